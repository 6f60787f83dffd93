"""What stands in which well and site of a plate: cell line, treatment, faults. Keyed by seed and plate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.spec import Fault


@dataclass(frozen=True)
class PlannedField:
    """One field to simulate."""

    plate: str
    well: str
    site: int
    cell_line: str
    treatment: str
    fault: Fault | None

    @property
    def stem(self) -> str:
        """The file names' beginning, such as `B03_s2`."""
        return f"{self.well}_s{self.site}"


def plate_names(count: int) -> list[str]:
    """`simulated-01`, `simulated-02`, ...: the name says what it is."""
    return [f"simulated-{i + 1:02}" for i in range(count)]


def well_names(count: int) -> list[str]:
    """The first `count` wells of a 96-well plate, or of a 384-well plate where 96 are too few, row by row."""
    rows, columns = ("ABCDEFGH", 12) if count <= 96 else ("ABCDEFGHIJKLMNOP", 24)
    return [f"{row}{column + 1:02}" for row, column in product(rows, range(columns))][:count]


def plan_plate(
    seed: int, plate: str, wells: int, sites: int, lines: list[str], treatments: list[str], faults: dict[Fault, int]
) -> list[PlannedField]:
    """The fields of one plate, in order of well and site.

    Every combination of line and treatment takes as many wells as any other, give or take one, at random places, so
    that neither plate nor position tells the line. Faults hit random fields, one each at most.
    """
    rng = keyed(seed, plate, "layout")
    pairs = list(product(lines, treatments))
    order = rng.permutation(len(pairs))
    taken = [pairs[order[i % len(pairs)]] for i in rng.permutation(wells)]
    spoilt = dict(
        zip(
            rng.permutation(wells * sites).tolist(),
            [name for name, count in sorted(faults.items()) for _ in range(count)],
            strict=False,
        )
    )
    return [
        PlannedField(plate, well, site + 1, *taken[w], spoilt.get(w * sites + site))
        for w, well in enumerate(well_names(wells))
        for site in range(sites)
    ]
