"""Imports go one way through the house, and the networks know nothing of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cosmic_ray"
BASE = {"errors", "config", "progress", "s3", "storage", "lease", "output", "cluster"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "progress": set(),
    "s3": {"errors"},
    "storage": {"errors", "s3"},
    "lease": {"errors", "storage"},
    "output": {"errors", "config", "storage", "lease"},
    "cluster": {"errors", "progress", "storage"},
    "reach": {"errors", "config", "storage"},
    "models": set(),
    "stores": BASE,
    "simulation": BASE | {"stores", "imaging", "cells"},
    "imaging": BASE | {"stores"},
    "cells": BASE | {"stores", "imaging"},
    "ingest": BASE | {"stores"},
    "registry": BASE | {"stores", "ingest", "models"},
    "training": BASE | {"reach", "stores", "ingest", "models", "registry"},
    "transcriptome": BASE | {"stores", "models", "registry"},
    "tuning": BASE | {"reach", "registry", "training", "jobs", "pipeline"},
    "inference": BASE | {"stores", "ingest", "models", "registry"},
    "evaluation": BASE | {"stores", "ingest", "models", "registry", "inference"},
}
NO_RAY = [
    "models",
    "registry",
    "simulation",
    "evaluation",
    "training/loop.py",
    "training/objective.py",
    "training/mae.py",
    "training/seq2img.py",
]


def house_imports(path: Path) -> set[str]:
    """The parts of the house that a file names in its imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("cosmic_ray.")}


def sources(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder if folder.suffix else folder.with_suffix(".py")]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(part):
    for path in sources(part):
        assert house_imports(path) - {part} <= MAY_IMPORT[part], path


@pytest.mark.parametrize("part", NO_RAY)
def test_ray_stays_at_the_edges(part):
    for path in sources(part):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not any(module.split(".")[0] == "ray" for module in modules), path
