"""Sources -> one table of fields, sorted and with its duplicates named; no image is opened."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.imaging.source import TEXT_COLUMNS, Source

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")


@dataclass(slots=True)
class Entry:
    """One field (or one ready crop) of a catalogue."""

    origin: str
    """Key of its `Source` in the job."""
    files: list[str]
    """URIs of its channels' files, in the order of `Source.channels`; equal where one file holds several."""
    illumination: list[str] = field(default_factory=list)
    """URIs of the channels' illumination functions, "" for none; empty where there is none at all."""
    label_uri: str = ""
    page: int = -1
    """Page of a TIFF, from 0; -1 for its only one."""
    source: str = ""
    plate: str = ""
    well: str = ""
    site: str = ""
    cell_line: str = ""
    treatment: str = ""
    pixel_size_um: float = float("nan")
    simulated: bool = False
    reason: str = ""
    """Why it cannot be used, where the catalogue alone shows that."""
    detail: str = ""

    @property
    def field_uri(self) -> str:
        """URI of the first channel's file."""
        return self.files[0]

    @property
    def name(self) -> str:
        """What tells it from every other field: what is known of source, plate, well and site."""
        return "/".join(part for part in (self.source, self.plate, self.well, self.site) if part)


def read_catalogue(sources: Mapping[str, Source]) -> list[Entry]:
    """Every field of every source, sorted by source, plate, well and site, whatever the order of the catalogue.

    Of fields that share all of these (of ready crops that share their id), or their files, the first in that order
    stays; the others get the reason "duplicate".

    Args:
        sources: by the key in the job; it names the source where neither catalogue nor defaults do.

    Raises:
        DataError: naming file, column and row, where a catalogue is missing, empty or cannot be understood.
    """
    from cosmic_ray.imaging.tables import read_table

    entries = []
    for origin, source in sources.items():
        found = read_folder(origin, source) if source.layout == "folder" else read_table(origin, source)
        if not found:
            raise DataError(source.uri, "the catalogue holds no field")
        entries += found
    entries.sort(key=lambda e: (e.source, e.plate, e.well, e.site, e.origin, e.files, e.page))
    _mark_duplicates(entries, ready={origin for origin, source in sources.items() if source.holds == "crops"})
    return entries


def _mark_duplicates(entries: Iterable[Entry], ready: set[str]) -> None:
    names: dict[str, str] = {}
    files: dict[tuple, str] = {}
    for entry in entries:
        if entry.reason:
            continue
        name = entry.site if entry.origin in ready else entry.name
        holds = (*entry.files, entry.page)
        twin = names.get(name) or files.get(holds)
        if twin is not None:
            same = f"name ({name})" if name in names else "file"
            entry.reason, entry.detail = "duplicate", f"same {same} as {twin}"
            continue
        names[name] = files[holds] = entry.field_uri


def read_folder(origin: str, source: Source) -> list[Entry]:
    """The image files below a folder, those of one field brought together by the groups of `names`.

    Raises:
        DataError: where no file matches.
    """
    root = storage.absolute(source.uri)
    found = storage.listing(root, source.pattern or "**")
    paths = [uri[len(root) + 1 :] for uri in found if uri.lower().endswith(IMAGE_SUFFIXES)]
    if not paths:
        what = f"no file matches {source.pattern!r}" if found or source.pattern else "no file"
        raise DataError(source.uri, f"{what} with a suffix of {', '.join(IMAGE_SUFFIXES)}", "look at source.pattern")
    if source.names is None:
        return [_entry(origin, source, root, path, {"site": _stem(path)}) for path in paths]
    return _by_names(origin, source, root, paths)


def _by_names(origin: str, source: Source, root: str, paths: list[str]) -> list[Entry]:
    pattern = re.compile(source.names or "")
    entries: list[Entry] = []
    fields: dict[tuple, dict[str, str]] = {}
    for path in paths:
        match = pattern.search(path)
        if match is None:
            entry = _entry(origin, source, root, path, {"site": _stem(path)})
            entry.reason, entry.detail = "name", f"{path!r} does not match source.names"
            entries.append(entry)
            continue
        groups = {name: value or "" for name, value in match.groupdict().items()}
        if "channel" not in groups:
            entries.append(_entry(origin, source, root, path, groups))
            continue
        channel = groups.pop("channel")
        files = fields.setdefault(tuple(groups.items()), {})
        if channel in files:
            entry = _entry(origin, source, root, path, groups)
            entry.reason, entry.detail = "duplicate", f"same field and channel as {files[channel]}"
            entries.append(entry)
        else:
            files[channel] = path
    wanted = [channel.file or channel.name for channel in source.channels]
    for groups, files in fields.items():
        present = [name for name in wanted if name in files]
        if not present:
            continue
        entry = _entry(origin, source, root, files[present[0]], dict(groups))
        entry.files = [storage.join(root, files[name]) for name in present]
        if len(present) < len(wanted):
            entry.reason = "missing"
            entry.detail = f"no file for channel {', '.join(sorted(set(wanted) - set(present)))}"
        entries.append(entry)
    return entries


def _entry(origin: str, source: Source, root: str, path: str, known: dict[str, str]) -> Entry:
    entry = make_entry(origin, source, [storage.join(root, path)] * len(source.channels), known)
    if source.labels is not None:
        words = {"path": path, "folder": posixpath.dirname(path), "stem": posixpath.basename(_stem(path)), **known}
        entry.label_uri = resolved(source, filled(source, source.labels, words), root)
    return entry


def make_entry(origin: str, source: Source, files: list[str], known: Mapping[str, str]) -> Entry:
    """An entry of `files`, with what is `known` of it by column name, and the defaults for what is empty or absent."""
    defaults = source.defaults
    if source.holds == "crops" and not known.get("site"):
        known = {**known, "site": storage.name(_stem(files[0]))}
    about = {column: known.get(column) or getattr(defaults, column, "") for column in TEXT_COLUMNS}
    # Not the folder's name: a copy of the fields elsewhere is to give the same crop ids.
    fallback = "" if origin == "source" else origin
    entry = Entry(origin, files, **(about | {"source": about["source"] or fallback}))
    if defaults.pixel_size_um is not None:
        entry.pixel_size_um = defaults.pixel_size_um
    return entry


def filled(source: Source, template: str, words: Mapping[str, str]) -> str:
    """`template` with each `{name}` replaced.

    Raises:
        DataError: where a name is not among `words`.
    """
    try:
        return template.format_map(words)
    except (KeyError, IndexError, AttributeError) as error:
        raise DataError(source.uri, f"template {template!r}: no {error}", f"known here: {', '.join(words)}") from None


def resolved(source: Source, path: str, folder: str) -> str:
    """The URI of a file name of the catalogue: remapped, then relative to `source.root`, or else to `folder`."""
    for old in sorted(source.remap, key=len, reverse=True):
        if path.startswith(old):
            path = source.remap[old] + path[len(old) :]
            break
    if "://" not in path and not path.startswith("/"):
        path = storage.join(storage.absolute(source.root) if source.root else folder, path)
    scheme, mark, rest = path.rpartition("://")
    return storage.absolute(scheme + mark + posixpath.normpath(rest))


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def to_table(entries: Iterable[Entry]) -> pa.Table:
    """Entries as an Arrow table, one row each."""
    import pyarrow as pa

    text = [pa.field(name, pa.string()) for name in TEXT_COLUMNS]
    lists = [pa.field(name, pa.list_(pa.string())) for name in ("files", "illumination")]
    rest = [pa.field("page", pa.int32()), pa.field("pixel_size_um", pa.float64()), pa.field("simulated", pa.bool_())]
    plain = [pa.field(name, pa.string()) for name in ("origin", "label_uri", "reason", "detail")]
    return pa.Table.from_pylist([asdict(entry) for entry in entries], pa.schema([*text, *lists, *rest, *plain]))


def from_table(table: pa.Table) -> list[Entry]:
    """The inverse of `to_table`."""
    return [Entry(**row) for row in table.to_pylist()]
