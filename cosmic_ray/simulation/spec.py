"""What is simulated, in physical units: cell types, treatments, optics, camera, debris, and the field that holds them.

Lengths are micrometres, light is photoelectrons (photons that the camera catches), DNA is in N (haploid genomes).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fault = Literal["empty", "blurred", "saturated", "truncated"]


class CellCycle(Config):
    """Shares of the cycle's duration; they add up to 1."""

    g1: Share = 0.50
    """G1, DNA content 2 N."""
    s: Share = 0.30
    """S, from 2 N to 4 N at a constant rate."""
    g2: Share = 0.15
    """G2, 4 N."""
    m: Share = 0.05
    """Mitosis: prophase, metaphase, then anaphase with two nuclei of 2 N."""

    @model_validator(mode="after")
    def _whole(self) -> CellCycle:
        total = self.g1 + self.s + self.g2 + self.m
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:.4g}, not 1")
        return self


class CellType(Config):
    """The distribution of one cell type's nuclei in G1; `cells.py` states what the cycle changes."""

    area_um2: Positive = 180.0
    """Median projected area in G1, um^2."""
    area_cv: NonNegative = 0.12
    """Coefficient of variation of the area between nuclei of the same DNA content."""
    aspect: Annotated[float, Field(ge=1)] = 1.35
    """Median ratio of the axes."""
    irregularity: NonNegative = 0.04
    """Root mean square deviation of the outline from an ellipse, as a share of the radius: lobes and dents."""
    bend: NonNegative = 0.12
    """Standard deviation of the banana-like bending of the long axis, as a share of the radius."""
    flatness: Annotated[float, Field(ge=2)] = 5.0
    """Exponent p of the thickness profile sqrt(1 - rho^p): 2 is an ellipsoid, 8 a pancake with rounded edges."""
    grain_um: Positive = 0.6
    """Distance at which the autocorrelation of the log chromatin density falls to one half, before optics, um."""
    contrast: NonNegative = 0.20
    """Coefficient of variation of the chromatin density, before optics."""
    nucleoli: NonNegative = 2.0
    """Mean number of nucleoli (dark)."""
    nucleolus_um: Positive = 1.2
    """Median radius of a nucleolus, um."""
    nucleolus_depth: Share = 0.40
    """Share of the light that is missing at a nucleolus' centre."""
    foci: NonNegative = 0.0
    """Mean number of heterochromatin foci (bright)."""
    focus_um: Positive = 0.45
    """Median standard deviation of a focus' Gaussian profile, um."""
    focus_gain: NonNegative = 0.9
    """Peak of a focus over the local density, as a multiple of it."""
    rim: Annotated[float, Field(ge=-0.9)] = 0.15
    """Relative change of the density within 0.7 um of the edge: peripheral heterochromatin."""
    texture_cv: NonNegative = 0.12
    """Coefficient of variation of grain, contrast, nucleolus and focus size between nuclei of the type."""
    cycle: CellCycle = CellCycle()
    """Durations of the phases."""


CELL_TYPES: dict[str, CellType] = {
    "smooth": CellType(grain_um=0.55, contrast=0.15, nucleoli=1.2, nucleolus_depth=0.20, rim=0.10),
    "granular": CellType(grain_um=0.95, contrast=0.30, nucleoli=2.0, nucleolus_depth=0.35, rim=0.15),
    "speckled": CellType(grain_um=0.60, contrast=0.15, nucleoli=1.0, foci=11, focus_um=0.50, focus_gain=0.9, rim=0.20),
    "lobed": CellType(
        area_um2=235, area_cv=0.18, aspect=1.30, irregularity=0.07, bend=0.24, flatness=6, grain_um=0.75, contrast=0.24,
        nucleoli=3.0, nucleolus_um=1.4,
    ),
    "spindle": CellType(
        area_um2=135, aspect=1.95, irregularity=0.03, bend=0.10, grain_um=0.70, contrast=0.20, nucleoli=1.5,
        nucleolus_um=1.0, nucleolus_depth=0.30, cycle=CellCycle(g1=0.70, s=0.17, g2=0.10, m=0.03),
    ),
    "compact": CellType(
        area_um2=85, area_cv=0.10, aspect=1.10, irregularity=0.03, bend=0.03, flatness=2.6, grain_um=1.10,
        contrast=0.30, nucleoli=0.7, nucleolus_um=0.8, rim=0.35, cycle=CellCycle(g1=0.80, s=0.11, g2=0.06, m=0.03),
    ),
}  # fmt: skip
"""Simulated cell types. `smooth`, `granular` and `speckled` share size, shape and cycle and differ in texture alone."""


class Treatment(Config):
    """Known effects of a treatment, as factors on a cell type's values; 1 is no effect."""

    area: Positive = 1.0
    """Factor on the area."""
    aspect: Positive = 1.0
    """Factor on the excess of the axes' ratio over 1."""
    grain: Positive = 1.0
    """Factor on the grain."""
    contrast: NonNegative = 1.0
    """Factor on the contrast."""
    nucleoli: NonNegative = 1.0
    """Factor on the mean number of nucleoli."""
    foci: NonNegative = 1.0
    """Factor on the mean number of foci."""
    density: NonNegative = 1.0
    """Factor on the number of cells."""
    g2_arrest: Share = 0.0
    """Share of the cells that are held in G2 whatever their age."""


class Optics(Config):
    """A widefield microscope. The PSF is a Gaussian core and a wide Gaussian halo."""

    na: Annotated[float, Field(gt=0, lt=1.3)] = 0.75
    """Numerical aperture."""
    wavelength_nm: Positive = 461.0
    """Emission wavelength; the core in focus has sigma 0.21 wavelength / NA."""
    thickness_um: NonNegative = 0.6
    """Blur of nuclei for being thick, as an equivalent defocus, um."""
    focus_sd_um: NonNegative = 0.5
    """Standard deviation of a field's focus error, um; a defocus z adds a blur of sigma z tan(asin(NA / 1.33)) / 2."""
    depth_sd_um: NonNegative = 0.8
    """Standard deviation of the nuclei's own height, um, at four levels."""
    halo: Share = 0.16
    """Share of the light that goes into the halo."""
    halo_um: Positive = 4.0
    """Sigma of the halo, um."""
    vignetting: Share = 0.25
    """Loss of light from the brightest point to the farthest corner, at most; keyed per plate."""
    tilt: Share = 0.15
    """Largest slope of the illumination over the field, as a share of its mean; keyed per plate."""
    background_per_um2: NonNegative = 500.0
    """Mean background, photoelectrons per um^2."""
    background_gradient: Share = 0.25
    """Largest change of the background across a field, as a share of its mean; its direction is the field's own."""


class Camera(Config):
    """offset + gain x (Poisson electrons + read noise), rounded, cut at 0 and at the bit depth's largest value."""

    photons_per_n: Positive = 5e5
    """Mean photoelectrons from one haploid genome (N), over the whole nucleus."""
    stain_cv: NonNegative = 0.05
    """Coefficient of variation of the staining between nuclei, and between plates."""
    gain: Positive = 2.0
    """Grey values per photoelectron."""
    offset: NonNegative = 100.0
    """Grey value of no light."""
    read_noise: NonNegative = 1.6
    """Standard deviation of the read noise, electrons."""
    bit_depth: Annotated[int, Field(ge=8, le=16)] = 16
    """Bits of the converter; values are kept in 16."""


class Debris(Config):
    """What is bright and is no nucleus; in counts per mm^2. It has no label."""

    specks_per_mm2: NonNegative = 450.0
    """Small bright specks, sigma 0.1 to 0.5 um."""
    clouds_per_mm2: NonNegative = 40.0
    """Dim blobs far out of focus, sigma 4 to 10 um."""
    corpses_per_mm2: NonNegative = 25.0
    """Dead nuclei: clusters of 1 to 5 bright, round, smooth fragments of radius 0.8 to 2.2 um."""


class FieldSpec(Config):
    """One field of view, and what may be in it."""

    height: Annotated[int, Field(ge=32, le=8192)] = 512
    """Pixels."""
    width: Annotated[int, Field(ge=32, le=8192)] = 512
    """Pixels."""
    pixel_size_um: Annotated[float, Field(gt=0.02, le=2)] = 0.325
    """Micrometres a pixel, in the specimen."""
    density_per_mm2: NonNegative = 1400.0
    """Mean number of cells per mm^2; a field draws its own from a Poisson law."""
    clustering: Share = 0.25
    """Probability that a cell is placed in contact with another one."""
    max_overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    """Largest share of the smaller nucleus that may be covered; the covered share of a contact is uniform up to it."""
    gap_um: NonNegative = 1.0
    """Least distance between nuclei that are not placed in contact."""
    cell_types: dict[str, CellType] = CELL_TYPES
    """Cell types by name."""
    optics: Optics = Optics()
    """The microscope."""
    camera: Camera = Camera()
    """The camera and the stain's brightness."""
    debris: Debris = Debris()
    """What is bright and is no nucleus."""
