"""Step three: shards of the crop store, each from its range of keys over all chunks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray.errors import DataError
from cosmic_ray.imaging.chunks import CANDIDATES, read_candidates
from cosmic_ray.imaging.crops import Patch, render
from cosmic_ray.imaging.intensity import Line, patch_line
from cosmic_ray.imaging.select import kept
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.writer import encode_shard, write_shard

if TYPE_CHECKING:
    from cosmic_ray.imaging.job import BuildCrops

_THREADS = 8


def assemble(
    shards: Sequence[Sequence[int]], spans: Sequence[Sequence[Any]], job: BuildCrops, out: str, chosen: dict[str, Any]
) -> dict[str, Any]:
    """Write `shards` of the store at the URI `out`.

    Args:
        shards, spans: of `select.shard_units`.
        chosen: `limits`, `lines` and `schema` of `select.select`.

    Returns:
        `entries`: index -> `ShardEntry` as JSON.

    Raises:
        DataError: where the candidates are no longer those that were selected from.
    """
    schema = base64.b64decode(chosen["schema"])
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda span: read_candidates(out, span[0], schema, span[1], span[2]), spans))
    rows = pa.concat_tables(tables)
    del tables
    small, large = kept(rows, chosen["limits"])
    keys, ids = rows["order"].to_numpy(), np.array(rows["crop_id"].to_pylist())
    order = np.lexsort((ids, keys))
    order = order[~(small | large)[order]]
    keys = keys[order]
    lines = {(source, plate): line for source, plate, line in chosen["lines"]}
    entries = {}
    for index, low, high, skip, count in shards:
        first = int(np.searchsorted(keys, np.uint64(low), "left")) + skip
        last = int(np.searchsorted(keys, np.uint64(high), "right"))
        mine = order[first : min(last, first + count)]
        if len(mine) != count:
            problem = f"{len(mine)} candidates of shard {index}, not {count}"
            raise DataError(f"{out}/{CANDIDATES}", problem, "they were changed: delete this folder and run again")
        encoded = encode_shard(_finished(job, rows.take(mine), lines), job.spec, job.rows_per_group, job.compression)
        entries[str(index)] = write_shard(out, index, encoded).model_dump(mode="json")
    return {"entries": entries}


def _finished(job: BuildCrops, rows: pa.Table, lines: dict[tuple[str, str], list[Line]]) -> pa.Table:
    """Candidates as rows of a crop store: pixels rendered, the mapping of each in its columns."""
    channels = len(job.channels)
    crops = np.zeros((len(rows), *job.spec.shape), np.uint8)
    mapping = np.empty((len(rows), channels, 2), np.float32)
    of_row = zip(rows["patch"], rows["source"].to_pylist(), rows["plate"].to_pylist(), strict=True)
    for row, (packed, source, plate) in enumerate(of_row):
        patch = Patch.unpack(packed.as_buffer(), channels)
        if job.ready and patch.pixels.dtype == np.uint8:
            used = None
        elif job.intensity.mapping == "patch":
            used = [patch_line(pixels) for pixels in patch.pixels]
        else:
            used = lines[source, plate]
        mapping[row] = used or (1, 0)
        render(patch, used, crops[row])
    rows = rows.drop_columns(["patch", "order", "reject"]).append_column("image", image_column(crops))
    for channel, name in enumerate(job.channels):
        suffix = f"_{name}" if channel else ""
        for part, what in enumerate(("intensity_scale", "intensity_offset")):
            rows = rows.append_column(what + suffix, pa.array(mapping[:, channel, part]))
    return rows
