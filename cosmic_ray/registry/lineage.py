"""What something was made from: input name -> {"uri", "content_hash"}, a model's being its digest (and called so, or
`content_hash`); plain facts (job fingerprint, step) beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lineage_tags(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of a lineage becomes MLflow tags: `store_hash` for `store: {uri, content_hash}`, plain values as is.

    Inputs that have a lineage themselves tell what they were made from: `latents_model_hash` is the digest of the
    encoder that made the latents, `latents_model_split_hash` that of the split which it was fitted on.
    """
    found = {key: str(value) for key, value in lineage.items() if not isinstance(value, Mapping | list | None)}
    return found | _hashes(lineage, "")


def _hashes(lineage: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found = {}
    for key, value in lineage.items():
        if isinstance(value, Mapping):
            if digest := value.get("content_hash") or value.get("digest"):
                found[f"{prefix}{key}_hash"] = str(digest)
            if isinstance(value.get("lineage"), Mapping):
                found |= _hashes(value["lineage"], f"{prefix}{key}_")
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
