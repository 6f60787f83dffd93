"""Percentiles from merged histograms are those of all the data, in whatever parts and order it came."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.config import validate
from cosmic_ray.errors import JobError
from cosmic_ray.imaging.histogram import Histogram
from cosmic_ray.imaging.thresholds import AreaLimits, area_limits

PARTS = st.lists(st.lists(st.integers(0, 5000), max_size=20), min_size=1, max_size=6).filter(any)


@settings(max_examples=200, deadline=None)
@given(parts=PARTS, percent=st.floats(0, 100), seed=st.randoms())
def test_percentiles_are_numpys_in_any_parts_and_order(parts, percent, seed):
    histograms = [Histogram.of(np.array(part, np.int64)) for part in parts if part]
    seed.shuffle(histograms)
    merged = Histogram.merged(Histogram.from_json(json.loads(json.dumps(one.to_json()))) for one in histograms)
    everything = np.array([value for part in parts for value in part])
    assert merged.total == len(everything)
    assert merged.percentile(percent) == pytest.approx(np.percentile(everything, percent), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_a_histogram_counts_any_integers(dtype):
    data = np.random.default_rng(0).integers(0, 200, (30, 40)).astype(dtype)
    histogram = Histogram.of(data)
    values, counts = np.unique(data, return_counts=True)
    np.testing.assert_array_equal(histogram.values, values)
    np.testing.assert_array_equal(histogram.counts, counts)


def test_an_area_of_a_hundred_megapixels_costs_one_count():
    assert len(Histogram.of(np.array([10**8, 5, 5])).counts) == 2


def test_nothing_has_no_percentile():
    with pytest.raises(ValueError, match="no data"):
        Histogram.of(np.empty(0, np.int64)).percentile(50)


def test_limits_by_source_and_over_all():
    areas = {"a": Histogram.of(np.arange(101)), "b": Histogram.of(np.arange(1000, 1101))}
    assert area_limits(areas, AreaLimits()) == {"a": (5.0, 95.0), "b": (1005.0, 1095.0)}
    both = np.concatenate([np.arange(101), np.arange(1000, 1101)])
    expected = (pytest.approx(np.percentile(both, 10)), pytest.approx(np.percentile(both, 80)))
    limits = area_limits(areas, AreaLimits(low=10, high=80, scope="all"))
    assert limits == {"a": expected, "b": expected}


def test_limits_must_be_ordered():
    with pytest.raises(JobError, match="below high"):
        validate(AreaLimits, {"low": 95, "high": 5})
