"""Planted truth: can genes that follow the morphology be told from those that do not, and from what strength on?"""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmic_ray.evaluation.metrics.intervals import mean_interval
from cosmic_ray.evaluation.scores import number

_NEXT = 1e-9


def auroc(planted: np.ndarray, unplanted: np.ndarray) -> float:
    """The probability that a planted gene's score is above an unplanted one's, ties counting half.

    Args:
        planted: real numbers (P,), P >= 1.
        unplanted: real numbers (U,), U >= 1.
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([planted, unplanted]))
    return float((ranks[: len(planted)].mean() - (len(planted) + 1) / 2) / len(unplanted))


def auroc_interval(area: float, planted: int, unplanted: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of an AUROC of so many planted and unplanted genes; it keeps its width at 0 and 1.

    Source: Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part
    2", method 5, with the variance of Hanley & McNeil 1982.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, extra = float(norm.ppf(0.5 + confidence / 2)), (planted + unplanted) / 2 - 1

    def beyond(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return (area - theta) ** 2 - z**2 * spread / (planted * unplanted)

    low = 0.0 if area == 0 else float(brentq(beyond, 0, area - _NEXT))  # at 0 and 1 there is no spread: a root, too
    return low, 1.0 if area == 1 else float(brentq(beyond, area + _NEXT, 1))


def matched(planted: np.ndarray, unplanted: np.ndarray, each: int) -> np.ndarray:
    """For each planted gene the `each` unplanted ones nearest in mean expression: int64 (P, each), places in
    `unplanted`. Genes may serve several planted ones.

    Args:
        planted: mean expression (P,).
        unplanted: mean expression (U,), U >= each.
    """
    away = np.abs(planted[:, None] - unplanted[None, :])
    return np.argsort(away, axis=1, kind="stable")[:, :each]


def planted_curve(
    r: np.ndarray,
    strength: np.ndarray,
    expression: np.ndarray,
    oracle: np.ndarray | None = None,
    *,
    controls: np.ndarray | None = None,
    each: int = 5,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """AUROC of planted against matched unplanted genes, strength by strength, and where the unplanted ones lie.

    A gene whose r is undefined is left out and counted. Intervals of AUROC (`auroc_interval`) count every matched gene
    once, however many planted ones it serves, and hold for independent genes.

    Args:
        r: float (G,): what is judged, a gene's correlation of generated with real expression.
        strength: float (G,): planted strength, 0 for an unplanted gene.
        expression: float (G,): mean expression, in which genes are matched.
        oracle: float (G,): the same correlation of one who sees the truth, where there is one.
        controls: int (G,): the place of a planted gene's own control, -1 where it has none; None: the `each`
            unplanted genes nearest in mean expression.
        each: unplanted genes matched to a planted one.
        confidence: of the intervals.

    Returns:
        `strengths` (a list), `all`: {"strength", "genes", "auroc", "low", "high", "oracle", "mean_r"}; `unplanted`:
        mean, low, high of r over unplanted genes (t interval), `genes`, `undefined`.
    """
    defined = np.isfinite(r)
    chosen, free = np.flatnonzero((strength > 0) & defined), np.flatnonzero((strength == 0) & defined)
    if not len(chosen) or len(free) < 2:
        raise ValueError(f"{len(chosen)} planted and {len(free)} unplanted genes with a correlation: nothing to tell")
    beside = _partners(chosen, free, expression, controls, defined, min(each, len(free)))
    rows = []
    for level in [*np.unique(strength[chosen]), None]:
        at = np.flatnonzero(strength[chosen] == level) if level is not None else np.arange(len(chosen))
        pairs = [(chosen[i], beside[i]) for i in at if len(beside[i])]
        rows.append({"strength": level, "genes": len(pairs)} | _judged(pairs, r, oracle, confidence))
    about = mean_interval(r[free], confidence)
    return {
        "strengths": rows[:-1],
        "all": rows[-1],
        "unplanted": {"mean": about.mean, "low": number(about.low), "high": number(about.high), "genes": len(free)},
        "undefined": int((~defined).sum()),
    }


def _partners(
    chosen: np.ndarray,
    free: np.ndarray,
    expression: np.ndarray,
    controls: np.ndarray | None,
    defined: np.ndarray,
    each: int,
) -> list[np.ndarray]:
    if controls is None:
        return list(free[matched(expression[chosen], expression[free], each)])
    return [np.array([c for c in [controls[gene]] if c >= 0 and defined[c]], np.int64) for gene in chosen]


def _judged(
    pairs: list[tuple[int, np.ndarray]], r: np.ndarray, oracle: np.ndarray | None, confidence: float
) -> dict[str, Any]:
    if not pairs:
        return {"auroc": None, "low": None, "high": None, "oracle": None, "mean_r": None}
    genes, beside = np.array([gene for gene, _ in pairs]), np.concatenate([others for _, others in pairs])
    area = auroc(r[genes], r[beside])
    low, high = auroc_interval(area, len(genes), len(np.unique(beside)), confidence)
    seen = None if oracle is None else np.nan_to_num(oracle)
    return {
        "auroc": area,
        "low": low,
        "high": high,
        "oracle": None if seen is None else auroc(seen[genes], seen[beside]),
        "mean_r": float(r[genes].mean()),
    }
