"""`where:` - which crops of a store a job uses, by the values of their columns."""

from __future__ import annotations

import difflib
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Discriminator, Field, Tag

from cosmic_ray.config import Config
from cosmic_ray.errors import JobError
from cosmic_ray.stores.crops import CropStore


class Between(Config):
    """A range of numbers, ends included; a missing value (NaN) lies in none."""

    min: float | None = None
    """Lowest value; null for no limit."""
    max: float | None = None
    """Highest value; null for no limit."""


MOST_VALUES = 254
"""A column that `column_codes` reads has at most so many."""

_THREADS, _AT_ONCE = 16, 256


def _tag(value: object) -> str | None:
    if isinstance(value, list):
        return "values"
    return "range" if isinstance(value, dict | Between) else None


_Values = Annotated[list[str] | list[float], Field(min_length=1)]
_SHAPE = "neither a list of values, as [U2OS], nor a range, as {min: 0, max: 1}"
Condition = Annotated[
    Annotated[_Values, Tag("values")] | Annotated[Between, Tag("range")],
    Discriminator(_tag, custom_error_type="condition", custom_error_message=_SHAPE),
]
Where = dict[str, Condition]
"""For each column the values wanted, or their range; all conditions must hold."""


def matching(store: CropStore, where: Where) -> np.ndarray:
    """Bool (N,): whether each row of the store meets every condition. Reads those columns of all rows, no image.

    Raises:
        JobError: for a column that the store lacks, a value that no crop has, and a range over text.
    """
    for column in where:
        require_column(store, column, f"where.{column}")
    table = store.metadata(list(where)) if where else None
    mask = np.ones(len(store), np.bool_)
    for column, condition in where.items():
        values = table[column].combine_chunks()
        chosen = _between if isinstance(condition, Between) else _among
        mask &= chosen(column, values, condition)
    return mask


def column_codes(store: CropStore, column: str, key: str) -> tuple[list[str], np.ndarray]:
    """The values of a column of text, sorted, and uint8 (N,): the number of each row's among them. Reads no image, and
    holds no more than a few row groups of text in memory.

    Raises:
        JobError: at `key`, for a column that the store lacks, that is no text, or that has more than `MOST_VALUES`.
    """
    require_column(store, column, key)
    numbers: dict[str, int] = {}
    codes = np.empty(len(store), np.uint8)

    def read(group: int) -> pa.DictionaryArray:
        return pc.dictionary_encode(store.read_row_group(group, [column])[column].combine_chunks())

    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(store.row_groups), _AT_ONCE):
            groups = range(first, min(first + _AT_ONCE, len(store.row_groups)))
            for group, encoded in zip(groups, pool.map(read, groups), strict=True):
                if not pa.types.is_string(encoded.dictionary.type):
                    raise JobError(key, column, f"a column of {encoded.dictionary.type}", "choose one of text")
                found = [numbers.setdefault(value, len(numbers)) for value in encoded.dictionary.to_pylist()]
                if len(numbers) > MOST_VALUES:
                    raise JobError(key, column, f"it has more than {MOST_VALUES} values", "choose a coarser column")
                start, stop = store.group_starts[group : group + 2]
                codes[start:stop] = np.array(found, np.uint8)[encoded.indices.to_numpy()]
    names = sorted(numbers)
    order = np.empty(len(names), np.uint8)
    order[[numbers[name] for name in names]] = np.arange(len(names))
    return names, order[codes]


def require_column(store: CropStore, column: str, key: str) -> None:
    """Raise JobError at `key` where the store has no such column of metadata."""
    known = [name for name in store.columns if name != "image"]
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        raise JobError(key, column, "the store has no such column", remedy)


def _between(column: str, values: pa.Array, wanted: Between) -> np.ndarray:
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise JobError(f"where.{column}", wanted.model_dump(), f"a range of {values.type}", "list the values wanted")
    numbers = values.to_numpy(zero_copy_only=False)
    low, high = (-np.inf if wanted.min is None else wanted.min), (np.inf if wanted.max is None else wanted.max)
    return (numbers >= low) & (numbers <= high)


def _among(column: str, values: pa.Array, wanted: list) -> np.ndarray:
    found = pc.unique(values).to_pylist()
    for value in wanted:
        if value not in found:
            near = difflib.get_close_matches(str(value), map(str, found), n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(str, found[:10]))}"
            raise JobError(f"where.{column}", value, "no crop has this value", remedy)
    return pc.is_in(values, pa.array(wanted, type=values.type)).to_numpy(zero_copy_only=False)
