"""Paired cells made to order for tests: real h5ad, JPEG and zip files of simulated cells."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_matrix

SIDE = 32


def make_adata(cells: int = 40, genes: int = 30, seed: int = 0, prefix: str = "cell") -> anndata.AnnData:
    """Simulated raw counts as CSR float32, `cell_id`, batch, type and donor in obs, symbols in var (2 mitochondrial).

    The first gene is found in every cell, the last in one cell alone; each cell has at least 3 genes.
    """
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (cells, genes)).astype(np.float32)
    counts[:, :3] += 1
    counts[:, -1] = 0
    counts[0, -1] = 2
    obs = pd.DataFrame(
        {
            "cell_id": [f"{prefix}-{seed}-{i:03}" for i in range(cells)],
            "plate": [f"P{i % 4}" for i in range(cells)],
            "kind": pd.Categorical([("alpha", "beta", "gamma")[i % 3] for i in range(cells)]),
            "who": [f"D{i % 2}" for i in range(cells)],
            "size": rng.uniform(1, 2, cells),
            "label": np.arange(1, cells + 1),
            "good": [i % 5 != 0 for i in range(cells)],
        },
        index=[f"row{i}" for i in range(cells)],
    )
    symbols = [f"Gene{i}" for i in range(genes - 3)] + ["mt-Nd1", "MT-CO1", "Rare"]
    var = pd.DataFrame({"symbol": symbols}, index=[f"ENS{i:05}" for i in range(genes)])
    return anndata.AnnData(csr_matrix(counts), obs=obs, var=var)


def image_of(cell_id: str, side: int = SIDE) -> np.ndarray:
    """A picture of its own for every id: uint8 (side, side)."""
    rng = np.random.default_rng(list(cell_id.encode()))
    yy, xx = np.mgrid[:side, :side] - side / 2
    inside = yy**2 + xx**2 < (rng.uniform(0.25, 0.45) * side) ** 2
    return np.where(inside, 80 + 100 * rng.random((side // 4, side // 4)).repeat(4, 0).repeat(4, 1), 0).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, form, **({"quality": 95} if form == "JPEG" else {}))
    return sink.getvalue()


def write_iris(folder: Path, adata: anndata.AnnData, where: str = "folder") -> dict[str, Any]:
    """The IRIS layout below `folder`: `cells.h5ad`, and `images/` or `images.zip`; the keys of the job that say so."""
    folder.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(folder / "cells.h5ad")
    files = {f"{cell_id}.jpg": encoded(image_of(cell_id)) for cell_id in adata.obs["cell_id"] if str(cell_id) != "nan"}
    if where == "zip":
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"nuclei/{name}", data)
    else:
        (folder / "images").mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / "images" / name).write_bytes(data)
    images = {"uri": str(folder / ("images.zip" if where == "zip" else "images")), "crop_px": SIDE}
    return {"expression": expression(folder / "cells.h5ad"), "images": images, "quality": LENIENT}


LENIENT = {"min_genes": 3, "max_mito_share": 0.9, "min_cells": 2}


def expression(path: Path | str) -> dict[str, Any]:
    return {"uri": str(path), "symbol": "symbol", "batch": "plate", "cell_type": "kind", "donor": "who"}
