"""Parts of an embedding: consecutive rows of a store, embedded by one worker and written whole.

<out>/part-00000.parquet    crop_id, embedding (D float32), and split where there is one; rows in store order
<out>/part-00000.json       rows, sha256 of the file and of its content; written after it: without it, no part
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference.actors import PartsActor
from cosmic_ray.output import encode
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import PARTS, Split

if TYPE_CHECKING:
    from cosmic_ray.registry.kinds.encoder import Encoder
    from cosmic_ray.registry.model import Precision

_AHEAD = 2
"""Row groups that a worker reads ahead."""


@dataclass(frozen=True)
class Work:
    """What every worker of an embed job is told."""

    store: str
    out: str
    model: str
    """URI of the model folder, which every worker reads."""
    digest: str
    """The model's."""
    split: str | None
    rows: int
    """Of a part, the last one aside; a multiple of `batch_size`."""
    batch_size: int
    precision: Precision
    device: str | None
    """None: an accelerator."""


class EmbedParts(PartsActor[Work]):
    """Holds the model of an embed job."""

    def open(self) -> None:
        """The model, the store, the split."""
        from cosmic_ray.registry.kinds.encoder import Encoder
        from cosmic_ray.registry.package import read_model

        work = self.work
        stored, self._store = read_model(work.model), CropStore.open(work.store)
        if stored.config.digest != work.digest:
            raise DataError(work.model, "the model was replaced while it was in use", "choose another out")
        self._model, self._codes = Encoder(stored, work.device), split_codes(work.split, self._store)

    def make(self, part: int) -> dict[str, Any]:
        """See `embed_part`."""
        return embed_part(self.work, part, self._model, self._store, self._codes)


def embed_part(work: Work, part: int, model: Encoder, store: CropStore, codes: np.ndarray | None) -> dict[str, Any]:
    """Embed and write one part.

    Batches begin at multiples of `batch_size` in the store, so that the numbers are those of embedding the whole store
    in one process with that batch size.

    Returns:
        Its sidecar's facts, with `seconds` and `read_wait_s` beside them.
    """
    started = time.monotonic()
    first = part * work.rows
    last = min(first + work.rows, len(store))
    embeddings = np.empty((last - first, model.config.embedding_width), np.float32)
    ids: list[pa.ChunkedArray] = []
    waited, done, held = 0.0, 0, np.empty((0, *store.spec.shape), np.uint8)
    for table, wait_s in _rows(store, first, last):
        waited += wait_s
        ids.append(table["crop_id"])
        held = np.concatenate([held, images(table, store.spec)])
        ready = len(held) if done + len(held) == last - first else len(held) // work.batch_size * work.batch_size
        embeddings[done : done + ready] = model.embed(
            held[:ready], batch_size=work.batch_size, precision=work.precision
        )
        done, held = done + ready, held[ready:]
    crop_ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()).combine_chunks()
    facts = _write(work, part, crop_ids, embeddings, None if codes is None else codes[first:last])
    return {**facts, "seconds": time.monotonic() - started, "read_wait_s": waited}


def part_uri(out: str, part: int) -> str:
    """URI of a part's Parquet file."""
    return storage.join(out, f"part-{part:05}.parquet")


def sidecar_uri(out: str, part: int) -> str:
    """URI of a part's facts."""
    return storage.join(out, f"part-{part:05}.json")


def read_part(out: str, facts: dict[str, Any]) -> pa.Table:
    """One part, its bytes checked.

    Raises:
        DataError: where it is missing or not what its sidecar says.
    """
    uri = part_uri(out, facts["part"])
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(uri, "its bytes do not match its sha256", "delete it with its .json and run the job again")
    return pq.read_table(pa.BufferReader(data))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The `embedding` column as float32 (N, D)."""
    width = column.type.list_size
    return np.concatenate([chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks])


def split_codes(uri: str | None, store: CropStore) -> np.ndarray | None:
    """uint8 (N,), an index of `stores.split.PARTS` for each row of the store; None without a split."""
    if uri is None:
        return None
    return Split.open(uri, store).codes


def _rows(store: CropStore, first: int, last: int) -> Iterator[tuple[pa.Table, float]]:
    """Rows first..last-1 by row group, read ahead in a thread; with the seconds that each was waited for."""
    starts = store.group_starts
    groups = range(int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, last, "left")))
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[pa.Table]] = []
        for position, group in enumerate(groups):
            for ahead in groups[position + len(coming) : position + 1 + _AHEAD]:
                coming.append(pool.submit(store.read_row_group, ahead, ["crop_id", "image"]))
            asked = time.monotonic()
            table = coming.pop(0).result()
            wait_s = time.monotonic() - asked
            begin = max(first - int(starts[group]), 0)
            yield table.slice(begin, min(last - int(starts[group]), len(table)) - begin), wait_s


def _write(
    work: Work, part: int, crop_ids: pa.Array, embeddings: np.ndarray, codes: np.ndarray | None
) -> dict[str, Any]:
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table({"crop_id": crop_ids, "embedding": column})
    if codes is not None:
        table = table.append_column("split", pa.DictionaryArray.from_arrays(pa.array(codes), list(PARTS)))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=["split"])
    data = sink.getbuffer()
    storage.write_bytes(part_uri(work.out, part), data)
    facts = {
        "part": part,
        "rows": len(table),
        "sha256": hashlib.sha256(data).hexdigest(),
        "content": _content(crop_ids, embeddings),
    }
    storage.write_bytes(sidecar_uri(work.out, part), encode(facts))
    return facts


def _content(crop_ids: pa.Array, embeddings: np.ndarray) -> str:
    """sha256 of crop ids and embeddings, whatever the file format."""
    total = hashlib.sha256(json.dumps(crop_ids.to_pylist()).encode())
    total.update(np.ascontiguousarray(embeddings, "<f4"))
    return total.hexdigest()
