"""The report of generated cells: what an evaluation found, shown with its caveats, and a comparison's verdicts."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from making_generated import GENES, World, drawn
from PIL import Image
from test_compare import evaluation
from test_evaluate import evaluated, write_truth

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.evaluation import figures
from cosmic_ray.evaluation.compare import Compare
from cosmic_ray.evaluation.report import Report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    folder = tmp_path_factory.mktemp("report")
    world = World(folder / "world")
    rows = world.rows()
    images = drawn(np.repeat(world.types[rows], 3), 5).reshape(len(rows), 3, 1, 16, 16)
    noise = np.random.default_rng(0).normal(0, 0.5, (len(rows), GENES))
    uri = world.model("whole", 4, split=None)
    cycle = world.expression("cycle", rows, world.log(rows) + noise, uri)
    keys = {"images": [world.images("made", rows, images)], "cycle": cycle, "truth": write_truth(world, folder)}
    evaluated(world, folder / "evaluate", seen=True, **keys)
    arms = {arm: [evaluation(folder, f"{arm}{k}", {"swd": 1.0 + 0.01 * k}) for k in range(3)] for arm in "ab"}
    Compare(out=str(folder / "compare"), arms=arms, baseline="a", margins={"swd": 0.1}).run()
    job = Report(
        out=str(folder / "page"),
        crops=world.cells.crops.uri,
        split=world.split.uri,
        evaluations={"tiny": str(folder / "evaluate")},
        comparisons={"twins": str(folder / "compare")},
    )
    job.check()
    found = job.run()
    return storage.read_bytes(found["report"]).decode(), found


def test_every_section_carries_the_caveats(page):
    html, found = page
    parts = html.split("<section>")
    generated = [part for part in parts if ": tiny</h2>" in part]
    titles = [re.search("<h2>(.*?)</h2>", part).group(1) for part in generated]
    assert [title.split(":")[0].split(",")[0] for title in titles] == [
        "Generated beside real nuclei",
        "Images",
        "Genes",
        "Planted truth (simulated)",
    ]
    for part in generated:
        assert "Caveat: not held out: cycle.img2seq" in part and "Simulated data." in part
    assert found["evaluation: tiny"]["flaws"][0].startswith("not held out") and found["simulated"] is True
    assert found["evaluation: tiny"]["scores"]["planted_auroc"] > 0.5


def test_verdicts_stand_on_the_page(page):
    html, found = page
    assert "Comparison: twins" in html and ">equivalent</td>" in html
    assert found["comparison: twins"]["figures"][1]["verdict"] == "equivalent"


def test_a_report_takes_no_other_manifests(page, tmp_path, crop_store):
    from cosmic_ray.evaluation import sections_generated

    with pytest.raises(DataError, match="not cosmic-ray/evaluate"):
        sections_generated.evaluation("x", crop_store(8).uri, 0)


def test_a_montage_shows_each_cell_above_its_generated_image():
    real, made = np.full((3, 1, 8, 8), 100, np.uint8), np.full((3, 1, 8, 8), 50, np.uint8)
    png = figures.paired_montage({"one": (real, made), "two": (real[:2], made[:2])}, 200.0, ("real", "generated"))
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert pixels.shape[0] == 2 * (14 + 2 * 10)
    assert (pixels[14:22, 0:8] == 127).all() and (pixels[24:32, 0:8] == 63).all()
    assert (pixels[14:22, 20:28] == 127).all() and (pixels[48:56, 20:28] == 0).all()


def test_histograms_leave_undefined_genes_out_and_say_how_many_there_are():
    svg = figures.histogram({"generated": np.array([0.1, np.nan, 0.3])}, "r")
    assert "generated (2)" in svg and svg == figures.histogram({"generated": np.array([0.1, np.nan, 0.3])}, "r")
