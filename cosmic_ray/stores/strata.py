"""A stratified split: the same shares of each value of a column in every part, as near as whole groups allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmic_ray.stores.groups import Column, places


def assign_stratified(
    groups: np.ndarray, keys: np.ndarray, stratum: Column, fractions: Sequence[float], seed: int
) -> np.ndarray:
    """The part of each group: uint8 (groups,).

    Groups of several rows go first, large ones before small ones (by powers of two, and among those by their keys),
    each to the part that lacks most of what it holds. Then the groups of one row fill what each part lacks of each
    value: where all groups are such, each part gets its share of each value rounded up or down, which of them by chance
    so that rare values come to all parts alike. Unlike a plain split, where a group goes depends on the others.

    Args:
        groups, keys: of `group_rows`.
        stratum: the column, over the same rows.
        fractions: share of each part; they add up to 1.
    """
    place = places(keys, seed)
    sizes = np.bincount(groups, minlength=len(keys))
    lacking = np.outer(fractions, np.bincount(stratum.codes, minlength=len(stratum.values))).astype(np.float64)
    parts = np.zeros(len(keys), np.uint8)
    _place_large(parts, groups, sizes, place, stratum.codes, lacking)
    _place_single(parts, groups, sizes, place, stratum, lacking, seed)
    return parts


def _place_large(
    parts: np.ndarray, groups: np.ndarray, sizes: np.ndarray, place: np.ndarray, codes: np.ndarray, lacking: np.ndarray
) -> None:
    """Place groups of several rows, and take what they hold from `lacking`, float64 (parts, values)."""
    from scipy.sparse import coo_array

    total = np.maximum(np.bincount(codes, minlength=lacking.shape[1]), 1)
    held = coo_array((np.ones(len(codes), np.int64), (groups, codes)), shape=(len(sizes), lacking.shape[1])).tocsr()
    open_parts = np.flatnonzero(lacking.any(axis=1))
    large = np.flatnonzero(sizes > 1)
    for group in large[np.lexsort((place[large], -np.floor(np.log2(sizes[large]))))]:
        here = slice(held.indptr[group], held.indptr[group + 1])
        values, rows = held.indices[here], held.data[here]
        wanting = lacking[open_parts][:, values] @ (rows / total[values])
        part = open_parts[int(wanting.argmax())]
        parts[group] = part
        lacking[part, values] -= rows


def _place_single(
    parts: np.ndarray,
    groups: np.ndarray,
    sizes: np.ndarray,
    place: np.ndarray,
    stratum: Column,
    lacking: np.ndarray,
    seed: int,
) -> None:
    """Place groups of one row, value by value, in the order of their keys."""
    rows = np.flatnonzero(sizes[groups] == 1)
    value = stratum.codes[rows]
    order = np.lexsort((place[groups[rows]], value))
    ends = np.searchsorted(value[order], np.arange(len(stratum.values) + 1))
    chance = places(stratum.hashes(), seed) / 2.0**64
    for code in range(len(stratum.values)):
        members = groups[rows[order[ends[code] : ends[code + 1]]]]
        filled = np.round(np.cumsum(_shares(lacking[:, code], len(members))), 6)
        cuts = np.floor([0.0, *filled[:-1], len(members)] + chance[code]).astype(np.int64)
        parts[members] = np.repeat(np.arange(len(lacking)), np.diff(cuts))


def _shares(lacking: np.ndarray, rows: int) -> np.ndarray:
    """How `rows` are shared out so that what the parts lack is levelled: float64 (parts,), none negative."""
    shares, wanting = np.zeros(len(lacking)), lacking > 0
    while wanting.any():
        level = (lacking[wanting].sum() - rows) / wanting.sum()
        filled = np.where(wanting, lacking - level, 0.0)
        if (filled >= 0).all():
            return filled
        wanting &= filled > 0
    return shares
