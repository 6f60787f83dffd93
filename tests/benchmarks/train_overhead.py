"""What Ray adds to a training step: the same job in a plain loop and in a Ray Train worker with Ray Data, in turns.

    python tests/benchmarks/train_overhead.py [--rounds 3] [--steps 400]

A small network, so that a step is short and whatever Ray took would show. One line a round: the median and the least
milliseconds of a step over lines of 20 steps, checkpoints and evaluations left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from training_jobs import Crops

from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.training.job import PretrainMAE
from cosmic_ray.training.record import METRICS, MetricsFile, read_metrics


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=400)
    given = options.parse_args()
    import ray

    torch.set_num_threads(1)
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        crops = Crops.make(folder, 1000, size=64, rows_per_group=50)
        for number in range(given.rounds):
            changes = {"steps": given.steps, "global_batch": 32, "log_every": 20, "eval": {"every": 10**6, "crops": 8}}
            plain = crops.job(f"plain-{number}", **changes, checkpoint={"every": 10**6})
            plain.loop([MetricsFile(f"{plain.out}/{METRICS}")], stream=plain_batches).run()
            workers = crops.job(f"ray-{number}", **changes, checkpoint={"every": 10**6})
            workers.run()
            print(f"round {number}: plain loop {milliseconds(plain)}; Ray Train {milliseconds(workers)}", flush=True)
    ray.shutdown()


def milliseconds(job: PretrainMAE) -> str:
    lines = read_metrics(f"{job.out}/{METRICS}")
    speeds = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line][2:]
    steps = [1000 * job.global_batch / speed for speed in speeds]
    return f"{statistics.median(steps):.2f} ms (least {min(steps):.2f})"


if __name__ == "__main__":
    main()
