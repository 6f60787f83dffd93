"""What makes the parts of a result: a Ray Data actor that opens its models and stores once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pyarrow as pa

from cosmic_ray.errors import CosmicError, packed

Work = TypeVar("Work")


class PartsActor(ABC, Generic[Work]):
    """Takes part numbers, leaves parts, gives back what it did."""

    def __init__(self, work: Work):
        """`work`: what every worker of a job is told."""
        self.work = work
        self._opened = False

    def __call__(self, parts: pa.Table) -> pa.Table:
        """`part` int64 -> what `make` says of each, as JSON; the user's errors too: Ray would wrap them up."""
        said = []
        for part in parts["part"].to_pylist():
            try:
                if not self._opened:
                    self.open()
                    self._opened = True
                said.append(self.make(part))
            except CosmicError as error:
                said.append({"error": packed(error)})
        return pa.table({"said": [json.dumps(one) for one in said]})

    @abstractmethod
    def open(self) -> None:
        """Open what all parts need."""

    @abstractmethod
    def make(self, part: int) -> dict[str, Any]:
        """Make and write one part; `rows`, `seconds` that it took, and `read_wait_s`, those spent waiting for input."""
