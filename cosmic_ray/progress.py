"""Long work shows itself: a live bar with rate and ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What `progress` hands out."""

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units of the total are finished; `note` (a loss, a count) stands beside."""


@contextmanager
def progress(what: str, total: int | None, unit: str = "") -> Iterator[Progress]:
    """Show the progress of `what` on standard error until the block ends.

    Args:
        what: a few words, shown in front.
        total: units in all, or None where it is unknown.
        unit: the unit's plural name (`fields`, `steps`).
    """
    shown = _Bar(what, total, unit) if sys.stderr.isatty() else _Lines(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def say(text: str) -> None:
    """Print one plain line to standard error, where progress goes; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


class _Lines:
    """A line every few seconds: readable in a file, a CI log and `ray job logs`."""

    every_s = 5.0

    def __init__(self, what: str, total: int | None, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._first: tuple[float, int] | None = None
        self._shown_at = 0.0
        self._last: tuple[int, str] | None = None

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        self._last = (done, note)
        if now - self._shown_at >= self.every_s:
            self._show(now)

    def close(self) -> None:
        if self._last is not None:
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        (started, from_), (done, note) = self._first, self._last
        self._shown_at, self._last = now, None
        rate = (done - from_) / (now - started) if now - started > 0.5 else 0.0
        parts = [
            f"{self._what}: {done:,}" + (f"/{self._total:,}" if self._total is not None else "") + f" {self._unit}"
        ]
        if rate:
            parts.append(f"{rate:,.4g}/s")
            if self._total is not None and done < self._total:
                parts.append(f"{_duration((self._total - done) / rate)} left")
        say(", ".join([*parts, *([note] if note else [])]))


class _Bar:
    def __init__(self, what: str, total: int | None, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, rate="", note="")

    def update(self, done: int, note: str = "") -> None:
        task = self._bar.tasks[0]
        rate = f"{task.speed:,.4g}/s" if task.speed else ""
        self._bar.update(self._task, completed=done, rate=rate, note=note)

    def close(self) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
