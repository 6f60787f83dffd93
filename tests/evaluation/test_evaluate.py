"""`evaluate`: generators of known quality get the figures that they deserve, and cells that were seen are refused."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making_generated import GENES, TYPES, World, digest, drawn, rates

from cosmic_ray import output, storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.evaluation.job import Evaluate
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import MakeSplit, Split

FAST = {"epochs": 25, "lr": 3e-3, "batch": 32, "size": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ideal(world: World) -> list[str]:
    """Two rounds of an ideal generator: ten fresh images of each val cell from the law of its type."""
    rows = world.rows()
    return [world.images(f"ideal-{r}", rows, samples(world.types[rows], 100 + r)) for r in range(2)]


def samples(types: np.ndarray, seed: int, count: int = 10) -> np.ndarray:
    return drawn(np.repeat(types, count), seed).reshape(len(types), count, 1, 16, 16)


def evaluated(world: World, out: Path | str, **keys: Any) -> dict[str, Any]:
    given = {"fm": world.fm} if keys.get("images") else {}
    job = Evaluate(
        **{"out": str(out), "cells": world.cells.uri, "split": world.split.uri, "classifier": FAST, "device": "cpu"}
        | given
        | keys
    )
    job.check()
    return job.run()


def test_an_ideal_generator_is_like_other_real_cells(world, ideal, tmp_path):
    found = evaluated(world, tmp_path / "out", images=ideal)
    images = found["images"]
    everything = images["groups"]["all"]
    assert set(images["groups"]) == {"all", *TYPES} and images["rounds"] == 2 and images["samples"] == 10
    assert abs(everything["knna"]["value"]["mean"] - 0.5) < 0.06
    for metric, slack in (("cov", 0.25), ("swd", 0.35), ("knna", 0.08)):
        about = everything[metric]
        assert abs(about["matched"]["mean"] - about["real"]["mean"]) < slack, metric
        assert about["value"]["low"] <= about["value"]["mean"] <= about["value"]["high"]
        assert len(about["value"]["rounds"]) == 2
    assert images["near_train"]["mean"] < 0.1
    accuracy = images["accuracy"]
    assert accuracy["real"]["accuracy"] > 0.9 and accuracy["generated"]["mean"] > 0.9
    assert found["simulated"] is True and found["flaws"] == [] and found["opened"] is None
    table = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    again = [row["value"] for row in table if (row["group"], row["metric"], row["kind"]) == ("all", "swd", "value")]
    assert again == everything["swd"]["value"]["rounds"]
    assert evaluated(world, tmp_path / "out", images=ideal) == found


def test_a_generator_that_ignores_the_condition_has_the_accuracy_of_chance(world, tmp_path):
    rows = world.rows()
    shuffled = np.random.default_rng(0).permutation(world.types[rows])
    found = evaluated(world, tmp_path / "out", images=[world.images("blind", rows, samples(shuffled, 5))])
    accuracy = found["images"]["accuracy"]
    assert accuracy["generated"]["low"] < accuracy["chance"] < accuracy["generated"]["high"]
    assert accuracy["real"]["accuracy"] > 0.9
    assert abs(found["images"]["groups"]["all"]["knna"]["value"]["mean"] - 0.5) < 0.08


def test_a_generator_that_gives_train_cells_back_is_caught(world, tmp_path):
    rows, train = world.rows(), world.rows("train")
    real, types = world.cells.crops.crops(train), world.types[train]
    random = np.random.default_rng(0)
    copies = np.stack([real[random.choice(np.flatnonzero(types == kind), 10)] for kind in world.types[rows]])
    found = evaluated(world, tmp_path / "out", images=[world.images("copies", rows, copies)])
    assert found["images"]["near_train"]["mean"] == 1.0
    assert found["scores"]["near_train"] > 0.9 and found["scores"]["image_accuracy"] > 0.9


def test_a_collapsed_generator_covers_little(world, ideal, tmp_path):
    rows = world.rows()
    one = np.repeat(samples(world.types[rows[:1]], 3, 1), len(rows), 0).repeat(10, 1)
    found = evaluated(world, tmp_path / "out", images=[world.images("collapsed", rows, one)])
    scores = found["scores"]
    assert scores["cov"] < 0.05 and scores["knna_excess"] > 0.3 and scores["swd"] > 1


def test_expression_of_known_quality(world, tmp_path):
    rows = world.rows()
    random, truth = np.random.default_rng(3), world.log(world.rows())
    law = np.log1p(rates(world.types[rows], world.hidden[rows]))
    draws = {f"sample_{k}": law + random.normal(0, 0.35, law.shape) for k in range(12)}
    stacked = np.stack(list(draws.values()))
    uri = world.expression("good", rows, law, lower=law - 0.6, upper=law + 0.6, **draws)
    found = evaluated(world, tmp_path / "out", expression=uri)
    about = found["expression"]
    genes = pq.read_table(tmp_path / "out" / "genes.parquet").to_pandas()
    assert len(genes) == GENES and (genes["of"] == "expression").all()
    batches = np.array(world.cells.obs(["batch"], rows)["batch"].to_pylist())
    by_hand = np.mean([np.corrcoef(law[batches == b, 13], truth[batches == b, 13])[0, 1] for b in ("b0", "b1")])
    assert genes["r"][13] == pytest.approx(by_hand, abs=1e-5)
    assert genes["r"][:18].min() > 0.3 and genes["r_within"][12:18].min() > 0.3
    assert genes["r"][18:].isna().all() and np.isnan(genes["p"][20]) and about["undefined"] == 6
    assert genes["r_cell_type"][:12].min() > 0.3 and abs(genes["r_cell_type"][12:18]).max() < 0.3
    assert abs(genes["r_within"][:12]).max() < 0.35 or np.isnan(genes["r_within"][:12]).all()
    inside = ((truth >= law - 0.6) & (truth <= law + 0.6)).mean()
    assert about["interval"]["held"] == pytest.approx(inside, abs=1e-3) and about["interval"]["level"] == 0.9
    gini = np.abs(stacked[:, None] - stacked[None]).sum((0, 1)) / (12 * 11) / 2
    assert about["crps"] == pytest.approx((np.abs(stacked - truth).mean(0) - gini).mean(), abs=1e-4)
    assert about["crps"] < about["crps_of_train_cells"] and about["error"] < about["error_of_train_mean"]
    assert about["accuracy"]["real"]["accuracy"] > 0.9 and about["accuracy"]["generated"]["accuracy"] > 0.9
    assert about["pearson_above_0.4"] == pytest.approx((genes["r"] > 0.4).mean())


def test_planted_genes_are_told_from_their_controls(world, tmp_path):
    rows = world.rows()
    log = world.log(rows)
    noise = np.random.default_rng(2).normal(0, 1, log.shape)
    made = np.where(np.arange(GENES) // 6 == 2, log, 0) + noise * 0.3
    truth = write_truth(world, tmp_path)
    found = evaluated(world, tmp_path / "out", cycle=world.expression("cycle", rows, made), truth=truth)
    planted = found["planted"]
    assert planted["all"]["auroc"] == found["scores"]["planted_auroc"] > 0.95
    assert planted["all"]["oracle"] > 0.95 and planted["planted"] == 6
    assert planted["unplanted"]["low"] < 0 < planted["unplanted"]["high"]


def test_expression_told_as_counts_is_compared_on_the_log_scale(world, tmp_path):
    rows = world.rows()
    made = world.log(rows) + np.random.default_rng(0).normal(0, 0.2, (len(rows), GENES))
    counts = world.expression("counts", rows, np.expm1(made), note={"values": "counts"})
    plain = world.expression("plain", rows, np.maximum(made, 0))
    found = [evaluated(world, tmp_path / Path(uri).name, expression=uri)["expression"] for uri in (counts, plain)]
    assert found[0]["error"] == pytest.approx(found[1]["error"], rel=1e-5)


def write_truth(world: World, folder: Path) -> str:
    ids = [f"g{i}" for i in range(GENES)]
    planted = [12 <= i < 18 for i in range(GENES)]
    twins = ["" if not (12 <= i < 24) else f"g{i + 6 if i < 18 else i - 6}" for i in range(GENES)]
    strength = [0.3 + 0.3 * (i % 2) if i >= 12 else 0.0 for i in range(GENES)]
    table = pa.table({"gene_id": ids, "planted": planted, "strength": strength, "matched": twins})
    pq.write_table(table, folder / "truth.parquet")
    everyone = world.ids(np.arange(len(world.cells)))
    pq.write_table(pa.table({"cell_id": everyone, "factor": world.hidden}), folder / "factors.parquet")
    return str(folder / "truth.parquet")


def refused(world: World, tmp_path: Path, match: str, **keys: Any) -> None:
    out = tmp_path / f"refused-{uuid.uuid4().hex}"
    with pytest.raises(DataError, match=match):
        evaluated(world, out, **keys)
    assert not storage.exists(str(out / "manifest.json"))


def seen_by(world: World, name: str, **lineage: Any) -> str:
    rows = world.rows()
    model = world.model(name, 3, **lineage)
    return world.expression(f"by-{name}", rows, world.log(rows), model)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("whole", "fitted on the whole store"),
        ("foreign", "another split of these cells"),
        ("silent", "does not say what it was fitted on"),
        ("other part", "fitted on val, which is judged here"),
        ("behind", r"img2seq\.fm \(.*m-inner\) was fitted on the whole store"),
        ("gone", "nobody knows what it was fitted on"),
    ],
)
def test_cells_that_a_model_has_seen_are_refused(world, tmp_path, case, match):
    name = f"m-{case.split()[0]}"
    split = {"uri": world.split.uri, "content_hash": world.split.content_hash}
    lineages = {
        "whole": {"split": None},
        "foreign": {"split": {"uri": "s3://elsewhere/split", "content_hash": "9" * 64}},
        "silent": {"store": None, "split": None},
        "other part": {"split": {**split, "part": "val"}},
        "gone": {"fm": {"uri": str(tmp_path / "no-such-model"), "digest": "1" * 64}},
    }
    if case == "behind":
        inner = world.model("m-inner", 4, split=None)
        lineages["behind"] = {"fm": {"uri": inner, "digest": digest(inner)}}
    uri = seen_by(world, name, **lineages[case])
    refused(world, tmp_path, match, expression=uri)
    found = evaluated(world, tmp_path / "open", expression=uri, seen=True)
    assert len(found["flaws"]) == 1 and found["flaws"][0].startswith("not held out: ")
    manifest = output.read_manifest(str(tmp_path / "open"))
    assert manifest["flaws"] == found["flaws"] and manifest["fitted"]


def test_models_of_other_data_and_by_this_split_are_held_out(world, tmp_path):
    uri = seen_by(world, "m-elsewhere", store={"uri": "s3://other", "content_hash": "2" * 64}, split=None)
    found = evaluated(world, tmp_path / "out", expression=uri)
    assert found["flaws"] == []
    assert output.read_manifest(str(tmp_path / "out"))["fitted"][0]["store"] == "2" * 64


def test_embeddings_are_followed_to_the_model_that_made_them(world, tmp_path):
    """Latents and features are not fitted themselves: that they are of all cells is no fault; their model's may be."""
    store = {"uri": "s3://moved", "content_hash": world.cells.content_hash}
    split = {"uri": "s3://moved", "content_hash": world.split.content_hash}

    def latents(model: dict[str, Any] | None) -> dict[str, Any]:
        return {"uri": "s3://gone", "content_hash": "4" * 64, "lineage": {"store": store, "model": model}}

    good = {"uri": "s3://pca", "content_hash": "6" * 64, "lineage": {"store": store, "split": split}}
    uri = seen_by(world, "m-latents", latents=latents(good))
    assert evaluated(world, tmp_path / "good", expression=uri)["flaws"] == []
    assert len(output.read_manifest(str(tmp_path / "good"))["fitted"]) == 2
    bad = {**good, "lineage": {"store": store}}
    refused(world, tmp_path, "latents.model .* whole store", expression=seen_by(world, "m-bad", latents=latents(bad)))
    ready = evaluated(world, tmp_path / "ready", expression=seen_by(world, "m-ready", latents=latents(None)))
    assert [flaw.startswith("what made the ready embeddings") for flaw in ready["flaws"]] == [True]


def test_a_cycle_is_followed_through_its_generated_images(world, ideal, tmp_path):
    rows = world.rows()
    blind = world.model("m-blind", 5, split=None)
    images = world.images("through", rows, samples(world.types[rows], 3, 1), blind)
    features = {"uri": "s3://f", "content_hash": "4" * 64}
    made_of = {"uri": images, "content_hash": CropStore.open(images).content_hash}
    other = {"uri": "s3://other", "content_hash": "2" * 64}
    fm = {"uri": world.fm, "content_hash": digest(world.fm), "lineage": {"store": other}}
    lineage = {"features": {**features, "lineage": {"store": made_of, "model": fm}}}
    uri = world.expression("through-cycle", rows, world.log(rows), lineage=lineage)
    refused(world, tmp_path, r"features\.store\.m-blind .* whole store", cycle=uri)


def test_generated_train_cells_are_refused(world, tmp_path):
    rows = world.rows("train")
    uri = world.images("of-train", rows, samples(world.types[rows], 9, 1))
    refused(world, tmp_path, "none of its cells is in the part", images=[uri])
    with pytest.raises(JobError, match="seen: true"):
        from cosmic_ray.jobs import make

        make({"kind": "evaluate", "out": "x", "cells": "c", "split": "s", "expression": "e", "part": "train"})


def test_what_does_not_fit_is_refused(world, ideal, tmp_path):
    rows, types = world.rows(), world.types[world.rows()]
    fewer = world.images("fewer", rows[5:], samples(types[5:], 1))
    refused(world, tmp_path, "its cells are not those of", images=[ideal[0], fewer])
    strange = world.images("strange", rows, samples(types, 1, 1), cell_ids=["nobody"] * len(rows))
    refused(world, tmp_path, "of no cell of", images=[strange])
    refused(world, tmp_path, "no generated images", images=[world.cells.crops.uri])
    broken = world.log(rows)
    broken[3, 4] = np.nan
    refused(world, tmp_path, "values of gene g4 are NaN", expression=world.expression("nan", rows, broken))
    wide = np.concatenate([world.log(rows), world.log(rows)[:, :1]], 1)
    refused(
        world, tmp_path, "1 of 25 genes are not in this store: g24", expression=world.expression("wide", rows, wide)
    )


def test_embeddings_of_another_encoder_are_refused(world, ideal, tmp_path):
    own = world.features("own-features", world.fm)
    foreign = world.features("foreign-features", world.model("other-fm", 8))
    refused(world, tmp_path, "another encoder than fm", images=ideal, features=foreign)
    ready = evaluated(world, tmp_path / "ready", images=ideal[:1], features=own)
    fresh = evaluated(world, tmp_path / "fresh", images=ideal[:1])
    assert ready["images"]["groups"]["all"]["swd"]["value"]["mean"] == pytest.approx(
        fresh["images"]["groups"]["all"]["swd"]["value"]["mean"], rel=1e-4
    )


def test_every_opening_of_test_is_counted(world, tmp_path):
    rows = world.rows("test")
    uris = [world.expression(f"test-{k}", rows, world.log(rows) + k) for k in range(2)]
    split = world.split.uri
    first = evaluated(world, tmp_path / "first", expression=uris[0], part="test")
    assert first["opened"]["others"] == []
    second = evaluated(world, tmp_path / "second", expression=uris[1], part="test")
    assert second["opened"]["others"] == [first["opened"]["key"]]
    again = evaluated(world, tmp_path / "again", expression=uris[0], part="test")
    assert again["opened"] == {"key": first["opened"]["key"], "others": [second["opened"]["key"]]}
    assert len(storage.listing(storage.join(split, "opened"), "*.json")) == 2
    output_val = evaluated(world, tmp_path / "val", expression=seen_by(world, "m-val"))
    assert output_val["opened"] is None and len(storage.listing(storage.join(split, "opened"), "*.json")) == 2


def test_a_split_of_few_groups_still_leaves_train_cells_to_fit_and_to_choose_on(world, tmp_path):
    MakeSplit(
        store=world.cells.uri,
        out=str(tmp_path / "split"),
        by=["batch"],
        fractions={"train": 0.5, "val": 0.5, "test": 0},
        near_duplicates={"crops": None, "fields": None},
        seed=5,
    ).run()
    split = Split.open(str(tmp_path / "split"), world.cells)
    assert len(np.unique(split.group_codes[split.rows("train")])) == 1
    rows = split.rows("val")
    model = world.model("m-batch", 3, split={"uri": split.uri, "content_hash": split.content_hash})
    uri = world.expression("by-batch", rows, world.log(rows), model)
    found = evaluated(world, tmp_path / "out", expression=uri, split=split.uri)
    accuracy = found["expression"]["accuracy"]
    assert accuracy["train_cells"] == 132 and accuracy["real"]["accuracy"] > 0.9


@pytest.mark.slow
def test_generated_expression_and_openings_lie_on_s3_too(world, s3):
    rows = world.rows("test")
    local = Path(world.expression("s3", rows, world.log(rows)), "expression.h5ad").read_bytes()
    storage.write_bytes(f"{s3}/made/expression.h5ad", local)
    for name in ("manifest.json", "codes.parquet"):
        storage.write_bytes(f"{s3}/split/{name}", Path(world.split.uri, name).read_bytes())
    found = evaluated(world, f"{s3}/out", expression=f"{s3}/made", split=f"{s3}/split", part="test")
    assert found["expression"]["pearson"] > 0.99 and found["opened"]["others"] == []
    assert len(storage.listing(f"{s3}/split/opened", "*.json")) == 1
    assert storage.exists(f"{s3}/out/genes.parquet")
