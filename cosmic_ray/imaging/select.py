"""Step two, over all candidates: which are kept, how intensities are mapped, where shards begin; plain and exact."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cosmic_ray.errors import CosmicError
from cosmic_ray.imaging.chunks import THREADS, Chunk, Totals, read_keys, read_schema
from cosmic_ray.imaging.histogram import Histogram
from cosmic_ray.imaging.intensity import plate_line
from cosmic_ray.imaging.thresholds import area_limits

if TYPE_CHECKING:
    from cosmic_ray.imaging.job import BuildCrops

TOO_SMALL, TOO_BIG = "area below the lower percentile", "area above the upper percentile"
_UNIT_BYTES, _UNIT_SHARDS = 2**28, 16


def select(job: BuildCrops, out: str, chunks: Sequence[Chunk], totals: Totals) -> dict[str, Any]:
    """Decide over all candidates below the URI `out`.

    Returns:
        JSON: `limits` (source -> [smallest, largest] area in px), `lines` ([source, plate, [scale, offset] a channel]),
        `rejected` (reason -> objects), `objects`, `rows`, `schema` (base64 of the candidates' Arrow schema) and
        `shards` ([lowest key, highest key, rows to skip at the lowest, rows], in order).

    Raises:
        CosmicError: where no nucleus is left.
    """
    limits = _limits(job, totals.areas)
    keys, outside = _kept_keys(out, chunks, limits)
    rejected = Counter(outside)
    for chunk in chunks:
        rejected.update(chunk.reasons)
    rejected = {reason: count for reason, count in sorted(rejected.items()) if count}
    if not len(keys):
        told = ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none was found"
        raise CosmicError(f"{out}: no nucleus is left: {told}")
    keys.sort()
    first = next(chunk for chunk in chunks if len(chunk.first_keys))
    return {
        "limits": {source: list(limit) for source, limit in sorted(limits.items())},
        "lines": _lines(job, totals.pixels),
        "rejected": rejected,
        "objects": len(keys) + sum(rejected.values()),
        "rows": len(keys),
        "schema": base64.b64encode(read_schema(out, first)).decode(),
        "shards": _shards(keys, job.rows_per_shard),
    }


def _limits(job: BuildCrops, areas: dict[str, Histogram]) -> dict[str, tuple[float, float]]:
    if job.ready:
        return dict.fromkeys(areas, (0.0, float(2**31)))
    return area_limits({source: histogram for source, histogram in areas.items() if histogram.total}, job.area)


def kept(table: pa.Table, limits: dict[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of `table` (`source`, `area_px`) are too small, and which too large: bool (n,) each."""
    area = table["area_px"].to_numpy()
    source = table["source"].combine_chunks().dictionary_encode()
    each = np.array([limits[name] for name in source.dictionary.to_pylist()]).reshape(-1, 2)
    of_row = each[source.indices.to_numpy()]
    return area < of_row[:, 0], area > of_row[:, 1]


def _kept_keys(out: str, chunks: Sequence[Chunk], limits: dict[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """The keys of all candidates inside the limits, uint64 (rows,), 8 bytes each; and how many lie outside."""

    def one(chunk: Chunk) -> tuple[np.ndarray, int, int]:
        table = read_keys(out, chunk.name)
        small, large = kept(table, limits)
        return table["order"].to_numpy()[~small & ~large], int(small.sum()), int(large.sum())

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(one, [chunk for chunk in chunks if len(chunk.first_keys)]))
    keys = np.concatenate([part for part, _, _ in parts] or [np.empty(0, np.uint64)])
    return keys, {TOO_SMALL: sum(small for _, small, _ in parts), TOO_BIG: sum(large for _, _, large in parts)}


def _lines(job: BuildCrops, pixels: dict[tuple[str, str, int], Histogram]) -> list[list[Any]]:
    """[source, plate, [[scale, offset] a channel]]; empty where patches are mapped one by one."""
    if job.intensity.mapping == "patch":
        return []
    lines: dict[tuple[str, str], list[list[float]]] = {}
    for (source, plate, _), histogram in sorted(pixels.items()):
        line = plate_line(histogram, job.intensity)
        lines.setdefault((source, plate), []).append([float(part) for part in line])
    return [[source, plate, line] for (source, plate), line in lines.items()]


def _shards(keys: np.ndarray, rows: int) -> list[list[int]]:
    """Cut sorted keys into shards of `rows`; where two keys meet at a cut, their crop ids decide, hence the skip."""
    shards = []
    for start in range(0, len(keys), rows):
        part = keys[start : start + rows]
        skip = start - int(np.searchsorted(keys, part[0], "left"))
        shards.append([int(part[0]), int(part[-1]), skip, len(part)])
    return shards


def shard_units(
    chunks: Sequence[Chunk], shards: Sequence[Sequence[int]], missing: Sequence[int]
) -> list[dict[str, Any]]:
    """Bring neighbouring missing shards together into tasks that fetch about `_UNIT_BYTES` from all chunks at once.

    Returns:
        For each task `shards` ([index, lowest, highest, skip, rows]) and `spans` ([chunk, first byte, end]).
    """
    held = [chunk for chunk in chunks if len(chunk.first_keys)]
    nbytes = sum(int(chunk.offsets[-1]) for chunk in held) / len(shards)
    size = int(max(1, min(_UNIT_SHARDS, _UNIT_BYTES // nbytes, len(missing) // 32)))
    units = []
    for start in range(0, len(missing), size):
        group = [[index, *shards[index]] for index in missing[start : start + size]]
        low, high = min(shard[1] for shard in group), max(shard[2] for shard in group)
        spans = [[chunk.name, *chunk.span(low, high)] for chunk in held]
        units.append({"shards": group, "spans": [span for span in spans if span[1] < span[2]]})
    return units
