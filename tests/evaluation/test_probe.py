"""Probes against cases with a known answer and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.feature import graycomatrix, graycoprops
from sklearn.linear_model import Ridge

from cosmic_ray.evaluation import probe, texture

ROWS = 900
PARTS = probe.Split3(np.arange(0, 500), np.arange(500, 700), np.arange(700, 900))


def test_ridge_finds_a_planted_share_of_variance_and_nothing_in_noise():
    random = np.random.default_rng(0)
    features = random.normal(size=(ROWS, 20))
    signal = features @ random.normal(size=20)
    targets = np.stack([signal + signal.std() * random.normal(size=ROWS), random.normal(size=ROWS)], 1)
    planted, noise = probe.ridge_r2(features, targets, PARTS)
    assert planted == pytest.approx(0.5, abs=0.08)
    assert -0.05 < noise < 0.03


def test_ridge_agrees_with_scikit_learn_at_the_penalty_it_chose():
    random = np.random.default_rng(1)
    features = random.normal(size=(ROWS, 5))
    targets = (features[:, :1] * 3 + random.normal(size=(ROWS, 1))).astype(float)
    x = (features - features[PARTS.train].mean(0)) / features[PARTS.train].std(0)
    y = targets[:, 0] - targets[PARTS.train, 0].mean()
    scores = {}
    for alpha in probe._ALPHAS:
        model = Ridge(alpha=alpha * len(PARTS.train), fit_intercept=False).fit(x[PARTS.train], y[PARTS.train])
        left = {part: y[rows] - model.predict(x[rows]) for part, rows in vars(PARTS).items()}
        scores[alpha] = {part: 1 - (left[part] ** 2).sum() / (y[rows] ** 2).sum() for part, rows in vars(PARTS).items()}
    best = max(scores.values(), key=lambda score: score["val"])
    assert probe.ridge_r2(features, targets, PARTS)[0] == pytest.approx(best["test"], abs=1e-10)


def test_beyond_removes_a_cubic_of_area_and_keeps_the_rest():
    random = np.random.default_rng(2)
    area = random.normal(size=(ROWS, 1))
    own = random.normal(size=(ROWS, 1))
    left = probe.beyond(np.hstack([area**3 - 2 * area, area**2 + own]), area, PARTS.train)
    assert np.corrcoef(left[PARTS.test, 1], own[PARTS.test, 0])[0, 1] > 0.99
    assert abs(np.corrcoef(left[PARTS.test, 1], area[PARTS.test, 0] ** 2)[0, 1]) < 0.15


def test_logistic_accuracy_is_chance_on_noise_and_one_on_separated_classes():
    random = np.random.default_rng(3)
    labels = np.array(["a", "b", "c"])[np.arange(ROWS) % 3]
    far = (np.arange(ROWS) % 3)[:, None] * 10.0 + random.normal(size=(ROWS, 4))
    assert probe.logistic_accuracy(far, labels, PARTS) > 0.95
    assert probe.logistic_accuracy(random.normal(size=(ROWS, 4)), labels, PARTS) == pytest.approx(1 / 3, abs=0.1)


def disc(radius: int, texture_image: np.ndarray) -> np.ndarray:
    size = texture_image.shape[0]
    y, x = np.mgrid[:size, :size] - size // 2
    return np.where(x**2 + y**2 <= radius**2, np.clip(texture_image, 1, 255), 0).astype(np.uint8)


def test_cooccurrence_agrees_with_scikit_image_on_a_full_square():
    levels = np.random.default_rng(4).integers(0, 16, (20, 20))
    ours = texture._haralick(texture._cooccurrence(levels, np.ones_like(levels, bool), 3))
    angles = [0, np.pi / 2]
    # scikit-image rounds diagonal offsets to the circle (3 px at 45 degrees is (2, 2)), ours keep (3, 3).
    straight = graycomatrix(levels.astype(np.uint8), [3], angles, levels=16, symmetric=True)[:, :, 0, :].sum(-1)
    diagonal = np.zeros((16, 16))
    for a, b in ((levels[:-3, :-3], levels[3:, 3:]), (levels[:-3, 3:], levels[3:, :-3])):
        np.add.at(diagonal, (a.ravel(), b.ravel()), 1)
    joint = straight + diagonal + diagonal.T
    joint = (joint / joint.sum())[:, :, None, None]
    assert ours[0] == pytest.approx(graycoprops(joint, "contrast")[0, 0])
    assert ours[1] == pytest.approx(graycoprops(joint, "correlation")[0, 0])


def test_chromatin_ignores_exposure_and_separates_textures_of_equal_area():
    random = np.random.default_rng(5)
    smooth = [disc(30, 100 + 2 * random.normal(size=(128, 128))) for _ in range(20)]
    rough = [disc(30, 100 + 20 * random.normal(size=(128, 128))) for _ in range(20)]
    measures = texture.chromatin(np.array(smooth + rough))
    assert np.isfinite(measures).all()
    variation = measures[:, texture.NAMES.index("coefficient_of_variation")]
    assert variation[:20].max() < 0.05 < 0.15 < variation[20:].min()
    doubled = texture.chromatin(np.array(rough) // 2 * 2)
    halved = texture.chromatin(np.array(rough) // 2)
    assert np.allclose(doubled, halved, atol=0.02)


def test_a_speck_has_no_texture():
    crop = np.zeros((1, 128, 128), np.uint8)
    crop[0, 64, 64:70] = 200
    assert np.isnan(texture.chromatin(crop)).all()
