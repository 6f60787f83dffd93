"""A stratified split: the same shares of each value of a column in every part, as near as whole groups allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from cosmic_ray.stores.groups import Column, places

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_TURNS, _MOST_MOVED, _GAIN = 50, 10_000, 1e-9
_FEW, _ORDERS = 500, 16


def assign_stratified(
    groups: np.ndarray, keys: np.ndarray, stratum: Column, fractions: Sequence[float], seed: int
) -> np.ndarray:
    """The part of each group: uint8 (groups,).

    Groups of several rows go first, large ones before small ones (by powers of two, and among those by their keys),
    each to the part that lacks most of what it holds; where there are few enough, each is then moved as long as that
    brings the shares nearer, and where there are few, several orders are tried. Then the groups of one row fill what
    each part lacks of each value: where all groups are such, each part gets its share of each value rounded up or down,
    which of them by chance so that rare values come to all parts alike. Unlike in a plain split, where a group goes
    depends on the others.

    Args:
        groups, keys: of `group_rows`.
        stratum: the column, over the same rows.
        fractions: share of each part; they add up to 1.
    """
    place = places(keys, seed)
    names = {name: rank for rank, name in enumerate(sorted(stratum.values))}
    codes = np.array([names[name] for name in stratum.values])[stratum.codes]  # whatever the order of the rows
    sizes = np.bincount(groups, minlength=len(keys))
    lacking = np.outer(fractions, np.bincount(codes)).astype(np.float64)
    parts = np.zeros(len(keys), np.uint8)
    _place_large(parts, groups, sizes, place, codes, lacking)
    _place_single(parts, groups, sizes, place, codes, lacking, _chances(sorted(names), stratum.key, seed))
    return parts


def _place_large(
    parts: np.ndarray, groups: np.ndarray, sizes: np.ndarray, place: np.ndarray, codes: np.ndarray, lacking: np.ndarray
) -> None:
    """Place groups of several rows, and take what they hold from `lacking`, float64 (parts, values)."""
    from scipy.sparse import coo_array

    held = coo_array((np.ones(len(codes), np.int64), (groups, codes)), shape=(len(sizes), lacking.shape[1])).tocsr()
    held.sort_indices()
    large = np.flatnonzero(sizes > 1)
    orders = [large[np.lexsort((place[large], -np.floor(np.log2(sizes[large]))))]]
    if len(large) <= _FEW:
        orders += [large[np.argsort(places(place[large], turn))] for turn in range(1, _ORDERS)]
    weight = 1 / np.maximum(np.bincount(codes, minlength=lacking.shape[1]), 1)
    tried = [_placed(order, held, lacking, weight) for order in orders]
    found, left = min(tried, key=lambda one: _far(one[1], weight))
    parts[large], lacking[:] = found[large], left


def _placed(
    order: np.ndarray, held: csr_array, lacking: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The part of each group of `order`, uint8 (groups,), and what the parts lack then."""
    parts, lacking = np.zeros(held.shape[0], np.uint8), lacking.copy()
    open_parts = np.flatnonzero(lacking.any(axis=1))
    for turn in range(_TURNS if len(order) <= _MOST_MOVED else 1):
        moved = 0
        for group in order:
            here = slice(held.indptr[group], held.indptr[group + 1])
            values, rows = held.indices[here], held.data[here]
            if turn:
                lacking[parts[group], values] += rows
            # Least squares: the sum of lacking**2 * weight falls most where this is largest.
            wanting = lacking[open_parts][:, values] @ (rows * weight[values])
            now = wanting[np.searchsorted(open_parts, parts[group])]
            best = int(wanting.argmax())
            if not turn or wanting[best] > now + _GAIN:
                parts[group] = open_parts[best]
                moved += 1
            lacking[parts[group], values] -= rows
        if not moved:
            break
    return parts, lacking


def _far(lacking: np.ndarray, weight: np.ndarray) -> float:
    """How far the parts are from their shares, of each value and of all rows."""
    rows = (1 / weight).sum()
    return round(float((lacking**2 * weight).sum() + (lacking.sum(axis=1) ** 2).sum() / rows), 6)


def _place_single(
    parts: np.ndarray,
    groups: np.ndarray,
    sizes: np.ndarray,
    place: np.ndarray,
    codes: np.ndarray,
    lacking: np.ndarray,
    chances: np.ndarray,
) -> None:
    """Place groups of one row, value by value, in the order of their keys."""
    rows = np.flatnonzero(sizes[groups] == 1)
    value = codes[rows]
    order = np.lexsort((place[groups[rows]], value))
    ends = np.searchsorted(value[order], np.arange(lacking.shape[1] + 1))
    for code, chance in enumerate(chances):
        members = groups[rows[order[ends[code] : ends[code + 1]]]]
        filled = np.round(np.cumsum(_shares(lacking[:, code], len(members))), 6)
        cuts = np.floor(np.array([0.0, *filled[:-1], len(members)]) + chance).astype(np.int64)
        parts[members] = np.repeat(np.arange(len(lacking)), np.diff(cuts))


def _chances(names: list[str], key: str, seed: int) -> np.ndarray:
    """A number in [0, 1) for each value: float64."""
    hashes = (xxhash.xxh3_64_intdigest(f"{key}={name}".encode()) for name in names)
    return (places(np.fromiter(hashes, np.uint64, len(names)), seed) >> np.uint64(11)) / 2.0**53


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
