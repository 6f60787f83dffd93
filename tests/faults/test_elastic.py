"""Nodes that come and go while a run trains: its global batches stay what they were, sample by sample.

The judge is the ledger of a run of one process without Ray: ids, order and membership of every committed step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ledger import Ledger, LedgerJob
from nodes_run import SCALING, Nodes
from training_jobs import Crops, plain

from cosmic_ray.training import checkpoint

EVERY = 5
ELASTIC = {
    "steps": 100_000,
    "schedule": {"kind": "constant", "warmup": 0.0},
    "optim": {"lr": 1e-3},
    "precision": "fp64",
    "ema": None,
    "eval": {"every": 1000, "crops": 8},
    "log_every": 10,
    "checkpoint": {"every": EVERY},
    "pause_s": 0.1,
}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Crops:
    return Crops.make(str(tmp_path_factory.mktemp("elastic")))


def assert_undisturbed(crops: Crops, run: Nodes) -> Ledger:
    """Every committed global batch, and float64 weights to 1e-9, are those of one process that was left alone."""
    steps, name = run.step(), f"{Path(run.out).name}-undisturbed"
    keys = crops.keys(name, **ELASTIC | {"steps": steps, "checkpoint": {"every": steps}, "pause_s": 0.0})
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
        run.go_on(2 * EVERY)
        run.tell("add")
        run.told("room for 1 more workers; saved after step")
        run.go_on(2 * EVERY)
        grown_at = run.step()
        assert Ledger(run.ledger).replayed(grown_at) == 0, "growing costs no step"
        run.tell("lose")
        run.told("starting the workers again from step-")
        run.told("worker 0 of 1: ", times=2)
        run.go_on(2 * EVERY)
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
        run.go_on(2 * EVERY)
        run.tell("drain")
        run.told("1 of the nodes that train will be taken away; saved after step")
        run.told("worker 0 of 2: ")
        run.go_on(2 * EVERY)
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
        run.go_on(2 * EVERY)
        run.tell("lose")
        run.told("waiting for room for 2 workers of 0.75 CPUs; there is for 1")
        run.tell("add")
        run.told("worker 0 of 2: ", times=2)
        run.go_on(2 * EVERY)
        run.tell("lose")
        assert run.end() == 1
    assert "no room for 2 workers in 2" in run.text()
    assert_undisturbed(crops, run)
