"""COSMIC models on Ray: from microscope fields and single-cell RNA to registered models, and back.

For notebooks: `cosmic_ray.open_store(uri)`, `cosmic_ray.load_model(uri)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmic_ray.registry.load import load_model
    from cosmic_ray.stores.cells import open_store

__all__ = ["load_model", "open_store"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import cosmic_ray` alone costs nothing."""
    if name == "load_model":
        return importlib.import_module("cosmic_ray.registry.load").load_model
    if name == "open_store":
        return importlib.import_module("cosmic_ray.stores.cells").open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
