"""What every training job's file has: the keys of the one trainer, and its way into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Job, Uri
from cosmic_ray.training.settings import Checkpointing, DataOrder, Evaluation, Optim, Scaling, Schedule, Tracking

if TYPE_CHECKING:
    from cosmic_ray.training.loop import Callback, Loop
    from cosmic_ray.training.stage import Stage


class TrainingJob(Job):
    """A job of the one trainer. A kind adds its inputs and its network, and a `Stage` that makes them work.

    Below `out`: `checkpoints/`, `model/` (as `cosmic_ray.load_model` takes it), `metrics.jsonl`, pictures. Trains on
    the split's `train`, reports `val`, and never sees `test`.
    """

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"scaling", "tracking", "compile", "micro_batch", "checkpoint", "eval", "log_every"}
    )
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What each recipe says of the keys that this job's file does not set, where that differs from their defaults."""

    split: Uri
    """URI of the split of what is trained on."""

    recipe: Literal["better", "paper"] = "better"
    """`paper` does App. A to the letter, `optim`, `schedule`, `ema` included where this job does not set them. `better`
    is ours."""

    epochs: float = Field(10.0, gt=0)
    """Passes over the training samples."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps in all, in place of `epochs`."""

    global_batch: int = Field(256, ge=1)
    """Samples of one optimiser step, over all workers and micro-batches."""

    micro_batch: int | None = Field(None, ge=1)
    """The most samples of a worker in one forward pass; null takes its whole share. Changes memory, not the result."""

    optim: Optim = Optim()
    """AdamW."""

    schedule: Schedule = Schedule()
    """The learning rate over the run."""

    ema: float | None = Field(0.9999, gt=0, lt=1)
    """Decay of the average of the weights, which is then what is evaluated and exported; null has none. It starts low:
    min(ema, (1 + step) / (10 + step))."""

    seed: int = 0
    """Decides weights, order, and every draw of a sample."""

    data: DataOrder = DataOrder()
    """The order of the samples."""

    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """`bf16` is autocast, weights stay float32; `auto` takes it on a GPU that has it, else `fp32`."""

    compile: bool = False
    """Compile the network's blocks: slower to start, faster after on a GPU."""

    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics."""

    eval: Evaluation = Evaluation()
    """The held-out loss."""

    checkpoint: Checkpointing = Checkpointing()
    """What a kill may cost."""

    scaling: Scaling = Scaling()
    """Workers."""

    tracking: Tracking | None = Tracking()
    """MLflow; null does without."""

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, tree: Any) -> Any:
        """Lay the job's own keys over the recipe's."""
        if not isinstance(tree, Mapping):
            return tree
        recipe = tree.get("recipe", cls.model_fields["recipe"].default)
        return _over(cls.recipes.get(recipe, {}) if isinstance(recipe, str) else {}, tree)

    @abstractmethod
    def stage(self) -> Stage:
        """What this kind adds to the trainer: opens the job's inputs, and raises as `Stage`."""

    def check(self) -> None:
        """Check inputs, network and plan; resources are checked when the job runs and Ray is up."""
        self.stage().check()

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        return "tracking.uri" if self.tracking and self.tracking.uri is None else None

    def run(self) -> dict[str, Any]:
        """Train, resuming from the newest checkpoint, then export, register and publish.

        Returns:
            `model` (URI), `steps`, `train_loss`, `val_loss`, `images_per_s`, `data_wait_share`, `content_hash`,
            `run_id` and `registered` where there is a tracking server.
        """
        from cosmic_ray.training import run

        return run.run(self)

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        """The step loop of one rank, for the driver or for a plain process; see `assemble.make_loop`."""
        from cosmic_ray.training import assemble

        return assemble.make_loop(self.stage(), callbacks, **place)


def _over(base: Any, tree: Any) -> Any:
    """`tree` laid over `base`, mapping by mapping."""
    if isinstance(base, Mapping) and isinstance(tree, Mapping):
        return {**base, **{key: _over(base.get(key), value) for key, value in tree.items()}}
    return tree
