"""`where:` and `mixing:` of a job decide what it trains on and holds out; `cosmic-ray plan JOB.yaml` shows its plan."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from training_jobs import Crops
from typer.testing import CliRunner

from cosmic_ray import storage
from cosmic_ray.cli import app
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.ingest.show import crop_ids
from cosmic_ray.jobs import make
from cosmic_ray.output import encode
from cosmic_ray.training import exclusions

LINES = {"cell_line": ["HeLa"]}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Crops:
    return Crops.make(str(tmp_path_factory.mktemp("order")))


def job_file(crops: Crops, name: str = "run", **changes: object) -> str:
    path = Path(crops.folder) / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"kind": "pretrain-mae", **crops.keys(name, **changes)}))
    return str(path)


def shown(*arguments: str) -> dict:
    ended = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    if isinstance(ended.exception, CosmicError):
        raise ended.exception
    return json.loads(ended.stdout)


def lines_of(crops: Crops) -> np.ndarray:
    return np.array(crops.store.metadata(["cell_line"])["cell_line"].to_pylist())


def test_where_narrows_what_is_trained_on_and_what_is_held_out(crops: Crops) -> None:
    found, split = crops.job(where=LINES).stage(), crops.opened_split()
    wanted = lines_of(crops) == "HeLa"
    steps = [found.plan.step(k) for k in range(found.plan.steps(1))]
    trained = {int(crops.store.group_starts[g] + r) for s in steps for g, r in zip(s.row_group, s.row, strict=True)}
    assert trained == {row for row in split.rows("train").tolist() if wanted[row]}
    assert found.held_out.tolist() == [row for row in split.rows("val").tolist() if wanted[row]]
    assert 0 < len(found.held_out) < len(split.rows("val"))
    assert found.plan.digest != crops.job().stage().plan.digest


def test_mixing_gives_the_shares_among_the_training_crops(crops: Crops) -> None:
    lines, train = lines_of(crops), crops.opened_split().rows("train")
    weights = {line: 1.0 + 2 * number for number, line in enumerate(sorted(set(lines[train].tolist())))}
    job = crops.job(mixing={"column": "cell_line", "weights": weights, "epoch": 160}, where={"area_px": {"min": 0}})
    plan = job.stage().plan
    rows = np.concatenate([crops.store.group_starts[s.row_group] + s.row for s in map(plan.step, range(10))])
    found = Counter(lines[rows].tolist())
    assert {line: found[line] for line in weights} == {w: 160 * v / sum(weights.values()) for w, v in weights.items()}
    assert set(rows.tolist()) <= set(train.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"cell_line": ["Hela"]}}, r"where\.cell_line = 'Hela': no crop has this value .did you mean 'HeLa'"),
        ({"where": {"area_px": {"min": 1e9}}}, r"where = .*: no selected crop meets the conditions"),
        ({"mixing": {"column": "cell_line", "weights": {"HeLa": 1}}}, r"mixing\.weights = .*: no weight for "),
    ],
)
def test_refusals_name_key_value_and_remedy(crops: Crops, changes: dict, message: str) -> None:
    with pytest.raises(JobError, match=message) as refusal:
        crops.job(**changes).check()
    assert refusal.value.exit_code == 2 and refusal.value.remedy


def test_no_held_out_crop_is_left(crops: Crops) -> None:
    ids = np.array(crops.store.metadata(["crop_id"])["crop_id"].to_pylist())
    some = ids[crops.opened_split().rows("train")[:40]].tolist()
    with pytest.raises(JobError, match="no held-out crop meets the conditions"):
        crops.job(where={"crop_id": some}).check()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"cell_line": "HeLa"}, r"where\.cell_line = 'HeLa': neither a list of values, .* nor a range"),
        ({"cell_line": []}, r"where\.cell_line.* at least 1 item"),
        ({"area_px": {"least": 3}}, r"where\.area_px.*least = 3: unknown key .valid here: max, min"),
    ],
)
def test_ill_typed_conditions(crops: Crops, where: dict, message: str) -> None:
    with pytest.raises(JobError, match=message):
        make({"kind": "pretrain-mae", **crops.keys(where=where)})


class TestPlanVerb:
    def test_a_job_file_shows_the_runs_own_plan(self, crops: Crops) -> None:
        file = job_file(crops, where=LINES, seed=4)
        plan = crops.job(where=LINES, seed=4).stage().plan
        found = shown(file, "--step", "17")
        assert found["crop_ids"] == crop_ids(crops.store, plan.step(17)) and found["plan"] == plan.digest
        assert shown(file, "seed=5", "--step", "17")["crop_ids"] != found["crop_ids"]

    def test_as_the_options_say_it(self, crops: Crops) -> None:
        file = job_file(crops)
        options = ["--split", crops.split, "--global-batch", "16", "--lanes", "4", "--step", "3"]
        assert shown(file, "--step", "3") == shown(crops.store.uri, *options)

    def test_with_what_the_run_left_out(self, crops: Crops) -> None:
        file = job_file(crops, "excluded")
        plan = crops.job("excluded").stage().plan.excluding([0, 1], 5)
        left_out = exclusions.Exclusion(step=5, shard="s", problem="damaged", row_groups=[0, 1], crops=40)
        at = storage.join(crops.folder, "excluded", exclusions.FILE)
        storage.write_bytes(at, encode({"exclusions": [left_out.model_dump()]}))
        for step in (4, 5, 30):
            found = shown(file, "--step", str(step))
            assert found["crop_ids"] == crop_ids(crops.store, plan.step(step)) and found["plan"] == plan.digest

    def test_what_cannot_be_shown(self, crops: Crops) -> None:
        file = job_file(crops)
        with pytest.raises(JobError, match=r"--global-batch = 16: the job file says this .*override"):
            shown(file, "--step", "1", "--global-batch", "16")
        with pytest.raises(JobError, match="a store takes no overrides"):
            shown(crops.store.uri, "seed=3", "--step", "1")
        other = Path(crops.folder) / "split.yaml"
        other.write_text(yaml.safe_dump({"kind": "split", "out": "o", "store": "s"}))
        with pytest.raises(JobError, match="this kind has no plan"):
            shown(str(other), "--step", "1")
        with pytest.raises(JobError, match="steps are counted from 0"):
            shown(file, "--step", "-1")
