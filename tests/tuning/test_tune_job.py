"""A `tune` job's file: what may vary, and what a trial's job is. Nothing starts here."""

from __future__ import annotations

import pytest
import yaml

from cosmic_ray.config import parse_yaml
from cosmic_ray.errors import JobError
from cosmic_ray.jobs import make
from cosmic_ray.reach import require_reachable
from cosmic_ray.tuning.job import Tune

BASE = {"kind": "pretrain-mae", "crops": "c", "split": "s", "steps": 60, "eval": {"every": 10}, "tracking": None}
SPACE = {"optim.lr": {"log": [1e-4, 1e-2]}, "ema": {"choice": [0.9, None]}, "model.depth": {"int": [2, 6]}}


def job(**changes: object) -> Tune:
    return make({"kind": "tune", "out": "o", "job": BASE, "space": SPACE, "asha": {"grace": 20}} | changes)


def varying(key: str, **values: object) -> dict[str, object]:
    return {"space": {key: values}}


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        (varying("optim.lrr", log=[1, 2]), "space.optim.lrr", "did you mean 'lr'"),
        (varying("optimm.lr", log=[1, 2]), "space.optimm.lr", "did you mean 'optim'"),
        (varying("ema.decay", log=[1, 2]), "space.ema.decay", "unknown|valid number"),
        (varying("ema", uniform=[0.9, 1.5]), "space.ema", "less than 1"),
        (varying("ema", choice=[0.9, "much"]), "space.ema", "valid number"),
        (varying("model.depth", int=[0, 3]), "space.model.depth", "greater than or equal to 1"),
        (varying("model.depth", uniform=[1.5, 3]), "space.model.depth", "valid integer"),
        (varying("model.depth", int=[1.5, 3]), "space.model.depth.int.0", "valid integer"),
        (varying("optim.lr", log=[0, 1]), "space.optim.lr", "above 0"),
        (varying("optim.lr", log=[2, 1]), "space.optim.lr", "low below high"),
        (varying("optim.lr", log=[1, float("inf")]), "space.optim.lr", "low below high"),
        (varying("optim.lr", uniform=[float("nan"), 1]), "space.optim.lr", "low below high"),
        (varying("optim.lr", log=[1, 2], choice=[1, 2]), "space.optim.lr", "exactly one"),
        (varying("optim.lr"), "space.optim.lr", "exactly one"),
        (varying("optim.lr", choice=[1]), "space.optim.lr.choice", "at least 2"),
        (varying("optim.lr", choice=[1, 2, 1]), "space.optim.lr", "twice"),
        (varying("optim.lr", choice=[1, float("inf")]), "space.optim.lr", "not JSON compliant"),
        (varying("optim.lr", logg=[1, 2]), "space.optim.lr.logg", "did you mean 'log'"),
        ({"space": {}}, "space", "at least 1"),
        ({"metric": "train/loss"}, "metric", "val/"),
        ({"asha": {"grace": 5}}, "asha.grace", "evaluated every 10 steps"),
        ({"asha": {"grace": 60}}, "asha.grace", "has 60 steps"),
        ({"job": BASE | {"optm": 1}}, "job.optm", "did you mean 'optim'"),
        ({"job": BASE | {"kind": "split"}}, "job.kind", "trains no network"),
        ({"job": BASE | {"kind": "pretrain"}}, "job.kind", "did you mean 'pretrain-mae'"),
        ({"job": {"crops": "c"}}, "job.kind", "missing"),
        ({"job": "nowhere.yaml"}, "job.file", "cannot be read"),
    ],
)
def test_refused_with_its_key(changes, key, text):
    with pytest.raises(JobError, match=text) as error:
        job(**changes)
    assert error.value.key == key or str(error.value).startswith(key), str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "key",
    ["out", "kind", "crops", "split", "init_from", "where", "seed", "recipe", "eval.every", "eval.crops",
     "scaling.workers", "tracking.uri", "checkpoint.every", "micro_batch"],
)  # fmt: skip
def test_what_would_make_trials_incomparable_cannot_vary(key):
    with pytest.raises(JobError, match="must not vary") as error:
        job(space={key: {"choice": ["a", "b"]}})
    assert error.value.key == f"space.{key}"


def test_a_space_may_be_nested():
    nested = job(
        space={"optim": {"lr": {"log": [1e-4, 1e-2]}}, "ema": {"choice": [0.9, None]}, "model.depth": {"int": [2, 6]}}
    )
    assert nested.space == job().space


def test_a_trial_is_the_job_with_its_settings_and_registers_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    searched = job(job=BASE | {"tracking": {"register_as": "fm", "uri": "sqlite:///here.db"}})
    trial = make(searched.trial("0003", {"optim.lr": 1.5e-05, "ema": None, "model.depth": 3}))
    assert (trial.optim.lr, trial.ema, trial.model.depth, trial.steps) == (1.5e-05, None, 3, 60)
    assert trial.out == f"{tmp_path}/o/trials/0003" and trial.crops == f"{tmp_path}/c"
    assert trial.tracking.register_as is None and trial.tracking.uri == f"sqlite:///{tmp_path}/here.db"
    found = make(searched.with_settings({"optim.lr": 1.5e-05}))
    assert found.tracking.register_as == "fm" and found.out == f"{tmp_path}/o/best"


def test_an_untracked_job_stays_untracked():
    assert make(job().trial("0000", {})).tracking is None


def test_a_password_of_the_environment_is_in_no_trials_file(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    searched = job(job={key: value for key, value in BASE.items() if key != "tracking"})
    assert searched.untold_tracking() is None and searched.nested()["job"].untold_tracking() == "tracking.uri"
    assert "secret" not in str(searched.trial("0000", {}))


def test_the_job_may_be_a_file_with_keys_laid_over_it(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(BASE | {"optim": {"lr": 1e-3, "clip": 2.0}}))
    plain = job(job=str(file)).base
    changed = job(job={"file": str(file), "optim": {"lr": 5e-3}}).base
    assert plain.optim.lr == 1e-3
    assert (changed.optim.lr, changed.optim.clip, changed.steps) == (5e-3, 2.0, 60)


def test_a_resolved_search_is_the_same_search():
    """As it is submitted to a cluster."""
    searched = job()
    again = make(parse_yaml(yaml.safe_dump(searched.resolved()), "resolved"))
    assert again.resolved() == searched.resolved()
    assert again.fingerprint() == searched.fingerprint()


def test_how_is_not_what():
    assert (
        job(concurrent=3).fingerprint()
        == job(job=BASE | {"scaling": {"workers": 2}}).fingerprint()
        == job().fingerprint()
    )
    for changes in (
        {"seed": 1},
        {"trials": 4},
        {"job": BASE | {"eval": {"every": 5}}},
        varying("ema", choice=[0.9, 0.8]),
    ):
        assert job(**changes).fingerprint() != job().fingerprint()


def test_relative_paths_of_the_job_are_not_submitted():
    with pytest.raises(JobError, match=r"job.crops = 'c'"):
        require_reachable(job(out="/there"))


def test_the_jobs_inputs_are_checked_at_the_door(tmp_path):
    with pytest.raises(JobError) as error:
        job(job=BASE | {"crops": str(tmp_path), "split": str(tmp_path)}).check()
    assert error.value.key == "crops"
