"""The steps of `build-cells`, each resumed where an earlier run left it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.cells import h5ad
from cosmic_ray.cells.annotations import COUNTED, read_obs, to_table
from cosmic_ray.cells.assemble import Assembly
from cosmic_ray.cells.chunks import SCRATCH, Genes, Reader, Span, finished_chunk, spans, write_chunk
from cosmic_ray.cells.h5ad import H5ad
from cosmic_ray.cells.images import Source, added, open_images
from cosmic_ray.cells.join import Fault, Joined, join, rejected_table
from cosmic_ray.errors import CosmicError, DataError, NotFoundError
from cosmic_ray.output import Output, canonical, claim, encode, read_manifest
from cosmic_ray.progress import progress, say
from cosmic_ray.stores import cells_form as form
from cosmic_ray.stores.cells_form import Part
from cosmic_ray.stores.cells_writer import publish_cells
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import ShardEntry
from cosmic_ray.stores.writer import publish_store

if TYPE_CHECKING:
    from cosmic_ray.cells.job import BuildCells, Expression

_SOURCES, _REJECTED = "sources.json", "rejected.parquet"
_Chunks = list[tuple[Span, dict[str, Any]]]


def build(job: BuildCells) -> dict[str, Any]:
    """Run `job`; see `BuildCells.run`."""
    with claim(job) as target:
        if not target.done:
            with _files(job.expression) as files, ExitStack() as stack:
                images = stack.enter_context(open_images(job.images, job.threads)) if job.images else None
                _build(job, target, files, images)
        for scratch in (SCRATCH, _SOURCES):
            storage.delete(target.at(scratch))
        return _results(target)


def _results(target: Output) -> dict[str, Any]:
    manifest = target.manifest()
    about = {key: manifest[key] for key in ("rows", "genes", "content_hash", "simulated", "values")}
    return {"out": target.uri, **about, "images": manifest["images"] is not None, **manifest["statistics"]}


@contextmanager
def _files(expression: Expression) -> Iterator[list[H5ad]]:
    with ExitStack() as stack:
        yield [stack.enter_context(H5ad.open(uri, expression)) for uri in h5ad.find(expression)]


def _build(job: BuildCells, target: Output, files: Sequence[H5ad], images: Source | None) -> None:
    genes = _genes(job, files)
    joined = join(read_obs(files, job.expression), images, job.seed)
    _require_share(job, target, joined, joined.faults)
    _require_same_sources(target, files, joined)
    shard_rows = job.rows_per_group * job.groups_per_shard(images.spec if images else None)
    buckets = max(1, len(joined.obs) // shard_rows)
    reader = Reader(files, genes, joined, images, job.expression.values, job.quality, buckets)
    chunks = _read(job, target, reader)
    left_out = joined.faults | {row: (why, how) for _, about in chunks for row, why, how in about["faults"]}
    _require_share(job, target, joined, left_out)
    low = {row: (why, how) for _, about in chunks for row, why, how in about["low"]}
    cells, order = _cells(joined, chunks, job.expression.values == "raw")
    few = np.sum([about["gene_cells"] for _, about in chunks], axis=0)
    stay = few >= job.quality.min_cells
    _write_rejected(target, joined, left_out | low, genes, few, stay)
    _require_some(target, cells, stay)
    assembly = Assembly(job, target, chunks, images, cells, order, stay, buckets)
    parts, shards = _assemble(assembly, shard_rows)
    statistics = _statistics(joined, left_out, low, genes, stay)
    lineage = {file.uri: file.sha256 for file in files}
    if images:
        lineage[storage.absolute(job.images.uri)] = images.digest or added(about["images"] for _, about in chunks)
    simulated = _simulated(job, files)
    crops = _publish_crops(job, target, images, shards, lineage, simulated) if images else None
    named = {"gene_id": genes.ids, "symbol": genes.symbols}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in named.items()})
    publish_cells(
        target,
        cells,
        table.filter(pa.array(stay)),
        parts,
        values=job.expression.values,
        crops=crops,
        statistics=statistics,
        lineage=lineage,
        job=job.resolved(),
        simulated=simulated,
    )


def _genes(job: BuildCells, files: Sequence[H5ad]) -> Genes:
    expression, first = job.expression, files[0]
    ids = h5ad.ids_of(first.var, expression.gene_id, first.uri, "expression.gene_id")
    symbols = [""] * len(ids)
    if expression.symbol:
        symbols = h5ad.ids_of(first.var, expression.symbol, first.uri, "expression.symbol")
    h5ad.require_unique_genes(ids, first.uri)
    orders = []
    for file in files:
        here = h5ad.ids_of(file.var, expression.gene_id, file.uri, "expression.gene_id")
        h5ad.require_unique_genes(here, file.uri)
        orders.append(h5ad.gene_order(ids, here, file.uri, first.uri))
    mitochondrial = h5ad.mitochondrial(ids, symbols, job.quality.mito)
    if job.quality.max_mito_share is not None and not mitochondrial.any():
        say(f"no mitochondrial gene ({job.quality.mito}) among {len(ids):,}: quality.max_mito_share has no effect")
    return Genes(ids, symbols, mitochondrial, orders)


def _require_same_sources(target: Output, files: Sequence[H5ad], joined: Joined) -> None:
    """What an earlier run has put aside is of these sources, or of no use."""
    where = hashlib.sha256(canonical([list(map(str, joined.where)), sorted(joined.orphans)])).hexdigest()
    now = {"files": [file.sha256 for file in files], "where": where}
    try:
        then = storage.read_json(target.at(_SOURCES))
    except NotFoundError:
        target.write(_SOURCES, encode(now))
        return
    if then != now:
        changed = "expression" if then["files"] != now["files"] else "list of images"
        problem = f"an earlier run began here with other sources: the {changed} has changed"
        raise DataError(target.uri, problem, "delete this folder, or choose another out")


def _read(job: BuildCells, target: Output, reader: Reader) -> _Chunks:
    """Every chunk, read or found read."""
    total = len(reader.joined.obs)
    chunks: _Chunks = []
    with progress("cells", total, "cells") as shown:
        for span in spans([len(file) for file in reader.files], job.chunk_cells):
            about = finished_chunk(target, span)
            if about is None:
                about = write_chunk(target, span, *reader.read(span), reader.buckets)
            chunks.append((span, about))
            kept = sum(len(one["rows"]) for _, one in chunks)
            shown.update(span.first + span.stop - span.start, f"{kept:,} kept")
    return chunks


def _require_share(job: BuildCells, target: Output, joined: Joined, faults: dict[int, Fault]) -> None:
    """Stop where too much is at fault, the list of it written."""
    reasons = Counter(reason for reason, _ in faults.values())
    for what, bad, total in (
        ("cells", len(faults), len(joined.obs)),
        ("images", len(joined.orphans), joined.images),
    ):
        if bad > job.max_rejected_share * total:
            target.write(_REJECTED, _parquet(rejected_table(joined, faults, [])))
            top = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
            why = top if what == "cells" else f"they belong to no cell, such as {sorted(joined.orphans)[0]}"
            share = f"more than max_rejected_share = {job.max_rejected_share:g}"
            listed = f"each is listed in {target.at(_REJECTED)}"
            raise CosmicError(f"{bad:,} of {total:,} {what} are rejected, {share}: {why}; {listed}")


def _cells(joined: Joined, chunks: _Chunks, raw: bool) -> tuple[pa.Table, np.ndarray]:
    """`cells.parquet`, and the order keys of its rows."""
    rows = np.array([row for _, about in chunks for row in about["rows"]], np.int64)
    frame = joined.obs.iloc[rows].copy()
    for name in COUNTED:
        values = [value for _, about in chunks for value in about[name]]
        whole = name == "q_genes" or (name == "q_counts" and raw)
        frame[name] = np.array([np.nan if v is None else v for v in values], np.int64 if whole else np.float64)
    keys = joined.order[rows]
    order = np.lexsort((frame["cell_id"].to_numpy(str), keys))
    return to_table(frame.iloc[order]), keys[order]


def _write_rejected(
    target: Output, joined: Joined, cells: dict[int, Fault], genes: Genes, found: np.ndarray, stay: np.ndarray
) -> None:
    gone = [(genes.ids[i], "few cells", f"found in {found[i]} cells") for i in np.flatnonzero(~stay)]
    target.write(_REJECTED, _parquet(rejected_table(joined, cells, gone)))


def _require_some(target: Output, cells: pa.Table, stay: np.ndarray) -> None:
    for what, count, key in (("cell", len(cells), "min_genes, max_mito_share"), ("gene", stay.sum(), "min_cells")):
        if not count:
            listed = f"see quality.{key}, and {target.at(_REJECTED)}"
            raise CosmicError(f"no {what} is left: {listed}")


def _assemble(assembly: Assembly, shard_rows: int) -> tuple[list[Part], list[ShardEntry]]:
    total = len(assembly.cells)
    parts: list[Part] = []
    shards: list[ShardEntry] = []
    with progress("store", total, "cells") as shown:
        for index, first in enumerate(range(0, total, shard_rows)):
            last = min(first + shard_rows, total)
            here, entry = assembly.shard(index, first, last)
            parts += here
            shards += [entry] if entry else []
            shown.update(last)
    return parts, shards


def _publish_crops(
    job: BuildCells,
    target: Output,
    images: Source,
    shards: list[ShardEntry],
    lineage: dict[str, str],
    simulated: bool,
) -> CropStore:
    inside = target.inside(form.CROPS)
    if not inside.done:
        publish_store(inside, images.spec, shards, {}, images.intensity, lineage, job.resolved(), simulated)
    return CropStore.open(inside.uri)


def _statistics(
    joined: Joined, faults: dict[int, Fault], low: dict[int, Fault], genes: Genes, stay: np.ndarray
) -> dict[str, Any]:
    cells = Counter(reason for reason, _ in (faults | low).values())
    return {
        "cells": len(joined.obs),
        "cells_rejected": dict(sorted(cells.items())),
        "genes_rejected": {"few cells": int((~stay).sum())} if not stay.all() else {},
        "images_rejected": {"no cell": len(joined.orphans)} if joined.orphans else {},
        "mitochondrial_genes": int(genes.mitochondrial.sum()),
    }


def _simulated(job: BuildCells, files: Sequence[H5ad]) -> bool:
    """Whether a file, or what is published at a source, says so."""
    if any(file.simulated for file in files):
        return True
    for source in (job.expression, job.images):
        with suppress(DataError):
            if source is not None and read_manifest(source.uri).get("simulated"):
                return True
    return False


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
