"""What a long run reads, held fast: the inputs that it began with, and models where every worker can read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.errors import DataError, NotFoundError
from cosmic_ray.output import Output, canonical

if TYPE_CHECKING:
    from cosmic_ray.registry.model import StoredModel

_FILE = "inputs.json"


def shared_model(stored: StoredModel, output: Output, name: str = "model") -> str:
    """A folder with the model that every worker can read: a registered one is copied to `<out>/<name>`."""
    from cosmic_ray.registry.package import copy_model

    if not stored.uri.startswith("models:"):
        return stored.uri
    copy_model(stored, output.at(name))
    return output.at(name)


def pinned(output: Output, lineage: dict[str, Any]) -> dict[str, Any]:
    """See that a continued run has the inputs that it began with: an alias moves, a folder is written anew.

    Args:
        lineage: by name, {"uri", "content_hash", ...}.

    Returns:
        The lineage that the run began with.

    Raises:
        DataError: where an input is another than it was.
    """
    try:
        begun = storage.read_json(output.at(_FILE))
    except NotFoundError:
        output.write(_FILE, canonical(lineage))
        return lineage
    for name, now in lineage.items():
        if begun[name]["content_hash"] != now["content_hash"]:
            problem = f"this run began with {name} {begun[name]['uri']}, whose content was another than it is now"
            raise DataError(output.uri, problem, "choose another out, or delete that folder")
    return begun
