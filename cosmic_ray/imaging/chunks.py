"""What step one leaves on storage, so that any range of the final order can be fetched from it by one range read.

    <out>/objects/chunk-00000.parquet      every object found, with the reason where it was left out; stays
    <out>/candidates/chunk-00000.arrows    candidates with their raw pixels; removed once the store is published
    <out>/candidates/chunk-00000.json      the rest of `Found`, and where batches lie; written last

The candidates of a chunk lie in the order of their keys, as an Arrow stream of small compressed batches. A slice of
whole batches behind the stream's schema is a stream again. Every shard draws from every chunk, so this is what makes
the shuffle cheap: shards x chunks / (shards a task) range reads, and only nuclei's own pixels are kept (about 2 KB of a
1,000-px 16-bit nucleus). Reading 50 k fields of 9 MB twice instead would cost 470 GB and segmenting twice.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.imaging.candidates import KEEP, Found
from cosmic_ray.imaging.histogram import Histogram
from cosmic_ray.output import encode

OBJECTS, CANDIDATES = "objects", "candidates"
THREADS = 16
BATCH = 32
"""Candidates a batch: what a range read may fetch too much at either end."""


@dataclass(frozen=True)
class Chunk:
    """One finished chunk: what its sidecar tells, but the histograms, which are merged over all chunks."""

    name: str
    fields: list[dict[str, Any]]
    reasons: dict[str, int]
    """Objects left out in step one, by reason."""
    first_keys: np.ndarray
    """uint64 (b,): the first key of each batch."""
    offsets: np.ndarray
    """int64 (b + 1,): where the batches begin in the stream, and its end; the schema lies before the first."""

    def span(self, low: int, high: int) -> tuple[int, int]:
        """First and past-the-last byte of the batches that may hold keys from `low` to `high`, both included."""
        first = max(int(np.searchsorted(self.first_keys, np.uint64(low), "left")) - 1, 0)
        last = int(np.searchsorted(self.first_keys, np.uint64(high), "right"))
        return int(self.offsets[first]), int(self.offsets[max(first, last)])


def chunk_name(index: int) -> str:
    """Name of chunk number `index`."""
    return f"chunk-{index:05}"


def write_chunk(out: str, name: str, found: Found) -> None:
    """Write a chunk below the URI `out`, its sidecar last: it is there whole or not at all."""
    first_keys, offsets, reasons = [], [0], {}
    if found.objects is not None:
        parquet = io.BytesIO()
        pq.write_table(found.objects.drop_columns(["patch"]), parquet, compression="zstd")
        storage.write_bytes(storage.join(out, OBJECTS, f"{name}.parquet"), parquet.getvalue())
        reject = np.array(found.objects["reject"].to_pylist())
        reasons = {str(why): int((reject == why).sum()) for why in np.unique(reject[reject != KEEP])}
        data, first_keys, offsets = _stream(found.objects.filter(pa.array(reject == KEEP)))
        storage.write_bytes(storage.join(out, CANDIDATES, f"{name}.arrows"), data)
    sidecar = {
        "fields": found.fields,
        "reasons": reasons,
        "areas": {source: histogram.to_json() for source, histogram in found.areas.items()},
        "pixels": [[*key, histogram.to_json()] for key, histogram in sorted(found.pixels.items())],
        "first_keys": first_keys,
        "offsets": offsets,
    }
    storage.write_bytes(storage.join(out, CANDIDATES, f"{name}.json"), encode(sidecar))


def _stream(candidates: pa.Table) -> tuple[bytes, list[int], list[int]]:
    sink = io.BytesIO()
    keys = candidates["order"].to_numpy()
    starts = range(0, len(candidates), BATCH)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    offsets = []
    with pa.ipc.new_stream(sink, candidates.schema, options=options) as writer:
        for start in starts:
            batch = candidates.slice(start, BATCH).combine_chunks().to_batches()[0]
            if not offsets:
                offsets.append(_schema_size(candidates.schema))
            writer.write_batch(batch)
            offsets.append(sink.tell())
    return sink.getvalue(), [int(keys[start]) for start in starts], offsets or [0]


def _schema_size(schema: pa.Schema) -> int:
    """Bytes of a stream before its first batch: the writer holds them back until then, so that they cannot be told."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema):
        pass
    return sink.tell() - 8


@dataclass(frozen=True)
class Totals:
    """The histograms of `Found`, over all chunks."""

    areas: dict[str, Histogram]
    pixels: dict[tuple[str, str, int], Histogram]


def read_chunks(out: str, names: Sequence[str]) -> tuple[list[Chunk], Totals]:
    """The sidecars of finished chunks, in the order of `names`, and their histograms merged as they are read."""
    chunks, totals = [], Totals({}, {})
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), THREADS):
            uris = [storage.join(out, CANDIDATES, f"{name}.json") for name in names[start : start + THREADS]]
            for name, data in zip(names[start:], pool.map(storage.read_json, uris), strict=False):
                chunks.append(
                    Chunk(
                        name=name,
                        fields=data["fields"],
                        reasons=data["reasons"],
                        first_keys=np.array(data["first_keys"], np.uint64),
                        offsets=np.array(data["offsets"], np.int64),
                    )
                )
                for source, histogram in data["areas"].items():
                    _merge(totals.areas, source, histogram)
                for *key, histogram in data["pixels"]:
                    _merge(totals.pixels, tuple(key), histogram)
    return chunks, totals


def _merge(into: dict[Any, Histogram], key: Any, data: dict[str, Any]) -> None:
    histogram = Histogram.from_json(data)
    into[key] = Histogram.merged([into[key], histogram]) if key in into else histogram


def read_keys(out: str, name: str) -> pa.Table:
    """`order`, `source` and `area_px` of the candidates of a chunk, in order."""
    data = storage.read_bytes(storage.join(out, OBJECTS, f"{name}.parquet"))
    table = pq.read_table(pa.BufferReader(data), columns=["order", "source", "area_px", "reject"], use_threads=False)
    return table.filter(pc.equal(table["reject"], KEEP)).drop_columns(["reject"])


def read_schema(out: str, chunk: Chunk) -> bytes:
    """The beginning of a chunk's stream; the same for all chunks of a job."""
    return storage.read_range(storage.join(out, CANDIDATES, f"{chunk.name}.arrows"), 0, int(chunk.offsets[0]))


def read_candidates(out: str, name: str, schema: bytes, start: int, stop: int) -> pa.Table:
    """The candidates in bytes `start` to `stop` of a chunk's stream, given the stream's beginning."""
    data = storage.read_range(storage.join(out, CANDIDATES, f"{name}.arrows"), start, stop - start)
    return pa.ipc.open_stream(schema + data).read_all()


def finished(out: str) -> set[str]:
    """Names of the chunks that are written."""
    return {storage.name(uri).removesuffix(".json") for uri in storage.listing(storage.join(out, CANDIDATES), "*.json")}
