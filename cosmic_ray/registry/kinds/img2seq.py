"""`img2seq`: the morphology FM's features of a nucleus to its cell's expression: means, intervals, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cosmic_ray.config import Config
from cosmic_ray.registry.kinds.conditions import FeatureSpec, checked_vectors
from cosmic_ray.registry.kinds.sampling import checked_count
from cosmic_ray.registry.model import Model, ModelConfig, Served, filled

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cosmic_ray.models.img2seq import Calibration, Img2SeqConfig, Prediction
    from cosmic_ray.registry.kinds.encoder import Encoder
    from cosmic_ray.stores.embeddings import Embeddings

Width = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=0, le=4096)]


class Img2SeqFields(Config):
    """`models.img2seq.Img2SeqConfig`, field by field."""

    recipe: Literal["paper", "better"]
    genes: Width
    feature_size: Width
    counts: Literal["normalised", "negative binomial"]
    hidden: Annotated[int, Field(ge=1, le=2**16)]
    depth: Annotated[int, Field(ge=0, le=64)]
    programs: Few
    heads: Few
    prefix_tokens: Few


class Img2SeqModelConfig(ModelConfig):
    """`config.json` of an img2seq model."""

    kind: Literal["img2seq"] = "img2seq"
    """Maps the morphology FM's features to expression."""

    network: Img2SeqFields
    """Recipe and widths."""

    genes: tuple[str, ...] = Field(min_length=1)
    """Ids of the genes that it tells, in the network's order."""

    features: FeatureSpec
    """The features that it takes; `model` is the digest of the morphology FM."""

    decides: ClassVar[tuple[str, ...]] = ("network", "genes", "features")
    needs: ClassVar[tuple[str, ...]] = ("diffusers", "numpy", "safetensors", "timm", "torch")

    @field_validator("genes")
    @classmethod
    def _once(cls, genes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(genes)) < len(genes):
            raise ValueError(f"{len(genes) - len(set(genes))} genes stand twice")
        return genes

    @model_validator(mode="after")
    def _agrees(self) -> Img2SeqModelConfig:
        """The parts of the config belong to each other."""
        if len(self.genes) != self.network.genes:
            raise ValueError(f"network tells {self.network.genes} genes; {len(self.genes)} are named")
        if self.network.feature_size != self.features.width:
            raise ValueError(f"network takes features of {self.network.feature_size}, not {self.features.width}")
        if (self.network.recipe == "paper") != (self.features.tokens is not None):
            raise ValueError("recipe 'paper', and it alone, takes tokens")
        return self

    @classmethod
    def facts(cls, config: Img2SeqConfig, **others: Any) -> dict[str, Any]:
        """The keys of `config` for `package.write_model`, beside `others`: genes, features."""
        return {"network": config.to_json(), **others}

    def settings(self) -> Img2SeqConfig:
        """What builds the network."""
        from cosmic_ray.models.img2seq import Img2SeqConfig

        return Img2SeqConfig(**self.network.model_dump())

    def build(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """One of `models.img2seq`'s three networks."""
        return filled(self.settings().build, tensors)

    def try_out(self, network: torch.nn.Module) -> None:
        """Predict one cell whose features are all zero."""
        import torch

        from cosmic_ray.ingest.cell_draws import CellDraws

        made = network.predict(torch.zeros(1, *self.features.shape), [CellDraws(0, torch.zeros(1, dtype=torch.int64))])
        wanted = (1, self.network.genes)
        if made.mean.shape != wanted or not (made.mean.isfinite().all() and made.samples.isfinite().all()):
            raise ValueError(f"the network's means are not finite, or {tuple(made.mean.shape)} and not {wanted}")
        if not made.calibration.quantiles.any():
            raise ValueError("the network is not calibrated: its intervals would be empty")

    def served(self) -> Served:
        """float32 (-1, D) features, or (-1, T, D) tokens -> float32 (-1, G) means; see `Img2Seq.sample` for more."""
        import numpy as np

        features = np.linspace(-1, 1, 2 * int(np.prod(self.features.shape)), dtype=np.float32)
        takes = ("float32", (-1, *self.features.shape))
        gives = ("float32", (-1, self.network.genes))
        return Served(takes, gives, features.reshape(2, *self.features.shape), {"seed": 0})


@dataclass(frozen=True)
class Expression:
    """What an img2seq model says of N cells and G genes."""

    genes: tuple[str, ...]
    """Ids, in the order of the columns."""
    cell_ids: tuple[str, ...]
    """In the order of the rows; row numbers where there were none."""
    values: Literal["log1p of normalised counts", "counts"]
    """What the numbers are."""
    mean: np.ndarray
    """float32 (N, G)."""
    spread: np.ndarray
    """float32 (N, G): the standard deviation that the model expects."""
    samples: np.ndarray
    """float32 (N, S, G)."""
    _calibration: Calibration = field(repr=False)

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limit, float32 (N, G) each, that hold the truth with probability `level`, gene by gene, for
        cells like those that it was calibrated on. Raises ValueError for a level outside (0, 0.99]."""
        import torch

        mean, spread = torch.from_numpy(self.mean), torch.from_numpy(self.spread)
        lower, upper = self._calibration.interval(mean, spread, level)
        return lower.numpy(), upper.numpy()


class Img2Seq(Model[Img2SeqModelConfig]):
    """From the morphology FM's features of nuclei to their cells' expression."""

    config_type = Img2SeqModelConfig
    about = "Models of gene expression given nuclei: features of the morphology FM to means, intervals and samples."

    @property
    def genes(self) -> tuple[str, ...]:
        """Ids of the genes that it tells."""
        return self.config.genes

    def sample(
        self,
        features: np.ndarray | Embeddings,
        cell_ids: Sequence[str] | None = None,
        *,
        samples: int = 20,
        seed: int = 0,
        encoder: Encoder | None = None,
        library: np.ndarray | None = None,
        batch_size: int = 256,
    ) -> Expression:
        """The expression of each cell.

        Draws are keyed by (seed, cell id, sample): the same cell, features and seed give the same in any batch and
        order, up to rounding, and more samples begin with the fewer. Memory: 4 * N * samples * G bytes.

        Args:
            features: published `Embeddings` of the morphology FM that `config.features` names; or floating (N, D), or
                (N, T, D) where it takes tokens. **Of a bare array nothing but the shape can be checked**: features of
                another FM of that width give numbers that mean nothing.
            cell_ids: text, one a cell; by default the embeddings' own, or row numbers.
            samples: S, of each cell.
            encoder: the loaded FM that made an array: it is checked.
            library: floating (N,): total counts of each cell, for a model that counts; the training cells' median by
                default.
            batch_size: cells on the device at once.

        Raises:
            TypeError: for features that are not floating, or ids that are no text.
            ValueError: for features of another shape or not finite, a wrong number of ids, settings out of range, or
                values that are not finite.
            DataError: for features of another FM.
        """
        import numpy as np
        import torch

        from cosmic_ray.ingest.cell_noise import cell_keys

        vectors, names = checked_vectors(features, cell_ids, self.config.features, "features", self.uri, encoder)
        keys, count, totals = cell_keys(names), checked_count("samples", samples), self._library(library, len(vectors))
        shape = (len(vectors), self.config.network.genes)
        mean, spread = np.empty(shape, np.float32), np.empty(shape, np.float32)
        drawn = np.empty((shape[0], count, shape[1]), np.float32)
        for start in range(0, len(vectors), checked_count("batch_size", batch_size)):
            part = slice(start, start + batch_size)
            given = torch.from_numpy(np.array(vectors[part])).to(self.device).float()
            found = self._predict(given, keys[part], count, seed, None if totals is None else totals[part])
            for target, values in ((mean, found.mean), (spread, found.spread), (drawn, found.samples)):
                target[part] = values.float().cpu().numpy()
        if not (np.isfinite(mean).all() and np.isfinite(drawn).all()):
            raise self._broken("predicted expression")
        values = "counts" if self.config.network.counts == "negative binomial" else "log1p of normalised counts"
        return Expression(self.genes, tuple(names), values, mean, spread, drawn, self._calibration)

    def predict(self, given: np.ndarray, **params: Any) -> np.ndarray:
        """The means of `sample`."""
        return self.sample(given, samples=1, **params).mean

    @property
    def _calibration(self) -> Calibration:
        """On the CPU, where intervals are made."""
        import copy

        return copy.deepcopy(self._network.calibration).cpu()

    def _predict(
        self, features: torch.Tensor, keys: torch.Tensor, samples: int, seed: int, library: torch.Tensor | None
    ) -> Prediction:
        import torch

        from cosmic_ray.ingest.cell_draws import CellDraws

        # Float64, in which normal numbers are drawn, does not exist on mps.
        keys = keys if self.device == "mps" else keys.to(self.device)
        draws = [CellDraws(seed, keys, number) for number in range(samples)]
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._network.predict(features, draws, None if library is None else library.to(self.device))

    def _library(self, library: np.ndarray | None, count: int) -> torch.Tensor | None:
        import numpy as np
        import torch

        if library is None:
            return None
        if self.config.network.counts != "negative binomial":
            raise ValueError("library is for models that count; this one tells normalised expression")
        found = np.asarray(library, np.float32)
        if found.shape != (count,) or not (np.isfinite(found).all() and (found >= 0).all()):
            raise ValueError(f"library must be ({count},), finite and not negative, not {found.shape}")
        return torch.from_numpy(found)
