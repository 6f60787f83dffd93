"""The nuclei of a field before they have a place: type, cell-cycle age, DNA content, size, shape and chromatin.

What the cell cycle does (the model, not a fit):

- Age a in [0, 1) has the density 2 ln 2 * 2^-a of an exponentially growing culture; G1, S, G2, M follow each other with
  the type's durations. DNA content is 2 N in G1, 2 N to 4 N linearly through S, 4 N until anaphase splits it.
- Projected area grows as DNA content^(2/3): at equal shape, volume follows DNA content.
- S is finer and more even (grain x 0.85, contrast x 0.85), G2 a little coarser (x 1.1, x 1.1).
- Prophase: threads (grain x 0.9, contrast x 1.4), no nucleoli. Metaphase: a bar of 25 % of the G1 area, axes 2.6:1.
  Anaphase: two such bars of 2 N and 16 % each, 45 % of a G1 diameter apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from cosmic_ray.simulation.spec import CellType, Optics, Treatment

HARMONICS = np.arange(3, 8)
"""Fourier orders of the outline: 3 makes eggs and beans, the higher ones lobes and dents (2 would be the aspect)."""

_MITOSIS = np.array(["prophase", "metaphase", "anaphase"])
_MITOSIS_ENDS = np.array([0.35, 0.75, 1.0])
_FACTORS = {  # stage: (area, grain, contrast) relative to the type in G1
    "G1": (1.0, 1.0, 1.0),
    "S": (1.0, 0.85, 0.85),
    "G2": (1.0, 1.1, 1.1),
    "prophase": (1.0, 0.9, 1.4),
    "metaphase": (0.25 / 2 ** (2 / 3), 0.9, 1.0),
    "anaphase": (0.16, 0.9, 1.0),
}


@dataclass(frozen=True)
class Nuclei:
    """One row a nucleus, in arrays of length n; two nuclei of one anaphase share `cell`.

    Another source of nuclei (a planted truth, say) fills these columns itself and hands them to `simulate_field`.
    """

    cell: np.ndarray
    """int32: the cell's number in its field."""
    cell_type: np.ndarray
    """str."""
    state: np.ndarray
    """str: G1, S, G2 or M."""
    mitosis: np.ndarray
    """str: prophase, metaphase, anaphase, or empty."""
    phase: np.ndarray
    """float64 in [0, 1): age as a share of the cycle."""
    dna: np.ndarray
    """float64: DNA content in N."""
    stain: np.ndarray
    """float64: brightness of the nucleus relative to its DNA content, around 1."""
    area_um2: np.ndarray
    """float64: area of the outline."""
    aspect: np.ndarray
    """float64, at least 1: ratio of the axes before outline harmonics and bending."""
    angle: np.ndarray
    """float64: direction of the long axis, radians from x towards y."""
    bend: np.ndarray
    """float64: bending as a share of the radius."""
    harmonics: np.ndarray
    """complex128 (n, 5): relative radius = 1 + sum Re(h_k exp(i k theta)), k = 3..7."""
    flatness: np.ndarray
    """float64: exponent of the thickness profile."""
    grain_um: np.ndarray
    """float64: half-autocorrelation distance of the chromatin."""
    contrast: np.ndarray
    """float64: coefficient of variation of the chromatin density."""
    threads: np.ndarray
    """bool: chromatin as threads (prophase)."""
    nucleoli: np.ndarray
    """int32: number of dark nucleoli."""
    nucleolus_um: np.ndarray
    """float64: their median radius."""
    nucleolus_depth: np.ndarray
    """float64 in [0, 1]."""
    foci: np.ndarray
    """int32: number of bright foci."""
    focus_um: np.ndarray
    """float64: their median sigma."""
    focus_gain: np.ndarray
    """float64."""
    rim: np.ndarray
    """float64: relative density change at the edge."""
    depth_um: np.ndarray
    """float64: height above the mean focal plane."""

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, rows: np.ndarray) -> Nuclei:
        """The nuclei at these rows, in this order."""
        return Nuclei(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw_nuclei(
    rng: np.random.Generator,
    cell_types: Mapping[str, CellType],
    mix: Mapping[str, float],
    count: int,
    treatment: Treatment,
    optics: Optics,
    stain_cv: float,
) -> Nuclei:
    """Draw `count` cells of a mixture of types; anaphases have two rows.

    Args:
        mix: weight of each cell type, by name.
    """
    names = sorted(mix)
    weights = np.array([mix[name] for name in names], float)
    kind = rng.choice(len(names), size=count, p=weights / weights.sum())
    types = [cell_types[name] for name in names]

    def trait(name: str) -> np.ndarray:
        return np.array([getattr(one, name) for one in types], float)[kind]

    phase, state, mitosis, dna = _cycle(rng, types, kind, treatment.g2_arrest)
    area, grain, contrast = _factors(state, mitosis, dna)
    bar, open_, vary = np.isin(mitosis, ("metaphase", "anaphase")), state != "M", trait("texture_cv")
    nuclei = Nuclei(
        cell=np.arange(count, dtype=np.int32),
        cell_type=np.array(names)[kind],
        state=state,
        mitosis=mitosis,
        phase=phase,
        dna=dna,
        stain=_lognormal(rng, np.full(count, stain_cv)),
        area_um2=trait("area_um2") * treatment.area * area * _lognormal(rng, trait("area_cv")),
        aspect=np.where(bar, 2.6, 1 + (trait("aspect") - 1) * treatment.aspect) ** _lognormal(rng, np.full(count, 0.3)),
        angle=rng.uniform(0, np.pi, count),
        bend=rng.normal(0, trait("bend")),
        harmonics=_harmonics(rng, np.where(bar, 0.06, trait("irregularity"))),
        flatness=np.where(bar, 2.0, trait("flatness")),
        grain_um=trait("grain_um") * treatment.grain * grain * _lognormal(rng, vary),
        contrast=trait("contrast") * treatment.contrast * contrast * _lognormal(rng, vary),
        threads=mitosis == "prophase",
        nucleoli=rng.poisson(trait("nucleoli") * treatment.nucleoli * open_).astype(np.int32),
        nucleolus_um=trait("nucleolus_um") * _lognormal(rng, vary),
        nucleolus_depth=trait("nucleolus_depth"),
        foci=rng.poisson(trait("foci") * treatment.foci * open_).astype(np.int32),
        focus_um=trait("focus_um") * _lognormal(rng, vary),
        focus_gain=trait("focus_gain"),
        rim=np.where(bar, 0.0, trait("rim")),
        depth_um=_levels(rng, count, optics.depth_sd_um),
    )  # fmt: skip
    return _divided(nuclei)


def _cycle(
    rng: np.random.Generator, types: list[CellType], kind: np.ndarray, g2_arrest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Age, state, mitotic stage and DNA content of each cell."""
    count = len(kind)
    shares = np.array([[t.cycle.g1, t.cycle.s, t.cycle.g2, t.cycle.m] for t in types]).reshape(-1, 4)[kind]
    ends = np.cumsum(shares, axis=1)
    phase = -np.log2(1 - rng.uniform(0, 1, count) / 2)
    held = rng.uniform(0, 1, count) < g2_arrest
    phase = np.where(held, ends[:, 1] + shares[:, 2] * rng.uniform(0, 1, count), phase)
    index = (phase[:, None] >= ends[:, :3]).sum(axis=1)
    state = np.array(["G1", "S", "G2", "M"])[index]
    starts = np.concatenate([np.zeros((count, 1)), ends[:, :3]], axis=1)
    rows = np.arange(count)
    through = (phase - starts[rows, index]) / np.maximum(shares[rows, index], 1e-12)
    stage = np.searchsorted(_MITOSIS_ENDS, np.minimum(through, 1 - 1e-9), side="right")
    mitosis = np.where(state == "M", _MITOSIS[stage], "")
    dna = np.where(state == "G1", 2.0, np.where(state == "S", 2 + 2 * through, 4.0))
    return phase, state, mitosis, np.where(mitosis == "anaphase", 2.0, dna)


def _factors(state: np.ndarray, mitosis: np.ndarray, dna: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the cycle does to area, grain and contrast, relative to the type in G1."""
    stage = np.where(state == "M", mitosis, state)
    area, grain, contrast = (np.array([_FACTORS[s][i] for s in stage], float) for i in range(3))
    return area * np.where(mitosis == "anaphase", 1.0, (dna / 2) ** (2 / 3)), grain, contrast


def _lognormal(rng: np.random.Generator, cv: np.ndarray) -> np.ndarray:
    """Factors of median 1 with the given coefficient of variation."""
    return np.exp(rng.normal(0, 1, len(cv)) * np.sqrt(np.log1p(cv**2)))


def _harmonics(rng: np.random.Generator, rms: np.ndarray) -> np.ndarray:
    """Random outline coefficients whose expected root mean square over the angle is `rms`; power falls as k^-4."""
    power = HARMONICS**-4.0
    sigma = np.sqrt(power / power.sum())
    draws = rng.normal(0, 1, (2, len(rms), len(HARMONICS)))
    return (draws[0] + 1j * draws[1]) * sigma * rms[:, None]


def _levels(rng: np.random.Generator, count: int, sd: float) -> np.ndarray:
    """Heights at four equally likely levels of unit variance times `sd`."""
    return np.array([-1.3416, -0.4472, 0.4472, 1.3416])[rng.integers(0, 4, count)] * sd


def _divided(nuclei: Nuclei) -> Nuclei:
    """Give each anaphase its second row, right after the first and like it."""
    twice = np.where(nuclei.mitosis == "anaphase", 2, 1)
    rows = np.repeat(np.arange(len(nuclei)), twice)
    return nuclei.take(rows)
