"""What the generative kinds share: cells by id, seeds, batches."""

from __future__ import annotations

from collections.abc import Sequence


def cell_names(cell_ids: Sequence[str] | None, count: int) -> list[str]:
    """An id for each of `count` rows, by which its noise is keyed: as given, else its row number.

    Raises:
        TypeError: where an id is no text.
        ValueError: where there is not one for each row.
    """
    if cell_ids is None:
        return [str(row) for row in range(count)]
    names = list(cell_ids)
    if len(names) != count:
        raise ValueError(f"there are {len(names)} cell ids for {count} cells")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"cell ids are text; {wrong[0]!r} is {type(wrong[0]).__name__}")
    return names


def checked_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        ValueError: for another.
    """
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)
