"""Where a run stands in its plan: a global sample position, kept in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cosmic_ray.errors import JobError

if TYPE_CHECKING:
    from cosmic_ray.ingest.plan import Plan


@dataclass(frozen=True)
class Cursor:
    """The next global sample position of the plan with this digest; independent of the number of workers."""

    plan_digest: str
    position: int

    @classmethod
    def at(cls, plan: Plan, step: int) -> Cursor:
        """The cursor of a run that has committed the global batches 0..step-1."""
        return cls(plan.digest, step * plan.spec.global_batch)

    def step(self, plan: Plan) -> int:
        """The next global batch.

        Raises:
            JobError: where `plan` is another plan than the cursor's: resuming there would repeat and skip samples.
        """
        if self.plan_digest != plan.digest:
            remedy = "resume with the store, split, lanes, window, global batch and seed that the run began with"
            raise JobError("plan", plan.digest[:16], f"the cursor belongs to plan {self.plan_digest[:16]}", remedy)
        return self.position // plan.spec.global_batch

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint's state."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """The inverse of `to_json`.

        Raises:
            JobError: for anything else.
        """
        try:
            digest, position = value["plan_digest"], value["position"]
        except (KeyError, TypeError):
            raise JobError("cursor", value, "not a cursor", "its keys are plan_digest and position") from None
        if not isinstance(digest, str) or not isinstance(position, int) or position < 0:
            raise JobError("cursor", value, "not a cursor", "plan_digest is text, position an integer of at least 0")
        return cls(digest, position)
