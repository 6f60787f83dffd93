"""Which settings are tried, and what is kept of the trials: plain functions and files."""

from __future__ import annotations

import io
import json
import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.config import Job
from cosmic_ray.errors import DataError
from cosmic_ray.output import claim
from cosmic_ray.tuning.propose import propose
from cosmic_ray.tuning.space import Range
from cosmic_ray.tuning.trials import Trial, Trials, best, table

SPACE = {
    "lr": Range(log=(1e-5, 1e-1)),
    "share": Range(uniform=(-1.0, 2.0)),
    "depth": Range(int=(1, 6)),
    "way": Range(choice=["a", None, [1, 2]]),
}


def loss(found: dict) -> float:
    return (math.log10(found["lr"]) + 3) ** 2 + abs(found["depth"] - 4)


def search(trials: list[Trial], number: int, seed: int = 0) -> list[Trial]:
    """Go on until there are so many trials, one after another, some stopped and some failed."""
    while len(trials) < number:
        found = propose(SPACE, seed, len(trials), trials, "min")
        ended = [("finished", [(10, loss(found))]), ("stopped", [(5, loss(found) + 1)]), ("failed", [])]
        state, values = ended[(0, 1, 0, 0, 2)[len(trials) % 5]]
        trials = [*trials, Trial(len(trials), found, state, values)]
    return trials


@settings(deadline=None, max_examples=40)
@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_proposals_lie_in_the_space(seed, number):
    found = propose(SPACE, seed, number, [], "min")
    assert 1e-5 <= found["lr"] <= 1e-1 and -1 <= found["share"] <= 2
    assert found["depth"] in range(1, 7) and found["way"] in ["a", None, [1, 2]]


def test_an_interrupted_search_proposes_what_an_undisturbed_one_does():
    whole = search([], 14)
    for told in (3, 7, 12):
        assert search(whole[:told], 14) == whole


def test_seeds_differ_and_trials_differ():
    drawn = [propose(SPACE, seed, number, [], "min")["lr"] for seed in range(3) for number in range(3)]
    assert len(set(drawn)) == 9


def test_it_learns():
    """Over some seeds, the later trials are better than those drawn at random."""
    early, late = [], []
    for seed in range(5):
        values = [loss(trial.settings) for trial in search([], 30, seed)]
        early, late = early + values[:6], late + values[-10:]
    assert sorted(late)[len(late) // 2] < sorted(early)[len(early) // 2]


def test_failed_settings_are_kept_away_from():
    """Rates above a half failed, those below were all the same: later proposals are mostly below."""
    space = {"lr": Range(uniform=(0.0, 1.0))}
    low = [Trial(number, {"lr": number / 20}, "finished", [(10, 1.0)]) for number in range(10)]
    high = [Trial(number, {"lr": number / 20}, "failed") for number in range(10, 20)]
    proposed = [propose(space, 0, number, low + high, "min")["lr"] for number in range(20, 60)]
    assert sum(rate > 0.5 for rate in proposed) < 10


def test_the_best_is_of_those_that_finished():
    trials = [
        Trial(0, {}, "finished", [(5, 1.0), (10, 3.0)]),
        Trial(1, {}, "stopped", [(5, 0.5)]),
        Trial(2, {}, "finished", [(10, 2.0)]),
        Trial(3, {}, "failed", [(5, 0.1)]),
        Trial(4, {}, "finished", [(10, 2.0)]),
    ]
    assert best(trials, "min").number == 2 and best(trials, "max").number == 0
    assert best(trials[1:2], "min").number == 1
    assert best(trials[3:4], "min") is None


class Searching(Job):
    kind = "searching"


def test_trials_outlive_the_process(tmp_path):
    with claim(Searching(out=str(tmp_path))) as output:
        trials = Trials(output)
        trials.put(Trial(1, {"lr": 0.1, "way": [1, 2]}))
        trials.put(Trial(0, {"lr": 1e-5, "way": None}, "finished", [(10, 1.25)]))
        trials.put(trials[1].with_value(10, 3.0).with_value(20, 2.0).with_value(30, 1.5).with_value(20, 2.0))
        again = Trials(output)
    assert again.all() == trials.all() and [trial.number for trial in again.all()] == [0, 1]
    assert again[1].values == [(10, 3.0), (20, 2.0)], "a resumed trial makes its later values again"
    assert [trial.number for trial in again.ended()] == [0]


@pytest.mark.parametrize("text", ["{", "[]", '{"number": 1}', '{"number": 1, "settings": {}, "values": [[1, "x"]]}'])
def test_a_damaged_trial_is_named(tmp_path, text):
    with claim(Searching(out=str(tmp_path))) as output:
        output.write("trials/0001.json", text.encode())
        with pytest.raises(DataError, match=r"trials/0001\.json"):
            Trials(output)


def test_the_table_keeps_types():
    rows = pq.read_table(io.BytesIO(table(search([], 8)))).to_pylist()
    assert [row["trial"] for row in rows] == [f"{number:04}" for number in range(8)]
    assert all(isinstance(row["lr"], float) and isinstance(row["depth"], int) for row in rows)
    assert {json.dumps(json.loads(row["way"])) for row in rows} <= {'"a"', "null", "[1, 2]"}
    assert rows[4]["value"] is None and rows[1]["state"] == "stopped"
