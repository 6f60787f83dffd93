"""Parts of an embedding: consecutive rows of a store, embedded by one worker and written whole.

<out>/part-00000.parquet    see `stores.embeddings`
<out>/part-00000.json       rows, sha256 of the file and of its content; written after it: without it, no part
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference.actors import PartsActor
from cosmic_ray.output import encode
from cosmic_ray.stores.cells import CellStore, open_store
from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import id_column, write_part
from cosmic_ray.stores.split import Split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from cosmic_ray.registry.kinds.encoder import Encoder
    from cosmic_ray.registry.kinds.transcriptome_encoder import TranscriptomeEncoder
    from cosmic_ray.registry.model import Precision

    Rows = np.ndarray | csr_matrix
    Reader = Callable[[int], tuple[pa.ChunkedArray, Rows]]

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
    output: Literal["embedding", "tokens"] = "embedding"


class EmbedParts(PartsActor[Work]):
    """Holds the model of an embed job."""

    def open(self) -> None:
        """The model, the store, the split."""
        from cosmic_ray.registry.kinds import KINDS
        from cosmic_ray.registry.package import read_model

        work = self.work
        stored, self._store = read_model(work.model), open_store(work.store)
        if stored.config.digest != work.digest:
            raise DataError(work.model, "the model was replaced while it was in use", "choose another out")
        self._model = KINDS[stored.config.kind](stored, work.device)
        self._codes = split_codes(work.split, self._store)

    def make(self, part: int) -> dict[str, Any]:
        """See `embed_part`."""
        return embed_part(self.work, part, self._model, self._store, self._codes)


def embed_part(
    work: Work,
    part: int,
    model: Encoder | TranscriptomeEncoder,
    store: CropStore | CellStore,
    codes: np.ndarray | None,
) -> dict[str, Any]:
    """Embed and write one part.

    Batches begin at multiples of `batch_size` in the store, so that the numbers are those of embedding the whole store
    in one process with that batch size.

    Returns:
        Its sidecar's facts, with `seconds` and `read_wait_s` beside them.

    Raises:
        DataError: where the store is damaged, or what the model makes of it is not finite.
    """
    started = time.monotonic()
    first, last = part * work.rows, min((part + 1) * work.rows, len(store))
    read, embed = _ways(work, model, store)
    ids: list[pa.ChunkedArray] = []
    made: list[np.ndarray] = []
    waited, done, held = 0.0, 0, None
    for some_ids, rows, wait_s in _rows(store, read, first, last):
        waited += wait_s
        ids.append(some_ids)
        held = rows if held is None else _joined(held, rows)
        count = held.shape[0]
        ready = count if done + count == last - first else count // work.batch_size * work.batch_size
        try:
            made.append(embed(held[:ready]))
        except ValueError as error:
            raise DataError(store.uri, f"near row {first + done}: {error}") from None
        done, held = done + ready, held[ready:]
    row_ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()).combine_chunks()
    of_rows = None if codes is None else codes[first:last]
    facts = write_part(work.out, part, id_column(store), row_ids, np.concatenate(made), of_rows)
    storage.write_bytes(sidecar_uri(work.out, part), encode(facts))
    return {**facts, "seconds": time.monotonic() - started, "read_wait_s": waited}


def sidecar_uri(out: str, part: int) -> str:
    """URI of a part's facts."""
    return storage.join(out, f"part-{part:05}.json")


def split_codes(uri: str | None, store: CropStore | CellStore) -> np.ndarray | None:
    """uint8 (N,), an index of `stores.split.PARTS` for each row of the store; None without a split."""
    if uri is None:
        return None
    return Split.open(uri, store).codes


def _ways(
    work: Work, model: Encoder | TranscriptomeEncoder, store: CropStore | CellStore
) -> tuple[Reader, Callable[[Rows], np.ndarray]]:
    """How a row group is read: ids, and images or counts; and how these are embedded."""
    name = id_column(store)
    if model.config.kind == "transcriptome-encoder":
        genes, ids = store.genes["gene_id"].to_pylist(), store.obs([name])[name]
        starts = store.group_starts

        def counts(group: int) -> tuple[pa.ChunkedArray, csr_matrix]:
            return ids.slice(int(starts[group]), int(starts[group + 1] - starts[group])), store.read_counts(group)

        return counts, lambda rows: model.embed(rows, genes, batch_size=work.batch_size)

    def crops(group: int) -> tuple[pa.ChunkedArray, np.ndarray]:
        table = store.read_row_group(group, [name, "image"])
        return table[name], images(table, store.spec)

    embed = model.tokens if work.output == "tokens" else model.embed
    return crops, lambda rows: embed(rows, batch_size=work.batch_size, precision=work.precision)


def _rows(
    store: CropStore | CellStore, read: Reader, first: int, last: int
) -> Iterator[tuple[pa.ChunkedArray, Rows, float]]:
    """Rows first..last-1 by row group, read ahead in a thread; with the seconds that each was waited for."""
    starts = store.group_starts
    groups = range(int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, last, "left")))
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[tuple[pa.ChunkedArray, Rows]]] = []
        for position, group in enumerate(groups):
            for ahead in groups[position + len(coming) : position + 1 + _AHEAD]:
                coming.append(pool.submit(read, ahead))
            asked = time.monotonic()
            ids, rows = coming.pop(0).result()
            wait_s = time.monotonic() - asked
            begin, end = (min(max(row - int(starts[group]), 0), len(ids)) for row in (first, last))
            yield ids.slice(begin, end - begin), rows[begin:end], wait_s


def _joined(before: Rows, after: Rows) -> Rows:
    if isinstance(before, np.ndarray):
        return np.concatenate([before, after])
    from scipy.sparse import vstack

    return vstack([before, after], format="csr")
