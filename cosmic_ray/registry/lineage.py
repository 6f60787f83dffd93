"""What something was made from: input name -> {"uri", "content_hash"}, a model's being its digest (and called so, or
`content_hash`); plain facts (job fingerprint, step) beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lineage_tags(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of a lineage becomes MLflow tags: `store_hash` for `store: {uri, content_hash}`, plain values as is."""
    found = {}
    for key, value in lineage.items():
        if isinstance(value, Mapping):
            if digest := value.get("content_hash") or value.get("digest"):
                found[f"{key}_hash"] = str(digest)
        elif value is not None and not isinstance(value, list):
            found[key] = str(value)
    return found


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of JSON-like data; a list of plain values is one leaf."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(value, dict | list) for value in tree):
        for index, value in enumerate(tree):
            yield from flat(value, f"{prefix}.{index}")
    else:
        yield prefix, str(tree)
