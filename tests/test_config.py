"""Job files: what is accepted, and what a refusal says."""

from __future__ import annotations

import pickle
from typing import ClassVar, Literal

import pytest

from cosmic_ray.config import Config, Job, apply_overrides, parse_yaml, validate
from cosmic_ray.errors import DataError, FencedError, JobError, JobErrors


class Scaling(Config):
    workers: int = 1
    strategy: Literal["ddp", "fsdp2"] = "ddp"


class Train(Job):
    kind: ClassVar[str] = "train"
    incidental: ClassVar[frozenset[str]] = frozenset({"scaling"})

    lr: float = 1.5e-4
    scaling: Scaling = Scaling()
    init_from: str | None = None
    stages: list[Scaling] = []


def make(*overrides: str) -> Train:
    return validate(Train, apply_overrides({"out": "o"}, list(overrides)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5e-4", 1.5e-4), ("3", 3), ("1_000", 1000), ("on_bad", "on_bad"), (".5", 0.5), ("1e", "1e")],
)
def test_yaml_numbers_are_yaml_1_2(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(JobError, match="'lr' stands twice"):
        parse_yaml("lr: 1\nlr: 2", "job.yaml")


def test_yaml_cannot_make_python_objects():
    with pytest.raises(JobError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "job.yaml")


def test_overrides_reach_nested_keys_and_leave_the_file_alone():
    tree = {"out": "o", "scaling": {"workers": 1}}
    result = apply_overrides(tree, ["scaling.workers=4", "lr=1e-3", "init_from=null"])
    assert result == {"out": "o", "scaling": {"workers": 4}, "lr": 1e-3, "init_from": None}
    assert tree == {"out": "o", "scaling": {"workers": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scaling.worker=2", "scaling.worker = 2: unknown key (did you mean 'workers'?)"),
        ("learning_rate=2", "learning_rate = 2: unknown key (valid here: init_from, lr, out, scaling, stages)"),
        ("scaling.workers=two", "scaling.workers = 'two': Input should be a valid integer"),
        ("scaling.strategy=dpd", "did you mean 'ddp'?"),
        ("scaling=3", "scaling = 3: "),
        ("stages=[{worker: 1}]", "stages.0.worker = 1: unknown key (did you mean 'workers'?)"),
        ("lr.x=1", "lr.x = '1': lr is 1.0, which has no keys of its own"),
        ("lr", "an override is written key=value"),
    ],
)
def test_a_refusal_names_key_value_and_remedy(override, message):
    with pytest.raises(JobError) as caught:
        validate(Train, apply_overrides({"out": "o", "lr": 1.0}, [override]))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_bad_key_is_named_at_once():
    with pytest.raises(JobErrors) as caught:
        validate(Train, {"lr": "fast", "scalling": {}})
    assert [error.key for error in caught.value.errors] == ["out", "lr", "scalling"]


@pytest.mark.parametrize(
    "error", [JobError("lr", 3, "wrong", "mend it"), DataError("s3://b/k", "torn", "restore"), FencedError("held")]
)
def test_errors_come_back_whole_from_another_process(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)
    assert back.exit_code == error.exit_code


def test_fingerprint_is_what_the_job_computes_not_how_or_where():
    assert make().fingerprint() == make("out=elsewhere", "scaling.workers=8").fingerprint()
    assert make().fingerprint() != make("lr=1e-3").fingerprint()


def test_a_resolved_job_is_a_job_file():
    job = make("scaling.workers=3")
    tree = job.resolved()
    assert tree.pop("kind") == "train"
    assert validate(Train, tree) == job
