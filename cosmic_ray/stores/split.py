"""`split`: one hashed, grouped split of a crop store or a cell store for everything that is fitted or judged on it."""

from __future__ import annotations

import hashlib
import io
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import Field, model_validator

from cosmic_ray import output, storage
from cosmic_ray.config import Config, Job, Uri
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.output import MANIFEST, claim, read_manifest
from cosmic_ray.progress import say
from cosmic_ray.stores.cells import CellStore, open_store
from cosmic_ray.stores.cells_form import SOURCE_ROW
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.groups import Column, assign, group_rows
from cosmic_ray.stores.manifest import FIELD
from cosmic_ray.stores.scan import Scan
from cosmic_ray.stores.strata import assign_stratified

FORMAT, VERSION = "cosmic-ray/split", 1
PARTS = ("train", "val", "test")
_CODES = "codes.parquet"
_SCHEMA = pa.schema([pa.field("part", pa.uint8(), nullable=False), pa.field("group", pa.int32(), nullable=False)])
_BY = [FIELD]
_STRATA_SHOWN = 1000
_ALTERNATING = (
    "alternating, as in the paper: seq2img is fitted on the even cells (part `test`), img2seq on the odd ones (part "
    "`train`), so that no cell is held out of both, and cells of one batch, well or field lie on both sides"
)

Share = Annotated[float, Field(ge=0, le=1)]


class Fractions(Config):
    """Shares of the groups, and so about of the crops; they add up to 1."""

    train: Share = 0.8
    """What models are fitted on."""
    val: Share = 0.1
    """What is watched while they are fitted."""
    test: Share = 0.1
    """What they are judged on, and nothing else sees."""

    @model_validator(mode="after")
    def _add_up(self) -> Fractions:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError(f"train, val and test add up to {self.train + self.val + self.test:g}, not 1")
        return self


class NearDuplicates(Config):
    """What counts as the same thing twice and is kept in one part. Null turns a test off."""

    crops: Annotated[float, Field(gt=0, le=1)] | None = 0.995
    """Correlation of the pixels of two nuclei from which one is a copy of the other (re-encoded, other contrast)."""
    fields: Annotated[float, Field(gt=0, le=1)] | None = 0.6
    """Share of nuclei in the same places from which two fields show the same cells (z-planes, time points, cycles)."""


class MakeSplit(Job):
    """Split a crop store or a cell store into train, val and test: grouped, hashed, near-duplicates together."""

    kind: ClassVar[str] = "split"

    store: Uri
    """URI of the crop store, or of the cell store: then the split is one of its crops, too."""
    method: Literal["hashed", "alternating"] = "hashed"
    """`alternating`: the paper's, of a cell store; for comparison with it alone, since no cell is held out of both
    directions. Of the cells in the order of their file the odd ones are `train`, the even ones `test`: img2seq is
    fitted on the odd ones, seq2img on the even ones. It knows no groups: leave the keys below alone."""
    by: list[str] = Field(default=_BY, min_length=1)
    """Columns; rows that agree in any of them stay together. `plate+well` takes two as one key. Of a cell store any
    column of the cells or of their crops: `cell_id`, `batch`, `donor`, ..."""
    stratify: str | None = None
    """A column (`cell_type`), or several joined by `+`: each part gets the same share of each of its values, as near as
    whole groups allow; exactly, but for rounding, where the groups are single cells. Null: parts by hash alone."""
    fractions: Fractions = Fractions()
    """Shares of the groups, or where `stratify` is given of the rows."""
    seed: int = 0
    """Another seed, another split."""
    near_duplicates: NearDuplicates = NearDuplicates()
    """What else stays together. It takes a pass over the images (about 0.1 CPU-ms a crop). Cells without images have
    none."""

    @model_validator(mode="after")
    def _alternates_alone(self) -> MakeSplit:
        plain = (self.by, self.stratify, self.fractions, self.near_duplicates)
        if self.method == "alternating" and plain != (_BY, None, Fractions(), NearDuplicates()):
            raise ValueError("method alternating takes neither by, stratify, fractions nor near_duplicates")
        return self

    def check(self) -> None:
        """Raise `JobError` where there is no store, or it lacks a column."""
        try:
            store = open_store(self.store)
        except NotFoundError as error:
            raise JobError("store", self.store, error.problem, error.remedy) from None
        if self.method == "alternating":
            if not isinstance(store, CellStore):
                raise JobError("method", self.method, "the paper's split is of cells", "give a cell store")
            return
        keys = [(f"by.{place}", key) for place, key in enumerate(self.by)]
        for place, key in [*keys, *([("stratify", self.stratify)] if self.stratify else [])]:
            for name in key.split("+"):
                if name not in store.columns or name == "image":
                    known = ", ".join(column for column in store.columns if column != "image")
                    raise JobError(place, key, f"the store has no column {name!r}", f"it has {known}")

    def run(self) -> dict[str, Any]:
        """Make the split.

        Returns:
            rows and groups of each part, and what was found near-duplicate.

        Raises:
            JobError: where a part that should hold crops gets none.
        """
        store = open_store(self.store)
        with claim(self) as target:
            if target.done:
                return read_manifest(target.uri)["counts"]
            make = self._alternating if self.method == "alternating" else self._hashed
            codes, groups, counts = make(store)
            self._publish(target, store, codes, groups, counts)
        rows = counts["rows"]
        say(f"split {len(store):,} rows: " + ", ".join(f"{part} {rows[part] / len(store):.1%}" for part in PARTS))
        return counts

    def _hashed(self, store: CropStore | CellStore) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Codes and groups of the rows, and the counts."""
        near = self.near_duplicates
        crops = near.crops if "image" in store.columns else None
        fields = near.fields if FIELD in store.columns else None
        scan = Scan(store, self.by, crops, fields, self.stratify)
        pairs, found = scan.near_duplicates()
        groups, keys = group_rows(scan.columns, pairs)
        fractions = [getattr(self.fractions, part) for part in PARTS]
        if scan.also is None:
            part_of_group = assign(keys, fractions, self.seed)
        else:
            part_of_group = assign_stratified(groups, keys, scan.also, fractions, self.seed)
        codes = part_of_group[groups]
        counts = {**_counts(codes, groups, part_of_group), "near_duplicates": found}
        if scan.also is not None and len(scan.also.values) <= _STRATA_SHOWN:
            counts["rows_by_stratum"] = _by_value(codes, scan.also)
        self._require_parts(counts)
        return codes, groups, counts

    def _alternating(self, store: CellStore) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Appendix A: "odd for training, even for testing", over the cells of the store in the order of their file."""
        position = np.argsort(np.argsort(store.obs([SOURCE_ROW])[SOURCE_ROW].to_numpy()))
        codes = np.where(position % 2, PARTS.index("train"), PARTS.index("test")).astype(np.uint8)
        return codes, np.arange(len(store), dtype=np.int32), _counts(codes, np.arange(len(store)), codes)

    def _require_parts(self, counts: dict[str, Any]) -> None:
        """An empty part would only be noticed when something is judged on it."""
        for part in PARTS:
            if getattr(self.fractions, part) and not counts["rows"][part]:
                raise JobError(
                    f"fractions.{part}",
                    getattr(self.fractions, part),
                    f"no crop falls to it: there are {counts['groups']} groups, the largest with "
                    f"{counts['largest_group_rows']:,} crops",
                    "group by a finer column, or try another seed",
                )

    def _publish(
        self,
        target: output.Output,
        store: CropStore | CellStore,
        codes: np.ndarray,
        groups: np.ndarray,
        counts: dict[str, Any],
    ) -> None:
        sink = io.BytesIO()
        pq.write_table(pa.table([codes, groups], schema=_SCHEMA), sink, compression="zstd")
        target.write(_CODES, sink.getvalue())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "parts": PARTS,
            "store": named(store),
            "method": self.method,
            "flaws": [_ALTERNATING] if self.method == "alternating" else [],
            "counts": counts,
            "codes_digest": xxhash.xxh3_128_hexdigest(sink.getvalue()),
            "content_hash": _content_hash(store.content_hash, codes, groups),
            "lineage": {store.uri: store.content_hash},
            "simulated": store.simulated,
            "job": self.resolved(),
        }
        target.publish(manifest)


class Split:
    """A published split of one store; that of a cell store is one of its crop store, too."""

    def __init__(self, uri: str, manifest: dict[str, Any], codes: np.ndarray, group_codes: np.ndarray):
        self.uri = uri
        self.manifest = manifest
        self.codes = codes
        """uint8 (N,), in store row order: 0 train, 1 val, 2 test."""
        self.group_codes = group_codes
        """int32 (N,): rows with one number must stay together (in bootstraps, too)."""

    @classmethod
    def open(cls, uri: str, store: CropStore | CellStore) -> Split:
        """Open the split at `uri` of `store`. One of a cell store is one of its crops, and the other way round.

        Raises:
            DataError: where there is none, its version is unknown, it was damaged, or it is of another store.
        """
        uri = storage.absolute(uri)
        manifest = read_manifest(uri)
        at = storage.join(uri, MANIFEST)
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            problem = f"not a split this program reads: {manifest.get('format')!r}, version {manifest.get('version')!r}"
            raise DataError(at, problem, f"expected {FORMAT!r}, version {VERSION}")
        if not set(content_hashes(manifest["store"])) & set(content_hashes(named(store))):
            problem = f"this split is of another store ({manifest['store']['uri']}), not of {store.uri}"
            raise DataError(at, problem, "make a split of this one")
        data = storage.read_bytes(storage.join(uri, _CODES))
        if xxhash.xxh3_128_hexdigest(data) != manifest["codes_digest"]:
            raise DataError(storage.join(uri, _CODES), "its bytes do not match the manifest's digest", "make it again")
        table = pq.read_table(pa.BufferReader(data))
        split = cls(uri, manifest, table["part"].to_numpy(), table["group"].to_numpy())
        if split.content_hash != _content_hash(manifest["store"]["content_hash"], split.codes, split.group_codes):
            raise DataError(at, "the content hash is not that of the codes", "make the split again")
        return split

    @property
    def content_hash(self) -> str:
        """sha256 of the store's content hash and of which row goes where."""
        return self.manifest["content_hash"]

    @property
    def flaws(self) -> list[str]:
        """What every figure that rests on this split has to say; empty where all is well."""
        return self.manifest.get("flaws", [])

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of `train`, `val` or `test`, ascending: int64.

        Raises:
            KeyError: for another name.
        """
        if part not in PARTS:
            raise KeyError(f"{part}: the parts of a split are {', '.join(PARTS)}")
        return np.flatnonzero(self.codes == PARTS.index(part))


def named(store: CropStore | CellStore) -> dict[str, str]:
    """How a lineage names a store: `uri`, `content_hash`, and of a cell store with images `crops_hash`, theirs."""
    named = {"uri": store.uri, "content_hash": store.content_hash}
    if isinstance(store, CellStore) and store.manifest.images:
        named["crops_hash"] = store.manifest.images.content_hash
    return named


def content_hashes(named: dict[str, str]) -> list[str]:
    """Those of a store that `named` names: whatever has one of them has its rows, in their order."""
    return [named[key] for key in ("content_hash", "crops_hash") if key in named]


def _by_value(codes: np.ndarray, stratum: Column) -> dict[str, dict[str, int]]:
    """Rows of each part by value of a column."""
    table = np.zeros((len(stratum.values), len(PARTS)), np.int64)
    np.add.at(table, (stratum.codes, codes), 1)
    return {value: dict(zip(PARTS, table[code].tolist(), strict=True)) for value, code in stratum.values.items()}


def _counts(codes: np.ndarray, groups: np.ndarray, part_of_group: np.ndarray) -> dict[str, Any]:
    """Rows and groups of each part; makes sure that no group lies in two."""
    for code in range(len(PARTS)):
        if not (part_of_group[groups[codes == code]] == code).all():
            raise AssertionError("a group straddles two parts")
    return {
        "rows": {part: int((codes == code).sum()) for code, part in enumerate(PARTS)},
        "groups_by_part": {part: int((part_of_group == code).sum()) for code, part in enumerate(PARTS)},
        "groups": len(part_of_group),
        "largest_group_rows": int(np.bincount(groups).max()),
    }


def _content_hash(store_hash: str, codes: np.ndarray, groups: np.ndarray) -> str:
    total = hashlib.sha256(output.canonical({"store": store_hash, "parts": PARTS, "version": VERSION}))
    total.update(codes.tobytes())
    total.update(groups.astype("<i4").tobytes())
    return total.hexdigest()
