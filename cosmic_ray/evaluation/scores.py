"""The figures that evaluations are compared by: their names, which way is better, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmic_ray.evaluation.metrics.intervals import mean_interval


@dataclass(frozen=True)
class Score:
    """One figure of an evaluation."""

    better: int
    """+1 where more is better, -1 where less is."""
    words: str
    """What it says, for a table."""


SCORES: dict[str, Score] = {
    "cov": Score(1, "COV: real cells that are a generated cell's nearest"),
    "swd": Score(-1, "SWD: W1 over that of a Gaussian"),
    "knna_excess": Score(-1, "|k-NNA - 0.5|"),
    "near_train": Score(-1, "generated closer to a train cell than 1 % of held-out cells are, beyond 1 %"),
    "image_accuracy": Score(1, "cell type told from generated images"),
    "expression_accuracy": Score(1, "cell type told from generated expression"),
    "pearson": Score(1, "mean over genes of r within batch"),
    "pearson_above_0.4": Score(1, "share of genes with r above 0.4"),
    "error": Score(-1, "mean squared error of log expression"),
    "crps": Score(-1, "CRPS of log expression"),
    "coverage_error": Score(-1, "|held by the interval - its level|"),
    "cycle_pearson": Score(1, "mean over genes of r within batch, expression -> image -> expression"),
    "cycle_pearson_above_0.4": Score(1, "share of genes with r above 0.4, expression -> image -> expression"),
    "planted_auroc": Score(1, "planted against matched unplanted genes, all strengths"),
}


def over_rounds(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """`mean`, `low`, `high` (Student t; None for one round) and `rounds`, the values; JSON-serialisable.

    The interval is over rounds of generation: it knows nothing of other cells or of models trained anew.
    """
    known = [float(value) for value in values if np.isfinite(value)]
    if len(known) < len(values) or not known:
        return {"mean": None, "low": None, "high": None, "rounds": [number(value) for value in values]}
    found = mean_interval(np.array(known), confidence)
    return {"mean": found.mean, "low": number(found.low), "high": number(found.high), "rounds": known}


def number(value: Any) -> float | None:
    """A float for JSON: None for NaN and infinity."""
    return float(value) if value is not None and np.isfinite(value) else None


def scores_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Those of `SCORES` that the results of an evaluation hold."""
    found: dict[str, Any] = {}
    if images := results.get("images"):
        everything = images["groups"]["all"]
        found |= {name: everything[name]["value"]["mean"] for name in ("cov", "swd")}
        found["knna_excess"] = _away(everything["knna"]["value"]["mean"], 0.5)
        found["near_train"] = max(0.0, images["near_train"]["mean"] - images["near_train_of_real"])
        if accuracy := images.get("accuracy"):
            found["image_accuracy"] = accuracy["generated"]["mean"]
    if expression := results.get("expression"):
        found |= {name: expression.get(name) for name in ("pearson", "pearson_above_0.4", "error", "crps")}
        if interval := expression.get("interval"):
            found["coverage_error"] = _away(interval["held"], interval["level"])
        if accuracy := expression.get("accuracy"):
            found["expression_accuracy"] = accuracy["generated"]["accuracy"]
    if cycle := results.get("cycle"):
        found |= {f"cycle_{name}": cycle[name] for name in ("pearson", "pearson_above_0.4")}
    if planted := results.get("planted"):
        found["planted_auroc"] = planted["all"]["auroc"]
    return {name: float(value) for name, value in found.items() if value is not None}


def _away(value: float | None, ideal: float | None) -> float | None:
    return None if value is None or ideal is None else abs(value - ideal)
