"""Per-gene correlation against SciPy, its p-values under the null, and where it is undefined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosmic_ray.evaluation.metrics import arrays
from cosmic_ray.evaluation.metrics.correlation import benjamini_hochberg, gene_correlation


def pair(seed: int, cells: int, genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed expression and a noisy copy of it, float32."""
    random = np.random.default_rng(seed)
    real = np.log1p(random.poisson(2.0, (cells, genes)))
    return real.astype(np.float32), (0.5 * real + random.normal(size=real.shape)).astype(np.float32)


def test_one_batch_agrees_with_scipy():
    real, generated = pair(0, 40, 30)
    found = gene_correlation(real, generated)
    expected = [stats.pearsonr(x, y) for x, y in zip(real.T.astype(float), generated.T.astype(float), strict=True)]
    assert found.r == pytest.approx([e.statistic for e in expected])
    assert found.p == pytest.approx([e.pvalue for e in expected])
    assert found.q == pytest.approx(stats.false_discovery_control([e.pvalue for e in expected]))
    assert found.batches == ("",) and found.cells.tolist() == [40]


def test_batches_are_averaged_with_equal_weight():
    real, generated = pair(1, 60, 10)
    batches = np.repeat(["b", "a", "c"], [40, 15, 5])
    shifted = generated + 100.0 * (batches == "a")[:, None]  # a batch effect that pooling would measure
    found = gene_correlation(real, shifted, batches)
    expected = [
        [stats.pearsonr(real[batches == name, g].astype(float), generated[batches == name, g].astype(float))[0]
         for g in range(10)] for name in "abc"
    ]  # fmt: skip
    assert found.batches == ("a", "b", "c") and found.cells.tolist() == [15, 40, 5]
    assert found.by_batch == pytest.approx(np.array(expected), abs=1e-5)
    assert found.r == pytest.approx(np.mean(expected, axis=0), abs=1e-5)


def test_batch_and_gene_confounded_give_a_pooled_correlation_that_is_not_there_within():
    random = np.random.default_rng(2)
    batches = np.repeat(["a", "b"], 200)
    real, generated = ((batches == "b")[:, None] * 5.0 + random.normal(size=(400, 50)) for _ in range(2))
    assert gene_correlation(real, generated).r.min() > 0.8
    within = gene_correlation(real, generated, batches)
    assert abs(within.r.mean()) < 0.03 and within.q.min() > 0.001


@pytest.mark.parametrize("sizes", [(12,), (6, 10, 40), (3, 3, 4, 5)])
def test_p_values_are_uniform_under_the_null(sizes):
    random = np.random.default_rng(3)
    batches = np.repeat(np.arange(len(sizes)), sizes)
    real, generated = random.normal(size=(2, sum(sizes), 20_000))
    p = gene_correlation(real, generated, batches).p
    # Exact for one batch; for the mean over several the match of moments costs little.
    for level in (0.01, 0.05, 0.5):
        margin = 4 * np.sqrt(level * (1 - level) / len(p)) + (0 if len(sizes) == 1 else 0.1 * level)
        assert np.mean(p < level) == pytest.approx(level, abs=margin)


def test_undefined_is_nan_and_left_out_of_the_correction():
    real, generated = pair(4, 12, 6)
    batches = np.repeat(["a", "b", "c"], [5, 5, 2])
    real[:, 0] = 0.1  # constant in truth
    generated[:, 1] = 0.1  # constant as generated
    real[:5, 2] = 0.0  # constant in one batch only
    found = gene_correlation(real, generated, batches)
    assert np.isnan(found.r[:2]).all() and np.isnan(found.p[:2]).all() and np.isnan(found.q[:2]).all()
    assert np.isnan(found.by_batch[2]).all(), "two cells are too few"
    assert found.r[2] == found.by_batch[1, 2] and np.isnan(found.by_batch[0, 2])
    assert found.p[2] == pytest.approx(stats.pearsonr(real[5:10, 2].astype(float), generated[5:10, 2])[1], rel=1e-4)
    assert found.q[2:] == pytest.approx(stats.false_discovery_control(found.p[2:]))
    assert found.share_above(-1.0) == 4 / 6


def test_a_range_of_rounding_is_no_variance():
    random = np.random.default_rng(7)
    noise = random.normal(size=(10, 1))
    assert np.isnan(gene_correlation(5 + 1e-14 * noise, noise).r).all()
    assert gene_correlation(5 + 1e-9 * noise, noise).r == pytest.approx(1.0, abs=1e-6)


def test_perfect_correlation_and_its_opposite():
    real, _ = pair(5, 10, 4)
    assert gene_correlation(real, 3 * real + 1).r == pytest.approx(1.0)
    opposite = gene_correlation(real, -real)
    assert opposite.r == pytest.approx(-1.0) and opposite.p.max() < 1e-10


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-170, 1.0, 1e160]))
def test_order_of_cells_and_units_do_not_matter(seed, scale):
    random = np.random.default_rng(seed)
    real, generated = random.normal(size=(2, 20, 3))
    batches, order = np.repeat(["a", "b"], 10), random.permutation(20)
    before = gene_correlation(real, generated, batches)
    after = gene_correlation(real[order] * scale, generated[order] * 7, batches[order])
    assert after.by_batch == pytest.approx(before.by_batch)
    assert gene_correlation(generated, real, batches).r == pytest.approx(before.r)


def test_blocks_do_not_change_the_result(monkeypatch):
    real, generated = pair(6, 30, 11)
    whole = gene_correlation(real, generated)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 1000)
    assert gene_correlation(real, generated).r == pytest.approx(whole.r, rel=1e-12)


def test_benjamini_hochberg_on_its_paper_s_example():
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    adjusted = benjamini_hochberg(np.array([*p, np.nan]))
    assert np.count_nonzero(adjusted <= 0.05) == 4, "the four hypotheses that the paper rejects"
    assert adjusted[:4] == pytest.approx([0.0015, 0.003, 0.0095, 0.035625])
    assert np.isnan(adjusted[-1])
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


@pytest.mark.parametrize(
    ("real", "generated", "batches", "message"),
    [
        (np.ones((5, 2)), np.ones((5, 3)), None, "must be the same"),
        (np.ones((2, 2)), np.ones((2, 2)), None, "at least 3"),
        (np.ones((3, 2)), np.full((3, 2), np.nan), None, "generated: 6 of 6"),
        (np.ones((3, 2)), np.ones((3, 2)), np.array(["a", "b"]), r"shape \(2,\)"),
        (np.ones((3, 2)), np.ones((3, 2)), np.array(["a", None, "b"], object), "1 of 3 labels are missing"),
        (np.ones((3, 2)), np.ones((3, 2)), np.array([1.0, np.nan, 2.0]), "1 of 3 labels are missing"),
    ],
)
def test_gene_correlation_refuses(real, generated, batches, message):
    with pytest.raises(ValueError, match=message):
        gene_correlation(real, generated, batches)
