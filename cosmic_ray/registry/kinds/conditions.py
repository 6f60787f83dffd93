"""Vectors at a model's door: latents and features, of the model that its own were made by, and none other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cosmic_ray.config import Config
from cosmic_ray.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from cosmic_ray.registry.model import Model
    from cosmic_ray.stores.embeddings import Embeddings


class VectorSpec(Config):
    """The vectors that a model takes, one a cell."""

    width: int = Field(ge=1, le=2**20)
    """D."""

    model: str | None
    """Digest of the model that made those that it was trained on; null where none of ours did (a ready embedding)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what one cell has."""
        return (self.width,)


class FeatureSpec(VectorSpec):
    """The features of the morphology FM that a model takes."""

    tokens: int | None = Field(ge=1, le=2**16)
    """T, where it takes the tokens that enter the FM's last block; null where it takes embeddings."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,), or (T, D) for tokens."""
        return (self.width,) if self.tokens is None else (self.tokens, self.width)


def checked_vectors(
    given: np.ndarray | Embeddings, spec: VectorSpec, what: str, taker: str, made_by: Model | None = None
) -> np.ndarray:
    """float32 (N, *spec.shape) of what a user gave; float16 stays that.

    Args:
        given: published `Embeddings`, which say what made them; or a floating array, of which nothing but the shape can
            be checked unless `made_by` says it.
        spec: those that the model takes.
        what: they are: latents, features.
        taker: URI of the model.
        made_by: the loaded model that made an array.

    Raises:
        TypeError: where they are not floating.
        ValueError: for another shape, or values that are not finite.
        DataError: where they are of another model than the model was trained with.
    """
    import numpy as np

    from cosmic_ray.stores.embeddings import Embeddings

    if isinstance(given, Embeddings):
        _require(given.uri, (given.lineage.get("model") or {}).get("content_hash"), spec, what, taker)
        given = given.vectors()
    if made_by is not None:
        _require(made_by.uri, made_by.config.digest, spec, what, taker)
    vectors = np.asarray(given)
    if not np.issubdtype(vectors.dtype, np.floating):
        raise TypeError(f"{what} must be floating, not {vectors.dtype}")
    if vectors.ndim < 2 or vectors.shape[1:] != spec.shape:
        raise ValueError(f"{what} are {vectors.shape}; {taker} takes (N, {', '.join(map(str, spec.shape))})")
    if vectors.dtype.itemsize > 4:
        vectors = vectors.astype(np.float32)
    finite = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1) if len(vectors) else np.ones(0, bool)
    if not finite.all():
        raise ValueError(f"{what} of row {int(np.argmin(finite))} are not finite in float32")
    return vectors


def _require(uri: str, digest: str | None, spec: VectorSpec, what: str, taker: str) -> None:
    if digest == spec.model:
        return
    theirs, ours = (f"the model {found[:12]}" if found else "no registered model" for found in (digest, spec.model))
    problem = f"these {what} are of {theirs}; {taker} was trained on those of {ours}"
    raise DataError(uri, problem, f"make the {what} with the model that its lineage names")
