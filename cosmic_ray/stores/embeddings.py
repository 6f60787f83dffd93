"""Embeddings format, version 1: one vector, or the tokens of one, for every row of a crop store or a cell store.

    <out>/part-00000.parquet    `crop_id` (`cell_id` of a cell store), `embedding` or `tokens`, `split` where given
    <out>/manifest.json         rows, width, what they were made of and by; written last

Parts are consecutive rows in store order. An embedding is D float32. Tokens are float16 (T, D), row by row: 2 * T * D
bytes a crop (403 kB for the 197 tokens of a ViT-L/16).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import DamagedError, DataError
from cosmic_ray.output import MANIFEST, Output, canonical, read_manifest
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import PARTS, content_hashes, named

FORMAT, VERSION = "cosmic-ray/embed", 1
EMBEDDING, TOKENS = "embedding", "tokens"
_PART_BYTES = 2**28


@dataclass(frozen=True)
class Embeddings:
    """Published embeddings of a store, in its row order; each part's bytes are checked as it is read."""

    uri: str
    manifest: dict[str, Any]
    """Rows, width, content hash, `simulated`, and the lineage."""

    @classmethod
    def open(cls, uri: str) -> Embeddings:
        """Open them: reads the manifest, nothing else.

        Raises:
            DataError: where none are published at `uri`.
        """
        uri = storage.absolute(uri)
        manifest = read_manifest(uri)
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise DataError(uri, f"not embeddings of version {VERSION}, but {manifest.get('format')!r}")
        return cls(uri, manifest)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def width(self) -> int:
        """D."""
        return self.manifest["width"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row: (D,), or (T, D) for tokens."""
        return (self.manifest["tokens"], self.width) if self.manifest.get("tokens") else (self.width,)

    @property
    def content_hash(self) -> str:
        """sha256 of ids and numbers."""
        return self.manifest["content_hash"]

    @property
    def simulated(self) -> bool:
        """Whether the store, or what the model was fitted on, is simulated."""
        return self.manifest["simulated"]

    @property
    def lineage(self) -> dict[str, Any]:
        """`store` {uri, content_hash}, `model` {uri, content_hash (the model's digest), lineage}, or null where none of
        ours made them, `split` where given."""
        return self.manifest["lineage"]

    def require(self, store: CropStore | CellStore) -> None:
        """Make sure that row i is row i of `store`; those of a cell store are those of its crops, too.

        Raises:
            DataError: where they were made of another store.
        """
        theirs = self.lineage["store"]
        if not set(content_hashes(theirs)) & set(content_hashes(named(store))):
            problem = f"these were made of another store ({theirs['uri']}), not of {store.uri}"
            raise DataError(storage.join(self.uri, MANIFEST), problem, "make them of this one")

    def parts(self) -> Iterator[pa.Table]:
        """Tables of `crop_id` or `cell_id`, `embedding` (D float32) or `tokens` (T * D float16), and `split` where it
        was given.

        Raises:
            DataError: naming the part that is missing or damaged.
        """
        for facts in self.manifest["parts"]:
            yield read_part(self.uri, facts)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Row numbers of `count` crops drawn with `seed` (of all, where there are no more): int64, ascending.

        They lie in as few parts as will do, so that little is read. That is fair, since a store's rows are in the
        order of hash(crop_id): which part a crop is in says nothing of it.
        """
        sizes = np.array([facts["rows"] for facts in self.manifest["parts"]], np.int64)
        ends = np.cumsum(sizes)
        random = np.random.default_rng(seed)
        order = random.permutation(len(sizes))
        enough = 1 + int(np.searchsorted(np.cumsum(sizes[order]), min(count, len(self))))
        rows = np.concatenate([np.arange(ends[part] - sizes[part], ends[part]) for part in np.sort(order[:enough])])
        return np.sort(random.choice(rows, min(count, len(rows)), replace=False))

    def vectors(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The embeddings of row numbers `rows`, in that order, or all: float32 (N, D); tokens are float16 (N, T, D).

        One part is read at a time, and only parts that hold one of the rows.

        Raises:
            DataError: naming the part that is missing or damaged.
            IndexError: for a row that there is not.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        found = np.empty((len(rows), *self.shape), np.float16 if len(self.shape) > 1 else np.float32)
        first = done = 0
        for facts in self.manifest["parts"]:
            last = first + facts["rows"]
            if here := int(np.searchsorted(ascending, last)) - done:
                part = matrix(read_part(self.uri, facts), self.shape)
                found[order[done : done + here]] = part[ascending[done : done + here] - first]
            first, done = last, done + here
        return found


def write_embeddings(
    target: Output,
    ids: pa.Array,
    values: np.ndarray,
    *,
    store: CropStore | CellStore,
    lineage: Mapping[str, Any],
    simulated: bool,
    job: Mapping[str, Any],
) -> dict[str, Any]:
    """Write and publish the embeddings of a whole store that are in memory; what lies at `target` is replaced.

    Args:
        target: the folder, under the claim of the job.
        ids: string (N,), the store's ids in its order.
        values: float32 (N, D), or float16 (N, T, D).
        store: that they were made of.
        lineage: `model`, `split`...; `store` is added.
        simulated: whether the store, or what the model was fitted on, is simulated.
        job: the resolved job.

    Returns:
        The manifest.

    Raises:
        ValueError: where there is not one for each row, or a value is not finite.
    """
    if len(values) != len(store) or len(ids) != len(store):
        raise ValueError(f"{len(values)} embeddings and {len(ids)} ids of a store with {len(store)} rows")
    storage.delete(target.uri)
    size = rows_a_part(values.itemsize * int(np.prod(values.shape[1:])))
    parts = []
    for part, first in enumerate(range(0, len(values), size)):
        target.require()
        chosen = slice(first, first + size)
        parts.append(write_part(target.uri, part, id_column(store), ids[chosen], values[chosen]))
    manifest = {
        "job": dict(job),
        "lineage": {"store": named(store), **lineage},
        "simulated": simulated,
        **about_parts(parts, values.shape[1:]),
    }
    target.publish(manifest)
    return manifest


def rows_a_part(nbytes: int) -> int:
    """Rows of `nbytes` each that make a part: at most 16,384, or 256 MiB."""
    return max(1, min(16384, _PART_BYTES // nbytes))


def id_column(store: CropStore | CellStore) -> str:
    """What the ids of a store's rows are called."""
    return "cell_id" if isinstance(store, CellStore) else "crop_id"


def about_parts(parts: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> dict[str, Any]:
    """What a manifest says of all parts: format, version, rows, width, tokens, content hash, and themselves."""
    kept = [{key: part[key] for key in ("part", "rows", "sha256", "content")} for part in parts]
    return {
        "format": FORMAT,
        "version": VERSION,
        "rows": sum(part["rows"] for part in kept),
        "width": shape[-1],
        "tokens": shape[0] if len(shape) > 1 else None,
        "content_hash": hashlib.sha256(canonical([[part["rows"], part["content"]] for part in kept])).hexdigest(),
        "parts": kept,
    }


def write_part(
    out: str, part: int, ids_name: str, ids: pa.Array, values: np.ndarray, codes: np.ndarray | None = None
) -> dict[str, Any]:
    """Write the rows of one part: `part`, `rows`, `sha256` of the file, `content` (sha256 of ids and numbers).

    Raises:
        ValueError: where a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(1)))} is not finite")
    width = int(np.prod(values.shape[1:]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), width)
    table = pa.table({ids_name: ids, EMBEDDING if values.ndim == 2 else TOKENS: column})
    if codes is not None:
        table = table.append_column("split", pa.DictionaryArray.from_arrays(pa.array(codes), list(PARTS)))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=["split"])
    data = sink.getbuffer()
    storage.write_bytes(part_uri(out, part), data)
    content = hashlib.sha256(json.dumps(ids.to_pylist()).encode())
    content.update(np.ascontiguousarray(values, "<f4" if values.dtype == np.float32 else "<f2"))
    return {
        "part": part,
        "rows": len(table),
        "sha256": hashlib.sha256(data).hexdigest(),
        "content": content.hexdigest(),
    }


def part_uri(out: str, part: int) -> str:
    """URI of a part's Parquet file."""
    return storage.join(out, f"part-{part:05}.parquet")


def read_part(out: str, facts: Mapping[str, Any]) -> pa.Table:
    """One part, its bytes checked.

    Raises:
        DataError: where it is missing or not what the manifest says.
    """
    uri = part_uri(out, facts["part"])
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DamagedError(uri, "its bytes do not match its sha256", "delete it with its .json and run the job again")
    return pq.read_table(pa.BufferReader(data))


def matrix(part: pa.Table, shape: Sequence[int]) -> np.ndarray:
    """The numbers of a part: float32 (N, D) for a `shape` of (D,), float16 (N, T, D) for one of (T, D)."""
    column = part[EMBEDDING if len(shape) == 1 else TOKENS]
    return np.concatenate([chunk.flatten().to_numpy().reshape(-1, *shape) for chunk in column.chunks])
