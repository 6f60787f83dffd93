"""Vectors at a model's door: latents and features, of the model that its own were made by, and none other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cosmic_ray.config import Config
from cosmic_ray.errors import DataError
from cosmic_ray.registry.kinds.sampling import cell_names

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
    given: np.ndarray | Embeddings,
    cell_ids: Sequence[str] | None,
    spec: VectorSpec,
    what: str,
    taker: str,
    made_by: Model | None = None,
) -> tuple[np.ndarray, list[str]]:
    """float32 (N, *spec.shape) of what a user gave (float16 stays that), and an id for each cell.

    Args:
        given: published `Embeddings`, which say what made them; or a floating array, of which nothing but the shape can
            be checked unless `made_by` says it.
        cell_ids: by default the embeddings' own, or row numbers.
        spec: those that the model takes.
        what: they are: latents, features.
        taker: URI of the model.
        made_by: the loaded model that made an array.

    Raises:
        TypeError: where they are not floating, or an id is no text.
        ValueError: for another shape, values that are not finite, or a wrong number of ids.
        DataError: where they are of another model than the model was trained with.
    """
    import numpy as np

    from cosmic_ray.stores.embeddings import Embeddings

    if isinstance(given, Embeddings):
        _require(given.uri, (given.lineage.get("model") or {}).get("content_hash"), spec, what, taker)
        _require_shape((len(given), *given.shape), spec, what, taker)
        own, given = _read(given)
        cell_ids = own if cell_ids is None else cell_ids
    if made_by is not None:
        _require(made_by.uri, made_by.config.digest, spec, what, taker)
    vectors = np.asarray(given)
    if not np.issubdtype(vectors.dtype, np.floating):
        raise TypeError(f"{what} must be floating, not {vectors.dtype}")
    _require_shape(vectors.shape, spec, what, taker)
    if vectors.dtype.itemsize > 4:
        vectors = vectors.astype(np.float32)
    finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
    if not finite.all():
        raise ValueError(f"{what} of row {int(np.argmin(finite))} are not finite in float32")
    return vectors, cell_names(cell_ids, len(vectors))


def _read(embeddings: Embeddings) -> tuple[list[str], np.ndarray]:
    """Ids, and vectors or tokens, of all rows."""
    import numpy as np

    from cosmic_ray.stores.embeddings import matrix

    ids, found = [], [np.empty((0, *embeddings.shape), np.float32)]
    for part in embeddings.parts():
        ids += part.column(0).to_pylist()
        found.append(matrix(part, embeddings.shape))
    return ids, np.concatenate(found[1:] or found)


def _require_shape(shape: tuple[int, ...], spec: VectorSpec, what: str, taker: str) -> None:
    if shape[1:] != spec.shape:
        raise ValueError(f"{what} are {shape}; {taker} takes (N, {', '.join(map(str, spec.shape))})")


def _require(uri: str, digest: str | None, spec: VectorSpec, what: str, taker: str) -> None:
    if digest == spec.model:
        return
    theirs, ours = (f"the model {found[:12]}" if found else "no registered model" for found in (digest, spec.model))
    problem = f"these {what} are of {theirs}; {taker} was trained on those of {ours}"
    raise DataError(uri, problem, f"make the {what} with the model that its lineage names")
