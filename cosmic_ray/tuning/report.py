"""What a search leaves: the best settings as a job file, the table of trials, and the same on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import yaml

from cosmic_ray.output import Output, encode
from cosmic_ray.tuning.trials import Trial, best, table

if TYPE_CHECKING:
    from cosmic_ray.tuning.job import Tune

BEST, TRIALS = "best.yaml", "trials"


def write(job: Tune, output: Output, trials: Sequence[Trial], winner: Trial) -> None:
    """Write `best.yaml`, `trials.json` and `trials.parquet`."""
    output.write(f"{TRIALS}.json", encode({"trials": [{"trial": trial.name, **asdict(trial)} for trial in trials]}))
    output.write(f"{TRIALS}.parquet", table(trials))
    output.write(BEST, job_file(job, output.at(BEST), len(trials), winner).encode())


def job_file(job: Tune, uri: str, trials: int, winner: Trial) -> str:
    """The job file of the best settings, which runs as it is; `uri` is where it will lie."""
    found = ", ".join(f"{key}={value!r}" for key, value in winner.settings.items())
    header = (
        f"# The best of {trials} trials of a search: {job.metric} {number(winner.value)} after step {winner.steps} "
        f"(trial {winner.name}).\n"
        f"# Found, and laid over the job that was searched: {found}\n"
        f"#   cosmic-ray run {uri}\n"
    )
    return header + yaml.safe_dump(job.with_settings(winner.settings), sort_keys=False, allow_unicode=True, width=120)


def show(trials: Sequence[Trial], job: Tune) -> None:
    """Print all trials to standard error, the best first."""
    from rich.console import Console
    from rich.table import Table

    keys = list(job.space)
    shown = Table("trial", "state", "steps", job.metric, *keys, box=None)
    ranked = []
    rest = list(trials)
    while (winner := best(rest, job.mode)) is not None:
        ranked.append(winner)
        rest.remove(winner)
    for trial in [*ranked, *rest]:
        settings = [number(trial.settings[key]) for key in keys]
        shown.add_row(trial.name, trial.state, str(trial.steps), number(trial.value), *settings)
    Console(stderr=True, markup=False, highlight=False).print(shown)


def number(value: object) -> str:
    """A value, with as many digits as one reads."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
