"""What compression costs and saves on real crops: the table behind the default of the crop store.

    python tests/benchmarks/compression.py --data DATA

DATA holds `images/dsb2018_train_fluo` and `images/coelho2009_U2OS`, each with `images/` and `labels/`. Crops are cut
here by the hand-made masks, 1x128x128, background 0; nuclei that do not fit are left out. Reading is what a stream
does: row group by row group, digests checked, decoded, each crop copied into a staging buffer in shuffled order; one
thread, files in the page cache. Ways take turns; medians of the rounds are shown with their range.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy.ndimage import find_objects

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from making import make_rows, store_of

from cosmic_ray.stores.columns import image_column, images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec
from cosmic_ray.stores.writer import COMPRESSION, encode_shard

SIZE, LEAST_PX = 128, 150
SPEC = CropSpec(channels=("DNA",), height=SIZE, width=SIZE)
WAYS = ("none", "lz4", "zstd")
SETS = {"dsb2018": ("dsb2018_train_fluo", 4), "U2OS": ("coelho2009_U2OS", 1)}
"""Name -> folder, and one in how many fields is taken."""


def main() -> None:
    arguments = parse()
    print(f"{arguments.rounds} rounds; load before this {os.getloadavg()[0]:.1f}")
    for name, (folder, every) in SETS.items():
        crops = np.array(list(real_crops(arguments.data / "images" / folder, every)))[:, None]
        crops = crops[np.random.default_rng(0).permutation(len(crops))]
        compare(name, crops, arguments.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def real_crops(folder: Path, every: int) -> Iterator[np.ndarray]:
    """Masked nuclei of the fields below `folder`: uint8 (SIZE, SIZE), each field's brightest pixels at 255."""
    fields, labels = (sorted((folder / part).iterdir())[::every] for part in ("images", "labels"))
    for field, label in zip(fields, labels, strict=True):
        pixels = np.asarray(Image.open(field).convert("L"), np.float32)
        stored = np.clip(pixels * (255 / max(float(np.percentile(pixels, 99.9)), 1.0)), 1, 255).astype(np.uint8)
        objects = np.asarray(Image.open(label))
        for number, box in enumerate(find_objects(objects), 1):
            if box is None or max(side.stop - side.start for side in box) > SIZE:
                continue
            inside = objects[box] == number
            if inside.sum() >= LEAST_PX:
                crop = np.zeros((SIZE, SIZE), np.uint8)
                top, left = ((SIZE - length) // 2 for length in inside.shape)
                crop[top : top + inside.shape[0], left : left + inside.shape[1]] = np.where(inside, stored[box], 0)
                yield crop


def compare(name: str, crops: np.ndarray, rounds: int) -> None:
    """Print the table of one set of crops (N, 1, SIZE, SIZE)."""
    rows = make_rows(len(crops), SPEC)
    rows = rows.set_column(rows.column_names.index("image"), "image", image_column(crops))
    print(f"\n{name}: {len(crops):,} crops, {(crops > 0).mean():.0%} of their pixels in a nucleus\n")
    columns = ("compression", "bytes an image", "write, images per CPU-s", "read, images per CPU-s", "range")
    print(f"| {' | '.join((*columns, 'read, images/s', 'range'))} |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as folder:
        stores = {way: store_of(f"{folder}/{way}", rows, SPEC, 512, 8, way, masked=False) for way in WAYS}
        written = {way: [] for way in WAYS}
        seen = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, store in stores.items():
                written[way].append(write(rows, way))
                seen[way].append(read(store))
        for way, store in stores.items():
            nbytes = sum(group.nbytes for group in store.row_groups) / len(store)
            rates, per_cpu = zip(*seen[way], strict=True)
            name = f"**{way}**" if way == COMPRESSION else way
            print(f"| {name} | {nbytes:,.0f} | {median(written[way]):,.0f} | {shown(per_cpu)} | {shown(rates)} |")


def shown(figures: Sequence[float]) -> str:
    return f"{median(figures):,.0f} | {min(figures):,.0f}..{max(figures):,.0f}"


def write(rows: pa.Table, way: str) -> float:
    """Images per CPU-second of encoding one shard, digests and statistics included."""
    cpu = process_time()
    encode_shard(rows.slice(0, 4096), SPEC, 512, way)
    return min(len(rows), 4096) / (process_time() - cpu)


def read(store: CropStore) -> tuple[float, float]:
    """Images/s and images per CPU-second of at least 4,096 crops through a window of one row group."""
    staging = np.empty((512, *SPEC.shape), np.uint8)
    rng, count = np.random.default_rng(0), 0
    started, cpu = perf_counter(), process_time()
    while count < 4096:
        for group in range(len(store.row_groups)):
            stored = images(store.read_row_group(group, ["image"]), SPEC)
            np.take(stored, rng.permutation(len(stored)), axis=0, out=staging[: len(stored)], mode="clip")
            count += len(stored)
    return count / (perf_counter() - started), count / (process_time() - cpu)


if __name__ == "__main__":
    main()
