"""Read what was generated: images by cell and sample, expression by cell and gene; nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore

if TYPE_CHECKING:
    import h5py

_NOTE = "cosmic_ray"


@dataclass(frozen=True)
class Round:
    """One generation of images: S samples of each of N cells."""

    store: CropStore
    rows: np.ndarray
    """int64 (N, S): the row in `store` of each cell's samples, in the order of `sample`."""


def open_rounds(uris: Sequence[str], cells: CellStore, held: np.ndarray) -> tuple[np.ndarray, list[Round]]:
    """Generated crop stores of the same cells.

    Args:
        uris: crop stores with the columns `cell_id` and `sample`.
        cells: the real cells.
        held: rows of `cells` that are judged, int64 ascending; generated images of other cells are not looked at.

    Returns:
        Rows of `cells` that have images, int64 (N,) ascending, and the rounds, in that order of cells.

    Raises:
        DataError: where a store is no generated one, its images are of another shape, its cells are unknown, none of
            them is among `held`, one has more samples than another, or the rounds are not of the same cells.
    """
    place = {cell_id: row for row, cell_id in enumerate(cells.obs(["cell_id"])["cell_id"].to_pylist())}
    found, first = [], None
    for uri in uris:
        store = CropStore.open(uri)
        rows, grouped = _grouped(store, cells, place, held)
        if first is not None and not np.array_equal(rows, first):
            raise DataError(
                store.uri, f"its cells are not those of {uris[0]}", "generate every round for the same ones"
            )
        first = rows
        found.append(Round(store, grouped))
    if len({each.rows.shape for each in found}) > 1:
        raise DataError(uris[-1], "the rounds have different numbers of samples a cell", "generate them alike")
    return first, found


def _grouped(
    store: CropStore, cells: CellStore, place: Mapping[str, int], held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the cell store, ascending, and the rows in `store` of their samples."""
    if not {"cell_id", "sample"} <= set(store.columns):
        raise DataError(store.uri, "no generated images: it has no columns cell_id and sample", "run a generate job")
    if store.spec.shape != cells.spec.shape:
        raise DataError(store.uri, f"its images are {store.spec.shape}, those of the cells {cells.spec.shape}")
    about = store.metadata(["cell_id", "sample"])
    ids, samples = about["cell_id"].to_pylist(), about["sample"].to_numpy()
    of = np.array([place.get(cell_id, -1) for cell_id in ids], np.int64)
    if (of < 0).any():
        problem = f"{(of < 0).sum():,} of its {len(of):,} images are of no cell of {cells.uri}: {ids[of.argmin()]!r}"
        raise DataError(store.uri, problem, "name the cell store that they were generated for")
    order = np.lexsort((samples, of))
    order = order[np.isin(of[order], held)]
    if not len(order):
        raise DataError(store.uri, "none of its cells is in the part that is judged", "generate those of that part")
    rows, counts = np.unique(of[order], return_counts=True)
    if (counts != counts[0]).any():
        raise DataError(store.uri, f"{counts.min()} to {counts.max()} samples a cell", "generate as many of each cell")
    grouped = order.reshape(len(rows), counts[0])
    if (np.diff(samples[grouped], axis=1) == 0).any():
        raise DataError(store.uri, "a sample of a cell stands in it twice")
    return rows, grouped


class GeneratedExpression:
    """An open `expression.h5ad`: X the mean (log1p of normalised counts), layers `lower`, `upper`, `sample_<k>`."""

    def __init__(self, uri: str, file: h5py.File, sha256: str):
        from anndata.io import read_elem

        self.uri, self._file, self.sha256 = uri, file, sha256
        try:
            obs, var = read_elem(file["obs"]), read_elem(file["var"])
            note = read_elem(file["uns"][_NOTE]) if _NOTE in file["uns"] else {}
            self.layers = list(file["layers"])
            self._x_shape = _shape(file["X"])
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise DataError(uri, f"not an AnnData file: {error}", "run a generate job") from None
        self.cell_ids = [str(name) for name in obs.get("cell_id", obs.index)]
        self.genes = [str(name) for name in var.index]
        self.note: dict[str, Any] = {key: _plain(value) for key, value in note.items()}
        self.samples = sorted((name for name in self.layers if name.startswith("sample_")), key=_number)
        self._sparse: dict[str, Any] = {}
        self._order, self._starts = np.arange(len(self.cell_ids)), np.arange(len(self.cell_ids))

    @classmethod
    @contextmanager
    def open(cls, uri: str) -> Iterator[GeneratedExpression]:
        """Open the file, or the `expression.h5ad` of the folder, at `uri` for the block.

        Raises:
            DataError: where it is no AnnData, or damaged.
        """
        import hashlib

        import h5py

        uri = storage.absolute(uri if uri.endswith(".h5ad") else storage.join(uri, "expression.h5ad"))
        with storage.local_file(uri) as path:
            try:
                with open(path, "rb") as raw:
                    digest = hashlib.file_digest(raw, "sha256").hexdigest()
                file = h5py.File(path, "r")
            except OSError as error:
                raise DataError(uri, f"cannot be read as HDF5: {error}", "generate it again") from None
            with file:
                yield cls(uri, file, digest)

    @property
    def lineage(self) -> Mapping[str, Any]:
        """What it was made from."""
        found = self.note.get("lineage", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def simulated(self) -> bool:
        """Whether anything behind it is simulated."""
        return bool(self.note.get("simulated", False))

    @property
    def single(self) -> bool:
        """Whether each cell that is looked at has one row: then layers are of that cell."""
        return len(self._order) == len(self._starts)

    def select(self, cells: CellStore, held: np.ndarray) -> np.ndarray:
        """Look at the cells of `held` (rows of `cells`) alone from here on.

        Returns:
            Rows of `cells` that are here, int64 ascending: the order of what `block` gives.

        Raises:
            DataError: for cells or genes that `cells` does not have, or none of the cells that are judged.
        """
        place = {cell_id: row for row, cell_id in enumerate(cells.obs(["cell_id"])["cell_id"].to_pylist())}
        of = np.array([place.get(cell_id, -1) for cell_id in self.cell_ids], np.int64)
        if (of < 0).any():
            problem = f"{(of < 0).sum():,} of its cells are not in {cells.uri}: {self.cell_ids[of.argmin()]!r}"
            raise DataError(self.uri, problem, "name the cell store that they were generated for")
        order = np.argsort(of, kind="stable")
        self._order = order[np.isin(of[order], held)]
        if not len(self._order):
            raise DataError(self.uri, "none of its cells is in the part that is judged", "generate those of that part")
        rows, self._starts = np.unique(of[self._order], return_index=True)
        return rows

    def block(self, genes: slice, layer: str | None = None) -> np.ndarray:
        """X, or a layer, of the selected cells and of a few genes: float32 (N, g); several rows of a cell are averaged.
        Of a model that tells counts (`values: counts` in its note), log1p of them.

        Raises:
            DataError: for values that are not finite, naming the first gene.
        """
        values = self._columns("X" if layer is None else f"layers/{layer}", genes)[self._order]
        values = np.log1p(np.maximum(values, 0)) if self.note.get("values") == "counts" else values
        if not np.isfinite(values).all():
            gene = self.genes[genes][int(np.argmin(np.isfinite(values).all(0)))]
            raise DataError(self.uri, f"{layer or 'X'}: values of gene {gene} are NaN or infinite", "generate it again")
        if self.single:
            return values
        counts = np.diff(np.append(self._starts, len(self._order)))
        return np.add.reduceat(values, self._starts, axis=0) / counts[:, None].astype(np.float32)

    def _columns(self, where: str, genes: slice) -> np.ndarray:
        from anndata.io import sparse_dataset

        stored = self._file[where]
        if hasattr(stored, "keys"):
            if where not in self._sparse:
                self._sparse[where] = sparse_dataset(stored)[:].tocsc()
            return self._sparse[where][:, genes].toarray().astype(np.float32)
        return np.asarray(stored[:, genes], np.float32)


def _shape(stored: Any) -> tuple[int, ...]:
    return tuple(stored.attrs["shape"]) if hasattr(stored, "keys") else stored.shape


def _number(layer: str) -> tuple[int, str]:
    tail = layer.rpartition("_")[2]
    return (int(tail) if tail.isdecimal() else -1, layer)


def _plain(value: Any) -> Any:
    """What `uns` holds as plain data; JSON text is read."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.item() if isinstance(value, np.generic) else value
