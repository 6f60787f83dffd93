"""Read what an embed job left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.inference.parts import matrix, read_part
from cosmic_ray.output import read_manifest


@dataclass(frozen=True)
class Embeddings:
    """Published embeddings of a store, in its row order; each part's bytes are checked as it is read."""

    uri: str
    manifest: dict[str, Any]
    """Rows, width, content hash, `simulated`, and the lineage: store, model and what it was made from, split."""

    @classmethod
    def open(cls, uri: str) -> Embeddings:
        """Open them: reads the manifest, nothing else.

        Raises:
            DataError: where none are published at `uri`.
        """
        uri = storage.absolute(uri)
        manifest = read_manifest(uri)
        if (manifest.get("format"), manifest.get("version")) != ("cosmic-ray/embed", 1):
            raise DataError(uri, f"not embeddings of version 1, but {manifest.get('format')!r}")
        return cls(uri, manifest)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def width(self) -> int:
        """D."""
        return self.manifest["width"]

    def parts(self) -> Iterator[pa.Table]:
        """Tables of `crop_id`, `embedding` (D float32), and `split` where there is one.

        Raises:
            DataError: naming the part that is missing or damaged.
        """
        for facts in self.manifest["parts"]:
            yield read_part(self.uri, facts)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Row numbers of `count` crops drawn with `seed` (of all, where there are no more): int64, ascending.

        They lie in as few parts as will do, so that little is read. That is fair, since a store's rows are in the
        order of hash(crop_id): which part a crop is in says nothing of it.
        """
        sizes = np.array([facts["rows"] for facts in self.manifest["parts"]], np.int64)
        ends = np.cumsum(sizes)
        random = np.random.default_rng(seed)
        order = random.permutation(len(sizes))
        enough = 1 + int(np.searchsorted(np.cumsum(sizes[order]), min(count, len(self))))
        rows = np.concatenate([np.arange(ends[part] - sizes[part], ends[part]) for part in np.sort(order[:enough])])
        return np.sort(random.choice(rows, min(count, len(rows)), replace=False))

    def vectors(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The embeddings of row numbers `rows` (ascending), or all: float32 (N, D); one part is read at a time.

        Raises:
            DataError: naming the part that is missing or damaged.
        """
        rows = np.arange(len(self)) if rows is None else rows
        found = np.empty((len(rows), self.width), np.float32)
        first = done = 0
        for facts in self.manifest["parts"]:
            last = first + facts["rows"]
            if here := int(np.searchsorted(rows, last)) - done:
                part = matrix(read_part(self.uri, facts)["embedding"])
                found[done : done + here] = part[rows[done : done + here] - first]
            first, done = last, done + here
        return found
