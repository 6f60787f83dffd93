"""Catalogues: what each layout says of a field, and errors that name file, column and row."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmic_ray import storage
from cosmic_ray.config import validate
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.imaging.catalogue import Entry, from_table, read_catalogue, to_table
from cosmic_ray.imaging.source import Source


def touch(home: str, *paths: str) -> None:
    for path in paths:
        storage.write_bytes(storage.join(home, path), b"pixels")


def read(**source) -> list[Entry]:
    return read_catalogue({"source": validate(Source, source, "source")})


def csv(home: str, text: str, name: str = "fields.csv") -> str:
    uri = storage.join(home, name)
    storage.write_bytes(uri, text.encode())
    return uri


def problem(**source) -> str:
    with pytest.raises(DataError) as caught:
        read(**source)
    return str(caught.value)


def test_a_folder_is_its_images(home):
    touch(home, "plates/b/1.png", "plates/a.TIF", "plates/notes.txt", "plates/b/2.jpeg")
    entries = read(uri=f"{home}/plates", defaults={"cell_line": "U2OS", "pixel_size_um": 0.65})
    assert [(entry.site, entry.name, entry.field_uri) for entry in entries] == [
        ("a", "a", f"{home}/plates/a.TIF"),
        ("b/1", "b/1", f"{home}/plates/b/1.png"),
        ("b/2", "b/2", f"{home}/plates/b/2.jpeg"),
    ]
    assert {(entry.source, entry.cell_line, entry.pixel_size_um) for entry in entries} == {("", "U2OS", 0.65)}
    assert math.isnan(read(uri=f"{home}/plates", pattern="b/*.png")[0].pixel_size_um)


def test_names_say_what_a_field_is_and_bring_channels_together(tmp_path):
    home = str(tmp_path)
    touch(home, *(f"P1/{well}_s{site}_{c}.tif" for well in ("A01", "A02") for site in (1, 2) for c in ("dna", "er")))
    touch(home, "P1/A03_s1_dna.tif", "P1/thumbnail.png", "P1/A01_s1_brightfield.tif")
    pattern = r"(?P<plate>[^/]+)/(?P<well>[A-P]\d\d)_s(?P<site>\d+)_(?P<channel>\w+)\.tif"
    channels = [{"name": "DNA", "file": "dna"}, {"name": "ER", "file": "er"}]
    entries = read(uri=home, names=pattern, channels=channels, defaults={"source": "s"})
    good = [entry for entry in entries if not entry.reason]
    assert [entry.name for entry in good] == ["s/P1/A01/1", "s/P1/A01/2", "s/P1/A02/1", "s/P1/A02/2"]
    assert good[0].files == [f"{home}/P1/A01_s1_dna.tif", f"{home}/P1/A01_s1_er.tif"]
    bad = {entry.reason: entry for entry in entries if entry.reason}
    assert set(bad) == {"missing", "name"}
    assert bad["missing"].detail == "no file for channel er"
    assert "thumbnail.png" in bad["name"].detail


def test_label_images_by_template(tmp_path):
    touch(str(tmp_path), "images/x.png", "labels/x.png")
    (entry,) = read(uri=str(tmp_path), pattern="images/*.png", labels="labels/{stem}.png")
    assert entry.label_uri == f"{tmp_path}/labels/x.png"
    assert "no 'stm'" in problem(uri=str(tmp_path), pattern="images/*.png", labels="labels/{stm}.png")


def test_a_table_maps_its_columns(home):
    rows = "path,Plate,Well,um,mask,line\nimg/1.tif,007,A01,0.5,m/1.tif,HeLa\n/abs/2.tif,007,A02,,,\n"
    uri = csv(home, rows)
    columns = {"field_uri": "path", "plate": "Plate", "well": "Well", "pixel_size_um": "um", "label_uri": "mask"}
    columns["cell_line"] = "line"
    first, second = read(uri=uri, layout="table", columns=columns, defaults={"cell_line": "U2OS", "source": "s"})
    assert (first.name, first.field_uri, first.label_uri) == ("s/007/A01", f"{home}/img/1.tif", f"{home}/m/1.tif")
    assert (first.pixel_size_um, first.cell_line) == (0.5, "HeLa")
    assert (second.field_uri, second.label_uri, second.cell_line) == ("/abs/2.tif", "", "U2OS")
    assert math.isnan(second.pixel_size_um)


def test_parquet_tsv_gzip_templates_and_pages(tmp_path):
    columns = {"id": ["x", "x"], "site": [1, 2], "page": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("id\tsite\tpage\nx\t1\t0\nx\t2\t1\n")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\ufeffid,site,page\nx,1,0\n\nx,2,1\n".encode()))
    channels = [{"file": "images/{id}.tif"}]
    for name in ("a.parquet", "a.tsv", "a.csv.gz"):
        entries = read(uri=str(tmp_path / name), layout="table", channels=channels)
        assert [(entry.site, entry.page) for entry in entries] == [("1", 0), ("2", 1)]
        assert entries[0].field_uri == entries[1].field_uri == f"{tmp_path}/images/x.tif"
        assert not any(entry.reason for entry in entries)


CPG = (
    "FileName_OrigDNA,PathName_OrigDNA,FileName_OrigER,PathName_OrigER,FileName_IllumDNA,PathName_IllumDNA,"
    "Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_Site\n"
    "d1.tiff,s3://cellpainting-gallery/p/images/,e1.tiff,s3://cellpainting-gallery/p/images/,P_IllumDNA.npy,"
    "/home/ubuntu/bucket/p/illum,source_4,P,A01,1\n"
    "d2.tiff,../images,e2.tiff,../images,P_IllumDNA.npy,../illum,source_4,P,A01,2\n"
)


def test_the_cell_painting_gallery(home):
    csv(home, CPG, "p/load_data_csv/P/load_data.csv")
    channels = [{"name": "DNA", "illumination": "IllumDNA"}, {"name": "ER"}]
    remap = {"/home/ubuntu/bucket/": "s3://anonymous@cpg/", "s3://cellpainting-gallery/": "s3://anonymous@cpg/"}
    for uri in (home, f"{home}/p/load_data_csv/P/load_data.csv"):
        first, second = read(uri=uri, layout="cpg", channels=channels, remap=remap)
        assert first.name == "source_4/P/A01/1"
        assert first.files == ["s3://anonymous@cpg/p/images/d1.tiff", "s3://anonymous@cpg/p/images/e1.tiff"]
        assert first.illumination == ["s3://anonymous@cpg/p/illum/P_IllumDNA.npy", ""]
        assert second.files[0] == f"{home}/p/load_data_csv/images/d2.tiff"
    assert not first.simulated


def test_what_the_catalogue_calls_simulated_is_simulated(tmp_path):
    text = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_simulated\na.tif,P,A01,1,True\n"
    assert read(uri=csv(str(tmp_path), text), layout="cpg")[0].simulated


def test_errors_name_file_column_and_row(tmp_path):
    def said(text: str, **source) -> str:
        return problem(uri=csv(str(tmp_path), text), layout="table", **source)

    assert "fields.csv: no column 'field_uri'" in said("path\nx\n")
    assert "columns there: path" in said("path\nx\n")
    assert "source.columns.plate" in said("field_uri\nx\n", columns={"plate": "Plate"})
    assert "source.channels.1.file" in said("field_uri\nx\n", channels=[{}, {"name": "ER"}])
    text = "field_uri,pixel_size_um\na.tif,0.5\nb.tif,half\n"
    assert "fields.csv: row 3, column 'pixel_size_um': 'half' is not a number" in said(text)
    assert "row 2, column 'pixel_size_um': '-1' is out of range" in said("field_uri,pixel_size_um\na.tif,-1\n")
    assert "row 2, column 'page': '0.5'" in said("field_uri,page\na.tif,0.5\n")
    assert "row 3: 3 cells under 2 columns" in said("field_uri,plate\na,b\na,b,c\n")
    assert "column 'a' stands twice" in said("a,a\n1,2\n")
    assert "an empty table" in said("")
    assert "holds no field" in said("field_uri\n")
    assert "no 'plate'" in said("field_uri\na\n", labels="{plate}.png")
    (tmp_path / "fields.csv").write_bytes(b"\xff\xfe\x00bad")
    assert "neither Parquet nor UTF-8" in problem(uri=str(tmp_path / "fields.csv"), layout="table")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1broken")
    assert "damaged Parquet" in problem(uri=str(tmp_path / "broken.parquet"), layout="table")
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(b"field_uri\na\n")[:-4])
    assert "damaged gzip" in problem(uri=str(tmp_path / "broken.csv.gz"), layout="table")
    assert "not found" in problem(uri=str(tmp_path / "none.csv"), layout="table")
    assert "no table matches" in problem(uri=str(tmp_path), layout="cpg")
    assert "no file matches '*.exr'" in problem(uri=str(tmp_path), pattern="*.exr")
    assert "no column 'Metadata_Plate'" in problem(uri=csv(str(tmp_path), "FileName_OrigDNA\nx\n"), layout="cpg")


def test_a_row_without_a_file_is_listed(tmp_path):
    uri = csv(str(tmp_path), "field_uri,site\n,1\na.tif,2\n")
    first, second = read(uri=uri, layout="table")
    assert (first.reason, second.reason) == ("missing", "")
    assert first.detail == f"row 2 of {uri} names no file for DNA"


def test_duplicates_are_named_and_the_first_stays_in_any_order(tmp_path):
    rows = ["a.tif,P,A01,1", "b.tif,P,A01,1", "c.tif,P,A02,1", "a.tif,P,A03,1"]
    for order in (rows, rows[::-1]):
        uri = csv(str(tmp_path), "\n".join(["field_uri,plate,well,site", *order]))
        entries = read(uri=uri, layout="table", defaults={"source": "s"})
        found = [(Path(entry.field_uri).name, entry.well, entry.reason) for entry in entries]
        assert found == [
            ("a.tif", "A01", ""),
            ("b.tif", "A01", "duplicate"),
            ("c.tif", "A02", ""),
            ("a.tif", "A03", "duplicate"),
        ]
        assert "same name (s/P/A01/1)" in entries[1].detail
        assert "same file" in entries[3].detail


def test_several_sources_are_named_by_their_keys(tmp_path):
    touch(str(tmp_path), "x/1.png", "y/1.png")
    sources = {name: Source(uri=str(tmp_path / name)) for name in "xy"}
    assert [entry.name for entry in read_catalogue(sources)] == ["x/1", "y/1"]


def test_ready_crops_are_called_by_their_ids(tmp_path):
    touch(str(tmp_path), "well/c1.png", "well/c2.jpg", "other/c1.png")
    source = {"uri": str(tmp_path), "holds": "crops"}
    assert {entry.site for entry in read(**source)} == {"well/c1", "well/c2", "other/c1"}
    by_name = read(**source, names="(?P<well>[^/]+)/")
    assert [(entry.site, entry.well, entry.reason) for entry in by_name] == [
        ("c1", "other", ""),
        ("c1", "well", "duplicate"),
        ("c2", "well", ""),
    ]


def test_a_catalogue_survives_its_table():
    plain = Entry("source", ["a", "b"], ["", "i"], "l", 3, "s", "p", "w", "1", "c", "t", 0.5, True, "missing", "why")
    assert from_table(to_table([plain])) == [plain]


@pytest.mark.parametrize(
    ("source", "key", "said"),
    [
        ({"layout": "tree"}, "source.layout", "'folder'"),
        ({"names": "(?P<plate>"}, "source.names", "regular expression"),
        ({"names": "(?P<plat>.)"}, "source.names", "named groups"),
        ({"columns": {"plat": "x"}, "layout": "table"}, "source.columns", "'plat' is not one of"),
        ({"columns": {"plate": "x"}}, "source", "need a table"),
        ({"names": "(?P<plate>.)", "layout": "cpg"}, "source", "layout folder"),
        ({"channels": []}, "source.channels", "at least 1"),
        ({"channels": [{}, {}]}, "source", "two channels of one name"),
        ({"labels": "x{"}, "source.labels", "template"),
        ({"labels": "x{}"}, "source.labels", "template"),
        ({"labels": "x", "holds": "crops"}, "source", "ready crops"),
        ({"defaults": {"pixel_size_um": 0}}, "source.defaults.pixel_size_um", "greater than 0"),
        ({"chanels": []}, "source.chanels", "channels"),
    ],
)
def test_ill_formed_sources_are_refused(source, key, said):
    with pytest.raises(JobError) as caught:
        validate(Source, {"uri": "x", **source}, "source")
    assert caught.value.key == key
    assert said in str(caught.value)
