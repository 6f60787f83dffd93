"""`compare`: arms paired by seed, verdicts that may be a loss, and nothing compared that was not judged alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.evaluation.compare import Compare, compared, holm
from cosmic_ray.evaluation.scores import SCORES, scores_of
from cosmic_ray.jobs import make


def evaluation(folder: Path, name: str, scores: dict[str, float], **changes: Any) -> str:
    """What an evaluate job publishes, as far as `compare` reads it."""
    hashes = {key: {"uri": key, "content_hash": key * 3} for key in ("cells", "split", "fm")}
    manifest = {
        "format": "cosmic-ray/evaluate",
        "version": 1,
        "scores": scores,
        "part": "val",
        "cells": 500,
        "flaws": [],
        "opened": None,
        "simulated": True,
        "content_hash": name,
        "lineage": hashes,
    } | changes
    storage.write_bytes(str(folder / name / "manifest.json"), json.dumps(manifest).encode())
    return str(folder / name)


def arms_of(**values: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {arm: [{"scores": {"swd": value}} for value in seeds] for arm, seeds in values.items()}


def verdict(paper: list[float], better: list[float], margin: float) -> dict[str, Any]:
    rows = compared(arms_of(paper=paper, better=better), "paper", {"swd": margin})
    return next(row for row in rows if row["arm"] == "better")


def test_a_gain_is_that_of_the_paired_t_test_with_more_being_better():
    random = np.random.default_rng(0)
    paper = random.normal(1.0, 0.3, 5)
    better = paper - 0.1 + random.normal(0, 0.02, 5)
    row = verdict(paper.tolist(), better.tolist(), 0.05)
    by_scipy = stats.ttest_rel(paper, better)
    interval = by_scipy.confidence_interval(0.95)
    assert row["gain"] == pytest.approx((paper - better).mean())
    assert (row["gain_low"], row["gain_high"], row["p"]) == pytest.approx((*interval, by_scipy.pvalue))
    assert row["mean"] == pytest.approx(better.mean()) and row["verdict"] == "better"


@pytest.mark.parametrize(
    ("shift", "spread", "margin", "expected"),
    [
        (-0.2, 0.01, 0.1, "better"),
        (0.2, 0.01, 0.1, "worse"),
        (-0.02, 0.001, 0.1, "better, by less than the margin"),
        (0.02, 0.001, 0.1, "worse, by less than the margin"),
        (0.0, 0.01, 0.1, "equivalent"),
        (0.0, 0.5, 0.1, "undecided"),
    ],
)
def test_verdicts_may_be_a_loss_or_none(shift, spread, margin, expected):
    paper = [1.0, 1.1, 0.9, 1.05, 0.95]
    noise = spread * np.array([1.0, -1.0, 0.5, -0.7, 0.2])
    assert verdict(paper, (np.array(paper) + shift + noise).tolist(), margin)["verdict"] == expected


def test_without_a_margin_there_is_no_verdict():
    rows = compared(arms_of(paper=[1.0, 1.1], better=[0.5, 0.7]), "paper", {})
    assert [row["verdict"] for row in rows] == [None, None] and rows[1]["gain"] == pytest.approx(0.45)


def test_several_verdicts_are_corrected_by_holm():
    rows = [{"verdict": "better", "p": p, "p_holm": None} for p in (0.03, 0.001, 0.04)] + [{"verdict": None, "p": 0.2}]
    holm(rows, 0.05)
    assert [row["p_holm"] for row in rows[:3]] == pytest.approx([0.06, 0.003, 0.06])
    assert [row["verdict"].startswith("better (not") for row in rows[:3]] == [True, False, True]


def test_every_score_is_one_that_an_evaluation_makes():
    figures = {metric: {"value": {"mean": 0.4}} for metric in ("cov", "swd", "knna")}
    accuracy = {"generated": {"mean": 0.9, "accuracy": 0.9}}
    genes = {"pearson": 0.1, "pearson_above_0.4": 0.2, "error": 0.3, "crps": 0.4, "accuracy": accuracy}
    results = {
        "images": {
            "groups": {"all": figures},
            "near_train": {"mean": 0.03},
            "near_train_of_real": 0.01,
            "accuracy": accuracy,
        },
        "expression": genes | {"interval": {"level": 0.9, "held": 0.85}},
        "cycle": genes,
        "planted": {"all": {"auroc": 0.7}},
    }
    found = scores_of(results)
    assert set(found) == set(SCORES)
    assert found["knna_excess"] == pytest.approx(0.1) and found["coverage_error"] == pytest.approx(0.05)
    assert found["near_train"] == pytest.approx(0.02)


def test_the_job(tmp_path):
    paper = [evaluation(tmp_path, f"paper-{k}", {"swd": 1 + 0.1 * k, "cov": 0.4}) for k in range(3)]
    better = [evaluation(tmp_path, f"better-{k}", {"swd": 0.8 + 0.11 * k, "cov": 0.4, "crps": 1}) for k in range(3)]
    keys = {"arms": {"paper": paper, "better": better}, "baseline": "paper", "margins": {"swd": 0.05, "cov": 0.02}}
    job = make({"kind": "compare", "out": str(tmp_path / "out"), **keys})
    job.check()
    found = job.run()
    rows = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    assert rows == found["figures"] and {row["figure"] for row in rows} == {"swd", "cov"}
    verdicts = {row["figure"]: row["verdict"] for row in rows if row["arm"] == "better"}
    assert verdicts == {"swd": "better", "cov": "equivalent"}
    assert found["simulated"] is True and found["seeds"] == 3 and found["opened_besides"] is None
    assert job.run() == found


def test_openings_of_test_beside_the_compared_ones_are_told(tmp_path):
    def opened(arm: str, k: int) -> str:
        others = [f"{other}-{n}" for other in ("paper", "better") for n in range(2) if (other, n) != (arm, k)]
        told = {"key": f"{arm}-{k}", "others": [*others, "tried before"]}
        return evaluation(tmp_path, f"{arm}-{k}", {"swd": 1.0 + k}, part="test", opened=told)

    arms = {arm: [opened(arm, k) for k in range(2)] for arm in ("paper", "better")}
    assert Compare(out=str(tmp_path / "out"), arms=arms, baseline="paper").run()["opened_besides"] == 1


def test_flaws_travel(tmp_path):
    arms = {
        arm: [evaluation(tmp_path, f"{arm}-{k}", {"swd": 1.0}, flaws=[f"not held out: {arm}"]) for k in range(2)]
        for arm in ("paper", "better")
    }
    found = Compare(out=str(tmp_path / "out"), arms=arms, baseline="paper").run()
    assert found["flaws"] == ["not held out: better", "not held out: paper"]


@pytest.mark.parametrize("changes", [{"part": "test"}, {"cells": 499}, {"lineage": {"cells": {"content_hash": "x"}}}])
def test_what_was_not_judged_alike_is_refused(tmp_path, changes):
    paper = [evaluation(tmp_path, f"paper-{k}", {"swd": 1.0}) for k in range(2)]
    better = [evaluation(tmp_path, f"better-{k}", {"swd": 1.0}, **(changes if k else {})) for k in range(2)]
    with pytest.raises(DataError, match="differs from"):
        Compare(out=str(tmp_path / "out"), arms={"paper": paper, "better": better}, baseline="paper").run()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"baseline": "papre"}, "must be one of two arms"),
        ({"arms": {"paper": ["a", "b"], "better": ["c", "d", "e"]}}, "as many evaluations"),
        ({"arms": {"paper": ["a", "b"], "better": ["c", "a"]}}, "stands twice"),
        ({"margins": {"swdd": 0.1}}, "no figures swdd"),
        ({"margins": {"swd": -0.1}}, "greater than 0"),
    ],
)
def test_a_job_that_cannot_compare_is_refused(keys, match):
    plain = {"kind": "compare", "out": "o", "baseline": "paper", "arms": {"paper": ["a", "b"], "better": ["c", "d"]}}
    with pytest.raises(JobError, match=match):
        make(plain | keys)
