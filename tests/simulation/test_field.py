"""A whole field: its truth is measured back from its pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.measure import regionprops
from skimage.segmentation import expand_labels

from cosmic_ray.simulation.cells import draw_nuclei
from cosmic_ray.simulation.field import FieldKey, simulate_field
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.spec import Camera, Debris, FieldSpec, Optics, Treatment

CLEAN = Debris(specks_per_mm2=0, clouds_per_mm2=0, corpses_per_mm2=0)
APART = FieldSpec(clustering=0, density_per_mm2=700, gap_um=5, debris=CLEAN, camera=Camera(stain_cv=0))


def whole(nuclei: dict[str, np.ndarray]) -> np.ndarray:
    return ~nuclei["touches_border"]


def test_the_same_key_gives_the_same_field_in_any_order():
    spec = FieldSpec(height=192, width=160)
    keys = [FieldKey(4, "p", well, site) for well in ("A01", "B02") for site in (1, 2)]
    forth = {key: simulate_field(spec, key) for key in keys}
    back = {key: simulate_field(spec, key) for key in reversed(keys)}
    for key in keys:
        for name in ("image", "labels", "signal", "electrons"):
            assert getattr(forth[key], name).tobytes() == getattr(back[key], name).tobytes()
        for name, values in forth[key].nuclei.items():
            np.testing.assert_array_equal(values, back[key].nuclei[name])
    images = [field.image.tobytes() for field in forth.values()]
    assert len(set(images)) == len(keys)
    assert simulate_field(spec, FieldKey(5, "p", "A01", 1)).image.tobytes() not in images


def test_the_camera_does_not_move_a_nucleus():
    """Purposes have keys of their own: what one of them draws does not shift another's numbers."""
    key = FieldKey(1)
    plain, other = (simulate_field(FieldSpec(camera=Camera(gain=gain), debris=debris), key)
                    for gain, debris in ((2.0, Debris()), (0.5, CLEAN)))  # fmt: skip
    assert (plain.labels == other.labels).all() and (plain.signal == other.signal).all()
    assert (plain.image != other.image).any()


def test_labels_are_the_truths_nuclei():
    field = simulate_field(APART, FieldKey(2))
    nuclei, inside = field.nuclei, whole(field.nuclei)
    assert field.labels.dtype == np.uint16 and field.labels.shape == field.image.shape == (512, 512)
    assert sorted(set(field.labels.ravel()) - {0}) == list(nuclei["label"])
    seen = {region.label: region for region in regionprops(field.labels)}
    for row in np.flatnonzero(inside):
        region = seen[nuclei["label"][row]]
        assert region.area == nuclei["visible_px"][row]
        perimeter = nuclei["perimeter_um"][row] / APART.pixel_size_um
        assert abs(region.area - nuclei["area_px"][row]) < 0.25 * perimeter
        y, x = region.centroid
        assert (x, y) == pytest.approx((nuclei["centroid_x"][row], nuclei["centroid_y"][row]), abs=0.3)
        assert region.eccentricity == pytest.approx(nuclei["eccentricity"][row], abs=0.05)


def test_light_follows_dna_content():
    """4 N gives twice the light of 2 N, whatever the texture; the share that leaves the outline is the optics'."""
    light, dna, photons = [], [], []
    for site in range(14):
        field = simulate_field(APART, FieldKey(3, site=site), treatment=Treatment(g2_arrest=0.4))
        nuclei = field.nuclei
        near = expand_labels(field.labels, round(2.5 / APART.pixel_size_um))
        total = np.bincount(near.ravel(), weights=field.signal.ravel(), minlength=len(nuclei["label"]) + 1)[1:]
        use = whole(nuclei) & (nuclei["state"] != "M")
        light += [*total[use]]
        dna += [*nuclei["dna"][use]]
        photons += [*nuclei["photons"][use]]
    light, dna, photons = map(np.array, (light, dna, photons))
    assert np.corrcoef(light, dna)[0, 1] > 0.995
    ratio = light[dna == 4].mean() / light[dna == 2].mean()
    assert ratio == pytest.approx(2, rel=0.02)
    assert np.std(light / photons) / np.mean(light / photons) < 0.03


def test_all_light_of_a_lone_nucleus_is_in_the_picture():
    spec = APART.model_copy(update={"optics": Optics(halo=0)})
    field = simulate_field(spec, FieldKey(8))
    nuclei = field.nuclei
    assert not nuclei["touching"].any()
    row = np.flatnonzero(whole(nuclei))[0]
    near = expand_labels(field.labels, round(2.4 / spec.pixel_size_um)) == nuclei["label"][row]
    assert field.signal[near].sum() == pytest.approx(nuclei["photons"][row], rel=2e-3)


def test_the_image_is_the_expected_light_through_the_camera():
    field = simulate_field(FieldSpec(), FieldKey(6))
    camera = Camera()
    grey = camera.offset + camera.gain * field.electrons
    noise = np.sqrt(camera.gain**2 * (field.electrons + camera.read_noise**2) + 1 / 12)
    z = (field.image - grey)[grey < 60_000] / noise[grey < 60_000]
    assert abs(z.mean()) < 0.01 and z.std() == pytest.approx(1, abs=0.01)


def touching_rate(spec: FieldSpec, seed: int) -> float:
    """Share of nuclei that touch another one, measured on the label images; checked against the truth on the way."""
    touch, count = 0, 0
    for site in range(6):
        field = simulate_field(spec, FieldKey(seed, site=site))
        padded = np.pad(field.labels, 1)
        found = {int(label) for label in field.nuclei["label"] if _neighbours(padded, label) - {0, int(label)}}
        assert found == set(field.nuclei["label"][field.nuclei["touching"]].tolist())
        touch, count = touch + len(found), count + len(field.nuclei["label"])
    return touch / count


def _neighbours(padded: np.ndarray, label: int) -> set[int]:
    y, x = np.nonzero(padded == label)
    return {int(v) for dy in (-1, 0, 1) for dx in (-1, 0, 1) for v in np.unique(padded[y + dy, x + dx])}


def test_clustering_sets_how_many_touch():
    rates = [touching_rate(FieldSpec(height=384, width=384, clustering=c, density_per_mm2=900), 1) for c in (0, 0.3, 1)]
    assert rates[0] == 0 and rates[2] > 0.8
    assert 0.2 <= rates[1] <= 0.6  # those that were pushed and those they were pushed against, some out of sight


def test_overlap_stays_below_its_limit():
    spec = FieldSpec(clustering=0.8, max_overlap=0.2)
    covered = np.concatenate([simulate_field(spec, FieldKey(7, site=s)).nuclei["covered"] for s in range(4)])
    assert covered.max() > 0.02
    lone = simulate_field(spec.model_copy(update={"max_overlap": 0.0}), FieldKey(7)).nuclei["covered"]
    assert lone.max() == 0


def test_debris_shines_has_no_label_and_is_known():
    dirty = FieldSpec(debris=Debris(corpses_per_mm2=1500))
    with_, without = (simulate_field(spec, FieldKey(9)) for spec in (dirty, FieldSpec(debris=CLEAN)))
    assert (with_.labels == without.labels).all()
    assert with_.about["n_debris"] > 20 and without.about["n_debris"] == 0
    assert with_.nuclei["in_debris"].max() > 0.5 and without.nuclei["in_debris"].max() == 0
    assert with_.electrons.sum() > 1.2 * without.electrons.sum()


def test_faults():
    key, spec = FieldKey(11), FieldSpec()
    good = simulate_field(spec, key)
    empty, blurred, saturated, truncated = (
        simulate_field(spec, key, fault=f) for f in ("empty", "blurred", "saturated", "truncated")
    )
    assert len(empty.nuclei["label"]) == 0 and not empty.labels.any() and not empty.signal.any()
    assert (blurred.labels == good.labels).all()
    sharp, soft = (ndimage.laplace(field.signal).std() for field in (good, blurred))
    assert soft < 0.2 * sharp
    assert blurred.signal.sum() == pytest.approx(good.signal.sum(), rel=0.05)
    full = 2**spec.camera.bit_depth - 1
    inside = saturated.labels > 0
    assert (saturated.image[inside] == full).mean() > 0.6 > 0.01 > (good.image == full).mean()
    assert truncated.image.tobytes() == good.image.tobytes()  # its file is what ends early


def test_texture_tells_types_that_size_and_shape_do_not():
    """The three matched types: area and shape classify at chance, the spectrum and skewness of the pixels do not."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shape, texture, kinds = [], [], []
    spec = FieldSpec(clustering=0, density_per_mm2=900)
    for site in range(12):
        field = simulate_field(spec, FieldKey(12, site=site), mix=dict.fromkeys(("smooth", "granular", "speckled"), 1))
        nuclei = field.nuclei
        for region in regionprops(field.labels, field.image - 150.0):
            row = region.label - 1
            if not nuclei["touches_border"][row] and nuclei["state"][row] != "M":
                shape.append([region.area, region.eccentricity, region.solidity])
                texture.append(_texture(region.image, region.image_intensity))
                kinds.append(nuclei["cell_type"][row])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    by_shape, by_texture = (cross_val_score(model, x, kinds, cv=5).mean() for x in (shape, texture))
    assert by_shape < 0.45
    assert by_texture > 0.75


def _texture(mask: np.ndarray, pixels: np.ndarray) -> list[float]:
    """Relative contrast and skewness in three bands of scale, inside the nucleus."""
    inner = ndimage.binary_erosion(np.pad(mask, 2), iterations=5)
    pixels = np.pad(pixels, 2)

    def smooth(sigma: float) -> np.ndarray:
        weight = ndimage.gaussian_filter(inner.astype(float), sigma)
        return ndimage.gaussian_filter(pixels * inner, sigma) / np.maximum(weight, 1e-3)

    found = []
    for sigma in (1, 2, 4):
        band = (smooth(sigma / 2) - smooth(sigma))[inner] / pixels[inner].mean()
        found += [np.log(band.std()), stats.skew(band)]
    return found


def test_cells_drawn_elsewhere_are_rendered_as_they_are():
    """A planted truth draws its own nuclei: each keeps its number, and the truth says what was asked for."""
    spec = FieldSpec(clustering=0, density_per_mm2=700)
    drawn = draw_nuclei(keyed(1), spec.cell_types, {"smooth": 1}, 30, Treatment(), spec.optics, stain_cv=0)
    planted = replace(drawn, grain_um=np.linspace(0.4, 1.6, len(drawn)))
    field = simulate_field(spec, FieldKey(1), nuclei=planted)
    nuclei, rows = field.nuclei, np.searchsorted(planted.cell, field.nuclei["cell"])
    alone = np.bincount(planted.cell)[nuclei["cell"]] == 1
    assert alone.sum() > 10
    np.testing.assert_array_equal(nuclei["grain_um"][alone], planted.grain_um[rows][alone])
    np.testing.assert_array_equal(nuclei["area_um2"][alone], planted.area_um2[rows][alone])
