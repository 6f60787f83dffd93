"""How much of an S3 server's bandwidth the stream takes, and what a gigabyte costs, beside plain parallel range reads.

    python tests/benchmarks/s3.py --limit 40    a server that gives 40 MB/s: share of it
    python tests/benchmarks/s3.py               a server without a limit: CPU-seconds per GB

The server is `rclone serve s3` on this machine, which checks signatures; the limit is a token bucket in a relay before
it (`tests/relay.py`), for all connections together, and every request arrives 50 ms late. All ways read the same row
groups in the same order with the same number of threads; turns are interleaved, medians are shown with their range.
"Whole" is all that the server sent from the call to the last batch, "used" what of it was in batches: the windows that
are open at the end of so short a run are not. CPU-seconds are those of this process and all that it started, Ray's own
processes included, the server and the relay not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ingest import BATCH, build, plan_of
from relay import Relay
from s3_servers import rclone_server, settings_of

from cosmic_ray import storage
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.stream import batches, plain_batches
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.places import REMOTE_THREADS

KEY, SECRET = "EXAMPLEACCESSKEY0001", "ExampleSecretOfTheBenchmark0000000000001"
Way = Callable[[int], Iterator[int]]
"""Hands out the stored bytes of one piece after another, as they are there for use."""


def ours(stream: Callable, store: CropStore, plan: Plan) -> Way:
    nbytes = stored_bytes(store) / len(store)

    def way(steps: int) -> Iterator[int]:
        for batch in stream(store.uri, plan, 0, 1, 0, steps):
            yield len(batch) * nbytes

    return way


def ranges(read: Callable[[str, int, int], bytes], store: CropStore, plan: Plan) -> Way:
    """The same row groups in the same order by `read`(URI, offset, length), and nothing else."""

    def way(steps: int) -> Iterator[int]:
        reads = plan.reads(range(plan.spec.lanes), 0, steps)
        groups = [store.row_groups[index] for window in reads for index in window.row_groups]
        # As many bytes as the batches use: the windows that are open at the end are read whole.
        groups = groups[: round(steps * BATCH * len(store.row_groups) / len(store))]
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            yield from pool.map(lambda group: len(read(group.shard, group.offset, group.nbytes)), groups)

    return way


def arrow_reader(url: str) -> Callable[[str, int, int], bytes]:
    """pyarrow's S3 file system; a shard is opened once."""
    from pyarrow import fs

    where = {"endpoint_override": url, "region": "us-east-1"}
    system = fs.S3FileSystem(access_key=KEY, secret_key=SECRET, **where)
    files = {}

    def read(uri: str, offset: int, length: int) -> bytes:
        if uri not in files:
            files[uri] = system.open_input_file(uri.removeprefix("s3://"))
        return files[uri].read_at(length, offset)

    return read


def stored_bytes(store: CropStore) -> int:
    return sum(group.nbytes for group in store.row_groups)


class Result(NamedTuple):
    used: float
    """Bytes/s that were used, from the call to the last one."""
    taken: float
    """Bytes/s of the server's answers, from the call to the last byte used; without a relay as `used`."""
    steady: float
    """As `taken`, between a quarter and three quarters of the bytes."""
    first_s: float
    """Seconds until the first bytes."""
    cpu: float
    """CPU-seconds per GB."""


def measure(way: Way, steps: int, relay: Relay | None, servers: set[int]) -> Result:
    began, spent, marks = time.perf_counter(), cpu_seconds(servers), []
    done, before = 0.0, relay.sent if relay else 0
    for size in way(steps):
        done += size
        marks.append((time.perf_counter(), done, relay.sent if relay else done))
    taken = relay.sent - before if relay else done
    wall, spent = time.perf_counter() - began, cpu_seconds(servers) - spent
    low, high = (next(mark for mark in marks if mark[1] >= done * part) for part in (0.25, 0.75))
    steady = (high[2] - low[2]) / (high[0] - low[0])
    return Result(done / wall, taken / wall, steady, marks[0][0] - began, spent / (done / 1e9))


def cpu_seconds(without: set[int]) -> float:
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += 0.0 if process.pid in without else times.user + times.system
    return total


def compare(folder: Path, limit: float | None, latency_s: float, rounds: int, steps: int) -> None:
    with ExitStack() as stack:
        (folder / "bucket").mkdir()
        build(str(folder / "bucket" / "store"), 20, "lz4")
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        server = stack.enter_context(rclone_server(folder, {KEY: SECRET}))
        relay = stack.enter_context(Relay(server, limit * 1e6, latency_s)) if limit else None
        servers = {child.pid for child in psutil.Process().children(recursive=True)} - before
        url = relay.url if relay else server
        os.environ.update({**settings_of(url), "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET})
        start_ray()
        store = CropStore.open("s3://bucket/store")
        plan = plan_of(store)
        ways: dict[str, Way] = {
            "plain ranges by pyarrow.fs.S3FileSystem": ranges(arrow_reader(url), store, plan),
            "plain ranges by storage.read_range": ranges(storage.read_range, store, plan),
            "plain_batches, verified and shuffled": ours(plain_batches, store, plan),
            "batches through Ray Data, verified and shuffled": ours(batches, store, plan),
        }
        found: dict[str, list[Result]] = {name: [] for name in ways}
        for turn in range(rounds + 1):  # the first one warms the page cache and Ray's workers
            for name, way in ways.items():
                result = measure(way, steps if turn else min(steps, 60), relay, servers)
                if turn:
                    found[name].append(result)
                    print(f"  {name}: {result}", file=sys.stderr, flush=True)
        about = f"{stored_bytes(store) / len(store):,.0f} bytes a crop, {REMOTE_THREADS} threads"
        print(f"\n{rounds} rounds of {steps} batches of {BATCH} crops, {about}, Python {sys.version.split()[0]}\n")
        table(found, limit)


def table(found: dict[str, list[Result]], limit: float | None) -> None:
    unit, scale = (f"% of {limit:g} MB/s", limit * 1e4) if limit else ("MB/s", 1e6)
    print(f"| way | steady, {unit} | range | whole | range | used | first, s | CPU-s per GB | range |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, results in found.items():
        columns = Result(*np.array(results).T)
        cells = [name]
        for figures in (columns.steady / scale, columns.taken / scale):
            cells += [f"{np.median(figures):.1f}", f"{figures.min():.1f}..{figures.max():.1f}"]
        cells += [f"{np.median(columns.used) / scale:.1f}", f"{np.median(columns.first_s):.2f}"]
        cells += [f"{np.median(columns.cpu):.2f}", f"{columns.cpu.min():.2f}..{columns.cpu.max():.2f}"]
        print(f"| {' | '.join(cells)} |")


def start_ray() -> None:
    """After the AWS variables are set: Ray's workers get those that it was started with."""
    import ray

    from cosmic_ray.cluster import connect

    ray.init(
        address="local", num_cpus=4, object_store_memory=600 * 2**20, include_dashboard=False, logging_level="WARNING"
    )
    connect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, help="MB/s (10**6 bytes) of the server's answers; none by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--latency-ms", type=float, default=50, help="of every request, where there is a limit")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            compare(Path(folder), options.limit, options.latency_ms / 1e3, options.rounds, options.steps)
        finally:
            import ray

            ray.shutdown()


if __name__ == "__main__":
    main()
