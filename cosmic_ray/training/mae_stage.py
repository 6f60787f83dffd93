"""`pretrain-mae` in the trainer: crops by the plan, the masked autoencoder, and the encoder that is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.training import beginning, exclusions
from cosmic_ray.training.stage import Stage

if TYPE_CHECKING:
    from torch import nn

    from cosmic_ray.ingest.plan import Plan
    from cosmic_ray.models.mae import MAEConfig
    from cosmic_ray.output import Output
    from cosmic_ray.registry.package import ModelConfig
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.training.data import CropData, Stream
    from cosmic_ray.training.mae import MAEObjective
    from cosmic_ray.training.mae_job import PretrainMAE

_DECODER = ("mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "background_weight")
_ENCODER = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")


class MAEStage(Stage):
    """See `Stage`."""

    inputs = {"crops": "build-crops"}
    samples = "crops"
    picture = "reconstructions.png"

    def __init__(self, job: PretrainMAE):
        super().__init__(job)
        plan, held_out = self._planned()
        self.left_out = exclusions.read(job.out)
        self.plan = exclusions.applied(self.left_out, plan)
        self.held_out = exclusions.kept(self.left_out, self.store, held_out)

    def open_store(self) -> CropStore:
        """The crop store."""
        from cosmic_ray.stores.crops import CropStore

        return self.opened("crops", lambda: CropStore.open(self.job.crops), "build-crops")

    @property
    def row_bytes(self) -> int:
        """Of a crop."""
        return self.store.spec.nbytes

    @cached_property
    def model(self) -> MAEConfig:
        """The network's configuration for these crops.

        Raises:
            JobError: for crops that the recipe cannot take.
        """
        from cosmic_ray.models.mae import MAEConfig

        job, (channels, height, width) = self.job, self.store.spec.shape
        if height != width:
            raise JobError("crops", job.crops, f"its crops are {height}x{width}; the network takes square ones")
        if job.recipe == "paper" and channels != 1:
            problem = f"`paper` repeats one grey channel; these crops have {channels}"
            raise JobError("recipe", job.recipe, problem, "use recipe: better")
        channels = 3 if job.recipe == "paper" else channels
        config = MAEConfig.of(job.model.preset, job.recipe, channels=channels, **self._given(_DECODER))
        return replace(config, encoder=replace(config.encoder, **self._given(_ENCODER)))

    def network(self) -> nn.Module:
        """Encoder and decoder."""
        from cosmic_ray.models.mae import MaskedAutoencoder

        return MaskedAutoencoder(self.model)

    def objective(self, begins: bool) -> MAEObjective:
        """Masked reconstruction, from what `init_from` names.

        Raises:
            JobError, DataError: as `beginning.find`, and where it is another network's.
        """
        from cosmic_ray.training.mae import MAEObjective

        job, objective = self.job, MAEObjective(self.model, self.job.seed)
        if begins and job.init_from:
            begun = beginning.kept(job.out) or beginning.find(job.init_from, job.tracking.uri if job.tracking else None)
            begun.load(objective)
        return objective

    def data(self, stream: Stream, rank: int, world: int) -> CropData:
        """Crops alone."""
        from cosmic_ray.training.data import CropData

        held_out = self.held_out[: self.job.eval.crops]
        return CropData(self.store, self.plan, held_out, stream, rank, world, self.job.micro_batch)

    def check(self) -> None:
        """See that what `init_from` names can be there, too."""
        super().check()
        if self.job.init_from:
            beginning.check(self.job.init_from)

    def mend(self, output: Output) -> Callable[[Mapping[str, Any]], bool]:
        """Leave a damaged shard out, where the job says so."""
        return (
            partial(exclusions.add, output, self.store) if self.job.on_bad_shard == "exclude" else super().mend(output)
        )

    def lineage(self, output: Output) -> dict[str, Any]:
        """What `init_from` named, too."""
        job = self.job
        tracking = job.tracking.uri if job.tracking else None
        begun = beginning.keep(job.init_from, output, tracking) if job.init_from else None
        return {**super().lineage(output), "init_from": begun}

    def counts(self) -> dict[str, float]:
        """`excluded_crops`, where there are any."""
        return {"excluded_crops": self.plan.excluded_rows} if self.left_out else {}

    def export(self, output: Output, newest: str, lineage: dict[str, Any], metrics: dict[str, float]) -> ModelConfig:
        """The encoder, and what the network reconstructs."""
        from cosmic_ray.training.mae_export import export_model, exported_model, picture
        from cosmic_ray.training.run import MODEL

        model = exported_model(self.model, newest)
        config = export_model(self, model, output.at(MODEL), lineage, metrics)
        output.write(self.picture, picture(model, self))
        return config

    def _planned(self) -> tuple[Plan, np.ndarray]:
        """The plan of the training crops, without exclusions, and the rows that are held out."""
        from cosmic_ray.ingest.mixing import mixed
        from cosmic_ray.ingest.plan import Plan
        from cosmic_ray.ingest.selection import Selection
        from cosmic_ray.ingest.where import matching

        job, store = self.job, self.store
        selection, held_out = Selection.of(store, self.split, "train"), self.split.rows("val")
        if job.where:
            kept, all_held_out = matching(store, job.where), held_out
            selection, held_out = selection.narrowed(kept), held_out[kept[held_out]]
            if len(all_held_out) and not len(held_out):
                raise JobError("where", job.where, "no held-out crop meets the conditions", "widen them")
        if job.mixing:
            selection = mixed(store, selection, job.mixing, job.seed)
        options = job.data.model_dump()
        return Plan.fitted(store.content_hash, selection, job.global_batch, job.seed, **options), held_out

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {key: value for key in names if (value := getattr(self.job.model, key)) is not None}
