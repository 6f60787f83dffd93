"""What the loop says of itself every few steps: losses over all samples since the last line, speed, waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Meter:
    """Adds up steps until their line is written; pauses are no part of the speed."""

    def __init__(self, global_batch: int):
        self._global_batch = global_batch
        self.restart()

    def add(self, sums: Mapping[str, tuple[float, float]], means: Mapping[str, float], wait_s: float) -> None:
        """One step: global sums and counts, plain numbers to average over steps, and the ranks' mean wait for data."""
        for name, (total, count) in sums.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)
        for name, value in means.items():
            self._means[name] = self._means.get(name, 0.0) + value
        self._wait_s += wait_s
        self._steps += 1

    def line(self) -> dict[str, float]:
        """The metrics since the last line: means of the sums, of the plain numbers, images/s and data-wait share."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused_s, 1e-9)
        line = {name: total / count if count else 0.0 for name, (total, count) in self._sums.items()}
        line |= {name: value / self._steps for name, value in self._means.items()}
        line["images_per_s"] = self._steps * self._global_batch / seconds
        line["data_wait_share"] = min(1.0, self._wait_s / seconds)
        self.restart()
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started

    def restart(self) -> None:
        """Forget what was added; the clock starts now."""
        self._sums: dict[str, tuple[float, float]] = {}
        self._means: dict[str, float] = {}
        self._wait_s = self._paused_s = 0.0
        self._steps = 0
        self._since = time.perf_counter()
