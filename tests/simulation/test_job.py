"""`simulate-plates` as a user runs it: layout, truth, any parallelism, any interruption, any storage."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cosmic_ray import storage
from cosmic_ray.errors import JobError
from cosmic_ray.imaging.read import FieldError, read_field
from cosmic_ray.jobs import make
from cosmic_ray.output import read_manifest
from cosmic_ray.simulation.files import parquet_table
from cosmic_ray.simulation.job import SimulatePlates
from cosmic_ray.simulation.layout import plan_plate, well_names

SMALL = {
    "kind": "simulate-plates",
    "seed": 3,
    "wells": 3,
    "sites": 3,
    "processes": 1,
    "cell_lines": {"one": {"smooth": 1}, "two": {"granular": 1, "compact": 1}},
    "field": {"height": 96, "width": 128, "density_per_mm2": 2500},
}


def job(out: object, **keys: object) -> SimulatePlates:
    return make({**SMALL, "out": str(out), **keys})


def contents(uri: str) -> dict[str, bytes]:
    """Every published file; not the record of the job (it holds its own `out`) and the lease."""
    here = [file for file in storage.listing(uri) if not storage.name(file).startswith(("job.json", "_lease"))]
    return {f.removeprefix(storage.absolute(uri)): storage.read_bytes(f) for f in here}


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("plates"))
    job(out, plates=2, faults={"empty": 1, "truncated": 1, "saturated": 1, "blurred": 1}).run()
    return out


def test_layout_and_truth_agree(plates):
    truth = parquet_table(storage.read_bytes(storage.join(plates, "truth.parquet"))).to_pandas()
    fields = parquet_table(storage.read_bytes(storage.join(plates, "fields.parquet"))).to_pandas()
    assert len(fields) == 2 * 3 * 3 and fields.n_nuclei.sum() == len(truth)
    seen = 0
    for plate in ("simulated-01", "simulated-02"):
        table = Path(plates, "load_data", plate, "load_data.csv")
        for row in csv.DictReader(io.StringIO(table.read_text())):
            path = table.parent / row["PathName_OrigDNA"] / row["FileName_OrigDNA"]
            where = (row["Metadata_Plate"], row["Metadata_Well"], int(row["Metadata_Site"]))
            about = fields.set_index(["plate", "well", "site"]).loc[where]
            assert path.resolve() == Path(plates, about["image"])
            assert about["cell_line"] == row["Metadata_cell_line"] and row["Metadata_pixel_size_um"] == "0.325"
            labels = np.asarray(Image.open(Path(plates, about["labels"])))
            assert labels.dtype == np.uint16 and labels.shape == (96, 128)
            mine = truth[(truth.plate == where[0]) & (truth.well == where[1]) & (truth.site == where[2])]
            assert list(np.bincount(labels.ravel())[1:]) == list(mine.visible_px)
            seen += 1
    assert seen == len(fields)


def test_everything_says_simulated(plates):
    manifest = read_manifest(plates)
    assert manifest["simulated"] is True and manifest["nuclei"] > 20
    for name in ("truth.parquet", "fields.parquet"):
        assert parquet_table(storage.read_bytes(storage.join(plates, name))).schema.metadata[b"simulated"] == b"true"
    good = next(f for f in _fields(plates) if not f["fault"])
    with tifffile.TiffFile(Path(plates, good["image"])) as file:
        assert json.loads(file.pages[0].description)["simulated"] is True
        assert file.pages[0].dtype == np.uint16 and file.pages[0].compression.name == "ADOBE_DEFLATE"
    assert Image.open(Path(plates, good["labels"])).text["Comment"] == "simulated"
    assert "simulated" in Path(plates, "load_data/simulated-01/load_data.csv").read_text().splitlines()[0]


def test_bad_fields_are_listed_and_bad(plates):
    for plate in ("simulated-01", "simulated-02"):
        bad = {f["fault"]: f for f in _fields(plates) if f["plate"] == plate and f["fault"]}
        assert sorted(bad) == ["blurred", "empty", "saturated", "truncated"]
        assert bad["empty"]["n_nuclei"] == 0
        with pytest.raises(FieldError) as error:
            read_field(Path(plates, bad["truncated"]["image"]).read_bytes(), "it")
        assert error.value.reason in ("truncated", "corrupt")
        image = read_field(Path(plates, bad["saturated"]["image"]).read_bytes(), "it")
        assert (image == 65535).mean() > 0.1


def _fields(uri: str) -> list[dict]:
    return parquet_table(storage.read_bytes(storage.join(uri, "fields.parquet"))).to_pylist()


@pytest.mark.slow
def test_the_same_bytes_at_any_parallelism(plates, tmp_path):
    faults = {"empty": 1, "truncated": 1, "saturated": 1, "blurred": 1}
    job(tmp_path, plates=2, faults=faults, processes=2).run()
    assert contents(str(tmp_path)) == contents(plates)


@pytest.mark.parametrize("sign", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, sign):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    keys = {"wells": 12}
    job(whole, **keys).run()
    file = tmp_path / "job.json"
    file.write_text(json.dumps({**SMALL, **keys, "processes": 2, "out": str(broken)}))
    code = "import sys; from cosmic_ray.jobs import load; load(sys.argv[1]).run()"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(storage.listing(str(broken / "parts"))) < 4:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.03)
    os.killpg(run.pid, sign) if sign == signal.SIGINT else run.kill()
    run.wait(30)
    left = storage.listing(str(broken / "parts"))
    assert 4 <= len(left) < 36 and not (broken / "manifest.json").exists()
    for part in left:  # whole, each of them: nothing half-written counts
        parquet_table(storage.read_bytes(part))
    job(broken, **keys).run()
    assert contents(str(broken)) == contents(str(whole))


def test_a_finished_job_is_found_done(plates, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("simulated again")

    monkeypatch.setattr("cosmic_ray.simulation.job.write_field", never)
    faults = {"empty": 1, "truncated": 1, "saturated": 1, "blurred": 1}
    found = job(plates, plates=2, faults=faults).run()
    assert found["simulated"] is True and found["content"] == read_manifest(plates)["content"]


def test_another_seed_is_other_content_and_is_refused_in_the_same_folder(plates, tmp_path):
    with pytest.raises(JobError, match="seed"):
        job(plates, plates=2, seed=4, faults={"empty": 1, "truncated": 1, "saturated": 1, "blurred": 1}).run()
    one, two = (job(tmp_path / str(seed), seed=seed, wells=1, sites=1).run() for seed in (1, 2))
    assert one["content"] != two["content"]


@pytest.mark.slow
def test_s3_holds_the_same_bytes(s3, tmp_path):
    there, here = storage.join(s3, "plates"), str(tmp_path)
    for out in (there, here):
        job(out, wells=2, sites=1).run()
    assert contents(there) == contents(here)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"cell_lines": {"a": {"smoth": 1}}}, "cell_lines.a"),
        ({"cell_lines": {}}, "cell_lines"),
        ({"faults": {"empty": 10}}, "faults"),
        ({"field": {"height": 8192, "width": 8192, "density_per_mm2": 5000}}, "field.density_per_mm2"),
    ],
)
def test_a_job_that_cannot_be_is_refused(tmp_path, keys, named):
    with pytest.raises(JobError) as error:
        job(tmp_path, **keys).check()
    assert error.value.key == named


def test_an_unknown_trait_is_named(tmp_path):
    with pytest.raises(JobError, match="contrast"):
        job(tmp_path, field={"cell_types": {"a": {"contrats": 1}}})


def test_wells_and_lines_are_balanced_and_not_in_order():
    assert well_names(13)[-1] == "B01" and well_names(97)[24] == "B01"
    layouts = {}
    for plate in ("p", "q"):
        fields = plan_plate(0, plate, 24, 2, ["a", "b", "c"], ["x", "y"], {"empty": 3})
        pairs = [(f.cell_line, f.treatment) for f in fields if f.site == 1]
        assert sorted(pairs.count(pair) for pair in set(pairs)) == [4] * 6
        assert sum(f.fault == "empty" for f in fields) == 3
        layouts[plate] = pairs
    assert layouts["p"] != layouts["q"]
