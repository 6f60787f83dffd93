"""`pretrain-mae`: the morphology FM from a crop store and its split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cosmic_ray.config import Config, Uri
from cosmic_ray.ingest.mixing import Mixing
from cosmic_ray.ingest.where import Where
from cosmic_ray.training.base import TrainingJob

if TYPE_CHECKING:
    from cosmic_ray.training.mae_stage import MAEStage

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


class PretrainMAE(TrainingJob):
    """Pretrain a masked autoencoder on nucleus crops and export its encoder.

    Below `out`: `checkpoints/`, `model/` (the encoder, as `cosmic_ray.load_model` takes it), `metrics.jsonl`,
    `reconstructions.png`. Trains on the split's `train`, reports `val`, and never sees `test`.
    """

    kind: ClassVar[str] = "pretrain-mae"
    incidental: ClassVar[frozenset[str]] = TrainingJob.incidental | {"on_bad_shard"}
    recipes = {"paper": PAPER}

    crops: Uri
    """URI of the crop store."""

    where: Where = {}
    """Only crops that meet every condition, to train on and to hold out: for a column the values wanted, as
    {cell_line: [U2OS, HeLa]}, or their range, as {area_px: {min: 500}}."""

    mixing: Mixing | None = None
    """Which share of an epoch each source, cell line ... has; null takes each training crop once an epoch."""

    model: Model = Model()
    """The network."""

    init_from: Uri | None = None
    """Continue the pretraining of these weights: a registered model (`models:/morphology-fm@candidate`), a model
    folder (its encoder; the decoder starts anew), a run's `out` or one of its checkpoints (all of it)."""

    on_bad_shard: Literal["stop", "exclude"] = "stop"
    """A shard that is missing or not what was written ends the run, or is left out from its newest checkpoint on: told,
    counted in the metrics, and kept in the manifest. One that cannot be reached ends the run in any case."""

    def stage(self) -> MAEStage:
        """See `TrainingJob`."""
        from cosmic_ray.training.mae_stage import MAEStage

        return MAEStage(self)
