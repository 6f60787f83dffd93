"""Catalogues that are tables: CSV, TSV, Parquet, and the Cell Painting Gallery's `load_data.csv`."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterator

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.imaging.catalogue import Entry, filled, make_entry, resolved
from cosmic_ray.imaging.source import TABLE_COLUMNS, Source

CPG_COLUMNS = {"plate": "Metadata_Plate", "well": "Metadata_Well", "site": "Metadata_Site"}
CPG_MAYBE = {"source": "Metadata_Source"} | {
    name: f"Metadata_{name}" for name in ("cell_line", "treatment", "pixel_size_um", "simulated")
}
Row = dict[str, str]


def read_table(origin: str, source: Source) -> list[Entry]:
    """The fields of the table(s) of a source, one a row.

    Raises:
        DataError: naming the file, the column and the row (its line in a CSV, counted from 1 with the header; its
            position in a Parquet file, from 1).
    """
    entries = []
    for uri in _tables(source):
        reader = _Reader(origin, source, uri)
        entries += [reader.entry(number, row) for number, row in reader.rows]
    return entries


def _tables(source: Source) -> list[str]:
    uri = storage.absolute(source.uri)
    if source.layout == "table" or uri.endswith((".csv", ".csv.gz", ".parquet")):
        return [uri]
    pattern = source.pattern or "**/load_data.csv*"
    found = storage.listing(uri, pattern)
    if not found:
        raise DataError(source.uri, f"no table matches {pattern!r}", "look at source.uri and source.pattern")
    return found


class _Reader:
    """One table, its columns checked once, its rows turned into entries."""

    def __init__(self, origin: str, source: Source, uri: str):
        self._origin, self._source, self._uri = origin, source, uri
        self._folder = uri.rsplit("/", 1)[0]
        self._names, self.rows = _open(uri)
        cpg = source.layout == "cpg"
        preset = CPG_COLUMNS | CPG_MAYBE if cpg else {}
        wanted = {name: name for name in TABLE_COLUMNS} | preset | source.columns
        self._columns = {ours: theirs for ours, theirs in wanted.items() if theirs in self._names}
        for ours in (*(CPG_COLUMNS if cpg else ()), *source.columns):
            self._require(wanted[ours], f"source.columns.{ours}")
        self._files = [self._file_columns(position) for position in range(len(source.channels))]
        self._illumination = [
            self._location(channel.illumination, f"source.channels.{position}.illumination")
            for position, channel in enumerate(source.channels)
            if channel.illumination is not None
        ]

    def _file_columns(self, position: int) -> list[str] | str:
        channel = self._source.channels[position]
        key = f"source.channels.{position}.file"
        if self._source.layout == "cpg":
            return self._location(channel.file or f"Orig{channel.name}", key)
        if channel.file is None and position == 0:
            return self._location(self._source.columns.get("field_uri", "field_uri"), key)
        return self._location(channel.file or channel.name, key)

    def _location(self, what: str, key: str) -> list[str] | str:
        """The columns whose values joined are the file's name, or a template of it."""
        if "{" in what:
            return what
        if self._source.layout != "cpg":
            return [self._require(what, key)]
        path = [f"PathName_{what}"] if f"PathName_{what}" in self._names else []
        return [*path, self._require(f"FileName_{what}", key)]

    def _require(self, column: str, key: str) -> str:
        if column not in self._names:
            raise DataError(self._uri, f"no column {column!r}", f"see {key}; columns there: {', '.join(self._names)}")
        return column

    def entry(self, number: int, row: Row) -> Entry:
        source = self._source
        known = {ours: row[theirs] for ours, theirs in self._columns.items()}
        files = [self._uri_of(location, row) for location in self._files]
        entry = make_entry(self._origin, source, files, known)
        if self._illumination:
            given = iter(self._illumination)
            entry.illumination = [self._uri_of(next(given), row) if c.illumination else "" for c in source.channels]
        if source.labels is not None:
            entry.label_uri = resolved(source, filled(source, source.labels, row), self._folder)
        elif known.get("label_uri"):
            entry.label_uri = resolved(source, known["label_uri"], self._folder)
        if known.get("pixel_size_um"):
            entry.pixel_size_um = self._number(number, self._columns["pixel_size_um"], row)
        if known.get("page"):
            page = self._number(number, self._columns["page"], row, least=0)
            if page != int(page):
                raise self._bad(number, self._columns["page"], row, "a page is a whole number, from 0")
            entry.page = int(page)
        entry.simulated = known.get("simulated", "").lower() in ("true", "1", "yes")
        if not all(files):
            empty = source.channels[files.index("")].name
            entry.reason, entry.detail = "missing", f"row {number} of {self._uri} names no file for {empty}"
        return entry

    def _uri_of(self, location: list[str] | str, row: Row) -> str:
        if isinstance(location, str):
            return resolved(self._source, filled(self._source, location, row), self._folder)
        if not row[location[-1]]:
            return ""
        parts = [row[column] for column in location if row[column]]
        joined = storage.join(*parts) if len(parts) > 1 else parts[0]
        return resolved(self._source, joined, self._folder)

    def _number(self, number: int, column: str, row: Row, least: float | None = None) -> float:
        try:
            value = float(row[column])
        except ValueError:
            raise self._bad(number, column, row, "not a number") from None
        if not math.isfinite(value) or (value <= 0 if least is None else value < least):
            raise self._bad(number, column, row, "out of range")
        return value

    def _bad(self, number: int, column: str, row: Row, problem: str) -> DataError:
        return DataError(self._uri, f"row {number}, column {column!r}: {row[column]!r} is {problem}")


def _open(uri: str) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    data = storage.read_bytes(uri)
    if data[:4] == b"PAR1":
        return _open_parquet(uri, data)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataError(uri, f"damaged gzip: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(uri, f"neither Parquet nor UTF-8 text: {error}") from None
    tabs = uri.removesuffix(".gz").endswith((".tsv", ".txt"))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    names = next(reader, None)
    if not names:
        raise DataError(uri, "an empty table: no header")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(uri, f"row 1: column {repeated[0]!r} stands twice")
    return names, _csv_rows(uri, reader, names)


def _csv_rows(uri: str, reader, names: list[str]) -> Iterator[tuple[int, Row]]:
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(names):
            raise DataError(uri, f"row {reader.line_num}: {len(cells)} cells under {len(names)} columns")
        yield reader.line_num, dict(zip(names, (cell.strip() for cell in cells), strict=True))


def _open_parquet(uri: str, data: bytes) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(uri, f"a damaged Parquet file: {error}") from None

    def rows() -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(table.to_pylist(), start=1):
            yield number, {name: "" if value is None else str(value) for name, value in row.items()}

    return table.column_names, rows()
