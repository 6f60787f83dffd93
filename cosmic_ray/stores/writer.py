"""Crops to shards to a published store. A shard is a pure function of its rows, so builds can resume and repeat."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cosmic_ray import output, storage
from cosmic_ray.errors import DataError, NotFoundError
from cosmic_ray.output import Output
from cosmic_ray.stores import manifest as form
from cosmic_ray.stores.columns import file_names, images, table_schema, type_name
from cosmic_ray.stores.manifest import CropManifest, CropSpec, Intensity, Shard, ShardEntry, StoredGroup
from cosmic_ray.stores.statistics import COUNTED, Statistics

ROWS_PER_GROUP = 512
GROUPS_PER_SHARD = 8
COMPRESSION = "lz4"
_PARQUET_COMPRESSION = {"none": ("NONE", None), "lz4": ("LZ4", None), "zstd": ("ZSTD", 1)}
_NAN = np.uint32(0x7FC00000)


@dataclass(frozen=True)
class EncodedShard:
    """A shard in memory: the bytes of its Parquet file and what `write_shard` records of it."""

    data: bytes
    entry: ShardEntry

    @property
    def row_groups(self) -> tuple[StoredGroup, ...]:
        """Offset, bytes, rows, digest and content digest of each row group."""
        return self.entry.shard.row_groups


def order_keys(crop_ids: Sequence[str], seed: int) -> np.ndarray:
    """The key of each crop in the order of a store: uint64 (N,), xxh3_64 of the id under `seed`."""
    seed &= 0xFFFFFFFFFFFFFFFF
    keys = (xxhash.xxh3_64_intdigest(crop_id.encode(), seed) for crop_id in crop_ids)
    return np.fromiter(keys, np.uint64, len(crop_ids))


def encode_shard(
    rows: pa.Table, spec: CropSpec, rows_per_group: int = ROWS_PER_GROUP, compression: str = COMPRESSION
) -> EncodedShard:
    """Encode `rows` (columns of `form.COLUMNS`, any `EXTRA_TYPES` columns, in the order to be stored) as one shard.

    The same rows give the same bytes with the same pyarrow, and the same content digests with any.

    Args:
        compression: `none`, `lz4` or `zstd` (level 1).

    Raises:
        ValueError: for a missing column, another type, a null, no rows, or an image of another size than `spec` says.
    """
    rows = _conform(rows, spec)
    extra = _extra(rows)
    sink = io.BytesIO()
    codec, level = _PARQUET_COMPRESSION[compression]
    metadata_columns = rows.column_names[:-1]
    contents, statistics = [], []
    with pq.ParquetWriter(
        sink,
        rows.schema,
        compression=codec,
        compression_level=level,
        use_dictionary=[name for name in metadata_columns if rows.schema.field(name).type == pa.string()],
        write_statistics=metadata_columns,
        store_schema=False,
    ) as writer:
        for start in range(0, len(rows), rows_per_group):
            group = rows.slice(start, rows_per_group).combine_chunks()
            writer.write_table(group, row_group_size=rows_per_group)
            contents.append(content_digest(group))
            statistics.append(count_rows(group, spec))
    data = sink.getvalue()
    entry = ShardEntry(
        spec=spec,
        extra_columns=extra,
        rows_per_group=rows_per_group,
        compression=compression,
        shard=_located(data, contents),
        statistics=Statistics.merged(statistics),
    )
    return EncodedShard(data, entry)


def content_digest(group: pa.Table) -> str:
    """sha256 of the decoded content of a row group: names, types and values, independent of how they are stored.

    Floats count by their bits, with every NaN as one; of `field_uri` the file's name counts and not the folder, so that
    the same fields elsewhere give the same digest (the stored bytes have their own). `group` holds the columns of a
    store in stored order, no nulls.
    """
    total = hashlib.sha256()
    for field in group.schema:
        total.update(f"{field.name}:{type_name(field.type)}:{len(group)}\n".encode())
        column = file_names(group[form.FIELD]) if field.name == form.FIELD else group[field.name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_string(field.type) or pa.types.is_binary(field.type):
            offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
            total.update(np.diff(offsets).astype("<i4").tobytes())
            if offsets[-1] > offsets[0]:
                total.update(memoryview(column.buffers()[2])[offsets[0] : offsets[-1]])
        else:
            values = column.to_numpy(zero_copy_only=False)
            if values.dtype == np.float32:
                values = np.where(np.isnan(values), _NAN, values.view(np.uint32))
            total.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def write_shard(store: str, index: int, encoded: EncodedShard) -> ShardEntry:
    """Write shard number `index` of the store at URI `store`, and beside it the entry that says it is finished."""
    name = f"shard-{index:05}.parquet"
    entry = encoded.entry.model_copy(update={"shard": encoded.entry.shard.model_copy(update={"name": name})})
    storage.write_bytes(storage.join(store, form.SHARDS, name), encoded.data)
    record = output.encode(entry.model_dump(mode="json"))
    storage.write_bytes(_sidecar(store, index), record)
    return entry


def finished_shard(store: str, index: int) -> ShardEntry | None:
    """The entry of shard `index` where an earlier run has finished it, else None."""
    try:
        entry = ShardEntry.model_validate(storage.read_json(_sidecar(store, index)))
        written = storage.size(storage.join(store, form.SHARDS, entry.shard.name))
    except (NotFoundError, ValueError):
        return None
    return entry if written == entry.shard.nbytes else None


def publish_store(
    target: Output,
    spec: CropSpec,
    shards: Sequence[ShardEntry],
    statistics: dict[str, Any],
    intensity: Intensity,
    lineage: dict[str, str],
    job: dict[str, Any],
    simulated: bool,
) -> dict[str, Any]:
    """Publish a crop store from its finished shards, in their order; what the rows hold is counted from them.

    Args:
        statistics: what the job counted besides (fields, rejects by reason); stands under `statistics.build`.
        lineage: URIs of the inputs and their content hashes.

    Returns:
        The manifest.

    Raises:
        DataError: where the shards do not make one store (other spec or columns, a short row group before the last).
        FencedError: where the claim was lost.
    """
    _require_one_store(target.uri, spec, shards)
    first = shards[0]
    groups = [group for entry in shards for group in entry.shard.row_groups]
    counted = Statistics.merged(entry.statistics for entry in shards)
    record = CropManifest(
        spec=spec,
        extra_columns=first.extra_columns,
        rows=counted.rows,
        rows_per_group=first.rows_per_group,
        compression=first.compression,
        content_hash=form.content_hash(spec, first.extra_columns, groups),
        simulated=simulated,
        intensity=intensity,
        statistics={**counted.summary(spec.channels), "build": statistics},
        lineage=lineage,
        job=job,
        shards=tuple(entry.shard for entry in shards),
    ).model_dump(mode="json")
    record["digest"] = form.self_digest(output.encode(record))
    target.publish(record)
    return record


def _conform(rows: pa.Table, spec: CropSpec) -> pa.Table:
    """`rows` with its columns in stored order and type.

    Raises:
        ValueError: where they cannot be a store's.
    """
    if not len(rows):
        raise ValueError("a shard needs at least one row")
    if missing := [name for name in form.COLUMNS if name not in rows.column_names]:
        raise ValueError(f"no column {', '.join(missing)}")
    extra = _extra(rows)
    if odd := {name: kind for name, kind in extra.items() if kind not in form.EXTRA_TYPES}:
        raise ValueError(f"extra columns are {', '.join(form.EXTRA_TYPES)}; not {odd}")
    if badly := [name for name in extra if not re.fullmatch(r"[A-Za-z0-9_]+", name)]:
        raise ValueError(f"column {badly[0]!r}: names are letters, digits and _")
    if empty := [name for name in rows.column_names if rows[name].null_count]:
        raise ValueError(f'nulls in {", ".join(empty)}: write "" for an unknown string, NaN for an unknown float')
    rows = rows.select(list(form.columns(extra))).cast(table_schema(extra))
    for chunk in rows["image"].chunks:
        images(chunk, spec)
    return rows


def _extra(rows: pa.Table) -> dict[str, str]:
    return {field.name: type_name(field.type) for field in rows.schema if field.name not in form.COLUMNS}


def count_rows(group: pa.Table, spec: CropSpec) -> Statistics:
    """The statistics of the rows of `group`."""
    labels = {name: group[name].to_numpy() for name in COUNTED}
    return Statistics.of(labels, group["area_px"].to_numpy(), images(group, spec))


def _located(data: bytes, contents: list[str]) -> Shard:
    """Where the row groups of the Parquet file `data` lie, from its own footer, and the digests of their bytes."""
    footer = pq.read_metadata(pa.BufferReader(data))
    view, groups, end = memoryview(data), [], 4
    for index, content in enumerate(contents):
        about = footer.row_group(index)
        spans = [_span(about.column(column)) for column in range(about.num_columns)]
        if [start for start, _ in spans] != [end, *(stop for _, stop in spans[:-1])]:
            raise RuntimeError("the Parquet writer left gaps between column chunks")
        start, image, end = end, spans[-1][0], spans[-1][1]
        groups.append(
            StoredGroup(
                offset=start,
                nbytes=end - start,
                rows=about.num_rows,
                digest=xxhash.xxh3_128_hexdigest(view[start:end]),
                meta_nbytes=image - start,
                meta_digest=xxhash.xxh3_128_hexdigest(view[start:image]),
                content=content,
            )
        )
    return Shard(
        name="",
        nbytes=len(data),
        footer_nbytes=len(data) - end,
        footer_digest=xxhash.xxh3_128_hexdigest(view[end:]),
        row_groups=tuple(groups),
    )


def _span(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    return start, start + chunk.total_compressed_size


def _sidecar(store: str, index: int) -> str:
    return storage.join(store, form.SHARDS, f"shard-{index:05}.json")


def _require_one_store(uri: str, spec: CropSpec, shards: Sequence[ShardEntry]) -> None:
    if not shards:
        raise DataError(uri, "a store needs at least one shard", "no crop passed the checks: look at the rejects")
    first = shards[0]
    for entry in shards:
        same = entry.spec == spec and entry.extra_columns == first.extra_columns
        if not (same and entry.rows_per_group == first.rows_per_group and entry.compression == first.compression):
            raise DataError(
                storage.join(uri, form.SHARDS, entry.shard.name),
                "has another image shape, other columns, row-group size or compression than the first shard",
                "an earlier build left it: delete the folder and run again",
            )
    rows = [group.rows for entry in shards for group in entry.shard.row_groups]
    if any(count != first.rows_per_group for count in rows[:-1]):
        raise DataError(uri, "a row group before the last one is short", "cut shards at multiples of the row group")
