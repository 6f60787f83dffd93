"""What a fault costs, and whether a run that was killed, grown, shrunk or drained ends as one that was left alone.

    python tests/benchmarks/elastic.py [--png curves.png] [--seed 0] [--folder runs]

One small job in float64, for real on a Ray of several nodes on this machine: with 1, 2 and 4 workers undisturbed;
killed three times; growing from 1 to 4 workers and shrinking again; and told that a node will go. What is compared
with the undisturbed run of one worker: the crop ids of every global batch, the loss of every step, the last weights.
Runs that are done in `--folder` are not made again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))

import numpy as np
from ledger import Ledger
from nodes_run import SCALING, Nodes
from training_jobs import Crops

from cosmic_ray.evaluation.figures import PALETTE
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.training import checkpoint
from cosmic_ray.training.record import METRICS, read_metrics

STEPS, EVERY, PROOF = 300, 20, 20
JOB = {
    "steps": STEPS,
    "optim": {"lr": 0.06},
    "precision": "fp64",
    "ema": None,
    "eval": {"every": 100, "crops": 64},
    "log_every": 1,
    "checkpoint": {"every": EVERY},
    "pause_s": 0.1,
}
NOTICED = "starting the workers again|; saved after step|crops to train on"
FLOOR = 1e-17
"""Where the picture draws differences of 0."""


@dataclass
class Run:
    """What one job left behind."""

    name: str
    out: str
    faults: list[tuple[float, str, bool]] = field(default_factory=list)
    """When (seconds since 1970), what, and whether it killed something that trained."""
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """Where faults and lines are kept once the run has ended."""
        return Path(f"{self.out}-run.json")

    @property
    def ledger(self) -> Ledger:
        return Ledger(f"{self.out}-ledger")

    def losses(self) -> np.ndarray:
        """float64 (STEPS,)."""
        lines = {line["step"]: line for line in read_metrics(f"{self.out}/{METRICS}") if "train/loss" in line}
        return np.array([lines[step]["train/loss"] for step in range(1, STEPS + 1)])

    def weights(self) -> dict[str, np.ndarray]:
        tensors = checkpoint.read_tensors(self._last_checkpoint(), checkpoint.WEIGHTS)
        return {name: each.numpy() for name, each in tensors.items()}

    def digest(self) -> str:
        """Equal where all weights are, bit for bit."""
        return checkpoint.digest(self._last_checkpoint())[:8]

    def _last_checkpoint(self) -> str:
        return checkpoint.folder(checkpoint.within(self.out), STEPS)

    def fault(self, what: str, make: Callable[[], None], kills: bool = True) -> None:
        self.faults.append((time.time(), what, kills))
        make()


@dataclass
class Change:
    """From one group of workers to the next, and what it cost."""

    what: str
    step: int
    """The last step that was taken before."""
    before: int
    after: int
    """Workers."""
    again: int
    """Steps taken again."""
    phases: tuple[float, float, float, float]
    """Seconds from the fault, or from the last step before a change that was planned, until it was noticed, the workers
    were there, they took their first step, and were done with the first one that is new."""


def changes(run: Run) -> list[Change]:
    """The changes of workers in a run, each told by the last fault before it."""
    attempts, found = run.ledger.attempts(), []
    for one, two in pairwise(attempts):
        first, last = min(two.taken), max(one.taken)
        at, what, kills = max(fault for fault in run.faults if fault[0] < two.taken[first])
        since = at if kills else one.taken[last]
        said = [(when, line) for when, line in run.lines if since < when <= two.taken[first] + 1]
        noticed = next(when for when, line in said if re.search(NOTICED, line))
        there = next(when for when, line in said if when > noticed and f"worker 0 of {two.world}: " in line)
        moments = (noticed, there, two.taken[first], two.taken[last + 2])
        phases = tuple(moment - since for moment in moments)
        found.append(Change(what, last, one.world, two.world, last + 1 - first, phases))
    return found


class Bench:
    """Makes the runs, one after another."""

    def __init__(self, folder: str, seed: int):
        made = Path(folder, "split", "manifest.json").exists()
        opened = CropStore.open(f"{folder}/crops") if made else None
        self._crops = Crops(opened, f"{folder}/split", folder) if made else Crops.make(folder, 960)
        self._seed = seed

    def made(self, name: str, make: Callable[[Run], None]) -> Run:
        """The run of that name, made now unless it was before."""
        run = Run(name, f"{self._crops.folder}/{name.replace(' ', '-').replace(',', '')}")
        if run.record.exists():
            kept = json.loads(run.record.read_text())
            return replace(run, faults=[tuple(each) for each in kept["faults"]], lines=kept["lines"])
        self._random = random.Random(f"{self._seed}, {name}")
        make(run)
        run.record.write_text(json.dumps({"faults": run.faults, "lines": run.lines}))
        print(f"{name}: {len(run.ledger.attempts())} attempts", file=sys.stderr, flush=True)
        return run

    @contextmanager
    def _started(self, run: Run, nodes: int, workers: int | list[int], **job: float) -> Iterator[Nodes]:
        keys = self._crops.keys(Path(run.out).name, **JOB | job, scaling={**SCALING, "workers": workers})
        with Nodes(keys, nodes) as started:
            yield started
        run.lines += started.lines

    def _later(self, nodes: Nodes, least: int = EVERY) -> None:
        """Go on for some steps, so that it ends anywhere between two checkpoints."""
        taken = max(step for attempt in Ledger(nodes.ledger).attempts() for step in attempt.taken)
        nodes.take(taken + least + self._random.randrange(EVERY))

    def undisturbed(self, run: Run, workers: int) -> None:
        with self._started(run, workers, workers, pause_s=0.0) as nodes:
            assert nodes.end() == 0, nodes.text()

    def killed(self, run: Run) -> None:
        with self._started(run, 3, 2) as nodes:
            nodes.take(0)
            self._later(nodes, 2 * EVERY)
            run.fault("SIGKILL of a rank", nodes.rank(1, 2).kill)
            nodes.told("worker 0 of 2: ", times=2)
            self._later(nodes, 3 * EVERY)
            run.fault("SIGKILL of a raylet and all it runs", lambda: nodes.tell("lose"))
            nodes.told("worker 0 of 2: ", times=3)
            self._later(nodes, 3 * EVERY)
            run.fault("SIGKILL of everything, the same file again", nodes.kill)
        with self._started(run, 3, 2) as nodes:
            assert nodes.end() == 0, nodes.text()

    def elastic(self, run: Run) -> None:
        with self._started(run, 1, [1, 4], pause_s=0.2) as nodes:
            nodes.take(0)
            self._later(nodes)
            run.fault("a node comes", lambda: nodes.tell("add"), kills=False)
            nodes.told("worker 0 of 2: ")
            self._later(nodes)
            run.fault("two nodes come", lambda: nodes.tell("add\nadd"), kills=False)
            nodes.told("worker 0 of 4: ")
            self._later(nodes)
            for left in (3, 2):
                run.fault("SIGKILL of a raylet and all it runs", lambda: nodes.tell("lose"))
                nodes.told(f"starting the workers again(.|\n)*worker 0 of {left}: ")
                self._later(nodes)
            assert nodes.end() == 0, nodes.text()

    def drained(self, run: Run) -> None:
        with self._started(run, 3, [1, 3]) as nodes:
            nodes.take(0)
            self._later(nodes, 4 * EVERY)
            run.fault("a node is announced to go", lambda: nodes.tell("drain"), kills=False)
            assert nodes.end() == 0, nodes.text()


def tables(runs: list[Run]) -> None:
    judge, losses, weights = runs[0].ledger.batches(STEPS), runs[0].losses(), runs[0].weights()
    print(f"| run | steps | taken again | loss apart, {PROOF} steps | all | weights apart | digest | batches alike |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        there, batches = run.weights(), run.ledger.batches(STEPS)
        weight = max(float(np.abs(there[name] - value).max()) for name, value in weights.items())
        same = sum(one == two for one, two in zip(batches, judge, strict=True))
        apart = np.abs(run.losses() - losses)
        figures = f"{apart[:PROOF].max():.1e} | {apart.max():.1e} | {weight:.1e} | {run.digest()} | {same} of {STEPS}"
        print(f"| {run.name} | {STEPS} | {run.ledger.replayed(STEPS)} | {figures} |")
    print(
        "\n| fault | at step | workers | taken again | noticed, s | workers there, s | first step, s | first new, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for change in (change for run in runs for change in changes(run)):
        phases = " | ".join(f"{phase:.1f}" for phase in change.phases)
        print(f"| {change.what} | {change.step} | {change.before} to {change.after} | {change.again} | {phases} |")


def draw(runs: list[Run], png: str) -> None:
    """The loss curves laid over each other, and their differences from the first."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure((9, 6), layout="constrained")
    curves, differences = figure.subplots(2, 1, sharex=True)
    steps, reference = np.arange(STEPS), runs[0].losses()
    for number, run in enumerate(runs):
        width, colour = 5.0 - 0.8 * number, PALETTE[number]
        curves.plot(steps, run.losses(), color=colour, linewidth=width, label=run.name)
        if number:
            apart = np.maximum(np.abs(run.losses() - reference), FLOOR)
            differences.plot(steps, apart, color=colour, linewidth=1, label=run.name)
        for change in changes(run):
            for axes in (curves, differences):
                axes.axvline(change.step, color=colour, linewidth=0.8, linestyle=":")
            text = f"{change.what.partition(',')[0].replace(' and all it runs', '')}: {change.before} to {change.after}"
            curves.text(change.step, 13, text, rotation=90, fontsize=6, color=colour, ha="right", va="top")
    curves.set(yscale="log", ylabel="training loss")
    differences.set(yscale="log", ylabel="difference from 1 worker", xlabel="step", ylim=(FLOOR / 2, None))
    curves.legend(fontsize=7, frameon=False, loc="upper right")
    differences.text(STEPS, FLOOR, "0", fontsize=7, va="center")
    for axes in (curves, differences):
        axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(64).save(png, optimize=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--png", help="where to draw the curves")
    options.add_argument("--seed", type=int, default=0, help="of the moments of the faults")
    options.add_argument("--folder", help="where the runs are made and kept; by default they are not kept")
    given = options.parse_args()
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as folder:
        bench = Bench(str(Path(folder).absolute()), given.seed)
        ways = {"1 worker": partial(bench.undisturbed, workers=1)}
        ways |= {f"{workers} workers": partial(bench.undisturbed, workers=workers) for workers in (2, 4)}
        ways["2 workers, killed three times"] = bench.killed
        ways["1 to 4 workers, elastic"] = bench.elastic
        ways["3 workers, a node announced to go"] = bench.drained
        runs = [bench.made(name, make) for name, make in ways.items()]
        print(f"{os.cpu_count()} cores; checkpoints every {EVERY} steps, seed {given.seed}\n")
        tables(runs)
        if given.png:
            draw(runs, given.png)


if __name__ == "__main__":
    main()
