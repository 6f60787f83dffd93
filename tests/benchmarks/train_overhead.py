"""What Ray adds to a training step: the same job's loop under torchrun and under Ray Train with Ray Data, in turns.

    python tests/benchmarks/train_overhead.py [--pairs 60] [--block 10] [--sleep-ms 20] [--workers 2]

Both runs are alive all the time, and take turns of a block of steps each: one of them trains, the other waits for its
data. Every step sleeps, so that it takes the same time on a busy machine and whatever is beside it shows. Timed on
rank 0, from one step's data to the next. Two blocks that follow each other are a pair (torchrun first in one, Ray Train
in the next, and so on); the difference of their medians is taken pair by pair, and what is told is the median of these
with the range that 95 of 100 resamplings of the pairs give. Ray's own processes are there beside both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from training_jobs import Crops

from cosmic_ray.training.loop import Callback, Loop
from cosmic_ray.training.mae_job import PretrainMAE
from cosmic_ray.training.objective import Share

TORCHRUN, RAY = "torchrun", "Ray Train"
WARM_PAIRS = 3
PATIENCE_S = 180.0


def whose(turn: int) -> str:
    return (TORCHRUN, RAY, RAY, TORCHRUN)[turn % 4]


class SleepingJob(PretrainMAE):
    """As `pretrain-mae`; each step sleeps, and rank 0 waits for its turn and writes down when it got its data."""

    incidental: ClassVar[frozenset[str]] = PretrainMAE.incidental | {"sleep_s", "name", "turns", "block"}
    sleep_s: float
    name: str
    turns: str
    """The file that holds the number of the turn."""
    block: int
    """Steps a turn."""

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        loop = super().loop(callbacks, **place)
        loop.data.shares = self._slowed(loop.data.shares, place.get("rank", 0))
        return loop

    def _slowed(self, shares: Callable[[int, int], Iterator[Share]], rank: int) -> Callable[..., Iterator[Share]]:
        def slowed(first_step: int, steps: int) -> Iterator[Share]:
            times, turn = [], 0
            for number, share in enumerate(shares(first_step, steps)):
                if rank == 0 and number % self.block == 0:
                    turn = self._await_turn()
                times.append((turn, time.perf_counter()))
                yield share
                time.sleep(self.sleep_s)
                if rank == 0 and number % self.block == self.block - 1:
                    _replace(self.turns, str(turn + 1))
            if rank == 0:
                Path(f"{self.out}-times.json").write_text(json.dumps(times))

        return slowed

    def _await_turn(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while whose(turn := int(Path(self.turns).read_text())) != self.name:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: the other run has not ended its turn")
            time.sleep(0.005)
        return turn


def _replace(path: str, text: str) -> None:
    Path(f"{path}.next").write_text(text)
    os.replace(f"{path}.next", path)


def under_torchrun(job: SleepingJob, workers: int) -> subprocess.Popen:
    Path(f"{job.out}.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return subprocess.Popen(
        [*command, __file__, "--rank-of", f"{job.out}.json"], stdout=subprocess.DEVNULL, start_new_session=True
    )


def one_rank(path: str) -> None:
    """What torchrun starts."""
    from cosmic_ray.ingest.stream import plain_batches

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    job = SleepingJob.model_validate_json(Path(path).read_text())
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    job.loop(stream=plain_batches, rank=rank, world=world).run()
    torch.distributed.destroy_process_group()


def block_medians(job: SleepingJob) -> np.ndarray:
    """Of each block without its first step, in ms; the first pairs are left out."""
    times: dict[int, list[float]] = {}
    for turn, at in json.loads(Path(f"{job.out}-times.json").read_text()):
        times.setdefault(turn, []).append(at)
    return np.array([1000 * np.median(np.diff(times[turn])[1:]) for turn in sorted(times)])[WARM_PAIRS:]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=60)
    options.add_argument("--block", type=int, default=10)
    options.add_argument("--sleep-ms", type=float, default=20.0)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rank-of", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.rank_of:
        one_rank(given.rank_of)
        return
    import ray
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        crops = Crops.make(folder, 1000, size=64, rows_per_group=50)
        turns = f"{folder}/turns"
        _replace(turns, "0")
        jobs = {}
        for name in (TORCHRUN, RAY):
            steps = (given.pairs + WARM_PAIRS) * given.block
            keys = crops.keys(name.split()[0], steps=steps, global_batch=32)
            rare = {"eval": {"every": 10**6, "crops": 8}, "checkpoint": {"every": 10**6}, "log_every": 20}
            keys |= rare | {"scaling": {"workers": given.workers, "cpus_per_worker": 0.5}}
            sleeping = {"sleep_s": given.sleep_ms / 1000, "name": name, "turns": turns, "block": given.block}
            jobs[name] = SleepingJob(**keys, **sleeping)
        torchrun = under_torchrun(jobs[TORCHRUN], given.workers)
        try:
            jobs[RAY].run()
            if torchrun.wait(PATIENCE_S):
                raise RuntimeError("torchrun failed")
        finally:
            torchrun.terminate()
        found = {name: block_medians(job) for name, job in jobs.items()}
    ray.shutdown()
    print(f"\n{given.workers} workers, {given.pairs} pairs of {given.block} steps that sleep {given.sleep_ms:g} ms\n")
    print("| loop under | median step, ms | middle half of the blocks, ms |\n|---|---|---|")
    for name, blocks in found.items():
        low, high = np.percentile(blocks, [25, 75])
        print(f"| {name} | {np.median(blocks):.2f} | {low:.2f}..{high:.2f} |")
    added, rng = found[RAY] - found[TORCHRUN], np.random.default_rng(0)
    drawn = np.median(rng.choice(added, (10_000, len(added))), axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    print(f"\nRay Train adds {np.median(added):.2f} ms a step (95 %: {low:.2f} to {high:.2f}).")


if __name__ == "__main__":
    main()
