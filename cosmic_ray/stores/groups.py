"""Groups of rows that belong together, and the part of a split that each goes to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cosmic_ray.stores.columns import file_names
from cosmic_ray.stores.manifest import FIELD, FIELD_NAMES

_BETWEEN = "\x1f"


class Column:
    """One grouping key over all rows, filled row group by row group: a code for each distinct value.

    `key` is a column's name, or several joined by `+` (`plate+well`): then their values together.
    """

    def __init__(self, key: str):
        self.key = key
        self.names = key.split("+")
        self.values: dict[str, int] = {}
        self._parts: list[np.ndarray] = []
        self._by_field = FIELD in self.names
        self._called: dict[int, str] = {}

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the columns that `add` needs."""
        return (*self.names, *(FIELD_NAMES if self._by_field else ()))

    def add(self, rows: pa.Table) -> None:
        """Take the next row group."""
        encoded = _joined([rows[name] for name in self.names]).dictionary_encode()
        known = [self.values.setdefault(value, len(self.values)) for value in encoded.dictionary.to_pylist()]
        codes = np.array(known, np.int32)[encoded.indices.to_numpy()]
        self._parts.append(codes)
        if self._by_field:
            called = _joined([file_names(rows[name]) if name == FIELD else rows[name] for name in self.reads])
            for code, text in set(zip(codes.tolist(), called.to_pylist(), strict=True)):
                self._called[code] = min(text, self._called.get(code, text))

    @property
    def codes(self) -> np.ndarray:
        """int32 (N,): the number of each row's value."""
        return np.concatenate(self._parts)

    def hashes(self) -> np.ndarray:
        """uint64 (values,): a hash of each value and its key, the same in every store.

        A field's is that of what it is called, so that it is the same wherever the field lies.
        """
        called = (self._called.get(code, value) for value, code in self.values.items())
        texts = (f"{self.key}{_BETWEEN}{value}".encode() for value in called)
        return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(self.values))


def _joined(columns: Sequence[pa.ChunkedArray | pa.Array]) -> pa.Array:
    """The values of each row as one text."""
    texts = [column.cast(pa.string()) for column in columns]
    joined = pc.binary_join_element_wise(*texts, _BETWEEN) if len(texts) > 1 else texts[0]
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def group_rows(columns: Sequence[Column], pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join rows that agree in any of `columns` or are linked by `pairs` of rows int64 (P, 2), and so on transitively.

    Returns:
        int32 (N,), each row's group, numbered by first appearance; uint64 (groups,), each group's key: the smallest
        hash of the values in it, so that it is the same in a store with further groups.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    codes = [column.codes for column in columns]
    starts = np.concatenate([[0], np.cumsum([len(column.values) for column in columns])])
    edges = [codes[0][pairs].astype(np.int64)]
    for start, other in zip(starts[1:], codes[1:], strict=False):
        edges.append(np.unique(np.stack([codes[0], other + start], axis=1), axis=0))
    linked = np.concatenate(edges)
    graph = coo_array((np.ones(len(linked), np.int8), linked.T), shape=(starts[-1], starts[-1]))
    _, component = connected_components(graph, directed=False)
    found, first, groups = np.unique(component[codes[0]], return_index=True, return_inverse=True)
    by_appearance = np.empty(len(found), np.int32)
    by_appearance[np.argsort(first)] = np.arange(len(found))
    keys = np.full(len(found), np.iinfo(np.uint64).max, np.uint64)
    hashes = np.concatenate([column.hashes() for column in columns])
    np.minimum.at(keys, by_appearance[np.searchsorted(found, component)], hashes)
    return by_appearance[groups], keys


def assign(keys: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """The part of each group: uint8 (groups,), by a hash of (seed, key) alone, so that no other group matters."""
    ends = np.cumsum(fractions)[:-1]
    return np.searchsorted(ends, places(keys, seed) / 2.0**64, side="right").astype(np.uint8)


def places(keys: np.ndarray, seed: int) -> np.ndarray:
    """A hash of (seed, key) for each key, even over its range: uint64 (keys,)."""
    texts = (key.tobytes() for key in keys.astype("<u8"))
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(text, seed & 0xFFFFFFFFFFFFFFFF) for text in texts), np.uint64, len(keys)
    )
