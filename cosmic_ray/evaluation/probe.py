"""Linear probes: what can be read from an embedding, judged on crops that nothing was fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmic_ray.evaluation.metrics.accuracy import balanced_accuracy

_ALPHAS = tuple(10.0**k for k in range(-3, 6))


@dataclass(frozen=True)
class Split3:
    """Row numbers of the three parts: fit on `train`, choose on `val`, judge on `test`."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def beyond(measures: np.ndarray, nuisance: np.ndarray, train: np.ndarray, degree: int = 3) -> np.ndarray:
    """What is left of each measure once a polynomial in the nuisances (log area, say) is taken out.

    Args:
        measures: float (N, F).
        nuisance: float (N, K); each gets its powers up to `degree` (no products).
        train: row numbers on which the polynomial is fitted.

    Returns:
        float64 (N, F), in units of the train residual's standard deviation.
    """
    standard = (nuisance - nuisance[train].mean(0)) / np.maximum(nuisance[train].std(0), 1e-12)
    design = np.hstack([np.ones((len(nuisance), 1)), *(standard**power for power in range(1, degree + 1))])
    weights = np.linalg.lstsq(design[train], measures[train], rcond=None)[0]
    residual = measures - design @ weights
    return residual / np.maximum(residual[train].std(0), 1e-12)


def ridge_r2(features: np.ndarray, targets: np.ndarray, parts: Split3) -> np.ndarray:
    """R^2 on `test` of a ridge regression from standardised features, its penalty chosen per target on `val`.

    Args:
        features: float (N, D).
        targets: float (N, F).
        parts: row numbers.

    Returns:
        float64 (F,): 1 - residual / total sum of squares about the TRAIN mean, so that it can be negative.
    """
    x = (features - features[parts.train].mean(0)) / np.maximum(features[parts.train].std(0), 1e-12)
    centre = targets[parts.train].mean(0)
    y = targets - centre
    left, singular, right = np.linalg.svd(x[parts.train], full_matrices=False)
    projected = left.T @ y[parts.train]
    best = np.full(targets.shape[1], -np.inf)
    result = np.zeros(targets.shape[1])
    for alpha in _ALPHAS:
        shrink = (singular / (singular**2 + alpha * len(parts.train)))[:, None]
        weights = right.T @ (shrink * projected)
        chosen = _r2(y[parts.val], x[parts.val] @ weights)
        better = chosen > best
        best = np.where(better, chosen, best)
        result = np.where(better, _r2(y[parts.test], x[parts.test] @ weights), result)
    return result


def logistic_accuracy(features: np.ndarray, labels: np.ndarray, parts: Split3) -> float:
    """Balanced accuracy on `test` of a multinomial logistic regression, its penalty chosen on `val`.

    Args:
        features: float (N, D), standardised inside on train.
        labels: (N,) class names; classes that are missing from train count as wrong.
        parts: row numbers.
    """
    from sklearn.linear_model import LogisticRegression

    x = (features - features[parts.train].mean(0)) / np.maximum(features[parts.train].std(0), 1e-12)
    best, result = -1.0, float("nan")
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        model = LogisticRegression(C=strength, max_iter=500, class_weight="balanced").fit(
            x[parts.train], labels[parts.train]
        )
        chosen = balanced_accuracy(labels[parts.val], model.predict(x[parts.val]))
        if chosen > best:
            best, result = chosen, balanced_accuracy(labels[parts.test], model.predict(x[parts.test]))
    return float(result)


def pixel_pca(crops: np.ndarray, train: np.ndarray, components: int, side: int = 32) -> np.ndarray:
    """The plain baseline: principal components of the shrunken pixels.

    Args:
        crops: uint8 (N, H, W), H and W multiples of `side`.
        train: row numbers on which the components are fitted.
        components: how many to keep.
        side: crops are averaged down to side x side first.

    Returns:
        float64 (N, components).
    """
    from sklearn.decomposition import PCA

    count, height, width = crops.shape
    small = crops.reshape(count, side, height // side, side, width // side).mean((2, 4), dtype=np.float32)
    flat = small.reshape(count, -1) / 255.0
    return PCA(components, svd_solver="randomized", random_state=0).fit(flat[train]).transform(flat)


def _r2(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return 1.0 - ((truth - predicted) ** 2).sum(0) / np.maximum((truth**2).sum(0), 1e-12)
