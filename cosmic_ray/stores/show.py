"""A crop store or a cell store at a glance: the backend of `cosmic-ray show`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.stores.cells import CellStore, open_store
from cosmic_ray.stores.crops import CropStore

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = np.array(
    [[0.35, 0.55, 1.0], [0.2, 1.0, 0.3], [1.0, 0.3, 0.25], [1.0, 0.85, 0.2], [0.9, 0.3, 1.0], [0.3, 1.0, 1.0]]
)
_GAP, _CAPTION = 2, 16


def glance(uri: str) -> tuple[dict[str, Any], CropStore | None]:
    """The description of the crop store or cell store at `uri`, and its crops where it has any."""
    store = open_store(uri)
    if isinstance(store, CropStore):
        return describe_store(store), store
    return describe_cells(store), store.crops if store.manifest.images else None


def describe_store(store: CropStore) -> dict[str, Any]:
    """What a reader wants to know of a store, JSON-serialisable: all of its manifest but the list of shards."""
    manifest = store.manifest.model_dump(mode="json", exclude={"shards", "digest"})
    stored = sum(shard.nbytes for shard in store.manifest.shards)
    return {
        "uri": store.uri,
        **manifest,
        "shards": len(store.manifest.shards),
        "row_groups": len(store.row_groups),
        "stored_bytes": stored,
        "bytes_per_crop": round(stored / len(store), 1),
    }


def describe_cells(store: CellStore) -> dict[str, Any]:
    """The same of a cell store: all of its manifest but the list of parts."""
    manifest = store.manifest.model_dump(mode="json", exclude={"parts", "digest", "cells_file", "genes_file"})
    stored = sum(part.nbytes for part in store.row_groups)
    return {
        "uri": store.uri,
        **manifest,
        "row_groups": len(store.row_groups),
        "expression_bytes": stored,
        "nonzeros_per_cell": round(sum(part.nonzeros for part in store.row_groups) / len(store), 1),
    }


def montage(store: CropStore, count: int = 64, columns: int | None = None) -> bytes:
    """A PNG of `count` crops taken evenly over the store, on black; one channel is grey, several are laid over another.

    `columns` of them stand side by side, by default as many as there are lines. Brightness is one
    mapping for the whole store and each channel: 0 to the 99.5th percentile of the nonzero pixels.
    """
    from PIL import Image, ImageDraw

    rows = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(np.int64))
    tiles = _coloured(store.crops(rows), _tops(store))
    wide = min(columns or int(np.ceil(np.sqrt(len(tiles)))), len(tiles))
    high = -(-len(tiles) // wide)
    step_y, step_x = store.spec.height + _GAP, store.spec.width + _GAP
    canvas = np.zeros((high * step_y + _CAPTION, wide * step_x, 3), np.uint8)
    for index, tile in enumerate(tiles):
        y, x = index // wide * step_y + _CAPTION, index % wide * step_x
        canvas[y : y + store.spec.height, x : x + store.spec.width] = tile
    picture = Image.fromarray(canvas)
    ImageDraw.Draw(picture).text((2, 1), _caption(store, len(tiles)), fill=(255, 255, 255))
    return _png(picture)


def _caption(store: CropStore, shown: int) -> str:
    size = "x".join(map(str, store.spec.shape))
    return (
        f"{'SIMULATED  ' if store.simulated else ''}{shown} of {len(store):,}  {size}  {', '.join(store.spec.channels)}"
    )


def _tops(store: CropStore) -> np.ndarray:
    """The stored value to show as full brightness: float (C,)."""
    statistics = store.manifest.statistics["nonzero_pixels"]
    tops = [statistics[name]["percentiles"]["99.5"] for name in store.spec.channels]
    return np.maximum(np.array(tops, float), 1.0)


def _coloured(crops: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) to uint8 (N, H, W, 3)."""
    scaled = np.clip(crops / tops[:, None, None], 0, 1)
    channels = crops.shape[1]
    colours = np.ones((1, 3)) if channels == 1 else _COLOURS[np.arange(channels) % len(_COLOURS)] * 2 / channels
    return (np.clip(np.einsum("nchw,ck->nhwk", scaled, colours), 0, 1) * 255).astype(np.uint8)


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()
