"""`transcriptome-encoder`: a cell's counts to its latent. scVI's encoder or principal components, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cosmic_ray.config import Config
from cosmic_ray.registry.kinds.sampling import checked_count
from cosmic_ray.registry.model import Model, ModelConfig, Served, filled

if TYPE_CHECKING:
    import numpy as np
    import torch
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from cosmic_ray.models.transcriptome import TranscriptomeSpec

Width = Annotated[int, Field(ge=1, le=2**20)]
Genes = Annotated[tuple[str, ...], Field(min_length=1)]


class TranscriptomeFields(Config):
    """`models.transcriptome.TranscriptomeSpec`, field by field."""

    method: Literal["scvi", "pca"]
    genes: Width
    latent: Width
    hidden: Width
    layers: int = Field(ge=1, le=64)
    target_total: float = Field(gt=0, allow_inf_nan=False)


class TranscriptomeEncoderConfig(ModelConfig):
    """`config.json` of a transcriptome encoder."""

    kind: Literal["transcriptome-encoder"] = "transcriptome-encoder"
    """Maps counts to latents."""

    network: TranscriptomeFields
    """Method and widths."""

    genes: Genes
    """Ids of the genes that go in, in the network's order."""

    total_genes: Genes | None
    """Ids of the genes over which a cell's total is taken (pca), `genes` among them; null: `genes` alone."""

    batches: tuple[str, ...]
    """Of the cells that it was fitted on. No encoder sees a cell's batch: see `TranscriptomeEncoder.embed`."""

    decides: ClassVar[tuple[str, ...]] = ("network", "genes", "total_genes")
    needs: ClassVar[tuple[str, ...]] = ("numpy", "safetensors", "scipy", "torch")

    @field_validator("genes", "total_genes")
    @classmethod
    def _once(cls, genes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if genes is not None and len(set(genes)) < len(genes):
            raise ValueError(f"{len(genes) - len(set(genes))} genes stand twice")
        return genes

    @model_validator(mode="after")
    def _agrees(self) -> TranscriptomeEncoderConfig:
        """The parts of the config belong to each other."""
        if len(self.genes) != self.network.genes:
            raise ValueError(f"network takes {self.network.genes} genes; {len(self.genes)} are named")
        if self.total_genes is not None and not set(self.genes) <= set(self.total_genes):
            raise ValueError("total_genes does not hold all of genes")
        return self

    @property
    def needed_genes(self) -> tuple[str, ...]:
        """Ids of all genes that a cell must come with."""
        return self.total_genes or self.genes

    @property
    def width(self) -> int:
        """D."""
        return self.network.latent

    def spec(self) -> TranscriptomeSpec:
        """What builds the network."""
        from cosmic_ray.models.transcriptome import TranscriptomeSpec

        return TranscriptomeSpec(**self.network.model_dump())

    def build(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """`models.transcriptome.build_transcriptome`."""
        from cosmic_ray.models.transcriptome import build_transcriptome

        return filled(lambda: build_transcriptome(self.spec()), tensors)

    def try_out(self, network: torch.nn.Module) -> None:
        """Embed an empty cell and one that has a count of each gene."""
        import torch

        counts = torch.stack([torch.zeros(len(self.genes)), torch.ones(len(self.genes))])
        latents = network(counts, counts.sum(1, keepdim=True))
        if latents.shape != (2, self.width) or not latents.isfinite().all():
            raise ValueError(
                f"the network's latents are not finite, or {tuple(latents.shape)} and not (2, {self.width})"
            )

    def served(self) -> Served:
        """float32 (-1, genes) counts of `needed_genes`, in that order -> float32 (-1, D)."""
        import numpy as np

        counts = np.stack([np.zeros(len(self.needed_genes)), np.ones(len(self.needed_genes))]).astype(np.float32)
        return Served(("float32", (-1, len(self.needed_genes))), ("float32", (-1, self.width)), counts)


class TranscriptomeEncoder(Model[TranscriptomeEncoderConfig]):
    """From cells' counts to latents."""

    config_type = TranscriptomeEncoderConfig
    about = "Encoders of transcriptomes: raw counts of cells to latents."

    @property
    def genes(self) -> tuple[str, ...]:
        """Ids of all genes that a cell must come with."""
        return self.config.needed_genes

    def embed(
        self,
        cells: AnnData | csr_matrix | np.ndarray,
        genes: Sequence[str] | None = None,
        *,
        layer: str | None = None,
        batch_size: int = 1024,
    ) -> np.ndarray:
        """The latents of cells, those that it was not fitted on too.

        A cell's batch is not asked for: scVI's encoder does not see it (`encode_covariates=False`: it enters the
        decoder alone), and neither does pca. A cell of an unseen batch gets the latent that its counts give it; how
        far batches then differ in latents is not corrected.

        Args:
            cells: AnnData (a backed one is read), or counts (N, genes), sparse or dense. Raw counts for `scvi`; for
                `pca` values >= 0 that are not normalised.
            genes: ids of the columns, in any order, more than `genes` of this model or as many; `var_names` of an
                AnnData by default.
            layer: of the AnnData that holds the counts; its X by default.
            batch_size: cells on the device at once.

        Returns:
            float32 (N, D).

        Raises:
            ValueError: naming the genes that are missing or stand twice; for values that are negative or not finite, or
                normalised ones where raw counts are expected.
        """
        from cosmic_ray.models.transcriptome import columns_of, encode

        if hasattr(cells, "obs_names"):
            cells = cells.to_memory() if cells.isbacked else cells
            genes = list(cells.var_names) if genes is None else genes
            cells = cells.X if layer is None else cells.layers[layer]
        if genes is None or len(genes) != cells.shape[1]:
            named = "none" if genes is None else len(genes)
            raise ValueError(f"genes must name each of the {cells.shape[1]} columns of the counts; it names {named}")
        columns = columns_of(self.config.genes, genes)
        totals = columns_of(self.config.needed_genes, genes)
        size = checked_count("batch_size", batch_size)
        return encode(self._network, self.config.spec(), cells, columns, totals, batch_size=size)

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """`embed`, of counts of `config.needed_genes`."""
        return self.embed(given, self.config.needed_genes)
