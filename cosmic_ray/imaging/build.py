"""The three steps of `build-crops`, each resumed where an earlier run left it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError, DataError, NotFoundError
from cosmic_ray.imaging.candidates import find_candidates
from cosmic_ray.imaging.catalogue import Entry, from_table, read_catalogue, to_table
from cosmic_ray.imaging.chunks import CANDIDATES, Chunk, Totals, chunk_name, finished, read_chunks, write_chunk
from cosmic_ray.imaging.parallel import each
from cosmic_ray.imaging.select import select, shard_units
from cosmic_ray.imaging.source import TEXT_COLUMNS
from cosmic_ray.output import Output, canonical, claim, encode, read_manifest
from cosmic_ray.progress import progress, say
from cosmic_ray.stores.manifest import SHARDS, Intensity, ShardEntry
from cosmic_ray.stores.writer import finished_shard, publish_store

if TYPE_CHECKING:
    from cosmic_ray.imaging.job import BuildCrops

CATALOGUE, SELECTION = "catalogue.parquet", "selection.json"
_FIELDS_A_CHUNK, _CROPS_A_CHUNK, _CHUNKS = 64, 4096, 64


def build(job: BuildCrops) -> dict[str, Any]:
    """Run `job`; see `BuildCrops.run`."""
    with claim(job) as output:
        if not output.done:
            _build(job, output)
        for scratch in (CANDIDATES, CATALOGUE, SELECTION):
            storage.delete(output.at(scratch))
        return _results(output)


def _results(output: Output) -> dict[str, Any]:
    manifest = output.manifest()
    about = {key: manifest[key] for key in ("rows", "content_hash", "simulated")}
    counted = {key: value for key, value in manifest["statistics"]["build"].items() if key != "intensity_lines"}
    return {"out": output.uri, **about, "shards": len(manifest["shards"]), **counted}


def _build(job: BuildCrops, output: Output) -> None:
    chunks = _catalogue(job, output)
    _find(job, output, chunks)
    sidecars, totals = read_chunks(output.uri, [chunk_name(index) for index in range(len(chunks))])
    fields = _outcomes(output, chunks, sidecars)
    _require_share(job, output, fields)
    chosen = _select(job, output, sidecars, totals)
    entries = _assemble(job, output, sidecars, chosen)
    intensity, statistics = _meaning(job), _statistics(chosen, fields)
    lineage, simulated = _lineage(job, fields), _simulated(job, chunks)
    publish_store(output, job.spec, entries, statistics, intensity, lineage, job.resolved(), simulated)


def _catalogue(job: BuildCrops, output: Output) -> list[list[Entry]]:
    """The fields in chunks, read once and kept: a resumed run works on the same fields in the same chunks."""
    with suppress(NotFoundError):
        parquet = _catalogue_file(output.uri)
        return [from_table(parquet.read_row_group(index)) for index in range(parquet.num_row_groups)]
    say("reading the catalogue")
    entries = read_catalogue(job.catalogues)
    most = _CROPS_A_CHUNK if job.ready else _FIELDS_A_CHUNK
    size = job.chunk_fields or max(1, min(most, len(entries) // _CHUNKS))
    data = io.BytesIO()
    pq.write_table(to_table(entries), data, row_group_size=size, compression="zstd")
    output.write(CATALOGUE, data.getvalue())
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _catalogue_file(out: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(storage.read_bytes(storage.join(out, CATALOGUE))))


def candidates_task(index: int, job: BuildCrops, out: str) -> dict[str, Any]:
    """Step one for chunk number `index`: what `find_candidates` finds, written."""
    entries = from_table(_catalogue_file(out).read_row_group(index))
    found = find_candidates(job, entries)
    write_chunk(out, chunk_name(index), found)
    reasons = Counter(field["reason"] for field in found.fields if field["reason"])
    return {
        "fields": len(entries),
        "rejected": sum(reasons.values()),
        "candidates": sum(field["candidates"] for field in found.fields),
    }


def _find(job: BuildCrops, output: Output, chunks: Sequence[Sequence[Entry]]) -> None:
    there = finished(output.uri)
    missing = [index for index in range(len(chunks)) if chunk_name(index) not in there]
    total = sum(map(len, chunks))
    done = total - sum(len(chunks[index]) for index in missing)
    rejected = candidates = 0
    with progress("fields", total, "fields") as shown:
        shown.update(done)
        for result in _tasks(job, candidates_task, [{"index": index} for index in missing], {"out": output.uri}):
            done, rejected = done + result["fields"], rejected + result["rejected"]
            candidates += result["candidates"]
            shown.update(done, f"{candidates:,} nuclei, {rejected:,} fields rejected")
            if rejected > job.max_rejected_share * total:
                break
    if done < total:
        there = sorted(finished(output.uri))
        index = [int(name.removeprefix("chunk-")) for name in there]
        fields = _outcomes(output, [chunks[i] for i in index], read_chunks(output.uri, there)[0])
        _require_share(job, output, fields, total)


def _tasks(job: BuildCrops, task: Any, units: list[dict[str, Any]], shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    seen = {job.key_of(name): source.uri for name, source in job.catalogues.items()}
    seen["out"] = storage.join(shared["out"], CATALOGUE)
    return each(task, units, {"job": job, **shared}, job.workers, int(job.memory_gib * 2**30), seen)


def _outcomes(output: Output, chunks: Sequence[Sequence[Entry]], sidecars: Sequence[Chunk]) -> list[dict[str, Any]]:
    """What became of each field; written to `fields.parquet`, and those left out to `rejected.parquet`."""
    rows = []
    for entries, chunk in zip(chunks, sidecars, strict=True):
        for entry, about in zip(entries, chunk.fields, strict=True):
            known = {name: getattr(entry, name) for name in ("origin", *TEXT_COLUMNS)}
            outcome = {name: about[name] for name in ("reason", "detail", "objects", "candidates", "digest")}
            rows.append({"field_uri": entry.field_uri, **known, **outcome})
    table = pa.Table.from_pylist(rows)
    left_out = table.filter(pc.not_equal(table["reason"], ""))
    for name, part in (("fields", table), ("rejected", left_out.drop_columns(["objects", "candidates", "digest"]))):
        data = io.BytesIO()
        pq.write_table(part, data, compression="zstd")
        output.write(f"{name}.parquet", data.getvalue())
    return rows


def _require_share(job: BuildCrops, output: Output, fields: Sequence[dict[str, Any]], total: int | None = None) -> None:
    reasons = Counter(field["reason"] for field in fields if field["reason"])
    rejected, total = sum(reasons.values()), total or len(fields)
    if rejected > job.max_rejected_share * total:
        top = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
        allowed = f"more than max_rejected_share = {job.max_rejected_share:g}"
        listed = f"each is listed in {output.at('rejected.parquet')}"
        raise CosmicError(f"{rejected:,} of {total:,} fields are rejected, {allowed}: {top}; {listed}")


def _select(job: BuildCrops, output: Output, sidecars: Sequence[Chunk], totals: Totals) -> dict[str, Any]:
    with suppress(NotFoundError):
        return storage.read_json(output.at(SELECTION))
    say("thresholds over all nuclei")
    chosen = select(job, output.uri, sidecars, totals)
    output.write(SELECTION, encode(chosen))
    return chosen


def _assemble(job: BuildCrops, output: Output, sidecars: Sequence[Chunk], chosen: dict[str, Any]) -> list[ShardEntry]:
    from cosmic_ray.imaging.assemble import assemble

    shards = chosen["shards"]
    written = storage.listing(output.at(SHARDS), "*.json")
    indices = [int(storage.name(uri).removeprefix("shard-").removesuffix(".json")) for uri in written]
    there = {index: finished_shard(output.uri, index) for index in indices}
    entries = {index: entry for index, entry in there.items() if entry is not None}
    missing = [index for index in range(len(shards)) if index not in entries]
    shared = {"out": output.uri, "chosen": {key: chosen[key] for key in ("limits", "lines", "schema")}}
    with progress("crops", chosen["rows"], "crops") as shown:
        shown.update(chosen["rows"] - sum(shards[index][3] for index in missing))
        for result in _tasks(job, assemble, shard_units(sidecars, shards, missing), shared):
            entries |= {int(index): ShardEntry.model_validate(entry) for index, entry in result["entries"].items()}
            shown.update(sum(shards[index][3] for index in entries))
    return [entries[index] for index in range(len(shards))]


def _meaning(job: BuildCrops) -> Intensity:
    if job.ready:
        return Intensity(scope="stored", description="ready crops; those of 8 bits as they are", masked=False)
    if job.intensity.mapping == "patch":
        text = "each patch by its own maximum: 0..max -> 0..255; brightness and DNA content are lost between crops"
        return Intensity(scope="crop", description=f"{text}; a nucleus pixel is at least 1", masked=True)
    text = f"one line a plate and channel: percentile {job.intensity.low:g} of its nucleus pixels -> 1"
    return Intensity(scope="plate", description=f"{text}, percentile {job.intensity.high:g} -> 255", masked=True)


def _statistics(chosen: dict[str, Any], fields: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons = Counter(field["reason"] for field in fields if field["reason"])
    return {
        "fields": len(fields),
        "fields_rejected": dict(sorted(reasons.items())),
        "objects": chosen["objects"],
        "objects_rejected": chosen["rejected"],
        "area_limits_px": chosen["limits"],
        "intensity_lines": chosen["lines"],
    }


def _lineage(job: BuildCrops, fields: Sequence[dict[str, Any]]) -> dict[str, str]:
    """URI of each source -> sha256 over what each of its fields is called and what its files hold.

    Sources of one URI, such as two patterns over one folder, are one input: their fields count together.
    """
    uris = {origin: storage.absolute(source.uri) for origin, source in job.catalogues.items()}
    totals = {uri: hashlib.sha256() for uri in uris.values()}
    for field in fields:
        known = [field[key] for key in ("source", "plate", "well", "site", "reason", "digest")]
        totals[uris[field["origin"]]].update(canonical(known))
    return {uri: total.hexdigest() for uri, total in totals.items()}


def _simulated(job: BuildCrops, chunks: Sequence[Sequence[Entry]]) -> bool:
    """Whether the catalogue, or what is published at a source, says that any field is simulated."""
    if any(entry.simulated for chunk in chunks for entry in chunk):
        return True
    for source in job.catalogues.values():
        with suppress(DataError):
            if read_manifest(source.uri).get("simulated"):
                return True
    return False
