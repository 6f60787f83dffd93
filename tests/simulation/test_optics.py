"""Optics and camera, measured back from what they make."""

from __future__ import annotations

import numpy as np
import pytest

from cosmic_ray.simulation.field import FieldKey, simulate_field
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.optics import blur_um, blurred, expose, illumination, plate_brightness
from cosmic_ray.simulation.spec import Camera, Debris, FieldSpec, Optics

CLEAN = Debris(specks_per_mm2=0, clouds_per_mm2=0, corpses_per_mm2=0)


def test_noise_variance_rises_with_the_mean_by_the_gain():
    """The photon transfer curve: variance = gain x (mean - offset) + (gain x read noise)^2 + 1/12 of rounding."""
    camera = Camera(gain=2.5, read_noise=3.0, offset=100)
    levels = np.geomspace(5, 8000, 9)
    flats = [expose(np.full((400, 400), level), camera, keyed(0, i)) for i, level in enumerate(levels)]
    mean, variance = np.array([f.mean() for f in flats]), np.array([f.var() for f in flats])
    slope, intercept = np.polyfit(mean - camera.offset, variance, 1, w=1 / variance)
    assert slope == pytest.approx(camera.gain, rel=0.01)
    assert intercept == pytest.approx((camera.gain * camera.read_noise) ** 2 + 1 / 12, rel=0.15)
    np.testing.assert_allclose(mean, camera.offset + camera.gain * levels, rtol=2e-3)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_converter_saturates_at_its_bit_depth(bits):
    image = expose(np.full((50, 50), 1e6), Camera(bit_depth=bits), keyed(0))
    assert image.dtype == np.uint16 and (image == 2**bits - 1).all()


def test_blur_keeps_the_light_and_has_the_stated_width():
    optics, pixel = Optics(halo=0.0), 0.1
    point = np.zeros((256, 256), np.float32)
    point[128, 128] = 1000
    image = blurred({1.5: point}, optics, pixel)
    assert image.sum() == pytest.approx(1000, rel=1e-4)
    axis = (np.arange(256) - 128) * pixel
    sigma = np.sqrt((image.sum(axis=0) * axis**2).sum() / image.sum())
    assert sigma == pytest.approx(blur_um(optics, 1.5), rel=0.02)
    assert blur_um(optics, 3.0) > blur_um(optics, 0.0) > 0.21 * 0.461 / 0.75


def test_the_halo_takes_its_share():
    optics, pixel = Optics(halo=0.2, halo_um=5.0), 0.25
    point = np.zeros((512, 512), np.float32)
    point[256, 256] = 1
    image = blurred({0.0: point}, optics, pixel)
    far = np.hypot(*np.ogrid[-256:256, -256:256]) * pixel > 2.5
    assert image[far].sum() == pytest.approx(0.2 * np.exp(-0.5 * (2.5 / 5) ** 2), rel=0.02)


def test_illumination_is_the_plates_own_and_can_be_recovered_from_its_fields():
    spec = FieldSpec(height=128, width=160, density_per_mm2=500, debris=CLEAN, optics=Optics(vignetting=0.4, tilt=0.3))
    truth = illumination(spec, 3, "p")
    assert truth.mean() == pytest.approx(1, abs=1e-5) and truth.max() / truth.min() > 1.2
    assert np.abs(truth - illumination(spec, 3, "q")).max() > 0.02
    fields = [simulate_field(spec, FieldKey(3, "p", "A01", site)).image for site in range(80)]
    floor = np.median(fields, axis=0) - spec.camera.offset  # where most fields show background
    y, x = np.mgrid[-1:1:128j, -1:1:160j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    fit = (terms @ np.linalg.lstsq(terms, floor.ravel(), rcond=None)[0]).reshape(truth.shape)
    error = fit / fit.mean() - truth
    assert np.sqrt(np.mean(error**2)) < 0.25 * truth.std()


def test_plates_differ_in_brightness_as_stated():
    camera = Camera(stain_cv=0.1)
    values = [plate_brightness(camera, 0, f"p{i}") for i in range(400)]
    assert np.std(values) / np.mean(values) == pytest.approx(0.1, rel=0.12)
