"""A few bytes of a Parquet file, at the offsets that its footer knows."""

from __future__ import annotations

import pyarrow as pa


class RangeFile:
    """A file-like object that holds the bytes from `offset` on and nothing before; hands out views, not copies."""

    mode = "rb"
    closed = False

    def __init__(self, data: bytes | memoryview, offset: int):
        self._data = pa.py_buffer(data)
        self._offset = offset
        self._position = 0

    def arrow(self) -> pa.PythonFile:
        """This file for Arrow's readers."""
        return pa.PythonFile(self, mode="r")

    def read_buffer(self, count: int) -> pa.Buffer:
        """`count` bytes from the position on, as Arrow asks for them."""
        start = self._position - self._offset
        if start < 0:
            raise OSError(f"byte {self._position} lies before the {len(self._data)} bytes from {self._offset}")
        found = self._data.slice(start, min(count, self._data.size - start))
        self._position += found.size
        return found

    def read(self, count: int = -1) -> bytes:
        return self.read_buffer(self._data.size if count < 0 else count).to_pybytes()

    def seek(self, position: int, whence: int = 0) -> int:
        ends = {0: 0, 1: self._position, 2: self._offset + self._data.size}
        self._position = ends[whence] + position
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
