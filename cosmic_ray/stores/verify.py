"""Read all of a crop store again and say what is wrong with it: the backend of `cosmic-ray verify`."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError
from cosmic_ray.progress import Progress
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import Shard
from cosmic_ray.stores.statistics import Statistics
from cosmic_ray.stores.writer import content_digest, count_rows, order_keys


def verify_store(uri: str, progress: Progress | None = None) -> list[str]:
    """Read every byte of the store at `uri`; one line for each problem, none where all is well.

    Checked: the manifest; size, first bytes and footer of each shard; digest, schema, content and image sizes of each
    row group; that masked crops have `area_px` nonzero pixels in every channel; that no `crop_id` stands twice;
    that the manifest's statistics are those of the rows. Holds one row group and 8 bytes a crop in memory.
    """
    try:
        store = CropStore.open(uri)
    except CosmicError as error:
        return [str(error)]
    problems, ids, counted = [], [], []
    first = 0
    for number, shard in enumerate(store.manifest.shards):
        groups = range(first, first + len(shard.row_groups))
        first = groups.stop
        problems += _check_file(store, shard, store.row_groups[groups[0]].shard)
        for group in groups:
            try:
                rows = store.read_row_group(group)
            except CosmicError as error:
                problems.append(str(error))
                continue
            problems += _check_rows(store, group, rows, shard.row_groups[group - groups.start].content)
            ids.append(_hashes(rows["crop_id"]))
            counted.append(count_rows(rows, store.spec))
        counted = [Statistics.merged(counted)] if counted else []
        if progress:
            progress.update(number + 1, f"{len(problems)} problems" if problems else "")
    problems += _check_unique(store, ids)
    if not problems and _differ(store, counted[0]):
        problems.append(f"{store.uri}: the manifest's statistics are not those of the rows")
    return problems


def _check_file(store: CropStore, shard: Shard, uri: str) -> list[str]:
    """What no row group covers: the size, the first four bytes, and that row groups follow each other to the footer."""
    try:
        size = storage.size(uri)
        head = storage.read_range(uri, 0, 4)
    except CosmicError as error:
        return [str(error)]
    problems = []
    if size != shard.nbytes:
        problems.append(f"{uri}: {size:,} bytes; the manifest says {shard.nbytes:,}")
    if head != b"PAR1":
        problems.append(f"{uri}: does not begin as a Parquet file")
    ends = [4, *(group.offset + group.nbytes for group in shard.row_groups)]
    starts = [*(group.offset for group in shard.row_groups), shard.nbytes - shard.footer_nbytes]
    if ends != starts:
        problems.append(f"{uri}: the manifest leaves bytes of it to no row group")
    return problems


def _check_rows(store: CropStore, group: int, rows: pa.Table, content: str) -> list[str]:
    where = f"{store.row_groups[group].shard}: row group {store.row_groups[group].within}"
    try:
        crops = images(rows, store.spec)
    except ValueError as error:
        return [f"{where}: {error}"]
    problems = []
    if content_digest(rows) != content:
        problems.append(f"{where}: its decoded content does not match the manifest's digest")
    if store.manifest.intensity.masked:
        nonzero = np.count_nonzero(crops, axis=(2, 3))
        wrong = (nonzero != rows["area_px"].to_numpy()[:, None]).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            crop, area = rows["crop_id"][row].as_py(), rows["area_px"][row].as_py()
            seen = f"crop {crop!r} has {nonzero[row].tolist()} nonzero pixels by channel and area_px {area}"
            problems.append(f"{where}: {wrong.sum()} crops break the store's mask rule: {seen}")
    return problems


def _hashes(crop_ids: pa.ChunkedArray) -> np.ndarray:
    return order_keys(crop_ids.to_pylist(), seed=0)


def _check_unique(store: CropStore, ids: list[np.ndarray]) -> list[str]:
    """Ids whose 64-bit hashes meet are read again and compared themselves."""
    hashes = np.concatenate(ids) if ids else np.empty(0, np.uint64)
    hashes.sort()
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return []
    seen, twice = set(), set()
    for group in range(len(store.row_groups)):
        with suppress(CosmicError):
            crop_ids = store.read_row_group(group, ["crop_id"])["crop_id"]
            for crop_id in crop_ids.filter(pa.array(np.isin(_hashes(crop_ids), suspects))).to_pylist():
                (twice if crop_id in seen else seen).add(crop_id)
    return [f"{store.uri}: {len(twice)} crop ids stand more than once, such as {min(twice)!r}"] if twice else []


def _differ(store: CropStore, counted: Statistics) -> bool:
    said = {key: value for key, value in store.manifest.statistics.items() if key != "build"}
    return said != counted.summary(store.spec.channels) or counted.rows != len(store)
