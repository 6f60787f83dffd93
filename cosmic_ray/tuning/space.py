"""What a search varies: ranges over the dotted keys of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from cosmic_ray.config import Config, apply_overrides

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Real, Whole = float, int
"""`Range` has a key named `int`, which would stand for itself in its own annotations."""


class Range(Config):
    """The values of one key; exactly one of these."""

    log: tuple[Real, Real] | None = None
    """[low, high], both above 0: numbers, every factor equally likely."""

    uniform: tuple[Real, Real] | None = None
    """[low, high]: numbers, all equally likely."""

    int: tuple[Whole, Whole] | None = None
    """[low, high]: whole numbers, both ends included, all equally likely."""

    choice: list[Any] | None = Field(None, min_length=2)
    """Two values or more, of any type."""

    @model_validator(mode="after")
    def _one_range_that_ascends(self) -> Range:
        if sum(getattr(self, name) is not None for name in Range.model_fields) != 1:
            raise ValueError("exactly one of log, uniform, int, choice says what the values are")
        if self.choice is not None:
            _require_json(self.choice)
            if any(value in self.choice[:place] for place, value in enumerate(self.choice)):
                raise ValueError("a choice stands twice")
            return self
        low, high = self.ends
        if not low < high or not abs(low) < high - low + abs(high) < float("inf"):
            raise ValueError("a range is written [low, high], low below high")
        if self.log and low <= 0:
            raise ValueError("a log range starts above 0")
        return self

    @property
    def ends(self) -> list[Any]:
        """The values to check: the low and the high end, or every choice."""
        return list(self.choice or self.log or self.uniform or self.int)

    def distribution(self) -> BaseDistribution:
        """As Optuna has it; of choices, their places in the list."""
        from optuna import distributions as known

        if self.choice is not None:
            return known.CategoricalDistribution(range(len(self.choice)))
        low, high = self.ends
        if self.int is not None:
            return known.IntDistribution(low, high)
        return known.FloatDistribution(low, high, log=self.log is not None)

    def value(self, drawn: Any) -> Any:
        """The key's value for a draw from `distribution`."""
        return drawn if self.choice is None else self.choice[drawn]

    def drawn(self, value: Any) -> Any:
        """The draw from `distribution` that gave `value`."""
        return value if self.choice is None else self.choice.index(value)


def _require_json(values: Any) -> None:
    """Raise ValueError for what a job's record cannot hold: dates, and numbers that are not finite."""
    try:
        json.dumps(values, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from None


def flat(space: Any) -> Any:
    """`space` with mappings of mappings written as dotted keys: {optim: {lr: {log: ...}}} is {optim.lr: {log: ...}}."""
    if not isinstance(space, Mapping):
        return space
    found: dict[str, Any] = {}
    for key, values in space.items():
        if isinstance(values, Mapping) and values and all(isinstance(inner, Mapping) for inner in values.values()):
            found |= {f"{key}.{inner}": value for inner, value in flat(values).items()}
        else:
            found[key] = values
    return found


def lay(tree: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the value of each dotted key laid over it.

    Raises:
        JobError: for a key that walks into a value that is no mapping.
    """
    return apply_overrides(tree, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
