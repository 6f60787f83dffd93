"""`train-img2seq` in the trainer: features and counts of cells by the plan, and the model that is left."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.training import checkpoint
from cosmic_ray.training.cell_stage import CellStage
from cosmic_ray.training.img2seq_job import REGRESSION

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    from cosmic_ray.models.img2seq import Img2SeqConfig
    from cosmic_ray.output import Output
    from cosmic_ray.registry.model import ModelConfig
    from cosmic_ray.training.cell_data import CellData
    from cosmic_ray.training.data import Stream
    from cosmic_ray.training.objective import Objective

STATISTICS = "statistics.safetensors"
FIRST = "model/regression.safetensors"


class Img2SeqStage(CellStage):
    """See `Stage`. Of `recipe: paper`, the second stage."""

    inputs = {"cells": "build-cells", "features": "embed"}
    table = "features"
    images = False

    def __init__(self, job: Any):
        super().__init__(job)
        self.found: dict[str, float] = {}
        tokens, wanted = len(self.embeddings.shape) > 1, job.recipe == "paper"
        if tokens != wanted:
            problem = f"recipe {job.recipe!r} takes {'the tokens' if wanted else 'embeddings'} of the FM"
            remedy = f"embed the cells with output: {'tokens' if wanted else 'embeddings'}"
            raise JobError("features", job.features, problem, remedy)
        if job.model.counts == "negative binomial" and self.store.manifest.values != "raw":
            problem = "these cells have soft values, not counts"
            raise JobError("model.counts", job.model.counts, problem, "use counts: normalised")

    @property
    def row_bytes(self) -> int:
        """Of a cell's features and its counts, sparse."""
        nonzeros = sum(part.nonzeros for part in self.store.row_groups)
        return int(8 * nonzeros / len(self.store)) + 4 * int(np.prod(self.embeddings.shape))

    @cached_property
    def features(self) -> np.ndarray:
        """Of all cells: float32 (N, D), in memory; tokens float16 (N, T, D), in a file that is mapped."""
        if len(self.embeddings.shape) == 1:
            return self.embeddings.vectors()
        from cosmic_ray.stores.embeddings import matrix

        shape = (len(self.embeddings), *self.embeddings.shape)
        with tempfile.TemporaryFile() as file:
            found, at = np.memmap(file, np.float16, "w+", shape=shape), 0
            for part in self.embeddings.parts():
                found[at : at + len(part)] = matrix(part, self.embeddings.shape)
                at += len(part)
        return found

    @cached_property
    def model(self) -> Img2SeqConfig:
        """The network for these genes and features."""
        from cosmic_ray.models.img2seq import Img2SeqConfig

        job, genes = self.job, self.store.manifest.genes
        config = Img2SeqConfig.of(job.model.preset, job.recipe, genes, self.embeddings.width, counts=job.model.counts)
        if job.model.hidden:
            config = replace(config, hidden=job.model.hidden)
        if job.recipe == "paper":
            fm = self._fm()
            return replace(config, heads=fm.blocks[-1].attn.num_heads, prefix_tokens=fm.num_prefix_tokens)
        most = min(genes, max(1, self.plan.total_rows // 4))
        return replace(config, programs=min(job.model.programs or config.programs, most))

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """What the training cells decide before training: as the run left it, else computed."""
        from safetensors.torch import load

        from cosmic_ray.training.img2seq_statistics import statistics

        try:
            return load(storage.read_bytes(storage.join(self.job.out, STATISTICS)))
        except NotFoundError:
            return statistics(self.model, self.store, self.split.rows("train"), self.features)

    def network(self) -> nn.Module:
        """The network."""
        return self.model.build()

    def objective(self, begins: bool) -> Objective:
        """That of the recipe; the second stage of `paper` with the first one's weights."""
        from cosmic_ray.training.img2seq import CountsObjective, Img2SeqObjective
        from cosmic_ray.training.img2seq_paper import ResidualObjective

        if self.job.recipe == "better":
            kind = Img2SeqObjective if self.model.counts == "normalised" else CountsObjective
            return kind(self.model, self.statistics, self.job.seed, self.job.model.feature_noise)
        made = ResidualObjective(self.model, self.statistics, self.job.seed)
        made.whole.base.load_state_dict(self._first())
        return made

    def data(self, stream: Stream, rank: int, world: int) -> CellData:
        """Features and counts."""
        return self._data(self.held_out[: self.job.eval.crops], rank, world, self.job.micro_batch)

    def check(self) -> None:
        """See that there are cells to calibrate by, too; and, for `paper`, the FM."""
        from cosmic_ray.training.img2seq_calibration import LEAST

        if len(self.held_out) < LEAST:
            remedy = "hold more cells out"
            raise JobError(
                "split", self.job.split, f"{len(self.held_out)} cells in val; intervals need {LEAST}", remedy
            )
        super().check()

    def lineage(self, output: Output) -> dict[str, Any]:
        """The first stage of `paper`, too. Leaves the statistics below `out`."""
        from safetensors.torch import save

        if not storage.exists(output.at(STATISTICS)):
            output.write(STATISTICS, save(self.statistics))
        found = super().lineage(output)
        if (first := self._first_run()) is not None:
            weights = checkpoint.digest(checkpoint.newest(checkpoint.within(first)))
            found[REGRESSION] = {"uri": first, "content_hash": weights}
        return found

    def export(self, output: Output, newest: str, lineage: dict[str, Any], metrics: dict[str, float]) -> ModelConfig:
        """The network, calibrated by held-out cells."""
        from cosmic_ray.training.img2seq_export import export_model

        config, self.found = export_model(self, output.uri, newest, lineage, metrics)
        return config

    def counts(self) -> dict[str, float]:
        """`coverage_90` and `val_r`, once exported."""
        return self.found

    def calibrating(self, at_once: int = 256) -> CellData:
        """Held-out cells, as many as are evaluated."""
        return self._data(self.held_out[: self.job.eval.crops], 0, 1, at_once)

    def _data(self, held_out: np.ndarray, rank: int, world: int, at_once: int | None) -> CellData:
        from cosmic_ray.training.cell_data import CellData

        tables = {"features": self.features}
        return CellData(self.store, self.plan, held_out, None, tables, True, rank, world, at_once)

    def _first_run(self) -> str | None:
        """Where the first stage of `paper` ran."""
        return storage.join(self.job.out, REGRESSION) if self.job.recipe == "paper" else None

    def _first(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load

        return load(storage.read_bytes(storage.join(self._first_run(), FIRST)))

    def _fm(self) -> VisionTransformer:
        """The morphology FM that made the tokens.

        Raises:
            JobError: where none of ours did, or it cannot be found any more.
        """
        from torch.nn import LayerNorm

        from cosmic_ray.registry.load import fetch_model

        about, job = self.embeddings.lineage.get("model") or {}, self.job
        if not about.get("content_hash"):
            problem = "no model of ours made these, whose last block could be trained"
            raise JobError("features", job.features, problem, "embed the cells with the morphology FM")
        try:
            stored = fetch_model(about["uri"], tracking=job.tracking.uri if job.tracking else None)
        except DataError as error:
            raise JobError("features", job.features, f"the FM that made them: {error}", error.remedy) from None
        if stored.config.digest != about["content_hash"]:
            problem = f"{about['uri']} is not the FM that made them any more"
            raise JobError("features", job.features, problem, "embed the cells again")
        network = stored.network()
        if not (hasattr(network, "blocks") and isinstance(getattr(network, "norm", None), LayerNorm)):
            problem = "the FM that made them is no ViT whose tokens are normed, then averaged"
            raise JobError("features", job.features, problem, "use an encoder that pretrain-mae left")
        return network


class RegressionStage(Img2SeqStage):
    """The first stage of `recipe: paper`."""

    def network(self) -> nn.Module:
        """The FM's last block and the linear layer."""
        return super().network().base

    def objective(self, begins: bool) -> Objective:
        """The regression, from the FM's own block."""
        from cosmic_ray.training.img2seq_paper import RegressionObjective

        made = RegressionObjective(self.model, self.statistics, self.job.seed)
        if begins:
            fm = self._fm()
            made.whole.base.begin(fm.blocks[-1], fm.norm)
        return made

    def export(self, output: Output, newest: str, lineage: dict[str, Any], metrics: dict[str, float]) -> Any:
        """The weights, for the second stage."""
        from safetensors.torch import save

        from cosmic_ray.training.beginning import exported_weights
        from cosmic_ray.training.img2seq import NAME

        weights = {key.removeprefix(f"{NAME}."): value for key, value in exported_weights(newest).items()}
        output.write(FIRST, save({key: value.contiguous() for key, value in weights.items()}))
        return SimpleNamespace(digest=checkpoint.digest(newest))

    def _first_run(self) -> None:
        """This is it."""
