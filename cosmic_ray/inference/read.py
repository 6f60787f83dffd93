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

    def vectors(self) -> np.ndarray:
        """All embeddings: float32 (N, D)."""
        found = np.empty((len(self), self.width), np.float32)
        row = 0
        for part in self.parts():
            found[row : row + len(part)] = matrix(part["embedding"])
            row += len(part)
        return found
