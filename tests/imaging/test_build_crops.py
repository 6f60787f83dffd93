"""`build-crops` from drawn fields to a store: what must be in it is known."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn_fields import NAMES, WHOLE, build, draw, field_name, make_job, plate, tiff
from PIL import Image

from cosmic_ray import storage
from cosmic_ray.config import validate
from cosmic_ray.errors import CosmicError, DataError, JobError
from cosmic_ray.imaging import candidates
from cosmic_ray.imaging.job import BuildCrops
from cosmic_ray.imaging.segment import measure, segment
from cosmic_ray.jobs import load
from cosmic_ray.simulation.job import SimulatePlates
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import Fractions, MakeSplit, NearDuplicates, Split
from cosmic_ray.stores.verify import verify_store
from cosmic_ray.stores.writer import order_keys

ALL = {"low": 0, "high": 100}
PER_PLATE = {"recipe": "better", "segmentation": {"recipe": "paper"}, "quality": {"max_debris": None}}


def table_of(uri: str, name: str):
    return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(uri, name))))


def rows_of(store):
    table = next(store.batches(10**6))
    return table.to_pylist(), images(table, store.spec)


def test_every_whole_nucleus_is_there_once_with_its_own_pixels(home):
    drawn = plate(f"{home}/plate", 6)
    results, store = build(f"{home}/plate", f"{home}/out", area=ALL, **PER_PLATE)
    truth = {}
    for index, field in enumerate(drawn):
        columns = measure(field.labels, field.image)
        for row in np.flatnonzero(~columns["touches_border"]):
            x, y = columns["centroid_x"][row], columns["centroid_y"][row]
            name = f"drawn/P1/{field_name(index).replace('_s', '/')}/x{round(x):04}y{round(y):04}"
            truth[name] = (field, columns, row)
    rows, crops = rows_of(store)
    assert {row["crop_id"] for row in rows} == set(truth)
    assert results["objects_rejected"] == {"touches the border": 6}
    assert (results["rows"], results["fields"], results["fields_rejected"]) == (len(truth), 6, {})
    clipped = total = 0
    for row, crop in zip(rows, crops, strict=True):
        field, columns, at = truth[row["crop_id"]]
        raw = field.image[field.labels == columns["label"][at]].astype(float)
        stored = crop[crop > 0].astype(float)
        assert len(stored) == row["area_px"] == len(raw)
        assert row["mean_intensity"] == pytest.approx(raw.mean(), rel=1e-6)
        back = row["intensity_offset"] + row["intensity_scale"] * stored
        between = (stored > 1) & (stored < 255)
        assert np.abs(back - raw)[between].max() <= row["intensity_scale"] * 0.501
        clipped, total = clipped + (~between).sum(), total + len(raw)
        y, x = np.nonzero(crop[0])
        assert max(abs(y.mean() - 15.5), abs(x.mean() - 15.5)) <= 0.5
        assert (row["plate"], row["source"], math.isnan(row["pixel_size_um"])) == ("P1", "drawn", True)
        assert 0 <= row["q_touching"] <= 1
    assert clipped / total < 0.02
    assert len({row["intensity_scale"] for row in rows}) == 1
    assert verify_store(store.uri) == []


def test_paper_maps_each_patch_to_its_maximum(tmp_path):
    plate(str(tmp_path / "plate"), 2)
    results, store = build(str(tmp_path / "plate"), str(tmp_path / "out"))
    rows, crops = rows_of(store)
    assert crops.reshape(len(rows), -1).max(1).tolist() == [255] * len(rows)
    assert {row["intensity_offset"] for row in rows} == {0.0}
    assert len({row["intensity_scale"] for row in rows}) == len(rows)
    assert (store.manifest.intensity.scope, store.manifest.intensity.masked) == ("crop", True)
    assert results["simulated"] is False


def test_area_limits_are_the_percentiles_of_whole_nuclei_by_source_and_over_all(tmp_path):
    for name, radii in (("small", (4, 7)), ("large", (7, 12))):
        plate(str(tmp_path / name), 4, radii=radii)
    sources = {name: {"uri": str(tmp_path / name)} for name in ("small", "large")}
    areas = {}
    for name, radii in (("small", (4, 7)), ("large", (7, 12))):
        measured = [measure(one.labels, one.image) for one in (draw(seed, radii=radii) for seed in range(4))]
        areas[name] = np.concatenate([m["area_px"][~m["touches_border"]] for m in measured])
    for scope in ("source", "all"):
        job = validate(BuildCrops, {"out": str(tmp_path / scope), "sources": sources, "area": {"scope": scope},
                                    "recipe": "paper", "crop_px": 32, "workers": 0})  # fmt: skip
        results = job.run()
        everything = np.concatenate(list(areas.values()))
        kept = 0
        for name, area in areas.items():
            low, high = np.percentile(area if scope == "source" else everything, [5, 95])
            assert results["area_limits_px"][name] == [pytest.approx(low), pytest.approx(high)]
            kept += ((area >= low) & (area <= high)).sum()
        assert results["rows"] == kept
        left = results["objects_rejected"]
        outside = left["area above the upper percentile"] + left["area below the lower percentile"]
        assert outside == len(everything) - kept


def test_what_does_not_fit_is_left_out_or_rescaled_never_truncated(tmp_path):
    home = str(tmp_path / "plate")
    plate(home, 3, radii=(10, 13))
    results, _ = build(home, str(tmp_path / "out"), crop_px=24, area=ALL)
    whole = 3 * WHOLE
    assert results["rows"] + results["objects_rejected"]["larger than the crop"] == whole
    assert 5 < results["rows"] < whole - 5
    known = {"source": {"defaults": {"pixel_size_um": 0.5, "plate": "P1", "source": "drawn"}}}
    results, store = build(home, str(tmp_path / "half"), crop_px=24, area=ALL, target_um_px=1.0, **known)
    assert results["rows"] == whole
    rows, _ = rows_of(store)
    assert {row["pixel_size_um"] for row in rows} == {1.0}
    small = {(round(row["centroid_x"]) // 38, round(row["centroid_y"]) // 38) for row in rows}
    assert max(x for x, _ in small) == 4, "centroids are in pixels of the field as it was"
    assert np.median([row["area_px"] for row in rows]) == pytest.approx(np.pi * 11.5**2 / 4, rel=0.15)


def test_label_images_are_taken_instead_of_our_segmentation(tmp_path):
    home = str(tmp_path / "plate")
    drawn = plate(home, 4)
    encodings = [lambda a: tiff(a), lambda a: tiff(a.astype(np.int32)), lambda a: tiff((a > 0).astype(np.uint8) * 255)]
    for index, encode in enumerate(encodings):
        storage.write_bytes(f"{home}/labels/{field_name(index)}.tif", encode(drawn[index].labels))
    storage.write_bytes(f"{home}/labels/{field_name(3)}.tif", tiff(drawn[3].labels[:-1]))
    source = {"labels": "labels/{stem}.tif", "pattern": "*.tif"}
    results, store = build(home, str(tmp_path / "out"), area=ALL, source=source, max_rejected_share=0.5)
    assert results["rows"] == 3 * WHOLE
    assert results["fields_rejected"] == {"label image": 1}
    assert len({row["crop_id"] for row in rows_of(store)[0]}) == 3 * WHOLE


def test_channels_of_one_file_or_of_several_are_cut_alike(tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    for seed in range(2):
        field = draw(seed)
        other = (field.image // 3 + 7).astype(np.uint16)
        storage.write_bytes(str(one / f"{field_name(seed)}.tif"), tiff(np.stack([other, field.image])))
        storage.write_bytes(str(several / f"{field_name(seed)}_dna.tif"), tiff(field.image))
        storage.write_bytes(str(several / f"{field_name(seed)}_er.tif"), tiff(other))
    paged = {"channels": [{"name": "DNA", "index": 1}, {"name": "ER", "index": 0}]}
    apart = {
        "names": NAMES + r"_(?P<channel>\w+)",
        "channels": [{"name": "DNA", "file": "dna"}, {"name": "ER", "file": "er"}],
    }
    _, first = build(str(one), str(tmp_path / "a"), source=paged, **PER_PLATE)
    _, second = build(str(several), str(tmp_path / "b"), source=apart, **PER_PLATE)
    rows, crops = rows_of(first)
    np.testing.assert_array_equal(crops, rows_of(second)[1])
    assert first.spec.shape == (2, 32, 32)
    assert ((crops[:, 0] > 0) == (crops[:, 1] > 0)).all()
    dna = crops[:, 0] * rows[0]["intensity_scale"] + rows[0]["intensity_offset"]
    er = crops[:, 1] * rows[0]["intensity_scale_ER"] + rows[0]["intensity_offset_ER"]
    inside = (crops > 1).all(1) & (crops < 255).all(1)
    assert np.abs(dna / 3 + 7 - er)[inside].max() < rows[0]["intensity_scale"] / 2


def test_the_gallerys_layout_with_illumination_functions(tmp_path):
    light = np.linspace(0.5, 1.5, 190, dtype=np.float32) * np.ones((150, 1), np.float32)
    data = io.BytesIO()
    np.save(data, light)
    storage.write_bytes(str(tmp_path / "illum/P_IllumDNA.npy"), data.getvalue())
    header = "FileName_OrigDNA,PathName_OrigDNA,FileName_IllumDNA,PathName_IllumDNA"
    lines = [f"{header},Metadata_Plate,Metadata_Well,Metadata_Site"]
    for seed in range(2):
        lit = np.rint(draw(seed).image * light).astype(np.uint16)
        storage.write_bytes(str(tmp_path / f"images/{seed}.tif"), tiff(lit))
        lines.append(f"{seed}.tif,../images,P_IllumDNA.npy,../illum,P,A01,{seed}")
    lines.append("0.tif,../images,none.npy,../illum,P,A02,1")
    lines.append("absent.tif,../images,none.npy,../illum,P,A03,1")
    storage.write_bytes(str(tmp_path / "csv/load_data.csv"), "\n".join(lines).encode())
    source = {"uri": str(tmp_path), "layout": "cpg", "names": None, "channels": [{"illumination": "IllumDNA"}]}
    results, store = build(str(tmp_path), str(tmp_path / "out"), source=source, area=ALL, max_rejected_share=1)
    assert results["fields_rejected"] == {"duplicate": 1, "missing": 1}
    rows, _ = rows_of(store)
    truth = {seed: measure(draw(seed).labels, draw(seed).image) for seed in range(2)}
    for row in rows:
        columns = truth[int(row["site"])]
        distance = np.hypot(columns["centroid_x"] - row["centroid_x"], columns["centroid_y"] - row["centroid_y"])
        nearest = int(np.argmin(distance))
        assert row["mean_intensity"] == pytest.approx(columns["mean_intensity"][nearest], rel=0.002)


@pytest.mark.parametrize("keys", [{}, {"target_um_px": 0.4}])
def test_saturation_is_what_the_camera_gave_whatever_is_corrected_since(tmp_path, keys):
    """Every nucleus of the second field is drawn at 65,535; the illumination function moves that to other values."""
    light, data = np.linspace(0.8, 1.2, 190, dtype=np.float32) * np.ones((150, 1), np.float32), io.BytesIO()
    np.save(data, light)
    storage.write_bytes(str(tmp_path / "illum.npy"), data.getvalue())
    for seed in range(2):
        one = draw(seed)
        image = np.where(one.labels > 0, 65535, one.image) if seed else one.image
        storage.write_bytes(str(tmp_path / f"{seed}.tif"), tiff(image.astype(np.uint16)))
    table = "field_uri,site,light,pixel_size_um\n0.tif,0,illum.npy,0.5\n1.tif,1,illum.npy,0.5\n"
    storage.write_bytes(str(tmp_path / "fields.csv"), table.encode())
    source = {"uri": str(tmp_path / "fields.csv"), "layout": "table", "names": None,
              "channels": [{"illumination": "light"}]}  # fmt: skip
    results, _ = build("", str(tmp_path / "out"), source=source, quality={"enabled": True, "max_debris": None},
                       area=ALL, max_rejected_share=1, **keys)  # fmt: skip
    assert results["objects_rejected"]["saturated"] == WHOLE
    names = storage.listing(str(tmp_path / "out/objects"))
    found = [row for name in names for row in pq.read_table(name).to_pylist()]
    shares = {site: [row["q_saturated"] for row in found if row["site"] == site] for site in ("0", "1")}
    assert set(shares["0"]) == {0.0}
    assert min(shares["1"]) > (0.99 if not keys else 0.8)


def crop_bytes(image: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def test_ready_crops_are_taken_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    crops = {f"CELL_{index:03}": rng.integers(0, 256, (256, 256), dtype=np.uint8) for index in range(12)}
    for name, crop in crops.items():
        storage.write_bytes(str(tmp_path / f"iris/{name}.png"), crop_bytes(crop, "PNG"))
    storage.write_bytes(str(tmp_path / "iris/small.png"), crop_bytes(crops["CELL_000"][:128], "PNG"))
    source = {"uri": str(tmp_path / "iris"), "holds": "crops", "names": None, "defaults": {"source": "IRIS"}}
    results, store = build("", str(tmp_path / "out"), source=source, crop_px=256, area={"low": 40, "high": 60})
    assert results["fields_rejected"] == {"wrong dimensions": 1}
    rows, stored = rows_of(store)
    assert {row["crop_id"] for row in rows} == set(crops)
    for row, image in zip(rows, stored, strict=True):
        np.testing.assert_array_equal(image[0], crops[row["crop_id"]])
        assert (row["intensity_scale"], row["intensity_offset"], row["source"]) == (1, 0, "IRIS")
    assert (store.manifest.intensity.scope, store.manifest.intensity.masked) == ("stored", False)


def specks(shape: tuple[int, int]) -> np.ndarray:
    """Single bright pixels."""
    return ((np.arange(shape[0] * shape[1]).reshape(shape) % 97 == 0) + 1).astype(np.uint8)


BAD = {
    "truncated": lambda good: tiff(good.image)[:9000],
    "wrong dtype": lambda good: tiff(good.image.astype(np.float32)),
    "empty": lambda good: b"",
    "black": lambda good: tiff(np.zeros_like(good.image)),
    "flat": lambda good: tiff(np.full_like(good.image, 9)),
    "unsupported format": lambda good: b"not an image at all",
    "wrong dimensions": lambda good: tiff(np.stack([good.image] * 3), photometric="minisblack"),
    "no nuclei": lambda good: tiff(specks(good.image.shape)),
}


def test_bad_fields_are_listed_with_their_reasons_and_end_nothing(home):
    drawn = plate(f"{home}/plate", 12)
    for index, make in enumerate(BAD.values()):
        storage.write_bytes(f"{home}/plate/bad_A{50 + index}_s1.tif", make(drawn[0]))
    with pytest.raises(CosmicError, match=r"5 of 20 fields are rejected, more than .* = 0\.2: 1 ") as caught:
        build(f"{home}/plate", f"{home}/out")
    assert f"{home}/out/rejected.parquet" in str(caught.value)
    assert not storage.exists(f"{home}/out/manifest.json")
    results, store = build(f"{home}/plate", f"{home}/out", max_rejected_share=0.4)
    assert results["fields_rejected"] == dict.fromkeys(sorted(BAD), 1)
    listed = table_of(f"{home}/out", "rejected.parquet").to_pylist()
    assert {row["reason"]: row["well"] for row in listed} == {reason: f"A{50 + i}" for i, reason in enumerate(BAD)}
    assert all(row["field_uri"].startswith(f"{home}/plate/bad_") for row in listed)
    fields = table_of(f"{home}/out", "fields.parquet").to_pylist()
    assert len(fields) == 20
    assert sum(row["candidates"] for row in fields) >= results["rows"]
    objects = [storage.name(uri) for uri in storage.listing(f"{home}/out/objects")]
    reasons = Counter(row["reject"] for name in objects for row in table_of(f"{home}/out/objects", name).to_pylist())
    assert sum(reasons.values()) == results["objects"]
    assert not storage.exists(f"{home}/out/candidates")
    assert len(store) == results["rows"]


def test_too_many_bad_fields_stop_the_job_before_its_end(tmp_path):
    for index in range(30):
        storage.write_bytes(str(tmp_path / f"plate/{field_name(index)}.tif"), b"")
    with pytest.raises(CosmicError, match="7 of 30 fields are rejected"):
        build(str(tmp_path / "plate"), str(tmp_path / "out"), chunk_fields=1)
    assert len(storage.listing(str(tmp_path / "out/candidates"), "*.json")) == 7


def test_nothing_left_says_why(tmp_path):
    plate(str(tmp_path / "plate"), 1, radii=(9, 12))
    with pytest.raises(CosmicError, match="no nucleus is left: 14 larger than the crop, 1 touches the border"):
        build(str(tmp_path / "plate"), str(tmp_path / "out"), crop_px=8, max_rejected_share=1)


@pytest.mark.parametrize("chunk_fields", [1, 4, 100])
def test_the_content_hash_does_not_depend_on_chunks_or_shards(tmp_path, chunk_fields):
    plate(str(tmp_path / "plate"), 7)
    reference, _ = build(str(tmp_path / "plate"), str(tmp_path / "reference"))
    other = {"chunk_fields": chunk_fields, "groups_per_shard": 3, "compression": "zstd"}
    results, _ = build(str(tmp_path / "plate"), str(tmp_path / "out"), **other)
    assert results["content_hash"] == reference["content_hash"]
    assert results["rows"] == reference["rows"] > 80
    other, _ = build(str(tmp_path / "plate"), str(tmp_path / "other"), seed=1)
    assert other["content_hash"] != reference["content_hash"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.exhaustive), None])
def test_the_content_hash_does_not_depend_on_parallelism(tmp_path, ray_local, workers):
    plate(str(tmp_path / "plate"), 7)
    reference, _ = build(str(tmp_path / "plate"), str(tmp_path / "reference"))
    results, _ = build(str(tmp_path / "plate"), str(tmp_path / "out"), workers=workers, chunk_fields=1, memory_gib=0.1)
    assert results["content_hash"] == reference["content_hash"]


@pytest.mark.slow
def test_an_error_in_a_task_on_ray_is_the_users_error(tmp_path, ray_local):
    plate(str(tmp_path / "plate"), 4)
    job = make_job(str(tmp_path / "plate"), str(tmp_path / "out"), workers=2, memory_gib=0.1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "objects").write_text("a file where a folder has to be")
    with pytest.raises(DataError, match="objects") as caught:
        job.run()
    assert caught.value.uri.startswith(str(tmp_path / "out/objects"))


@pytest.mark.parametrize("names", [{"names": None, "defaults": {}}, {}])
def test_the_same_fields_in_another_folder_give_the_same_store_and_split(tmp_path, names):
    built, halves = {}, Fractions(train=0.5, val=0, test=0.5)
    for folder in ("one/plates", "another"):
        plate(str(tmp_path / folder), 7)
        results, store = build(str(tmp_path / folder), str(tmp_path / f"{folder}-out"), source=names)
        rows, _ = rows_of(store)
        assert all(row["field_uri"].startswith(str(tmp_path / folder)) for row in rows)
        split = str(tmp_path / f"{folder}-split")
        MakeSplit(
            out=split, store=store.uri, fractions=halves, near_duplicates=NearDuplicates(crops=None, fields=None)
        ).run()
        parts = Split.open(split, store)
        ids = [row["crop_id"] for row in rows]
        built[folder] = (results["content_hash"], ids, parts.codes.tolist(), parts.content_hash,
                         list(store.manifest.lineage.values()))  # fmt: skip
        assert verify_store(store.uri) == []
    assert built["one/plates"] == built["another"]


def test_another_file_name_is_another_content(tmp_path):
    hashes = set()
    for suffix in ("tif", "tiff"):
        storage.write_bytes(str(tmp_path / suffix / f"A01_s1.{suffix}"), tiff(draw(0).image))
        hashes.add(build(str(tmp_path / suffix), str(tmp_path / f"{suffix}-out"))[0]["content_hash"])
    assert len(hashes) == 2


def test_two_sources_of_one_folder_are_both_in_the_lineage(tmp_path):
    home = str(tmp_path / "plates")

    def lineage(out: str) -> dict[str, str]:
        halves = {half: {"uri": home, "pattern": f"{half}*.tif"} for half in ("A01", "A02")}
        keys = {"out": str(tmp_path / out), "sources": halves, "recipe": "paper", "crop_px": 32, "workers": 0}
        validate(BuildCrops, keys).run()
        return CropStore.open(str(tmp_path / out)).manifest.lineage

    plate(home, 4)
    before = lineage("before")
    assert list(before) == [home]
    for changed in ("A01_s1", "A02_s1"):
        kept = storage.read_bytes(f"{home}/{changed}.tif")
        storage.write_bytes(f"{home}/{changed}.tif", tiff(draw(9).image))
        assert lineage(f"after-{changed}") != before
        storage.write_bytes(f"{home}/{changed}.tif", kept)


def test_a_finished_job_is_not_done_again(tmp_path):
    plate(str(tmp_path / "plate"), 2)
    first, _ = build(str(tmp_path / "plate"), str(tmp_path / "out"))
    for index in range(2):
        storage.delete(str(tmp_path / f"plate/{field_name(index)}.tif"))
    assert make_job(str(tmp_path / "plate"), str(tmp_path / "out")).run() == first


def test_a_resumed_job_keeps_its_catalogue_and_its_finished_work(tmp_path):
    home, out = str(tmp_path / "plate"), str(tmp_path / "out")
    plate(home, 6)
    reference, _ = build(home, str(tmp_path / "reference"), chunk_fields=1)
    storage.write_bytes(f"{home}/A01_s1.tif", b"")
    with pytest.raises(CosmicError, match="rejected"):
        build(home, out, chunk_fields=1, max_rejected_share=0)
    plate(home, 8)
    storage.delete(f"{out}/candidates/chunk-00000.json")
    results, _ = build(home, out, chunk_fields=3, max_rejected_share=0)
    assert results["content_hash"] == reference["content_hash"]


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"source": None}, "job", "needs `source`"),
        ({"sources": {"a": {"uri": "x"}}}, "job", "both `source` and `sources`"),
        ({"source": None, "sources": {"a": {"uri": "x"}, "b": {"uri": "x", "holds": "crops"}}}, "job", "differ"),
        ({"source": {"uri": "x", "holds": "crops"}, "target_um_px": 1}, "job", "as they are"),
        ({"recipe": "best"}, "recipe", "'better'"),
        ({"crop_pix": 3}, "crop_pix", "crop_px"),
        ({"segmentation": {"recipes": "paper"}}, "segmentation.recipes", "recipe"),
        ({"intensity": {"low": 99, "high": 1}}, "intensity", "below high"),
        ({"source": {"uri": "x", "layuot": 1}}, "source.layuot", "layout"),
    ],
)
def test_ill_formed_jobs_are_refused(keys, key, said):
    with pytest.raises(JobError) as caught:
        validate(BuildCrops, {"out": "o", "source": {"uri": "x"}, **keys})
    assert caught.value.key == key
    assert said in str(caught.value)


def test_a_missing_source_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(JobError) as caught:
        make_job(str(tmp_path / "nowhere"), str(tmp_path / "out")).check()
    assert caught.value.key == "source.uri"
    assert not (tmp_path / "out").exists()


def test_the_recipe_decides_what_the_job_does_not_say():
    def resolved(**keys):
        job = validate(BuildCrops, {"out": "o", "source": {"uri": "x"}, **keys})
        return job.segmentation.recipe, job.quality.enabled, job.intensity.mapping

    assert resolved() == ("better", True, "plate")
    assert resolved(recipe="paper") == ("paper", False, "patch")
    assert resolved(recipe="paper", intensity={"mapping": "plate"}) == ("paper", False, "plate")
    assert resolved(segmentation={"min_area_px": 9}) == ("better", True, "plate")


def test_equal_keys_at_the_edges_of_shards_lose_and_repeat_nothing(tmp_path, monkeypatch):
    """Two 64-bit keys hardly ever meet; here all are one of five, so that shards begin inside runs of equal keys."""
    monkeypatch.setattr(candidates, "order_keys", lambda ids, seed: order_keys(ids, seed) % np.uint64(5))
    plate(str(tmp_path / "plate"), 7)
    hashes = set()
    for chunk_fields, groups in ((1, 1), (3, 2), (100, 5)):
        out = str(tmp_path / f"out-{groups}")
        results, store = build(
            str(tmp_path / "plate"), out, chunk_fields=chunk_fields, groups_per_shard=groups, rows_per_group=4
        )
        ids = [row["crop_id"] for row in rows_of(store)[0]]
        assert len(set(ids)) == len(ids) == results["rows"] > 80
        hashes.add(results["content_hash"])
    assert len(hashes) == 1


def test_a_fault_of_segmentation_is_listed_and_ends_nothing(tmp_path, monkeypatch):
    drawn = plate(str(tmp_path / "plate"), 6)

    def faulty(image, settings):
        if (image == drawn[2].image).all():
            raise ValueError("a hull of three points")
        return segment(image, settings)

    monkeypatch.setattr(candidates, "segment", faulty)
    results, _ = build(str(tmp_path / "plate"), str(tmp_path / "out"))
    assert results["fields_rejected"] == {"failed": 1}
    (row,) = table_of(str(tmp_path / "out"), "rejected.parquet").to_pylist()
    assert row["detail"] == "ValueError: a hull of three points"


def test_a_server_that_does_not_answer_ends_the_job_and_rejects_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmic_ray.s3.FIRST_DEADLINE_S", 0.5)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "fields.csv").write_text("field_uri\ns3://bucket/a.tif\n")
    with pytest.raises(DataError, match="no answer"):
        source = {"uri": str(tmp_path / "fields.csv"), "layout": "table", "names": None}
        build(str(tmp_path), str(tmp_path / "out"), source=source)
    assert not storage.listing(str(tmp_path / "out"), "candidates/*")


def test_a_field_without_a_usable_nucleus_says_what_was_wrong_with_them(tmp_path):
    plate(str(tmp_path / "plate"), 4)
    edge = np.full((40, 40), 10, np.uint8)
    edge[:20, :20] = 99
    storage.write_bytes(str(tmp_path / "plate/A09_s1.tif"), tiff(edge))
    results, _ = build(str(tmp_path / "plate"), str(tmp_path / "out"), max_rejected_share=0.5)
    assert results["fields_rejected"] == {"no usable nuclei": 1}
    (row,) = table_of(str(tmp_path / "out"), "rejected.parquet").to_pylist()
    assert (row["detail"], row["well"]) == ("1 objects: 1 touches the border", "A09")


@pytest.mark.parametrize("recipe", ["paper", "better"])
def test_simulated_plates_become_simulated_crops_of_their_nuclei(tmp_path, recipe):
    field = {"height": 256, "width": 256, "pixel_size_um": 0.325}
    SimulatePlates(out=str(tmp_path / "plates"), wells=2, sites=1, processes=1, field=field).run()
    results, store = build(str(tmp_path / "plates"), str(tmp_path / "out"), recipe=recipe, crop_px=96, area=ALL,
                           source={"layout": "cpg", "names": None})  # fmt: skip
    assert results["simulated"] is store.simulated is True
    rows, _ = rows_of(store)
    truth = pq.read_table(tmp_path / "plates" / "truth.parquet").to_pylist()
    for row in rows:
        assert row["pixel_size_um"] == np.float32(0.325)
        here = [one for one in truth if (one["well"], str(one["site"])) == (row["well"], row["site"])]
        away = [
            math.hypot(one["centroid_x"] - row["centroid_x"], one["centroid_y"] - row["centroid_y"]) for one in here
        ]
        nearest = here[int(np.argmin(away))]
        assert nearest["cell_line"] == row["cell_line"]
        assert min(away) < 40, "every crop lies on a nucleus that was drawn"
    assert len(rows) >= 0.5 * sum(not one["touches_border"] for one in truth)


@pytest.mark.parametrize("name", ["build-crops", "build-crops-paper", "import-crops", "real-data"])
def test_the_job_files_are_well_formed(name):
    job = load(str(Path(__file__).parents[2] / "jobs" / f"{name}.yaml"), ["out=x"])
    assert job.kind == "build-crops"
    assert job.segmentation.recipe == job.recipe
