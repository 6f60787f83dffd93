"""The genes of simulated cells: which are planted, which are their controls, and everything that decides their counts.

A control is its planted gene's twin: the same means, dispersion, dropout, function and slope, but it follows a *shadow*
factor, drawn like the real one, shared by all controls of that factor, and shown by no image. So twins agree in their
whole distribution within type, batch and donor, and planted genes among each other correlate as controls do; morphology
alone tells them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cosmic_ray.errors import JobError
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.moments import CountLaw, centred, correlation, slope_for
from cosmic_ray.simulation.paired_spec import FACTORS, Effect, PairedSpec

PLANTED, CONTROL, BACKGROUND = "planted", "control", "background"


@dataclass(frozen=True)
class Genes:
    """One entry a gene, in the order of the columns of the counts. Their order and names tell nothing."""

    gene_id: list[str]
    role: list[str]
    """planted, control or background."""
    twin: list[str]
    """Of a planted gene its control and the reverse; else ""."""
    effect: list[str]
    """Name of the effect; of a control that of its twin; else ""."""
    factor: np.ndarray
    """int64: column of FACTORS; -1 for background genes."""
    function: list[str]
    slope: np.ndarray
    """float64: of the log rate over the function; negative where the gene falls with it; 0 for background genes."""
    strength: np.ndarray
    """float64: the correlation asked for, positive; 0 for background genes."""
    ceiling: np.ndarray
    """float64: correlation of E[y | factor, type, batch] with y, y being log1p of the normalised count: of a control
    with its shadow known; 0 for background genes."""
    log_means: np.ndarray
    """float64 (genes, types, batches, donors): log mean count at median depth, before dropout."""
    dispersion: np.ndarray
    """float64."""

    def log_rates(self, group: tuple[np.ndarray, ...], factors: np.ndarray, shadows: np.ndarray) -> np.ndarray:
        """Log mean count at median depth of each cell: float64 (N, genes).

        Args:
            group: indices of type, batch and donor, (N,) each.
            factors: z, (N, FACTORS).
            shadows: their shadows, (N, FACTORS).
        """
        rates = self.log_means[:, *group].T.copy()
        for gene in np.flatnonzero(self.factor >= 0):
            source = factors if self.role[gene] == PLANTED else shadows
            rates[:, gene] += centred(self.slope[gene], self.function[gene], source[:, self.factor[gene]])
        return rates


@dataclass(frozen=True)
class _Wanted:
    """A planted gene before it has counts."""

    name: str
    effect: Effect
    strength: float
    sign: int


def draw_genes(spec: PairedSpec, seed: int) -> Genes:
    """The genes of a simulation; a pure function of spec and seed.

    Raises:
        JobError: where a planted gene cannot reach its strength.
    """
    rng = keyed(seed, "genes")
    wanted = _wanted(spec)
    planted, count = len(wanted), spec.transcriptome.genes
    log_means, dispersion = _expression(spec, rng, planted)
    for block in (log_means, dispersion):
        block[planted : 2 * planted] = block[:planted]
    slope, ceiling = np.zeros(count), np.zeros(count)
    for i, one in enumerate(wanted):
        slope[[i, planted + i]], ceiling[[i, planted + i]] = _slope(spec, one, log_means[i], dispersion[i])
    order = rng.permutation(count)
    names = np.array([f"SIM{number + 1:05}" for number in range(count)])
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)

    def each(of_planted: list[str], rest: str = "") -> list[str]:
        return [[*of_planted, *of_planted, *[rest] * (count - 2 * planted)][row] for row in order]

    first = names[place[:planted]].tolist()
    second = names[place[planted : 2 * planted]].tolist()
    roles = [PLANTED] * planted + [CONTROL] * planted + [BACKGROUND] * (count - 2 * planted)
    twins = second + first + [""] * (count - 2 * planted)
    factor = [FACTORS.index(one.effect.factor) for one in wanted]
    return Genes(
        gene_id=names.tolist(),
        role=[roles[row] for row in order],
        twin=[twins[row] for row in order],
        effect=each([one.name for one in wanted]),
        factor=np.array([*factor, *factor, *[-1] * (count - 2 * planted)], np.int64)[order],
        function=each([one.effect.function for one in wanted]),
        slope=slope[order],
        strength=np.array([one.strength for one in wanted] * 2 + [0.0] * (count - 2 * planted))[order],
        ceiling=ceiling[order],
        log_means=log_means[order],
        dispersion=dispersion[order],
    )


def _wanted(spec: PairedSpec) -> list[_Wanted]:
    planted = spec.planted
    return [
        _Wanted(name, effect, strength, 1 if replicate % 2 == 0 else -1)
        for name, effect in planted.effects.items()
        for strength in planted.strengths
        for replicate in range(planted.replicates)
    ]


def _expression(spec: PairedSpec, rng: np.random.Generator, planted: int) -> tuple[np.ndarray, np.ndarray]:
    """Log means (genes, types, batches, donors) and dispersions (genes,); the first `planted` genes have `min_mean`."""
    said = spec.transcriptome
    floor = math.log(spec.planted.min_mean)
    base = math.log(said.counts_per_gene) - said.gene_sd**2 / 2 + said.gene_sd * rng.standard_normal(said.genes)
    base[:planted] = np.where(base[:planted] < floor, floor + np.abs(base[:planted] - floor) / 2, base[:planted])
    by = [
        sd * rng.standard_normal((said.genes, count))
        for sd, count in (
            (said.type_sd, len(spec.cell_types)),
            (said.batch_sd, spec.batches),
            (said.donor_sd, spec.donors),
        )
    ]
    means = base[:, None, None, None] + by[0][:, :, None, None] + by[1][:, None, :, None] + by[2][:, None, None, :]
    dispersion = said.dispersion * np.exp(0.3 * rng.standard_normal(said.genes))
    return means, np.clip(dispersion, 0.02, None)


def _slope(spec: PairedSpec, one: _Wanted, log_means: np.ndarray, dispersion: float) -> tuple[float, float]:
    said = spec.transcriptome
    law = CountLaw(float(dispersion), said.dropout, said.library_cv)
    slope = slope_for(law, log_means, one.effect.function, one.sign, one.strength)
    if slope is None:
        mean = math.exp(float(log_means.mean()))
        raise JobError(
            "planted.strengths",
            one.strength,
            f"effect {one.name!r} cannot reach it with {mean:.2g} counts a cell",
            "raise planted.min_mean or transcriptome.counts_per_gene, or lower the strength",
        )
    return slope, correlation(law, log_means, slope, one.effect.function)[1]
