"""What the plan of the whole data set costs: to open, and to answer any step.

    python tests/benchmarks/plan.py

21.8 M rows in 21,300 row groups and 5,400 shards. Each line is a fresh process; its figures begin after the imports and
hold what the plan is made from (a bool for each row, a byte with a mixing) and the first answer at each of five steps
from the beginning to epoch 100.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cosmic_ray import output
from cosmic_ray.ingest.mixing import Mixed
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.stores import manifest as form
from cosmic_ray.stores.crops import CropStore

GROUPS, ROWS, SHARDS, BATCH = 21_300, 1024, 5_400, 256
STEPS = (0, 17, 68_161, 85_199, 8_520_000)
WAYS = ("manifest", "all", "selection", "mixing", "selection and mixing", "three exclusions")


def measure(way: str, folder: str) -> None:
    """Print one line of the table."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _memory("VmRSS"), time.process_time()
    if way == "manifest":
        assert len(CropStore.open(folder).row_groups) == GROUPS
        print(f"| {way} | {time.process_time() - began:.3f} | | | {_memory('VmHWM') - before:.0f} |")
        return
    counts, total = np.full(GROUPS, ROWS), GROUPS * ROWS
    mask = None
    if "selection" in way:
        mask = np.ones(total, np.bool_)
        mask[::10] = False
    selection = Selection(counts, mask)
    if "mixing" in way:
        codes = np.zeros(total, np.uint8)
        for value, every in ((1, 5), (2, 11), (3, 101)):
            codes[::every] = value
        weights = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
        selection = Mixed(counts, mask, codes, weights, selection.selected, 1)
    plan = Plan.fitted("benchmark", selection, BATCH, 1)
    if "exclusions" in way:
        for number in range(3):
            plan = plan.excluding(range(4 * number, 4 * number + 4), 1000 * (number + 1))
    opened = time.process_time() - began
    answers = []
    for step in STEPS:
        asked = time.process_time()
        assert len(plan.step(step).row) == BATCH
        answers.append(time.process_time() - asked)
    asked = time.process_time()
    next(plan.reads(range(plan.spec.lanes), STEPS[-1], 2 * STEPS[-1]))
    reads = time.process_time() - asked
    print(f"| {way} | {opened:.3f} | {max(answers):.3f} | {reads:.3f} | {_memory('VmHWM') - before:.0f} |", flush=True)


def write_manifest(folder: str) -> None:
    """The manifest of a store of this size; its digests are right, its shards are not there."""
    sizes = [GROUPS * (s + 1) // SHARDS - GROUPS * s // SHARDS for s in range(SHARDS)]
    groups = [
        form.StoredGroup(4 + g * 6_000_000, 6_000_000, ROWS, f"{g:032x}", 90_000, f"{g:032x}", f"{g:064x}")
        for g in range(max(sizes))
    ]
    shards = tuple(
        form.Shard(
            name=f"shard-{number:05}.parquet",
            nbytes=25_000_000,
            footer_nbytes=9_000,
            footer_digest=f"{number:032x}",
            row_groups=tuple(groups[:size]),
        )
        for number, size in enumerate(sizes)
    )
    spec = form.CropSpec(channels=("DNA",), height=128, width=128)
    record = form.CropManifest(
        spec=spec,
        extra_columns={},
        rows=GROUPS * ROWS,
        rows_per_group=ROWS,
        compression="lz4",
        content_hash=form.content_hash(spec, {}, (group for shard in shards for group in shard.row_groups)),
        simulated=True,
        intensity=form.Intensity(scope="stored", description="none", masked=False),
        statistics={},
        lineage={},
        job={},
        shards=shards,
    ).model_dump(mode="json")
    record["digest"] = form.self_digest(output.encode(record))
    Path(folder, output.MANIFEST).write_bytes(output.encode(record))


def main() -> None:
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
        return
    print("| plan | open, CPU-s | slowest of five steps, CPU-s | first read, CPU-s | peak beyond imports, MB |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(folder)
        for way in WAYS:
            subprocess.run([sys.executable, __file__, way, folder], check=True)


def _memory(name: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024 / 1e6


if __name__ == "__main__":
    main()
