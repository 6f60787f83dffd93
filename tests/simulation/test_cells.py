"""The drawn population: cell cycle, DNA content, growth, treatments, and types that differ in texture alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cosmic_ray.simulation.cells import Nuclei, draw_nuclei
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.spec import CELL_TYPES, CellCycle, Optics, Treatment


def drawn(mix: dict[str, float], count: int = 20_000, treatment: Treatment | None = None, seed: int = 0) -> Nuclei:
    rng = keyed(seed, "test")
    return draw_nuclei(rng, CELL_TYPES, mix, count, treatment or Treatment(), Optics(), stain_cv=0.05)


def cells(nuclei: Nuclei) -> np.ndarray:
    """First row of each cell."""
    return np.unique(nuclei.cell, return_index=True)[1]


def test_shares_of_the_cycle_are_those_of_a_growing_culture():
    nuclei = drawn({"smooth": 1})
    cycle = CELL_TYPES["smooth"].cycle
    ends = np.cumsum([0, cycle.g1, cycle.s, cycle.g2, cycle.m])
    expected = np.diff(2 * (1 - 2.0**-ends))
    state = nuclei.state[cells(nuclei)]
    for name, share in zip(("G1", "S", "G2", "M"), expected, strict=True):
        tolerance = 4 * np.sqrt(share * (1 - share) / len(state))
        assert np.mean(state == name) == pytest.approx(share, abs=tolerance)


def test_dna_content_follows_the_age():
    nuclei = drawn({"smooth": 1})
    cycle = CELL_TYPES["smooth"].cycle
    assert set(nuclei.dna[nuclei.state == "G1"]) == {2.0}
    assert set(nuclei.dna[nuclei.state == "G2"]) == {4.0}
    s = nuclei.state == "S"
    np.testing.assert_allclose(nuclei.dna[s], 2 + 2 * (nuclei.phase[s] - cycle.g1) / cycle.s)
    assert set(nuclei.dna[nuclei.mitosis == "anaphase"]) == {2.0}
    assert set(nuclei.dna[(nuclei.state == "M") & (nuclei.mitosis != "anaphase")]) == {4.0}


def test_an_anaphase_is_two_nuclei_of_one_cell():
    nuclei = drawn({"smooth": 1}, 3000)
    of_cell = np.bincount(nuclei.cell)
    assert (of_cell[np.unique(nuclei.cell[nuclei.mitosis == "anaphase"])] == 2).all()
    assert (of_cell[np.unique(nuclei.cell[nuclei.mitosis != "anaphase"])] == 1).all()


def test_area_grows_as_dna_content_to_two_thirds():
    nuclei = drawn({"smooth": 1})
    g1, g2 = (np.median(nuclei.area_um2[nuclei.state == state]) for state in ("G1", "G2"))
    assert g1 == pytest.approx(CELL_TYPES["smooth"].area_um2, rel=0.01)
    assert g2 / g1 == pytest.approx(2 ** (2 / 3), rel=0.02)


def test_three_types_share_size_and_shape_and_differ_in_texture():
    one, two, three = (drawn({name: 1}, 4000, seed=i) for i, name in enumerate(("smooth", "granular", "speckled")))
    for other in (two, three):
        for trait in ("area_um2", "aspect", "bend", "dna", "flatness"):
            assert stats.ks_2samp(getattr(one, trait), getattr(other, trait)).pvalue > 1e-3, trait
    assert stats.ks_2samp(one.grain_um, two.grain_um).statistic > 0.9
    assert stats.ks_2samp(one.contrast, two.contrast).statistic > 0.9
    assert stats.ks_2samp(one.foci, three.foci).statistic > 0.9


def test_a_mixture_has_the_weights_it_was_given():
    nuclei = drawn({"smooth": 3, "compact": 1})
    assert np.mean(nuclei.cell_type[cells(nuclei)] == "compact") == pytest.approx(0.25, abs=0.015)


def test_treatments_do_what_they_say():
    plain, treated = drawn({"speckled": 1}), drawn({"speckled": 1}, treatment=Treatment(area=1.5, grain=2, foci=0.5))
    assert np.median(treated.area_um2) / np.median(plain.area_um2) == pytest.approx(1.5, rel=1e-6)
    assert np.median(treated.grain_um) / np.median(plain.grain_um) == pytest.approx(2, rel=1e-6)
    assert treated.foci.mean() / plain.foci.mean() == pytest.approx(0.5, abs=0.02)
    held = drawn({"speckled": 1}, treatment=Treatment(g2_arrest=0.6))
    free_g2 = np.mean(plain.state[cells(plain)] == "G2")
    assert np.mean(held.state[cells(held)] == "G2") == pytest.approx(0.6 + 0.4 * free_g2, abs=0.015)


def test_no_cells_is_no_error():
    assert len(drawn({"smooth": 1}, 0)) == 0


def test_a_cycle_must_be_whole():
    with pytest.raises(ValueError, match="not 1"):
        CellCycle(g1=0.9)
