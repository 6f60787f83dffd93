"""Arrow columns of a crop store: schema, and images as NumPy views."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.stores import manifest as form
from cosmic_ray.stores.manifest import CropSpec

TYPES = {"string": pa.string(), "float32": pa.float32(), "int32": pa.int32(), "binary": pa.binary()}
_NAMES = {kind: name for name, kind in TYPES.items()}


def type_name(kind: pa.DataType) -> str:
    """The format's name of an Arrow type; Arrow's own for one that no store has."""
    return _NAMES.get(kind, str(kind))


def table_schema(extra: dict[str, str]) -> pa.Schema:
    """The Arrow schema of a store whose columns beyond `form.COLUMNS` are `extra` (name -> type)."""
    return pa.schema([pa.field(name, TYPES[kind], nullable=False) for name, kind in form.columns(extra).items()])


def file_names(uris: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The last part of each URI: what a file is called wherever its folder lies."""
    uris = uris.combine_chunks() if isinstance(uris, pa.ChunkedArray) else uris
    encoded = uris.dictionary_encode()
    return pa.array(map(storage.name, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)


def images(column: pa.Table | pa.RecordBatch | pa.ChunkedArray | pa.Array, spec: CropSpec) -> np.ndarray:
    """The images as uint8 (N, C, H, W): a read-only view of Arrow's buffer, copied only where there are several chunks.

    Raises:
        ValueError: where an image is null or has another size than `spec` says.
    """
    if isinstance(column, pa.Table | pa.RecordBatch):
        column = column.column("image")
    if isinstance(column, pa.ChunkedArray):
        parts = [images(chunk, spec) for chunk in column.chunks if len(chunk)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *spec.shape), np.uint8)
    count = len(column)
    if column.null_count:
        raise ValueError(f"{column.null_count} of {count} images are null")
    _, offsets, values = column.buffers()
    wide = pa.types.is_large_binary(column.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset : column.offset + count + 1]
    sizes = np.diff(ends)
    if (sizes != spec.nbytes).any():
        row = int(np.argmax(sizes != spec.nbytes))
        raise ValueError(f"image {row} has {sizes[row]} bytes; {spec.shape} needs {spec.nbytes}")
    if not count:
        return np.empty((0, *spec.shape), np.uint8)
    view = np.frombuffer(values, np.uint8, count * spec.nbytes, int(ends[0])).reshape(count, *spec.shape)
    view.flags.writeable = False
    return view


def image_column(crops: np.ndarray) -> pa.Array:
    """uint8 (N, C, H, W) as an Arrow binary column over the same memory, where that is C-ordered.

    Raises:
        ValueError: for another dtype, or more than 2 GiB.
    """
    if crops.dtype != np.uint8:
        raise ValueError(f"crops are uint8, not {crops.dtype}")
    if crops.nbytes >= 2**31:
        raise ValueError(f"{crops.nbytes:,} bytes of images in one Arrow column: at most 2 GiB")
    crops = np.ascontiguousarray(crops)
    size = crops[0].nbytes if len(crops) else 0
    offsets = np.arange(len(crops) + 1, dtype=np.int32) * np.int32(size)
    return pa.Array.from_buffers(pa.binary(), len(crops), [None, pa.py_buffer(offsets), pa.py_buffer(crops)])
