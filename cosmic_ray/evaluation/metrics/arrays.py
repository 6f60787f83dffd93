"""What every metric asks of its arrays, and how large ones are worked through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 64 * 2**20
"""Rough size of one temporary array."""


def blocks(total: int, bytes_each: int) -> Iterator[slice]:
    """Slices that cover `total` items, each of `BLOCK_BYTES` at most but of one item at least."""
    step = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def matrix(values: np.ndarray, name: str, least: int = 1) -> np.ndarray:
    """`values` unchanged, once they are known to be finite numbers of shape (N >= least, D >= 1).

    Raises:
        ValueError: for another shape, too few rows, a dtype that is not real, NaN or infinity.
    """
    values = np.asarray(values)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"{name}: shape {values.shape}, but (samples, at least one dimension) is needed")
    if len(values) < least:
        raise ValueError(f"{name}: {len(values)} samples, but at least {least} are needed")
    finite(values, name)
    return values


def finite(values: np.ndarray, name: str) -> None:
    """Check that `values` (rows first) hold only finite real numbers.

    Raises:
        ValueError: for a dtype that is not real, NaN or infinity.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(f"{name}: dtype {values.dtype} is not a real number")
    if values.dtype.kind != "f":
        return
    bad = sum(
        values[part].size - np.count_nonzero(np.isfinite(values[part]))
        for part in blocks(len(values), values[:1].nbytes)
    )
    if bad:
        raise ValueError(f"{name}: {bad:,} of {values.size:,} values are NaN or infinite")


def same_width(first: np.ndarray, second: np.ndarray, names: str) -> None:
    """Raises: ValueError where two matrices differ in dimensions."""
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{names}: {first.shape[1]} and {second.shape[1]} dimensions, but they must be the same")


def same_shape(first: np.ndarray, second: np.ndarray, names: str) -> None:
    """Raises: ValueError where two arrays differ in shape."""
    if first.shape != second.shape:
        raise ValueError(f"{names}: shapes {first.shape} and {second.shape}, but they must be the same")


def names_of(values: np.ndarray, name: str, count: int) -> np.ndarray:
    """Labels (cell types, batches) as a str array (count,).

    Raises:
        ValueError: for another shape, or where a label is missing (None, NaN, empty).
    """
    values = np.asarray(values)
    if values.shape != (count,):
        raise ValueError(f"{name}: shape {values.shape}, but one label for each of {count} samples is needed")
    as_text = values.astype(str)
    missing = (as_text == "") | (values != values) | (np.equal(values, None) if values.dtype == object else False)
    if missing.any():
        raise ValueError(f"{name}: {np.count_nonzero(missing)} of {count} labels are missing")
    return as_text
