"""Open a crop store and read it, by row group, batch or row number; every byte is checked against the manifest."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cosmic_ray import storage
from cosmic_ray.errors import DamagedError
from cosmic_ray.output import MANIFEST, manifest_bytes
from cosmic_ray.stores import manifest as form
from cosmic_ray.stores.columns import images, table_schema
from cosmic_ray.stores.manifest import CropManifest, CropSpec, RowGroup
from cosmic_ray.stores.pages import decoded, find_pages
from cosmic_ray.stores.places import Places, read_stored
from cosmic_ray.stores.rangefile import RangeFile

_FOOTERS_KEPT = 256
_METADATA_THREADS = 16

Buffer = bytes | memoryview | pa.Buffer


class CropStore:
    """A published crop store. Rows are numbered 0..len-1 in stored order, row groups 0..G-1."""

    def __init__(self, uri: str, manifest: CropManifest):
        self.uri = uri
        self.manifest = manifest
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str) -> CropStore:
        """Open the store at `uri`: reads and checks its manifest, nothing else.

        Raises:
            DataError: where there is no store, its version is unknown, or the manifest does not match its digests.
        """
        uri = storage.absolute(uri)
        return cls(uri, form.parse_manifest(storage.join(uri, MANIFEST), manifest_bytes(uri)))

    def __reduce__(self) -> tuple[Any, ...]:
        return CropStore.open, (self.uri,)

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        return (
            f"CropStore({self.uri!r}: {len(self):,} crops of {self.spec.shape} in {len(self.row_groups):,} row groups)"
        )

    @property
    def spec(self) -> CropSpec:
        """Channels, height, width, dtype."""
        return self.manifest.spec

    @property
    def content_hash(self) -> str:
        """sha256 of the content alone."""
        return self.manifest.content_hash

    @property
    def simulated(self) -> bool:
        """Whether any crop comes from the simulator."""
        return self.manifest.simulated

    @property
    def columns(self) -> list[str]:
        """Names of all columns, `image` last."""
        return list(form.columns(self.manifest.extra_columns))

    @functools.cached_property
    def row_groups(self) -> list[RowGroup]:
        """Every row group in order."""
        found: list[RowGroup] = []
        for shard in self.manifest.shards:
            uri = storage.join(self.uri, form.SHARDS, shard.name)
            for within, g in enumerate(shard.row_groups):
                group = RowGroup(
                    len(found), uri, g.offset, g.nbytes, g.rows, g.digest, g.meta_nbytes, g.meta_digest, within
                )
                found.append(group)
        return found

    @functools.cached_property
    def rows_per_group(self) -> np.ndarray:
        """Rows of each row group: int64 (G,)."""
        return np.array([group.rows for group in self.row_groups], np.int64)

    @functools.cached_property
    def group_starts(self) -> np.ndarray:
        """The first row of each row group, and at the end the number of rows: int64 (G + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows_per_group)])

    @functools.cached_property
    def places(self) -> Places:
        """Where the row groups lie, for tasks that only read."""
        ends = np.cumsum([len(shard.row_groups) for shard in self.manifest.shards])
        footers = [(shard.nbytes - shard.footer_nbytes, shard.footer_nbytes) for shard in self.manifest.shards]
        groups = [(group.offset, group.nbytes) for group in self.row_groups]
        shard_of = np.searchsorted(ends, np.arange(len(groups)), side="right").astype(np.int32)
        footers, groups = (np.array(pairs, np.int64).reshape(-1, 2).T for pairs in (footers, groups))
        return Places(list(self._shards), *footers, shard_of, *groups)

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Row group `index` with `columns` (all by default), its stored bytes checked first.

        Without `image` only the metadata is fetched.

        Raises:
            DataError: naming the shard, where it is missing, truncated, or its bytes do not match the manifest.
            KeyError: for a column that the store does not have.
        """
        wanted = self._known(columns)
        with_images = "image" in wanted
        data = self.stored(index, with_images)
        group, footer = self._checked(index, data, with_images)
        return self._decoded(group, data, footer, wanted)

    def stored(self, index: int, with_images: bool = True, room: memoryview | None = None) -> Buffer:
        """The bytes of row group `index` as they lie in its shard, not checked; those of the metadata alone without
        images.

        `room`: memory that may be used for them.

        Raises:
            DataError: naming the shard, where it is missing or too short.
        """
        group = self.row_groups[index]
        return read_stored(group.shard, group.offset, group.nbytes if with_images else group.meta_nbytes, room)

    def stored_footer(self, shard: str) -> Buffer:
        """The end of the shard with URI `shard`, not checked: what tells how its row groups are stored.

        Raises:
            DataError: as `stored`.
        """
        about = self._shards[shard]
        return read_stored(shard, about.nbytes - about.footer_nbytes, about.footer_nbytes)

    def decoded_images(self, index: int, data: Buffer, footer: Buffer | None = None) -> Iterator[np.ndarray]:
        """The images of row group `index`, whose stored bytes are `data`, part by part: views, uint8 (n, image bytes).

        `footer`: what `stored_footer` gives of its shard; read where it is not given and not known.

        Raises:
            DataError: naming the shard, where the bytes do not match the manifest.
        """
        group, known = self._checked(index, data, True, footer)
        column = known.row_group(group.within).column(known.num_columns - 1)
        found, nbytes = find_pages(memoryview(data), column, group.offset, self.spec.nbytes), self.spec.nbytes
        if found is None or column.num_values != group.rows:
            yield images(self._decoded(group, data, known, ["image"]), self.spec).reshape(group.rows, -1)
            return
        try:
            yield from decoded(memoryview(data), found, column.compression, nbytes)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise _damaged(group, f"does not decode: {error}") from None

    def _decoded(self, group: RowGroup, data: Buffer, footer: pq.FileMetaData, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(RangeFile(data, group.offset).arrow(), metadata=footer)
            rows = file.read_row_group(group.within, columns=columns, use_threads=False).select(columns)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(group, f"does not decode: {error}") from None
        if len(rows) != group.rows:
            raise _damaged(group, f"has {len(rows)} rows; the manifest says {group.rows}")
        return rows

    def _checked(
        self, index: int, data: Buffer, with_images: bool, footer: Buffer | None = None
    ) -> tuple[RowGroup, pq.FileMetaData]:
        """A row group and its shard's footer, once its stored bytes match its digest."""
        group = self.row_groups[index]
        known = self._footer(group, footer)
        if xxhash.xxh3_128_hexdigest(data) != (group.digest if with_images else group.meta_digest):
            raise _damaged(group, "its bytes do not match the manifest's digest")
        return group, known

    def metadata(self, columns: Sequence[str], rows: np.ndarray | None = None) -> pa.Table:
        """`columns` (none of them `image`) of row numbers `rows`, in that order, or of all rows.

        Only the bytes of the metadata columns are fetched, and only of row groups that hold one of the rows.

        Raises:
            DataError: as `read_row_group`.
            IndexError: for a row that the store does not have.
        """
        wanted = self._known(columns)
        if "image" in wanted:
            raise KeyError("image: metadata() never reads images; use batches() or crops()")
        if rows is None:
            return self._metadata(wanted, np.arange(len(self.row_groups)))
        rows, group_of_row = self._located(rows)
        groups = np.unique(group_of_row) if len(rows) else np.zeros(1, np.int64)
        found = self._metadata(wanted, groups)
        skipped = self.group_starts[groups] - np.cumsum(np.append(0, self.rows_per_group[groups][:-1]))
        return found.take(rows - skipped[np.searchsorted(groups, group_of_row)])

    def _metadata(self, columns: Sequence[str], groups: np.ndarray) -> pa.Table:
        ends = np.cumsum([len(shard.row_groups) for shard in self.manifest.shards])
        by_shard = np.split(groups, np.searchsorted(groups, ends))
        with ThreadPoolExecutor(_METADATA_THREADS) as pool:
            parts = pool.map(lambda some: [self.read_row_group(int(group), columns) for group in some], by_shard)
            return pa.concat_tables(part for shard in parts for part in shard).combine_chunks()

    def batches(self, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in stored order, `size` at a time; the last batch may be shorter."""
        held: list[pa.Table] = []
        count = 0
        for index in range(len(self.row_groups)):
            held.append(self.read_row_group(index, columns))
            count += len(held[-1])
            if count >= size:
                rows = pa.concat_tables(held)
                for start in range(0, count - size + 1, size):
                    yield rows.slice(start, size)
                rest = count % size
                held, count = ([rows.slice(count - rest)] if rest else []), rest
        if count:
            yield pa.concat_tables(held)

    def crops(self, rows: np.ndarray) -> np.ndarray:
        """The images of row numbers `rows`, in that order: uint8 (N, C, H, W).

        Raises:
            IndexError: for a row that the store does not have.
        """
        rows, groups = self._located(rows)
        found = np.empty((len(rows), *self.spec.shape), np.uint8)
        for group in np.unique(groups):
            here = np.flatnonzero(groups == group)
            stored = images(self.read_row_group(int(group), ["image"]), self.spec)
            found[here] = stored[rows[here] - self.group_starts[group]]
        return found

    def _located(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`rows` as int64, and the row group of each."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a store with {len(self)}")
        return rows, np.searchsorted(self.group_starts, rows, side="right") - 1

    def _known(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return self.columns
        if unknown := [name for name in columns if name not in self.columns]:
            raise KeyError(f"{self.uri} has no column {', '.join(unknown)}; it has {', '.join(self.columns)}")
        return list(columns)

    def _footer(self, group: RowGroup, data: Buffer | None = None) -> pq.FileMetaData:
        with self._lock:
            if group.shard in self._footers:
                self._footers.move_to_end(group.shard)
                return self._footers[group.shard]
        footer = self._parsed(group, self.stored_footer(group.shard) if data is None else data)
        with self._lock:
            self._footers[group.shard] = footer
            while len(self._footers) > _FOOTERS_KEPT:
                self._footers.popitem(last=False)
        return footer

    def _parsed(self, group: RowGroup, data: Buffer) -> pq.FileMetaData:
        if xxhash.xxh3_128_hexdigest(data) != self._shards[group.shard].footer_digest:
            raise _damaged(group, "its footer does not match the manifest's digest")
        try:
            footer = pq.read_metadata(pa.BufferReader(b"PAR1" + bytes(data)))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(group, f"its footer does not decode: {error}") from None
        if not footer.schema.to_arrow_schema().equals(table_schema(self.manifest.extra_columns)):
            raise _damaged(group, "its schema is not the manifest's")
        return footer

    @functools.cached_property
    def _shards(self) -> dict[str, form.Shard]:
        return {storage.join(self.uri, form.SHARDS, shard.name): shard for shard in self.manifest.shards}


def _damaged(group: RowGroup, problem: str) -> DamagedError:
    return DamagedError(
        group.shard, f"row group {group.within}: {problem}", "the shard was damaged: restore it or rebuild the store"
    )
