"""A pretraining job that writes down which crops each rank took in each step; and what to read from that."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cosmic_ray.training.loop import Callback, Data, Loop
from cosmic_ray.training.mae_job import PretrainMAE
from cosmic_ray.training.objective import Share


class LedgerJob(PretrainMAE):
    """As `pretrain-mae`, with a ledger."""

    incidental: ClassVar[frozenset[str]] = PretrainMAE.incidental | {"ledger", "pause_s"}
    ledger: str
    pause_s: float = 0.0
    """Each step waits so long for its crops: few steps pass while nodes come and go, and few have to be taken again
    by the judge."""

    def loop(self, callbacks: Sequence[Callback] = (), **place: Any) -> Loop:
        loop = super().loop(callbacks, **place)
        attempt = loop.collective.share(f"{time.time_ns()}-{uuid.uuid4().hex[:6]}")
        facts = {"attempt": attempt, "rank": place.get("rank", 0), "world": place.get("world", 1)}
        loop.data = _Written(loop.data, Path(self.ledger), facts, self.pause_s)
        return loop


class _Written:
    def __init__(self, data: Data, folder: Path, facts: Mapping[str, Any], pause_s: float):
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._facts, self._pause_s = data, facts, pause_s
        self._file = (folder / f"{facts['attempt']}-{facts['rank']}-{os.getpid()}.jsonl").open("a")

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        for share in self._data.shares(first_step, steps):
            time.sleep(self._pause_s)
            line = {**self._facts, "step": share.step, "at": time.time(), "ids": share.names()}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            yield share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


@dataclass(frozen=True)
class Attempt:
    """The workers from one start to their end."""

    world: int
    """How many there were."""
    taken: Mapping[int, float]
    """When each step was taken by the last of its ranks, in seconds since 1970; steps ascend."""


class Ledger:
    """What was written by all attempts of a run."""

    def __init__(self, folder: str | Path):
        texts = [line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
        lines = [json.loads(text) for text in texts if text.endswith("\n")]  # the last one may be half written
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

    def attempts(self) -> list[Attempt]:
        """Those that took a step at all, in order."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        worlds: dict[str, int] = {}
        for step in sorted(self._taken):
            for attempt, ranks in self._taken[step].items():
                found[attempt][step] = max(line["at"] for line in ranks.values())
                worlds[attempt] = next(iter(ranks.values()))["world"]
        return [Attempt(worlds[attempt], found[attempt]) for attempt in sorted(found)]

    def _last(self, step: int) -> dict[int, Mapping[str, Any]]:
        return self._taken[step][max(self._taken[step])]
