"""How fast shuffled crops come out of a store into one consumer's staging buffers, and in how much memory.

    python tests/benchmarks/ingest.py [STORE]          rates, first batch, CPU
    python tests/benchmarks/ingest.py --peers          beside those of torch DataLoader over a memory map, MosaicML
                                                       streaming, webdataset, Hugging Face datasets that are installed
    python tests/benchmarks/ingest.py --memory         memory at 1x and 10x rows
    python tests/benchmarks/ingest.py --full-scale     first batch with the plan of 21.8 M rows

Every way copies every batch into a staging buffer, in the same order where the table says "same plan". Rounds are
interleaved; medians are shown with their range. CPU-seconds are those of this process and all that it started, Ray's
own processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from making import make_rows, publish_entries
from peers import Way, peers

from cosmic_ray import storage
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import batches, plain_batches, reading_bytes
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec, ShardEntry, parse_manifest
from cosmic_ray.stores.writer import encode_shard, write_shard

BATCH = 256
PRODUCT = "batches through Ray Data, same plan, verified"
SPEC = CropSpec(channels=("DNA",), height=128, width=128)


def build(out: str, shards: int, compression: str, rows_per_group: int = 512) -> CropStore:
    """A store of `shards` x 4,096 masked crops (two thirds background), of which ten shards differ."""
    kept: dict[int, object] = {}
    entries = []
    for index in range(shards):
        seed = index % 10
        if seed not in kept:
            kept[seed] = encode_shard(make_rows(4096, SPEC, seed), SPEC, rows_per_group, compression)
        entries.append(write_shard(out, index, kept[seed]))
    return publish_entries(out, entries, SPEC)


def plan_of(store: CropStore, seed: int = 1) -> Plan:
    return Plan.fitted(store.content_hash, Selection.all(store), BATCH, seed)


def in_process(store: CropStore, plan: Plan) -> Way:
    """The plan by the shortest way: no checksums, no threads; files stay open."""
    files = {}

    def window_of(lane: int, epoch: int, window: int) -> np.ndarray:
        parts, starts, at = [], {}, 0
        for index in plan.window_groups(lane, epoch, window):
            group = store.row_groups[index]
            if group.shard not in files:
                files[group.shard] = pq.ParquetFile(group.shard)
            table = files[group.shard].read_row_group(group.within, columns=["image"], use_threads=False)
            parts.append(images(table, store.spec).reshape(group.rows, -1))
            starts[index], at = at, at + group.rows
        groups, rows = plan.window_rows(lane, epoch, window)
        return np.concatenate(parts)[np.array([starts[g] for g in groups.tolist()]) + rows]

    def way(steps: int) -> Iterator[int]:
        lanes, opened = range(plan.spec.lanes), {}
        staging = np.empty((BATCH, store.spec.nbytes), np.uint8)
        for k in range(steps):
            at, pieces = 0, plan.pieces(k, lanes)
            for lane, epoch, window, start, stop in pieces:
                if (lane, epoch, window) not in opened:
                    opened[lane, epoch, window] = window_of(lane, epoch, window)
                staging[at : at + stop - start] = opened[lane, epoch, window][start:stop]
                at += stop - start
            current = {piece[0]: piece[:3] for piece in pieces}
            opened = {key: rows for key, rows in opened.items() if current[key[0]] == key}
            yield at

    return way


def ours(stream: Callable, store: CropStore, plan: Plan) -> Way:
    def way(steps: int) -> Iterator[int]:
        for batch in stream(store.uri, plan, 0, 1, 0, steps):
            yield len(batch)

    return way


def two_ranks(store: CropStore, plan: Plan) -> Way:
    """Two consumers in processes of their own; the sizes of both, as they report them."""
    import ray
    from ray.util.queue import Queue

    @ray.remote(num_cpus=0.5)
    def consume(rank: int, steps: int, queue: Queue) -> None:
        sizes, said = 0, time.monotonic()
        for batch in batches(store.uri, plan, rank, 2, 0, steps):
            sizes += len(batch)
            if time.monotonic() - said > 0.1:
                queue.put(sizes)
                sizes, said = 0, time.monotonic()
        queue.put(sizes)
        queue.put(None)

    def way(steps: int) -> Iterator[int]:
        queue = Queue(actor_options={"num_cpus": 0})
        tasks = [consume.remote(rank, steps, queue) for rank in range(2)]
        ended = 0
        while ended < 2:
            size = queue.get()
            if size is None:
                ended += 1
            elif size:
                yield size
        ray.get(tasks)
        queue.shutdown()

    return way


def cpu_seconds() -> float:
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
            total += spent.user + spent.system
            if process == me:  # a DataLoader's workers, which have ended
                total += spent.children_user + spent.children_system
        except psutil.NoSuchProcess:
            continue
    return total


class Result(NamedTuple):
    rate: float
    """Images/s after the first quarter."""
    first: float
    """Seconds to the first batch."""
    gap: float
    """The longest time between two batches after the first quarter, in ms; epochs begin and end there too."""
    per_cpu: float
    """Images per CPU-second."""
    others: float
    """Share of this machine's CPUs that other processes used meanwhile."""


def measure(way: Way, steps: int) -> Result:
    began, spent, busy, count, marks = time.perf_counter(), cpu_seconds(), busy_seconds(), 0, []
    for size in way(steps):
        count += size
        marks.append((time.perf_counter(), count))
    spent, busy, wall = cpu_seconds() - spent, busy_seconds() - busy, time.perf_counter() - began
    steady = [mark for mark in marks if mark[1] >= count / 4]
    rate = (count - steady[0][1]) / (marks[-1][0] - steady[0][0])
    gap = 1000 * float(np.max(np.diff([at for at, _ in steady])))
    others = max(0.0, busy - spent) / (wall * (os.cpu_count() or 1))
    return Result(rate, marks[0][0] - began, gap, count / spent, others)


def busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


def at_their_best(others: dict[str, dict[str, Way]], steps: int) -> dict[str, Way]:
    """Each peer with the number of workers that is fastest here, over fewer batches, warm."""
    found = {}
    for name, ways in others.items():
        tried = {workers: max(measure(way, steps // 4).rate for _ in range(2)) for workers, way in ways.items()}
        best = max(tried, key=tried.get)
        print(f"  {name}: { ({workers: round(rate) for workers, rate in tried.items()}) }", file=sys.stderr, flush=True)
        found[f"{name}, {best}"] = ways[best]
    return found


def rates(store: CropStore, others: dict[str, Way], rounds: int, steps: int, calm: float, preset: str) -> None:
    plan = plan_of(store)
    ways: dict[str, Way] = {
        **others,
        "in-process pyarrow, same plan": in_process(store, plan),
        "plain_batches, same plan, verified": ours(plain_batches, store, plan),
        PRODUCT: ours(batches, store, plan),
        "two ranks through Ray Data, same plan, verified": two_ranks(store, plan),
    }
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one warms the page cache, Ray's workers and its object store
        for name, way in ways.items():
            tries = [measure(way, steps)]
            while turn and tries[-1].others > calm and len(tries) < 10:
                tries.append(measure(way, steps))
            result = min(tries, key=lambda one: one.others)
            if turn:
                found[name].append(result)
            print(f"  {name}: {result.rate:,.0f} (others {result.others:.0%})", file=sys.stderr, flush=True)
    size = sum(group.nbytes for group in store.row_groups) / len(store)
    print(f"\n{store.uri}: {size:,.0f} bytes a crop, batch {BATCH}, {plan.spec.lanes} lanes, window {plan.spec.window}")
    print(f"{rounds} rounds of {steps} batches\n")
    print("| way | images/s | range | first batch, s | longest gap, ms | images per CPU-s | others' CPU share |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        middle = Result(*np.median(np.array(results), axis=0))
        low, high = min(r.rate for r in results), max(r.rate for r in results)
        figures = f"{middle.rate:,.0f} | {low:,.0f}..{high:,.0f} | {middle.first:.2f} | {middle.gap:,.0f}"
        print(f"| {name} | {figures} | {middle.per_cpu:,.0f} | {middle.others:.0%} |")
    print(f"\n{_verdict(float(np.median([result.rate for result in found[PRODUCT]])), preset)}")


def _verdict(ingest: float, preset: str) -> str:
    """Which of the two holds the other up, on this machine: ingest, or a training step on images at hand."""
    import torch
    from mae_step import Pool, our_step

    from cosmic_ray.models.mae import MAEConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 256 if device.type == "cuda" else 16
    step = our_step(Pool(device), MAEConfig.of(preset, "better"), batch, compiled=False)
    took = []
    for _ in range(4):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    trained = batch / min(took)
    slower = "the model" if trained < ingest else "ingest"
    return f"A training step of `{preset}` on {device} takes {trained:,.0f} images/s: {slower} is the bottleneck."


class _Watch:
    """The most memory of this process tree, without what it shares, and of Ray's object store, while a block runs."""

    def __enter__(self) -> _Watch:
        self.own = self.reader = self.stored = self.spilled = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self._stop.wait(0.25):
            store = get_memory_info_reply(state).store_stats
            self.stored = max(self.stored, store.object_store_bytes_used)
            self.spilled = store.spilled_bytes_total
            own = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    about = process.memory_info()
                    own += about.rss - about.shared
                    if any("read_chunks" in part for part in process.cmdline()):
                        self.reader = max(self.reader, about.rss - about.shared)
                except psutil.NoSuchProcess:
                    continue
            self.own = max(self.own, own)


def memory(folder: Path) -> None:
    print(
        "| rows | their bytes | all processes, without shared | the reading task | stated for reading |",
        end="",
    )
    print(" object store | spilled |\n|---|---|---|---|---|---|---|")
    for shards in (10, 100):
        store = build(str(folder / f"store-{shards}"), shards, "lz4")
        plan = plan_of(store)
        with _Watch() as watch:
            for batch in batches(store.uri, plan, 0, 1, 0, plan.steps(10 if shards == 10 else 1)):
                assert len(batch) == BATCH
        stated = reading_bytes(plan, range(plan.spec.lanes), SPEC.nbytes)
        figures = [len(store) * SPEC.nbytes, watch.own, watch.reader, stated, watch.stored, watch.spilled]
        print(f"| {len(store):,} | {' | '.join(f'{figure / 1e6:,.0f} MB' for figure in figures)} |", flush=True)


def full_scale(folder: Path, rounds: int) -> None:
    """The first batch of a store of 5,325 shards (ten real ones under many names) and 21,300 row groups.

    As after a start of Ray, a worker is idle that has imported nothing of Ray Data or of this project; closing a stream
    ends the worker that read for it.
    """
    import ray

    @ray.remote(num_cpus=1)
    def idle() -> None:
        time.sleep(0.5)

    small = build(str(folder / "real"), 10, "lz4", rows_per_group=1024)
    large = folder / "large" / "shards"
    large.mkdir(parents=True)
    entries = []
    for index in range(5325):
        shard = small.manifest.shards[index % 10]
        name = f"shard-{index:05}.parquet"
        (large / name).symlink_to(Path(small.uri) / "shards" / shard.name)
        about = json.loads((Path(small.uri) / "shards" / shard.name).with_suffix(".json").read_text())
        entries.append(ShardEntry.model_validate({**about, "shard": shard.model_copy(update={"name": name})}))
    uri = publish_entries(str(folder / "large"), entries, SPEC).uri
    print("| start | store opened, s | plan made, s | first batch after that, s | in all, s |\n|---|---|---|---|---|")
    for name, step in {"step 0": 0, "in the middle of the third epoch": 213_000}.items():
        found = []
        for turn in range(rounds + 1):
            parse_manifest.cache_clear()
            ray.get([idle.remote() for _ in range(2)])
            marks = [time.perf_counter()]
            store = CropStore.open(uri)
            marks.append(time.perf_counter())
            plan = plan_of(store)
            marks.append(time.perf_counter())
            stream = batches(uri, plan, 0, 1, step, 10**6)
            next(stream)
            marks.append(time.perf_counter())
            stream.close()
            if turn:
                found.append([*np.diff(marks), marks[-1] - marks[0]])
        print(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in np.median(found, axis=0))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", help="URI of a crop store; one is made by default")
    parser.add_argument("--peers", action="store_true", help="beside the peers that are installed")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--full-scale", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1920)
    parser.add_argument("--compression", default="lz4", choices=["none", "lz4", "zstd"])
    parser.add_argument("--calm", type=float, default=1.0, help="repeat a turn while others use more of the CPUs")
    parser.add_argument("--preset", default="large", help="the model that is told beside it")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    import ray

    from cosmic_ray.cluster import connect

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(
        address="local", num_cpus=4, object_store_memory=600 * 2**20, include_dashboard=False, logging_level="WARNING"
    )
    connect()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.memory:
            memory(Path(folder))
        elif options.full_scale:
            full_scale(Path(folder), options.rounds)
        else:
            at = options.store or build(f"{folder}/store-{options.compression}", 20, options.compression).uri
            store = CropStore.open(storage.absolute(at))
            others = at_their_best(peers(store, Path(folder), BATCH) if options.peers else {}, options.steps)
            rates(store, others, options.rounds, options.steps, options.calm, options.preset)
    ray.shutdown()


if __name__ == "__main__":
    main()
