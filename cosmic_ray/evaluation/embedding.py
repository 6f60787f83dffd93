"""The embedding space in which images are compared: one encoder, real cells and generated ones alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.errors import DataError
from cosmic_ray.evaluation.generated import Round
from cosmic_ray.progress import progress
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore

if TYPE_CHECKING:
    from cosmic_ray.stores.embeddings import Embeddings

_AT_ONCE = 2048


@dataclass(frozen=True)
class Space:
    """An encoder, and ready embeddings of the real cells where there are any."""

    encoder: Any
    store: CellStore
    features: Embeddings | None

    @classmethod
    def open(
        cls, fm: str, store: CellStore, features: str | None, device: str | None, tracking: str | None = None
    ) -> Space:
        """Load the encoder.

        Raises:
            DataError: where `fm` is no encoder of such crops, or `features` are of other cells or of another encoder.
        """
        from cosmic_ray.registry.load import load_model
        from cosmic_ray.stores.embeddings import Embeddings

        encoder = load_model(fm, device=device, tracking=tracking)
        if encoder.config.kind != "encoder":
            raise DataError(fm, f"a model of kind {encoder.config.kind!r}", "fm is an encoder of crops")
        if encoder.config.input.shape != store.spec.shape:
            problem = f"takes crops of {encoder.config.input.shape}; the cells' are {store.spec.shape}"
            raise DataError(fm, problem, "(C, H, W)")
        ready = None if features is None else Embeddings.open(features)
        if ready is not None:
            _require(ready, encoder.config.digest, store)
        return cls(encoder, store, ready)

    @property
    def uri(self) -> str:
        """Where the encoder came from."""
        return self.encoder.uri

    @property
    def digest(self) -> str:
        """The encoder's."""
        return self.encoder.config.digest

    @property
    def lineage(self) -> Mapping[str, Any]:
        """The encoder's."""
        return self.encoder.config.lineage

    def real(self, rows: np.ndarray) -> np.ndarray:
        """Real cells: rows ascending -> float32 (N, D)."""
        return self.features.vectors(rows) if self.features else self._embedded(self.store.crops, rows, "real cells")

    def generated(self, each: Round) -> np.ndarray:
        """One round: float32 (N, S, D)."""
        rows, back = np.unique(each.rows, return_inverse=True)
        found = self._embedded(each.store, rows, "generated images")
        return found[back.ravel()].reshape(*each.rows.shape, -1)

    def _embedded(self, crops: CropStore, rows: np.ndarray, what: str) -> np.ndarray:
        found = np.empty((len(rows), self.encoder.config.embedding_width), np.float32)
        with progress(f"embed {what}", len(rows), "crops") as shown:
            for start in range(0, len(rows), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                found[part] = self.encoder.embed(crops.crops(rows[part]))
                shown.update(min(part.stop, len(rows)))
        return found


def _require(ready: Embeddings, digest: str, store: CellStore) -> None:
    if ready.lineage.get("model", {}).get("content_hash") != digest:
        raise DataError(ready.uri, "embeddings by another encoder than fm", "embed the cells with fm")
    ready.require(store)
