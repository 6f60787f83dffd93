"""Which settings to try next: a pure function of the seed, the trial's number and what the trials so far gave."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cosmic_ray.tuning.space import Range
from cosmic_ray.tuning.trials import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

RANDOM = 6
"""Trials drawn at random before the sampler learns from them."""


def propose(
    space: Mapping[str, Range], seed: int, number: int, trials: Sequence[Trial], mode: Literal["min", "max"]
) -> dict[str, Any]:
    """The settings of trial `number`: key -> value.

    The tree-structured Parzen estimator of Optuna (Bergstra et al. 2011; multivariate: Falkner et al. 2018), made anew
    for every trial, so that an interrupted search proposes what an undisturbed one does. It is told the trials that
    ended; a stopped one counts as worse than those that finished, a failed one as worse than all; those that still run
    are kept away from (its constant liar).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM,
            multivariate=True,
            constant_liar=True,
            seed=int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1)[0]),
        )
    study = optuna.create_study(sampler=sampler, direction={"min": "minimize", "max": "maximize"}[mode])
    study.add_trials([_told(space, trial) for trial in trials])
    distributions = {key: values.distribution() for key, values in space.items()}
    drawn = study.ask(distributions).params
    return {key: values.value(drawn[key]) for key, values in space.items()}


def _told(space: Mapping[str, Range], trial: Trial) -> FrozenTrial:
    """A trial as Optuna has it; a failed one as pruned before its first value, which its estimator ranks last."""
    from optuna.trial import TrialState, create_trial

    states = {"running": TrialState.RUNNING, "finished": TrialState.COMPLETE}
    return create_trial(
        state=states.get(trial.state, TrialState.PRUNED),
        value=trial.value if trial.state == "finished" else None,
        params={key: values.drawn(trial.settings[key]) for key, values in space.items()},
        distributions={key: values.distribution() for key, values in space.items()},
        intermediate_values=dict(trial.values) if trial.state == "stopped" else {},
    )
