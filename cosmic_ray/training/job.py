"""`pretrain-mae`: the morphology FM from a crop store and its split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.ingest.mixing import Mixing
from cosmic_ray.ingest.where import Where
from cosmic_ray.training.settings import Checkpointing, DataOrder, Evaluation, Optim, Scaling, Schedule, Tracking

if TYPE_CHECKING:
    from cosmic_ray.training.loop import Callback, Loop

PAPER: dict[str, Any] = {
    "optim": {"betas": (0.9, 0.999), "weight_decay": 0.01, "decay": "all", "clip": None},
    "schedule": {"kind": "constant", "warmup": 0.0},
    "ema": None,
}
"""App. A, where it differs from `better`: AdamW as PyTorch has it, and no schedule, average or clipping is stated."""


class Model(Config):
    """The network: a preset, and what is to differ from it."""

    preset: Literal["tiny", "small", "base", "large"] = "large"
    """Encoder: `tiny` 0.2 M parameters on 80 px, for minutes on two cores; `small` ViT-S/16, `base` ViT-B/16, `large`
    ViT-L/16 (App. A), on 224 px."""

    img_size: int | None = Field(None, ge=1)
    """Side in px that crops are resized to."""

    patch_size: int | None = Field(None, ge=1)
    """Side of a patch in px."""

    embed_dim: int | None = Field(None, ge=4)
    """Width of the encoder, and of the embedding."""

    depth: int | None = Field(None, ge=1)
    """Blocks of the encoder."""

    num_heads: int | None = Field(None, ge=1)
    """Heads of the encoder."""

    mask_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of the patches that is masked; 0.75."""

    decoder_dim: int | None = Field(None, ge=4)
    """Width of the decoder; 512, of `tiny` 64."""

    decoder_depth: int | None = Field(None, ge=1)
    """Blocks of the decoder; 1."""

    decoder_heads: int | None = Field(None, ge=1)
    """Heads of the decoder; 16, of `tiny` 4."""

    background_weight: float | None = Field(None, ge=0)
    """`better`: weight of a background patch in the loss."""


class PretrainMAE(Job):
    """Pretrain a masked autoencoder on nucleus crops and export its encoder.

    Below `out`: `checkpoints/`, `model/` (the encoder, as `cosmic_ray.load_model` takes it), `metrics.jsonl`,
    `reconstructions.png`. Trains on the split's `train`, reports `val`, and never sees `test`.
    """

    kind: ClassVar[str] = "pretrain-mae"
    incidental: ClassVar[frozenset[str]] = frozenset(
        {"scaling", "tracking", "compile", "micro_batch", "checkpoint", "eval", "log_every", "on_bad_shard"}
    )

    crops: Uri
    """URI of the crop store."""

    split: Uri
    """URI of its split."""

    where: Where = {}
    """Only crops that meet every condition, to train on and to hold out: for a column the values wanted, as
    {cell_line: [U2OS, HeLa]}, or their range, as {area_px: {min: 500}}."""

    mixing: Mixing | None = None
    """Which share of an epoch each source, cell line ... has; null takes each training crop once an epoch."""

    recipe: Literal["better", "paper"] = "better"
    """`paper` does App. A to the letter: loss, masks and channels, and `optim`, `schedule`, `ema` where this job does
    not set them. `better` is ours."""

    model: Model = Model()
    """The network."""

    init_from: Uri | None = None
    """Continue the pretraining of these weights: a registered model (`models:/morphology-fm@candidate`), a model
    folder (its encoder; the decoder starts anew), a run's `out` or one of its checkpoints (all of it)."""

    epochs: float = Field(10.0, gt=0)
    """Passes over the training crops."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps in all, in place of `epochs`."""

    global_batch: int = Field(256, ge=1)
    """Crops of one optimiser step, over all workers and micro-batches."""

    micro_batch: int | None = Field(None, ge=1)
    """The most crops of a worker in one forward pass; null takes its whole share. Changes memory, not the result."""

    optim: Optim = Optim()
    """AdamW."""

    schedule: Schedule = Schedule()
    """The learning rate over the run."""

    ema: float | None = Field(0.9999, gt=0, lt=1)
    """Decay of the average of the weights, which is then what is evaluated and exported; null has none. It starts low:
    min(ema, (1 + step) / (10 + step))."""

    seed: int = 0
    """Decides weights, order, flips and masks."""

    data: DataOrder = DataOrder()
    """The order of the crops."""

    on_bad_shard: Literal["stop", "exclude"] = "stop"
    """A shard that is missing or not what was written ends the run, or is left out from its newest checkpoint on: told,
    counted in the metrics, and kept in the manifest. One that cannot be reached ends the run in any case."""

    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """`bf16` is autocast, weights stay float32; `auto` takes it on a GPU that has it, else `fp32`."""

    compile: bool = False
    """Compile the Transformer blocks: slower to start, faster after on a GPU."""

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
        if not isinstance(tree, Mapping) or tree.get("recipe") != "paper":
            return tree
        return _over(PAPER, tree)

    def check(self) -> None:
        """Check inputs, network and plan; resources are checked when the job runs and Ray is up."""
        from cosmic_ray.training import assemble

        assemble.check(self)

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        return "tracking.uri" if self.tracking and self.tracking.uri is None else None

    def run(self) -> dict[str, Any]:
        """Train, resuming from the newest checkpoint, then export, register and publish.

        Returns:
            `model` (URI), `steps`, `train_loss`, `val_loss`, `images_per_s`, `data_wait_share`, `content_hash`,
            `run_id` and `registered` where there is a tracking server.
        """
        from cosmic_ray.training import pretrain

        return pretrain.run(self)

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        """The step loop of one rank, for the driver or for a plain process; see `assemble.make_loop`."""
        from cosmic_ray.training import assemble

        return assemble.make_loop(self, callbacks, **place)


def _over(base: Any, tree: Any) -> Any:
    """`tree` laid over `base`, mapping by mapping."""
    if isinstance(base, Mapping) and isinstance(tree, Mapping):
        return {**base, **{key: _over(base.get(key), value) for key, value in tree.items()}}
    return tree
