"""Where a run stands in its plan: a global sample position, kept in every checkpoint with the exclusions so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cosmic_ray.errors import JobError

if TYPE_CHECKING:
    from cosmic_ray.ingest.plan import Plan

_FORM = "plan_digest is text, position an integer of at least 0, exclusions a list of [step, row groups]"


@dataclass(frozen=True)
class Cursor:
    """The next global sample position of the plan with this digest; independent of the number of workers."""

    plan_digest: str
    position: int
    exclusions: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """The plan's exclusions: what the job file does not say of it."""

    @classmethod
    def at(cls, plan: Plan, step: int) -> Cursor:
        """The cursor of a run that has committed the global batches 0..step-1."""
        return cls(plan.digest, step * plan.spec.global_batch, plan.spec.exclusions)

    def step(self, plan: Plan) -> int:
        """The next global batch. `plan` may exclude more than the cursor's did, from this batch on.

        Raises:
            JobError: where `plan` is another plan than the cursor's: resuming there would repeat and skip samples.
        """
        step, count = self.position // plan.spec.global_batch, len(self.exclusions)
        known, new = plan.spec.exclusions[:count], plan.spec.exclusions[count:]
        began_with = replace(plan.spec, exclusions=self.exclusions).digest
        if known != self.exclusions or self.plan_digest != began_with or any(first < step for first, _ in new):
            remedy = (
                "resume with the store, split, filter, mixing, lanes, window, global batch, seed and exclusions that "
                "the run began with"
            )
            raise JobError("plan", plan.digest[:16], f"the cursor belongs to plan {self.plan_digest[:16]}", remedy)
        return step

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint's state."""
        exclusions = [[step, list(groups)] for step, groups in self.exclusions]
        return {"plan_digest": self.plan_digest, "position": self.position, "exclusions": exclusions}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """The inverse of `to_json`.

        Raises:
            JobError: for anything else.
        """
        try:
            digest, position = value["plan_digest"], value["position"]
            exclusions = tuple((step, tuple(groups)) for step, groups in value.get("exclusions", []))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise JobError("cursor", value, "not a cursor", _FORM) from None
        numbers = [position, *(number for step, groups in exclusions for number in (step, *groups))]
        if not isinstance(digest, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise JobError("cursor", value, "not a cursor", _FORM)
        return cls(digest, position, exclusions)
