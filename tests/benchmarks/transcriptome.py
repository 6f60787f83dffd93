"""What fitting a transcriptome encoder costs, on simulated counts.

python tests/benchmarks/transcriptome.py epoch [cells]            CPU-s of an scVI epoch at the paper's settings
python tests/benchmarks/transcriptome.py make STORE [cells genes] a cell store of 3,000 genes found a cell
python tests/benchmarks/transcriptome.py memory STORE             what choosing, reading, embedding add to the peak
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix

from cosmic_ray.models.transcriptome import TranscriptomeSpec, build_transcriptome
from cosmic_ray.output import claim
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.cells_writer import publish_cells, write_part
from cosmic_ray.transcriptome.fit_scvi import fit_scvi
from cosmic_ray.transcriptome.fitted import Cells, _embedded
from cosmic_ray.transcriptome.genes import highly_variable, of_columns
from cosmic_ray.transcriptome.job import FitTranscriptome

sys.path.insert(0, str(Path(__file__).parents[1]))
FOUND, GROUP, DISTINCT = 3000, 1024, 4


def make(uri: str, cells: int = 100_000, genes: int = 18_000) -> None:
    """Poisson counts of gamma rates; the counts of four row groups come again and again."""
    from making import MakeTestStore
    from making_cell_stores import table_of

    rng, ids = np.random.default_rng(0), [f"cell-{cell}" for cell in range(cells)]
    rates = rng.gamma(0.3, 1, genes)
    while (1 - np.exp(-rates)).sum() < FOUND:
        rates *= 1.05
    drawn = [csr_matrix(rng.poisson(rates, (min(GROUP, cells), genes)).astype(np.int32)) for _ in range(DISTINCT)]
    parts = []
    for index, first in enumerate(range(0, cells, GROUP)):
        some = ids[first : first + GROUP]
        parts.append(write_part(uri, index, some, drawn[index % DISTINCT][: len(some)], "raw"))
    table = pa.table({"gene_id": [f"g{gene}" for gene in range(genes)], "symbol": [""] * genes})
    about = {"values": "raw", "crops": None, "statistics": {}, "lineage": {}, "job": {}, "simulated": True}
    with claim(MakeTestStore(out=uri)) as target:
        publish_cells(target, table_of(ids), table, parts, **about)
    print(f"{cells:,} cells x {genes:,} genes, {sum(part.nonzeros for part in parts) / cells:,.0f} found a cell")


def memory(uri: str) -> None:
    """Peak memory and CPU-seconds of each step of a fit but the training."""
    store = CellStore.open(uri)
    rows, codes = np.arange(len(store)), np.arange(len(store)) % 3
    columns = np.sort(np.random.default_rng(0).choice(store.manifest.genes, 1024, replace=False))
    network = build_transcriptome(spec := TranscriptomeSpec("scvi", 1024, 64)).eval()
    held = []
    for name, step in {
        "begun": lambda: None,
        "genes chosen": lambda: highly_variable(store, rows, codes, ["a", "b", "c"], 1024),
        "their counts read": lambda: of_columns(store, rows, columns),
        "all cells embedded": lambda: _embedded(network, spec, store, columns),
    }.items():
        began = time.process_time()
        held.append(step())
        print(f"{name}: peak {peak_mib():,.0f} MiB, {time.process_time() - began:,.1f} CPU-s", flush=True)


def epoch(cells: int = 10_000) -> None:
    """scVI at the paper's settings: CPU-seconds of an epoch, the first left out."""
    rng = np.random.default_rng(0)
    counts = csr_matrix(rng.poisson(rng.gamma(0.5, 1.0, 1024), (cells, 1024)).astype(np.int32))
    made = Cells(counts, np.asarray(counts.sum(1)).ravel().astype(float), rng.integers(0, 3, cells))
    none = Cells(counts[:0], made.totals[:0], made.codes[:0])
    ends: list[float] = []
    job = FitTranscriptome(out="-", cells="-", split="-", scvi={"epochs": 4})
    fit_scvi(job, made, none, lambda said: ends.append(time.process_time()))
    seconds = np.diff(ends).round(2).tolist()
    print(f"{cells:,} cells x 1,024 genes: {seconds} CPU-s an epoch, peak {peak_mib():,.0f} MiB")


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {"epoch": epoch, "make": make, "memory": memory}[what](*[int(one) if one.isdecimal() else one for one in rest])
