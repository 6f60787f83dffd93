"""What Ray adds to a training step: the same job's loop under torchrun and under Ray Train with Ray Data, in turns.

    python tests/benchmarks/train_overhead.py [--rounds 5] [--steps 250] [--sleep-ms 20] [--workers 2]

Every step sleeps, so that it takes the same time on a busy machine and whatever is beside it shows. Timed on rank 0,
from one step's data to the next; the first fifth of a run is left out. The difference of the medians comes with the
range that 95 of 100 resamplings of the rounds give.
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


class SleepingJob(PretrainMAE):
    """As `pretrain-mae`; each step sleeps, and rank 0 writes down when it got its data."""

    incidental: ClassVar[frozenset[str]] = PretrainMAE.incidental | {"sleep_s"}
    sleep_s: float

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        loop = super().loop(callbacks, **place)
        loop.data.shares = self._slowed(loop.data.shares, f"{self.out}-times-{place.get('rank', 0)}.json")
        return loop

    def _slowed(self, shares: Callable[[int, int], Iterator[Share]], path: str) -> Callable[..., Iterator[Share]]:
        def slowed(first_step: int, steps: int) -> Iterator[Share]:
            times = []
            for share in shares(first_step, steps):
                times.append(time.perf_counter())
                yield share
                time.sleep(self.sleep_s)
            Path(path).write_text(json.dumps(times))

        return slowed


def under_torchrun(job: SleepingJob, workers: int) -> None:
    Path(f"{job.out}.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    subprocess.run([*command, __file__, "--rank-of", f"{job.out}.json"], check=True, capture_output=True)


def one_rank(path: str) -> None:
    """What torchrun starts."""
    from cosmic_ray.ingest.stream import plain_batches

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    job = SleepingJob.model_validate_json(Path(path).read_text())
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    job.loop(stream=plain_batches, rank=rank, world=world).run()
    torch.distributed.destroy_process_group()


def milliseconds(job: SleepingJob) -> np.ndarray:
    times = json.loads(Path(f"{job.out}-times-0.json").read_text())
    return 1000 * np.diff(times[len(times) // 5 :])


def difference(plain: list[np.ndarray], with_ray: list[np.ndarray]) -> tuple[float, float, float]:
    """Of the medians, with its 95 % range."""
    rng, rounds = np.random.default_rng(0), len(plain)

    def between(picked: np.ndarray) -> float:
        one, other = (np.concatenate([each[index] for index in picked]) for each in (plain, with_ray))
        return float(np.median(other) - np.median(one))

    drawn = [between(rng.integers(0, rounds, rounds)) for _ in range(2000)]
    return between(np.arange(rounds)), *map(float, np.percentile(drawn, [2.5, 97.5]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=250)
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
    found: dict[str, list[np.ndarray]] = {"torchrun": [], "Ray Train": []}
    with tempfile.TemporaryDirectory() as folder:
        crops = Crops.make(folder, 1000, size=64, rows_per_group=50)
        for number in range(given.rounds):
            for name, steps in found.items():
                keys = crops.keys(f"{name.split()[0]}-{number}", steps=given.steps, global_batch=32)
                rare = {"eval": {"every": 10**6, "crops": 8}, "checkpoint": {"every": 10**6}, "log_every": 20}
                keys |= rare | {"scaling": {"workers": given.workers, "cpus_per_worker": 0.5}}
                job = SleepingJob(**keys, sleep_s=given.sleep_ms / 1000)
                under_torchrun(job, given.workers) if name == "torchrun" else job.run()
                steps.append(milliseconds(job))
                print(f"round {number}, {name}: median {np.median(steps[-1]):.2f} ms", flush=True)
    ray.shutdown()
    print(f"\n{given.workers} workers, {given.rounds} rounds of {given.steps} steps that sleep {given.sleep_ms:g} ms\n")
    print("| loop under | median step, ms | middle half, ms | medians of the rounds, ms |\n|---|---|---|---|")
    for name, steps in found.items():
        every = np.concatenate(steps)
        middles = [np.median(each) for each in steps]
        low, high = np.percentile(every, [25, 75])
        print(f"| {name} | {np.median(every):.2f} | {low:.2f}..{high:.2f} | {min(middles):.2f}..{max(middles):.2f} |")
    added, low, high = difference(*found.values())
    print(f"\nRay Train adds {added:.2f} ms a step (95 %: {low:.2f} to {high:.2f}).")


if __name__ == "__main__":
    main()
