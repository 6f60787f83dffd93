"""Scores against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix

from cosmic_ray.evaluation.metrics.accuracy import balanced_accuracy, classification_scores, wilson_interval

CLASSES = ("RAW", "3T3", "naive CD8")  # not sorted: the order is the caller's


def test_scores_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    truth = random.choice(CLASSES, 200, p=[0.7, 0.2, 0.1])
    predicted = np.where(random.random(200) < 0.6, truth, random.choice(CLASSES, 200))
    found = classification_scores(truth, predicted, CLASSES)
    assert found.accuracy.mean == accuracy_score(truth, predicted)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert balanced_accuracy(truth, predicted) == pytest.approx(found.balanced_accuracy)
    assert found.confusion.tolist() == confusion_matrix(truth, predicted, labels=CLASSES).tolist()
    assert found.recall == pytest.approx(
        confusion_matrix(truth, predicted, labels=CLASSES, normalize="true").diagonal()
    )
    shuffled = random.permutation(200)
    again = classification_scores(truth[shuffled], predicted[shuffled], CLASSES)
    assert again.accuracy == found.accuracy and (again.confusion == found.confusion).all()


def test_a_class_that_does_not_occur_has_no_recall():
    found = classification_scores(np.array(["RAW", "RAW"]), np.array(["RAW", "3T3"]), CLASSES)
    assert found.recall == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)
    assert found.balanced_accuracy == 0.5


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (3, 7), (780, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_agrees_with_scipy(right, count, confidence):
    expected = binomtest(right, count).proportion_ci(confidence, method="wilson")
    assert wilson_interval(right, count, confidence) == pytest.approx((right / count, expected.low, expected.high))


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (["RAW", "B cell"], ["RAW", "RAW"], "truth: 'B cell' not among the classes RAW, 3T3, naive CD8"),
        (["RAW", "RAW"], ["RAW", "x"], "predicted: 'x'"),
        (["RAW", "RAW"], ["RAW"], r"predicted: shape \(1,\)"),
        ([], [], "no samples"),
        ([None, "RAW"], ["RAW", "RAW"], "1 of 2 labels are missing"),
    ],
)
def test_scores_refuse(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(np.array(truth, object), np.array(predicted, object), CLASSES)


def test_wilson_refuses():
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)
