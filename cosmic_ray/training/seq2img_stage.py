"""`train-seq2img` in the trainer: crops of cells by the plan, their latents beside them, and the model that is left."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cosmic_ray.errors import JobError
from cosmic_ray.training.cell_stage import CellStage

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from cosmic_ray.models.seq2img import Seq2ImgConfig
    from cosmic_ray.output import Output
    from cosmic_ray.registry.model import ModelConfig
    from cosmic_ray.training.cell_data import CellData
    from cosmic_ray.training.data import Stream
    from cosmic_ray.training.seq2img import Seq2ImgObjective


class Seq2ImgStage(CellStage):
    """See `Stage`."""

    inputs = {"cells": "build-cells", "latents": "fit-transcriptome"}
    table = "latents"
    images = True
    picture = "generated.png"

    @property
    def row_bytes(self) -> int:
        """Of a crop."""
        return self.store.spec.nbytes

    @cached_property
    def latents(self) -> np.ndarray:
        """Of all cells: float32 (N, D)."""
        return self.embeddings.vectors()

    @cached_property
    def model(self) -> Seq2ImgConfig:
        """The network and its diffusion, for these crops and latents.

        Raises:
            JobError: for crops or latents that the network cannot take.
        """
        from cosmic_ray.models.seq2img import Seq2ImgConfig

        job, (channels, height, width) = self.job, self.store.spec.shape
        if len(self.embeddings.shape) > 1:
            raise JobError("latents", job.latents, "these are tokens, several vectors a cell", "give one vector a cell")
        options: dict[str, Any] = {}
        if job.recipe == "better":
            options["channels"] = channels
        elif channels != 1:
            problem = f"`paper` repeats one grey channel; these crops have {channels}"
            raise JobError("recipe", job.recipe, problem, "use recipe: better")
        config = Seq2ImgConfig.of(job.model.preset, job.recipe, self.embeddings.width, **options)
        config = replace(config, condition_drop=job.model.condition_drop)
        size = config.network.image_size
        if (height, width) != (size, size):
            problem = f"draws {size}x{size} px; the cells' crops are {height}x{width}"
            raise JobError("model.preset", job.model.preset, problem, "choose another preset, or build such crops")
        return config

    def network(self) -> nn.Module:
        """The U-Net."""
        return self.model.build()

    def objective(self, begins: bool) -> Seq2ImgObjective:
        """Denoising, given latents standardised by those of the training cells."""
        import torch

        from cosmic_ray.training.seq2img import Seq2ImgObjective

        train = torch.from_numpy(self.latents[self.split.rows("train")]).double()
        spread = train.std(0)
        statistics = train.mean(0).float(), torch.where(spread > 0, spread, 1.0).float()
        return Seq2ImgObjective(self.model, self.job.seed, statistics)

    def data(self, stream: Stream, rank: int, world: int) -> CellData:
        """Crops and latents."""
        from cosmic_ray.training.cell_data import CellData

        held_out, tables = self.held_out[: self.job.eval.crops], {"condition": self.latents}
        return CellData(
            self.store, self.plan, held_out, stream, tables, rank=rank, world=world, at_once=self.job.micro_batch
        )

    def export(self, output: Output, newest: str, lineage: dict[str, Any], metrics: dict[str, float]) -> ModelConfig:
        """The U-Net, and what it draws for held-out cells."""
        from cosmic_ray.training.run import MODEL
        from cosmic_ray.training.seq2img_export import export_model, picture

        config = export_model(self, output.at(MODEL), newest, lineage, metrics)
        output.write(self.picture, picture(self, output.at(MODEL)))
        return config
