"""Nodes that come and go while a run trains: its global batches stay what they were, sample by sample.

The judge is the ledger of a run of one process without Ray: ids, order and membership of every committed step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger import Ledger, LedgerJob
from training_jobs import Crops, plain

from cosmic_ray.training import checkpoint

EVERY = 20
ELASTIC = {
    "steps": 100_000,
    "schedule": {"kind": "constant", "warmup": 0.0},
    "optim": {"lr": 1e-3},
    "precision": "fp64",
    "ema": None,
    "eval": {"every": 1000, "crops": 8},
    "log_every": 10,
    "checkpoint": {"every": EVERY},
}
SCALING = {"cpus_per_worker": 0.5, "cpus_per_reader": 0.25, "hang_timeout_s": 60.0, "grow_every_s": 1.0}
PATIENCE_S = 200


class Nodes:
    """`nodes_run.py` in a process of its own: one node for each worker."""

    def __init__(self, keys: dict[str, Any], nodes: int):
        self.out, self.ledger = keys["out"], f"{keys['out']}-ledger"
        path = Path(f"{self.out}.json")
        path.write_text(json.dumps({**keys, "ledger": self.ledger}))
        here = Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here.parent / 'training'}"}
        environment.pop("RAY_ADDRESS", None)
        self.log = Path(f"{self.out}.log")
        self._process = subprocess.Popen(
            [sys.executable, str(here / "nodes_run.py"), str(path), str(nodes)],
            stdin=subprocess.PIPE, stdout=self.log.open("a"), stderr=subprocess.STDOUT, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait(30)

    def tell(self, word: str) -> None:
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def step(self) -> int:
        newest = checkpoint.newest(f"{self.out}/checkpoints")
        return int(newest.rsplit("-", 1)[1]) if newest else 0

    def told(self, text: str, times: int = 1) -> None:
        """Wait until the log says `text` so often."""
        self.wait(lambda: len(re.findall(text, self.log.read_text())) >= times, text)

    def go_on(self, steps: int = 2 * EVERY) -> None:
        """Wait until so many more steps are committed."""
        wanted = self.step() + steps
        self.wait(lambda: self.step() >= wanted, f"step {wanted}")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self._process.poll() is None, f"ended while waiting for {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{self.log.read_text()}"
            time.sleep(0.1)

    def end(self) -> int:
        return self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Crops:
    return Crops.make(str(tmp_path_factory.mktemp("elastic")))


def assert_undisturbed(crops: Crops, run: Nodes) -> Ledger:
    """Every committed global batch, and float64 weights to 1e-9, are those of one process that was left alone."""
    steps, name = run.step(), f"{Path(run.out).name}-undisturbed"
    keys = crops.keys(name, **ELASTIC | {"steps": steps, "checkpoint": {"every": steps}})
    alone = LedgerJob(**keys, ledger=f"{crops.folder}/{name}-ledger")
    plain(0, 1, alone)
    ledger = Ledger(run.ledger)
    assert ledger.batches(steps) == Ledger(alone.ledger).batches(steps)
    wanted, found = (
        checkpoint.read_tensors(checkpoint.newest(f"{out}/checkpoints"), checkpoint.WEIGHTS)
        for out in (alone.out, run.out)
    )
    for key, value in wanted.items():
        assert np.allclose(found[key], value, rtol=0, atol=1e-9), key
    return ledger


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_grows_when_a_node_comes_and_shrinks_when_it_dies(crops):
    keys = crops.keys("elastic", **ELASTIC, scaling={**SCALING, "workers": [1, 2]})
    with Nodes(keys, nodes=1) as run:
        run.told("worker 0 of 1: ")
        run.go_on()
        run.tell("add")
        run.told("room for 1 more workers; saved after step")
        run.go_on()
        grown_at = run.step()
        assert Ledger(run.ledger).replayed(grown_at) == 0, "growing costs no step"
        run.tell("lose")
        run.told("starting the workers again from step-")
        run.told("worker 0 of 1: ", times=2)
        run.go_on()
        run.tell("stop")
        assert run.end() == 130
    ledger = assert_undisturbed(crops, run)
    assert {ledger.world(step) for step in range(run.step())} == {1, 2}
    assert ledger.world(grown_at - 1) == 2 and ledger.world(run.step() - 1) == 1
    assert ledger.replayed(run.step()) <= EVERY


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_node_that_is_announced_to_go_costs_no_step(crops):
    """A preemption notice: the run saves, leaves the node, and goes on with what is left."""
    keys = crops.keys("drained", **ELASTIC, scaling={**SCALING, "workers": [1, 3]})
    with Nodes(keys, nodes=3) as run:
        run.told("worker 0 of 3: ")
        run.go_on()
        run.tell("drain")
        run.told("1 of the nodes that train will be taken away; saved after step")
        run.told("worker 0 of 2: ")
        run.go_on()
        run.tell("stop")
        assert run.end() == 130
    assert assert_undisturbed(crops, run).replayed(run.step()) == 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_waits_for_room_for_the_fewest_and_gives_up_in_the_end(crops):
    keys = crops.keys("waiting", **ELASTIC, scaling={**SCALING, "workers": 2, "patience_s": 25.0})
    with Nodes(keys, nodes=2) as run:
        run.told("worker 0 of 2: ")
        run.go_on()
        run.tell("lose")
        run.told("waiting for room for 2 workers of 0.75 CPUs; there is for 1")
        run.tell("add")
        run.told("worker 0 of 2: ", times=2)
        run.go_on()
        run.tell("lose")
        assert run.end() == 1
    assert "no room for 2 workers in 2" in run.log.read_text()
    assert_undisturbed(crops, run)
