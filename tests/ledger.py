"""A pretraining job that writes down which crops each rank took in each step; and what to read from that."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cosmic_ray.training.job import PretrainMAE
from cosmic_ray.training.loop import Callback, Data, Loop
from cosmic_ray.training.objective import Share


class LedgerJob(PretrainMAE):
    """As `pretrain-mae`, with a ledger."""

    incidental: ClassVar[frozenset[str]] = PretrainMAE.incidental | {"ledger"}
    ledger: str

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        loop = super().loop(callbacks, **place)
        attempt = loop.collective.share(f"{time.time_ns()}-{uuid.uuid4().hex[:6]}")
        loop.data = _Written(loop.data, Path(self.ledger), attempt, place.get("rank", 0), place.get("world", 1))
        return loop


class _Written:
    def __init__(self, data: Data, folder: Path, attempt: str, rank: int, world: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._facts = data, {"attempt": attempt, "rank": rank, "world": world}
        self._file = (folder / f"{attempt}-{rank}-{os.getpid()}.jsonl").open("a")

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        for share in self._data.shares(first_step, steps):
            self._file.write(json.dumps({**self._facts, "step": share.step, "ids": share.names()}) + "\n")
            self._file.flush()
            yield share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


class Ledger:
    """What was written by all attempts of a run."""

    def __init__(self, folder: str | Path):
        lines = [json.loads(line) for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines()]
        self._taken: dict[int, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
        for line in lines:
            self._taken[line["step"]][line["attempt"]][line["rank"]] = line

    def batch(self, step: int) -> list[str]:
        """The crops of a global batch in order, as the last attempt took them."""
        ranks = self._last(step)
        assert sorted(ranks) == list(range(ranks[0]["world"])), f"step {step}: not every rank took its share"
        return [name for rank in sorted(ranks) for name in ranks[rank]["ids"]]

    def batches(self, steps: int) -> list[list[str]]:
        """The global batches 0 .. `steps`-1 that were committed."""
        return [self.batch(step) for step in range(steps)]

    def world(self, step: int) -> int:
        """The ranks of the attempt that committed a step."""
        return self._last(step)[0]["world"]

    def replayed(self, steps: int) -> int:
        """How many of the first `steps` steps were taken more than once, each time counted."""
        return sum(len(self._taken[step]) - 1 for step in range(steps))

    def _last(self, step: int) -> dict[int, Mapping[str, Any]]:
        return self._taken[step][max(self._taken[step])]
