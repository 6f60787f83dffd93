"""Events that no tracking server has taken yet, kept beside the run's results until one does.

An event is a JSON object with `op`. Segments `<folder>/00000000.jsonl`, `...1.jsonl` hold them in order; each is
written whole, since an object store cannot append, and a new one begun when it is large. The same event may stand in a
spool twice (written when its delivery hung, and delivered all the same): delivering is idempotent, so no harm is done.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.progress import say

SEGMENT_BYTES = 256 * 1024
Event = dict[str, Any]


class Spool:
    """A queue on disk or S3; for one process at a time, any of its threads."""

    def __init__(self, folder: str):
        self._folder = folder
        self._lock = threading.Lock()
        self._segments = storage.listing(folder, "*.jsonl")
        self._next = 1 + max((int(storage.name(uri).partition(".")[0]) for uri in self._segments), default=-1)
        self._tail = b""

    def __bool__(self) -> bool:
        return bool(self._segments)

    def append(self, events: Sequence[Event]) -> None:
        """Add events at the end; once this returns they outlive the process."""
        if not events:
            return
        lines = b"".join(json.dumps(event).encode() + b"\n" for event in events)
        with self._lock:
            if not self._tail or len(self._tail) + len(lines) > SEGMENT_BYTES:
                self._segments.append(storage.join(self._folder, f"{self._next:08}.jsonl"))
                self._next += 1
                self._tail = b""
            self._tail += lines
            storage.write_bytes(self._segments[-1], self._tail)

    def segments(self) -> Iterator[list[Event]]:
        """Each segment's events, oldest first; a segment is deleted when the next is asked for."""
        while self._segments:
            with self._lock:
                uri = self._segments[0]
                if len(self._segments) == 1:
                    self._tail = b""  # what is read now must not grow: it is deleted afterwards
            yield _parse(uri)
            with self._lock:
                storage.delete(uri)
                self._segments.pop(0)


def _parse(uri: str) -> list[Event]:
    try:
        return [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
    except (ValueError, NotFoundError) as error:
        say(f"tracking: {uri} is damaged and is left out: {error}")
        return []
