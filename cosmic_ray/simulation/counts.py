"""Counts of simulated cells: Poisson-gamma around each cell's rates, then dropout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cosmic_ray.simulation.genes import Genes
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.paired_spec import PairedSpec
from cosmic_ray.simulation.population import chunks, draw_cells

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def draw_counts(spec: PairedSpec, seed: int, genes: Genes) -> csr_matrix:
    """Raw counts of all cells: CSR int32 (cells, genes), rows in order of the cells' numbers."""
    from scipy.sparse import csr_matrix, vstack

    parts = [csr_matrix(_chunk(spec, seed, genes, chunk)) for chunk in range(chunks(spec))]
    return vstack(parts, format="csr", dtype=np.int32)


def _chunk(spec: PairedSpec, seed: int, genes: Genes, chunk: int) -> np.ndarray:
    cells, rng, said = draw_cells(spec, seed, chunk), keyed(seed, "counts", chunk), spec.transcriptome
    rates = genes.log_rates(cells.group, cells.factors, cells.shadows)
    log_depth = math.sqrt(math.log1p(said.library_cv**2)) * rng.standard_normal((len(rates), 1))
    expected = np.exp(rates + log_depth)
    shape = 1 / genes.dispersion
    counts = rng.poisson(expected * rng.gamma(shape, genes.dispersion, rates.shape))
    kept = rng.uniform(0, 1, rates.shape) * (expected + said.dropout) < expected
    return np.where(kept, counts, 0).astype(np.int32)
