"""`metrics.jsonl`: every number that a run tells, a line each, in step with its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError

METRICS = "metrics.jsonl"
_PAUSE_S = 5.0


class MetricsFile:
    """A callback of the loop: lines `{"step": steps done, name: value, ...}`.

    The file is rewritten whole before each checkpoint, and in between as often as takes a hundredth of the time, since
    an object store cannot append. A resumed run drops the lines after its checkpoint: it makes them again.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self._lines: list[bytes] = []
        self._next_write = 0.0

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Keep the lines of the steps that are done."""
        self._lines = [encode_line(line) for line in read_metrics(self._uri) if line["step"] <= info["step"]]
        self._write()

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line."""
        self._lines.append(encode_line({"step": step, **metrics}))
        if time.monotonic() > self._next_write:
            self._write()

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line."""
        self.on_step(step, metrics)

    def on_saving(self, step: int) -> None:
        """What a resumed run will not make again must be there before its checkpoint is."""
        self._write()

    def on_checkpoint(self, step: int, uri: str) -> None:
        """Nothing to add."""

    def _write(self) -> None:
        started = time.monotonic()
        storage.write_bytes(self._uri, b"".join(self._lines))
        ended = time.monotonic()
        self._next_write = ended + max(_PAUSE_S, 100 * (ended - started))


def read_metrics(uri: str) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where there is none."""
    try:
        return [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
    except NotFoundError:
        return []


def encode_line(line: Mapping[str, Any]) -> bytes:
    """One line of JSON; numbers that are not finite become null."""
    finite = {key: value if not isinstance(value, float) or abs(value) < float("inf") else None
              for key, value in line.items()}  # fmt: skip
    return json.dumps(finite).encode() + b"\n"
