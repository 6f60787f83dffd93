"""The simulation of the planted truth is frozen: its file, and what it yields, are what they were when figures were
first measured on them. Where a test here fails, the change belongs into another file, under another name.

Sums are compared to about a millionth, counts to a few in a million: a CPU that rounds an exponential otherwise may
move a count or a pixel, and no change of the simulator stays within that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cosmic_ray.jobs import load
from cosmic_ray.simulation.counts import draw_counts
from cosmic_ray.simulation.genes import draw_genes
from cosmic_ray.simulation.morphology import draw_images
from cosmic_ray.simulation.population import all_cells

FILE = Path(__file__).parents[2] / "jobs/planted-truth/simulate.yaml"


@pytest.fixture(scope="module")
def spec():
    """Its first chunk of cells: what is drawn for them does not depend on how many follow."""
    return load(str(FILE)).model_copy(update={"cells": 64})


@pytest.fixture(scope="module")
def genes(spec):
    return draw_genes(spec, 0)


def test_every_key_is_what_it_was():
    assert load(str(FILE)).fingerprint() == "47beeecdfe2a94c4"


def test_genes_are_what_they_were(genes):
    assert "".join(role[0] for role in genes.role)[:40] == "bcbbbbbbbbppcpbppbbcbpbpbcbcpbbbbbbbcbbp"
    assert np.abs(genes.slope).sum() == pytest.approx(126.5171064, rel=1e-5)
    assert genes.ceiling.sum() == pytest.approx(134.8564908, rel=1e-5)
    assert genes.log_means.sum() == pytest.approx(62852.74541570844, rel=1e-9)
    assert genes.dispersion.sum() == pytest.approx(211.58642387468774, rel=1e-9)


def test_cells_are_what_they_were(spec):
    cells = all_cells(spec, 0)
    assert (cells.kind.sum(), cells.batch.sum(), cells.donor.sum()) == (100, 78, 70)
    assert cells.factors.sum() == pytest.approx(-12.107702392775662, abs=1e-8)
    assert cells.shadows.sum() == pytest.approx(-0.9247233291210044, abs=1e-8)


def test_counts_are_what_they_were(spec, genes):
    counts = draw_counts(spec, 0, genes).toarray()
    assert counts.sum() == pytest.approx(357768, abs=40)
    assert (counts == 0).sum() == pytest.approx(7745, abs=5)
    assert (counts * np.arange(800)).sum() == pytest.approx(143742805, abs=20_000)


def test_images_are_what_they_were(spec):
    crops = draw_images(spec, 0, 0)
    assert (crops > 0).sum() == pytest.approx(37046, abs=3)
    assert crops.sum(dtype=np.int64) == pytest.approx(2203803, abs=60)
    assert crops.std(axis=(1, 2)).sum() == pytest.approx(1514.4732152562542, abs=0.05)
