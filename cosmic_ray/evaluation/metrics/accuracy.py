"""Scores of a classifier: accuracy with its interval, balanced accuracy, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.intervals import Interval


@dataclass(frozen=True)
class Scores:
    """Scores over C classes."""

    accuracy: Interval
    """The share that is right, in [0, 1], with its Wilson interval."""
    balanced_accuracy: float
    """Mean of the defined `recall`."""
    recall: np.ndarray
    """float64 (C,): the share of each class that is right; NaN for a class that does not occur."""
    confusion: np.ndarray
    """int64 (C, C): rows are the truth, columns what was predicted."""
    classes: tuple[str, ...]
    """Names of rows and columns."""


def classification_scores(
    truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str], confidence: float = 0.95
) -> Scores:
    """Scores of predicted against true labels.

    Args:
        truth: labels (N,), N >= 1.
        predicted: labels (N,).
        classes: the C classes that there are, in the order of the confusion matrix.
        confidence: of the interval of the accuracy, in (0, 1).

    Raises:
        ValueError: for no samples, mismatched shapes, missing labels, or labels that are none of `classes`.
    """
    names = tuple(str(name) for name in classes)
    count = len(truth)
    if not count:
        raise ValueError("truth: no samples, nothing to score")
    rows, columns = (
        class_numbers(values, names, what, count) for values, what in ((truth, "truth"), (predicted, "predicted"))
    )
    confusion = np.bincount(rows * len(names) + columns, minlength=len(names) ** 2).reshape(len(names), len(names))
    total, right = confusion.sum(1), np.diag(confusion)
    recall = np.full(len(names), np.nan)
    np.divide(right, total, out=recall, where=total > 0)
    accuracy = wilson_interval(int(right.sum()), count, confidence)
    return Scores(accuracy, float(np.nanmean(recall)), recall, confusion, names)


def class_numbers(labels: np.ndarray, classes: Sequence[str], name: str, count: int) -> np.ndarray:
    """Each label's place in `classes`: int64 (count,).

    Raises:
        ValueError: for another shape, missing labels, or labels that are none of `classes`: each is named.
    """
    text = arrays.names_of(labels, name, count)
    unknown = sorted(set(np.unique(text).tolist()) - set(classes))
    if unknown:
        raise ValueError(f"{name}: {', '.join(map(repr, unknown))} not among the classes {', '.join(classes)}")
    order = np.argsort(classes)
    return order[np.searchsorted(np.asarray(classes)[order], text)]


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur in `truth`; a predicted class that does not is simply wrong."""
    return float(np.mean([(predicted[truth == name] == name).mean() for name in np.unique(truth)]))


def wilson_interval(right: int, count: int, confidence: float = 0.95) -> Interval:
    """A share with its Wilson score interval; `mean` is the plain share, not the interval's centre.

    It holds for independent samples: several images of one cell, or cells of few donors, make it too narrow.

    Raises:
        ValueError: where `right` is not in [0, count], `count` not above 0 or `confidence` not in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.stats import norm

    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} of {count} is no share")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}, but it must be above 0 and below 1")
    z2 = float(norm.ppf(0.5 + confidence / 2)) ** 2
    share = right / count
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))
