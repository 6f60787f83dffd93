"""How wide a trained img2seq's intervals have to be, by cells held out of its training; how well they then cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.cell_draws import CellDraws
from cosmic_ray.models.img2seq import Img2SeqNetwork, coverage
from cosmic_ray.training.objective import Share

STATED = (0.5, 0.8, 0.9, 0.95)
LEAST = 20
"""The fewest held-out cells."""


class Calibrated(NamedTuple):
    """How a network does on cells that it was not trained on."""

    cells: int
    coverage: dict[str, float]
    """By level of STATED, as text: the share of values inside their interval, over cells and genes."""
    correlation: float
    """The median over genes of Pearson's r of means with values, over cells; genes without variance left out."""


@torch.no_grad()
def calibrate(network: Img2SeqNetwork, shares: Iterable[Share], seed: int) -> Calibrated:
    """Calibrate `network` on the cells of `shares`, and say how it does on cells that it was not calibrated on.

    For its coverage it is calibrated on every other cell and looked at on the rest, and the other way round; what stays
    is by all of them. Memory: about six float32 (cells, genes).

    Args:
        shares: held-out cells, `features` and `counts` each; their positions key what is drawn.

    Raises:
        JobError: for fewer than LEAST cells.
    """
    dtype = network.calibration.quantiles.dtype
    seen = [
        network.observe(
            share.tensors["features"].to(dtype), share.tensors["counts"].to(dtype), CellDraws(seed, share.positions)
        )
        for share in shares
    ]
    observed = {name: torch.cat([part[name] for part in seen]) for name in seen[0]} if seen else {"mean": []}
    cells = len(observed["mean"])
    if cells < LEAST:
        raise JobError("split", f"{cells} cells in val", f"intervals need {LEAST}", "hold more cells out")
    halves = [{name: values[start::2] for name, values in observed.items()} for start in (0, 1)]
    found: dict[str, list[float]] = {str(level): [] for level in STATED}
    for ours, theirs in (halves, halves[::-1]):
        network.calibrate(ours)
        for level in STATED:
            found[str(level)].append(coverage(network, theirs, level))
    network.calibrate(observed)
    r = correlations(observed["mean"], observed["truth"])
    return Calibrated(cells, {level: sum(both) / 2 for level, both in found.items()}, r.nanmedian().item())


def correlations(means: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """Pearson's r of each gene over cells, of (N, G) each: (G,), NaN where one does not vary."""
    first, second = (values.double() - values.double().mean(0) for values in (means, truths))
    spreads = first.square().sum(0).sqrt() * second.square().sum(0).sqrt()
    return torch.where(spreads > 0, (first * second).sum(0) / spreads, torch.nan)
