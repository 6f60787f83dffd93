"""One simulated field of view: nuclei drawn, placed, rendered, photographed, with everything about them known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmic_ray.simulation.cells import Nuclei, draw_nuclei
from cosmic_ray.simulation.chromatin import chromatin_tile, nucleus_density
from cosmic_ray.simulation.debris import draw_debris
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.optics import background, blur_um, blurred, expose, illumination, plate_brightness
from cosmic_ray.simulation.placing import Placed, place, window
from cosmic_ray.simulation.spec import Fault, FieldSpec, Treatment
from cosmic_ray.simulation.truth import truth_columns

MARGIN_UM = 12.0
"""Width of the unseen frame around a field: nuclei there reach into it, and the periodic blur wraps within it."""

_BLURRED_UM, _SATURATED = 9.0, 60.0


@dataclass(frozen=True)
class FieldKey:
    """The name of a field; with the seed it decides everything that is drawn for it."""

    seed: int
    plate: str = "simulated-1"
    well: str = "A01"
    site: int = 1


@dataclass(frozen=True)
class SimulatedField:
    """A field and its truth. Simulated: no microscope has seen it."""

    image: np.ndarray
    """(H, W) uint16 grey values."""
    labels: np.ndarray
    """(H, W) uint16: 0 background, else the nucleus' `label` in the truth. Debris has none."""
    nuclei: dict[str, np.ndarray]
    """Truth columns of equal length, one row a nucleus that shows in the field; see `truth.COLUMNS`."""
    about: dict[str, Any]
    """Truth of the field as a whole: fault, focus, counts."""
    signal: np.ndarray
    """(H, W) float32: expected photoelectrons from nuclei alone, blurred, before illumination, background and noise."""
    electrons: np.ndarray
    """(H, W) float32: expected photoelectrons that reach the camera, all told."""


def simulate_field(
    spec: FieldSpec,
    key: FieldKey,
    mix: Mapping[str, float] | None = None,
    treatment: Treatment | None = None,
    fault: Fault | None = None,
    nuclei: Nuclei | None = None,
) -> SimulatedField:
    """Simulate one field. A pure function: equal arguments give equal bytes, in any process and order.

    Args:
        spec: what to simulate, in physical units.
        key: names the field and the seed; illumination and staining depend on seed and plate alone.
        mix: weight of each cell type by name; all of `spec.cell_types` equally without it.
        treatment: known effects on the cells.
        fault: make it a bad field: `empty` (no nuclei), `blurred` (9 um out of focus), `saturated` (60 x the light).
            `truncated` concerns the file, not the pixels, and changes nothing here.
        nuclei: cells drawn elsewhere (a planted truth); `mix` and `treatment` are not used then.
    """
    treatment = treatment or Treatment()
    rng = keyed(key.seed, key.plate, key.well, key.site, "cells")
    margin = round(MARGIN_UM / spec.pixel_size_um)
    canvas = _fast(spec.height + 2 * margin), _fast(spec.width + 2 * margin)
    if nuclei is None:
        mm2 = canvas[0] * canvas[1] * spec.pixel_size_um**2 / 1e6
        count = 0 if fault == "empty" else int(rng.poisson(spec.density_per_mm2 * treatment.density * mm2))
        mix = mix or dict.fromkeys(spec.cell_types, 1.0)
        cv = spec.camera.stain_cv
        nuclei = draw_nuclei(rng, spec.cell_types, mix, count, treatment, spec.optics, cv)
    placed = place(nuclei, spec, canvas, keyed(key.seed, key.plate, key.well, key.site, "places"))
    return _photographed(placed, spec, key, margin, fault)


def _photographed(placed: Placed, spec: FieldSpec, key: FieldKey, margin: int, fault: Fault | None) -> SimulatedField:
    name = (key.seed, key.plate, key.well, key.site)
    focus = keyed(*name, "focus").normal() * spec.optics.focus_sd_um + (_BLURRED_UM if fault == "blurred" else 0)
    exposure = plate_brightness(spec.camera, key.seed, key.plate) * (_SATURATED if fault == "saturated" else 1)
    seen = slice(margin, margin + spec.height), slice(margin, margin + spec.width)
    defocus = np.abs(placed.nuclei.depth_um - focus)
    photons = 1.0 * placed.nuclei.dna * placed.nuclei.stain * spec.camera.photons_per_n * exposure
    layers = _layers(placed, photons, defocus, spec, keyed(*name, "chromatin"))
    signal = blurred(layers, spec.optics, spec.pixel_size_um)[seen]
    dirt, things = draw_debris(spec, placed.owner.shape, keyed(*name, "debris"))
    debris = blurred({abs(focus): dirt * np.float32(exposure)}, spec.optics, spec.pixel_size_um)[seen]
    light = illumination(spec, key.seed, key.plate)
    dark = background(spec, keyed(*name, "background")) * (exposure if fault == "saturated" else 1)
    electrons = ((signal + debris + dark) * light).astype(np.float32)
    labels, columns = truth_columns(placed, spec, seen, debris > 0.2 * np.maximum(signal, 1))
    rows = columns.pop("row")
    columns["photons"] = photons[rows]
    columns["blur_um"] = np.array([blur_um(spec.optics, z) for z in defocus[rows]], float)
    about = {"fault": fault or "", "n_nuclei": len(rows), "n_debris": things, "focus_um": float(focus),
             "brightness": float(exposure), "background": float(dark.mean())}  # fmt: skip
    image = expose(electrons, spec.camera, keyed(*name, "camera"))
    return SimulatedField(image, labels, columns, about, signal, electrons)


def _layers(
    placed: Placed, photons: np.ndarray, defocus: np.ndarray, spec: FieldSpec, rng: np.random.Generator
) -> dict[float, np.ndarray]:
    """Nuclei before optics, one canvas for each defocus."""
    tile = chromatin_tile(rng)
    layers = {float(z): np.zeros(placed.owner.shape, np.float32) for z in np.unique(defocus)}
    layers = layers or {0.0: np.zeros(placed.owner.shape, np.float32)}
    for i, (shape, patch) in enumerate(zip(placed.outlines, placed.patches, strict=True)):
        density = nucleus_density(placed.nuclei, i, shape, patch, spec.pixel_size_um, tile, rng)
        on, of = window(placed.owner.shape, placed.rows[i], placed.columns[i], patch.half)
        layers[float(defocus[i])][on] += density[of] * np.float32(photons[i])
    return layers


def _fast(length: int) -> int:
    """The next length that the Fourier transform likes."""
    from scipy import fft

    return fft.next_fast_len(length, real=True)
