"""What is known of the trials of a search: a small file each while it lasts, one table at its end."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.output import Output, encode

FOLDER = "trials"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial; `running` also after the process that ran it was killed."""

    number: int
    settings: dict[str, Any]
    """Dotted key -> value."""
    state: State = "running"
    values: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, metric) of each evaluation, ascending."""
    error: str | None = None
    """Why it failed."""

    @property
    def name(self) -> str:
        """Of its folder below `trials/`."""
        return f"{self.number:04}"

    @property
    def steps(self) -> int:
        """Steps done at the last evaluation."""
        return self.values[-1][0] if self.values else 0

    @property
    def value(self) -> float | None:
        """The metric at the last evaluation; None before the first."""
        return self.values[-1][1] if self.values else None

    def with_value(self, step: int, value: float) -> Trial:
        """It, after one more evaluation; an earlier one made again replaces what came after it."""
        return replace(self, values=[*(each for each in self.values if each[0] < step), (step, value)])


class Trials:
    """The trials of one search, by number; what changes is written below its output at once."""

    def __init__(self, output: Output):
        """Raises DataError where a file is not what `put` wrote."""
        self._output = output
        found = (_read(uri) for uri in storage.listing(output.at(FOLDER), "*.json"))
        self._known = {trial.number: trial for trial in found}

    def __getitem__(self, number: int) -> Trial:
        return self._known[number]

    def all(self) -> list[Trial]:
        """In order of their numbers."""
        return [self._known[number] for number in sorted(self._known)]

    def ended(self) -> list[Trial]:
        """Those that do not run any more, in order."""
        return [trial for trial in self.all() if trial.state != "running"]

    def put(self, trial: Trial) -> None:
        """Keep `trial` in place of what was known of it.

        Raises:
            FencedError: where another run has taken the search over.
        """
        if self._known.get(trial.number) != trial:
            self._known[trial.number] = trial
            self._output.write(f"{FOLDER}/{trial.name}.json", encode(asdict(trial)))


def best(trials: Sequence[Trial], mode: Literal["min", "max"]) -> Trial | None:
    """The best of those that finished, or where none did, of those that were stopped; None where all failed."""
    sign = 1 if mode == "min" else -1
    for state in ("finished", "stopped"):
        if ended := [trial for trial in trials if trial.state == state and trial.value is not None]:
            return min(ended, key=lambda trial: (sign * trial.value, trial.number))
    return None


def table(trials: Sequence[Trial]) -> bytes:
    """A Parquet file: a row a trial with `trial`, `state`, `steps`, `value`, `error`, and a column a setting, which is
    JSON where its values are not all numbers, all text or all true and false."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"trial": each.name, "state": each.state, "steps": each.steps, "value": each.value, "error": each.error,
             **each.settings} for each in trials]  # fmt: skip
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except pa.ArrowException:
            columns[name] = pa.array([json.dumps(value) for value in values])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _read(uri: str) -> Trial:
    try:
        known = Trial(**storage.read_json(uri))
        return replace(known, values=[(int(step), float(value)) for step, value in known.values])
    except (TypeError, ValueError) as error:
        raise DataError(uri, f"not a trial: {error}", "delete it, and its trial is run again") from None
