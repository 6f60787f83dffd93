"""Simulated paired cells: planted correlations are what was asked, twins differ from them in nothing else, and images
show the factors that they say they show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage, stats

from cosmic_ray.config import validate
from cosmic_ray.errors import JobError
from cosmic_ray.simulation.counts import draw_counts
from cosmic_ray.simulation.genes import CONTROL, PLANTED, draw_genes
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.morphology import area_um2, draw_crop, draw_images, draw_morphology, require_room
from cosmic_ray.simulation.oracle import normalised, within
from cosmic_ray.simulation.paired_spec import FACTORS, PairedSpec
from cosmic_ray.simulation.population import CHUNK, all_cells, draw_cells

SPEC = validate(PairedSpec, {"cells": 6000, "transcriptome": {"genes": 150}})
TEXTURE = ("grain", "contrast", "foci")


@pytest.fixture(scope="module")
def drawn():
    """(genes, cells, y, groups): all but images."""
    genes, cells = draw_genes(SPEC, 7), all_cells(SPEC, 7)
    return genes, cells, normalised(draw_counts(SPEC, 7, genes).toarray()), cells.kind * 100 + cells.batch


def linked(genes, factors):
    from cosmic_ray.simulation.links import link

    found = np.zeros((len(factors), len(genes.gene_id)))
    for gene in np.flatnonzero(genes.factor >= 0):
        found[:, gene] = np.sign(genes.slope[gene]) * link(genes.function[gene], factors[:, genes.factor[gene]])
    return found


def test_planted_correlations_are_those_asked_for(drawn):
    genes, cells, y, groups = drawn
    planted = np.array(genes.role) == PLANTED
    found = within(linked(genes, cells.factors), y, groups)[planted]
    asked = genes.strength[planted]
    np.testing.assert_allclose(found, asked, atol=0.055)  # 4 standard errors of one gene
    for strength in np.unique(asked):
        assert found[asked == strength].mean() == pytest.approx(strength, abs=0.015)
    np.testing.assert_array_less(asked - 1e-3, genes.ceiling[planted])


def test_controls_follow_their_shadows_and_no_morphology(drawn):
    genes, cells, y, groups = drawn
    control = np.array(genes.role) == CONTROL
    seen = within(linked(genes, cells.factors), y, groups)[control]
    assert np.abs(seen).max() < 0.06 and seen.mean() == pytest.approx(0, abs=0.01)
    hidden = within(linked(genes, cells.shadows), y, groups)[control]
    np.testing.assert_allclose(hidden, genes.strength[control], atol=0.055)


def test_twins_have_the_same_distribution_in_every_group(drawn):
    genes, _, y, groups = drawn
    place = {gene: column for column, gene in enumerate(genes.gene_id)}
    planted = [column for column, role in enumerate(genes.role) if role == PLANTED]
    twin = [place[genes.twin[column]] for column in planted]
    assert len(set(twin)) == SPEC.planted.count and {genes.role[column] for column in twin} == {CONTROL}
    assert [genes.twin[column] for column in twin] == [genes.gene_id[column] for column in planted]
    np.testing.assert_array_equal(genes.log_means[planted], genes.log_means[twin])
    np.testing.assert_array_equal(genes.slope[planted], genes.slope[twin])
    mine = groups == groups[0]
    p = [stats.ks_2samp(y[mine, a], y[mine, b]).pvalue for a, b in zip(planted, twin, strict=True)]
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3  # no more small p than chance has


def test_neither_order_nor_name_of_a_gene_tells_what_it_is(drawn):
    genes = drawn[0]
    assert genes.gene_id == sorted(genes.gene_id)
    place = np.arange(len(genes.gene_id))
    planted = np.array(genes.role) == PLANTED
    assert stats.mannwhitneyu(place[planted], place[~planted]).pvalue > 1e-3
    assert np.diff(planted.astype(int)).astype(bool).sum() > 10


def test_batch_and_donor_tell_nothing_of_type_or_factors_unless_asked():
    cells = all_cells(SPEC, 1)
    for one, other in ((cells.kind, cells.batch), (cells.kind, cells.donor), (cells.batch, cells.donor)):
        assert stats.chi2_contingency(np.histogram2d(one, other, (4, 4))[0][:, : other.max() + 1] + 1).pvalue > 1e-4
    assert np.abs(np.corrcoef(np.c_[cells.factors, cells.shadows].T) - np.eye(2 * len(FACTORS))).max() < 0.06
    tied = all_cells(validate(PairedSpec, {"cells": 500, "confounding": 1}), 1)
    np.testing.assert_array_equal(tied.batch, tied.kind % 3)


def test_depths_and_dropout_are_those_of_the_spec():
    said = {"genes": 400, "library_cv": 0.5, "counts_per_gene": 20, "donor_sd": 0, "batch_sd": 0, "type_sd": 0}
    spec = validate(
        PairedSpec, {"cells": 2000, "transcriptome": {**said, "dropout": 0}, "planted": {"strengths": [0.1]}}
    )
    genes = draw_genes(spec, 0)
    counts = draw_counts(spec, 0, genes).toarray()
    totals = counts.sum(axis=1)
    assert np.median(totals) == pytest.approx(np.exp(genes.log_means[:, 0, 0, 0]).sum(), rel=0.05)
    assert np.std(np.log(totals)) == pytest.approx(np.sqrt(np.log1p(0.25)), rel=0.06)
    lossy = spec.model_copy(update={"transcriptome": spec.transcriptome.model_copy(update={"dropout": 5.0})})
    kept = draw_counts(lossy, 0, genes).toarray().sum(axis=0) / counts.sum(axis=0)
    mean = np.exp(genes.log_means[:, 0, 0, 0])
    few, many = mean < 4, mean > 60
    assert kept[few].mean() < 0.65 and kept[many].mean() > 0.88


def test_crops_are_masked_centred_and_whole():
    crops = draw_images(SPEC, 0, 3)
    assert crops.shape == (CHUNK, 64, 64) and crops.dtype == np.uint8
    for crop in crops:
        assert ndimage.label(crop, np.ones((3, 3)))[1] == 1
        assert not crop[[0, -1]].any() and not crop[:, [0, -1]].any()
        assert ndimage.center_of_mass(crop > 0) == pytest.approx((32, 32), abs=0.6)


def test_a_nucleus_has_the_area_of_its_factor():
    cells, crops = draw_cells(SPEC, 0, 3), draw_images(SPEC, 0, 3)
    asked = area_um2(cells.levels[:, FACTORS.index("size")]) / SPEC.image.pixel_size_um**2
    np.testing.assert_allclose((crops > 0).sum(axis=(1, 2)), asked, rtol=0.03)


def crops_at(factor: str, level: float) -> np.ndarray:
    """The same 64 cells with every factor at 0 but this one."""
    cells = draw_cells(SPEC, 5, 0)
    levels = np.zeros_like(cells.levels)
    levels[:, FACTORS.index(factor)] = level
    nuclei = draw_morphology(dataclasses.replace(cells, levels=levels), 5)
    from cosmic_ray.simulation.chromatin import chromatin_tile

    tile = chromatin_tile(keyed(5, "tile"))
    return np.stack([draw_crop(nuclei, i, SPEC.image, 1.0, tile, keyed(5, i)) for i in range(len(cells.number))])


def variation(crops: np.ndarray) -> np.ndarray:
    return np.array([crop[crop > 0].std() / crop[crop > 0].mean() for crop in crops])


def fineness(crops: np.ndarray) -> np.ndarray:
    """Share of the variation that neighbouring pixels do not share, in the middle of the nucleus."""
    middle = crops[:, 24:40, 24:40].astype(float)
    steps = np.diff(middle, axis=1).var(axis=(1, 2))
    return steps / middle.var(axis=(1, 2))


def brightest(crops: np.ndarray) -> np.ndarray:
    return np.array([np.quantile(crop[crop > 0], 0.98) / np.median(crop[crop > 0]) for crop in crops])


@pytest.mark.parametrize(
    ("factor", "shown", "rises"),
    [("contrast", variation, True), ("grain", fineness, False), ("foci", brightest, True)],
)
def test_texture_factors_show_in_texture_and_not_in_shape(factor, shown, rises):
    low, high = crops_at(factor, -1.5), crops_at(factor, 1.5)
    np.testing.assert_array_equal(low > 0, high > 0)
    difference = np.median(shown(high) - shown(low)) * (1 if rises else -1)
    assert difference > 0.25 * shown(low).std()
    assert ((shown(high) > shown(low)) == rises).mean() > 0.75


def test_shape_factors_show_in_shape():
    def ratio(crops: np.ndarray) -> np.ndarray:
        spread = [np.linalg.eigvalsh(np.cov(np.argwhere(crop).T)) for crop in crops]
        return np.array([np.sqrt(large / small) for small, large in spread])

    for level in (-2, 2):
        measured = np.median(ratio(crops_at("elongation", level)))
        assert measured == pytest.approx(1.05 + 0.3 * np.exp(0.35 * level), rel=0.06)
    area = [(crops_at("size", level) > 0).sum(axis=(1, 2)).mean() for level in (-2, 2)]
    assert area[1] / area[0] == pytest.approx(np.exp(4 * 0.17), rel=0.03)
    light = [crops_at("light", level).sum(axis=(1, 2), dtype=float).mean() for level in (-2, 2)]
    assert light[1] / light[0] == pytest.approx(np.exp(4 * 0.12), rel=0.05)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"image": {"crop_px": 48}}, "image.crop_px"),
        ({"image": {"pixel_size_um": 0.2}}, "image.crop_px"),
    ],
)
def test_crops_that_would_cut_nuclei_are_refused(keys, named):
    with pytest.raises(JobError) as error:
        require_room(validate(PairedSpec, keys))
    assert error.value.key == named


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"transcriptome": {"genes": 60}}, "transcriptome.genes"),
        ({"planted": {"replicates": 3}}, "planted.replicates"),
        ({"planted": {"effects": {"a": {"factor": "sise"}}}}, "planted.effects.a.factor"),
        ({"planted": {"strengths": [1.2]}}, "planted.strengths.0"),
        ({"cell_types": {"a": {"means": {"size": 9}}}}, "cell_types.a.means.size"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_its_key(keys, named):
    with pytest.raises(JobError) as error:
        validate(PairedSpec, keys)
    assert named in str(error.value)


def test_a_strength_beyond_reach_is_refused():
    spec = validate(PairedSpec, {"planted": {"strengths": [0.9]}})
    with pytest.raises(JobError, match="cannot reach") as error:
        draw_genes(spec, 0)
    assert error.value.key == "planted.strengths"
