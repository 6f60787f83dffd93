"""Semi-real pairs: the run of the job. Real images, simulated expression."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.simulation import thinning
from cosmic_ray.simulation.genes import BACKGROUND, CONTROL, PLANTED
from cosmic_ray.simulation.keys import keyed
from cosmic_ray.simulation.links import link
from cosmic_ray.simulation.measures import MEASURES, factors, measured
from cosmic_ray.simulation.oracle import normalised, within

if TYPE_CHECKING:
    import pandas as pd

    from cosmic_ray.simulation.semi_real_job import SemiReal

ABOUT = "semi-real: real images, simulated expression"
_BATCH, _BIN = 512, 8


@dataclass
class _Real:
    """Real cells: counts (M, G) int64 of the kept genes, and what is known of them."""

    counts: np.ndarray
    genes: list[str]
    obs: pd.DataFrame
    """`cell_type`, `batch`, `fold`, by name."""


def make(job: SemiReal) -> dict[str, Any]:
    """Measure the crops, draw the expression, and publish it; or find it published."""
    from cosmic_ray.output import claim

    with claim(job) as out:
        if not out.done:
            real, cells, z = _real(job), *_crops(job)
            cells["background"] = _paired(job, cells, real)
            told = real.obs.iloc[cells["background"]]
            cells["cell_type"], cells["batch"] = told["cell_type"].to_numpy(), told["batch"].to_numpy()
            truth = _genes(job, real)
            counts = _thinned(job, truth, real, cells, z)
            _judge(job, truth, real, cells, z, counts)
            _publish(out, job, real, truth, cells, z, counts)
        manifest = out.manifest()
    return {
        "simulated": True,
        "expression_is": ABOUT,
        "out": out.uri,
        **{key: manifest[key] for key in ("cells", "genes", "planted", "content")},
        **{name.split(".")[0]: out.at(name) for name in ("expression.h5ad", "truth.parquet", "factors.parquet")},
    }


def _crops(job: SemiReal) -> tuple[pd.DataFrame, np.ndarray]:
    """What is known of the crops, by crop id in its order, and their factors (N, MEASURES)."""
    from cosmic_ray.stores.crops import CropStore

    store = CropStore.open(job.crops)
    if job.channel >= len(store.spec.channels):
        raise JobError("channel", job.channel, f"the crops have {len(store.spec.channels)} channels")
    values = []
    for table in store.batches(_BATCH, ["image"]):
        pixels = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(-1, *store.spec.shape)
        try:
            values.append(measured(pixels[:, job.channel]))
        except ValueError as error:
            raise DataError(store.uri, str(error), "build crops of masked nuclei") from None
    known = store.metadata(["crop_id", "source", "plate", "well", "site", "field_uri"]).to_pandas()
    known["field"] = ["/".join([*row[1:5], storage.name(row[5])]) for row in known.itertuples(index=False)]
    order = np.argsort(known["crop_id"].to_numpy())
    known, numbers = known.iloc[order].reset_index(drop=True), np.concatenate(values)[order]
    known["fold"] = known["field"].map(_folds(sorted(set(known["field"])), job, "fields"))
    known = known.rename(columns={"crop_id": "cell_id"}).drop(columns="field_uri")
    return known, factors(numbers, known["source"].to_numpy())


def _real(job: SemiReal) -> _Real:
    """The real cells and the genes with most counts.

    Raises:
        DataError: where X holds no raw counts, or a column is missing.
    """
    import anndata
    import pandas as pd

    from cosmic_ray.cells.h5ad import require_column

    with storage.local_file(storage.absolute(job.counts.uri)) as path:
        data = anndata.read_h5ad(path)
    for key in ("cell_type", "batch"):
        require_column(data.obs, getattr(job.counts, key), job.counts.uri, f"counts.{key}")
    totals = np.asarray(data.X.sum(axis=0)).ravel()
    kept = np.sort(np.argsort(-totals, kind="stable")[: job.counts.genes])
    chosen = data.X[:, kept]
    values = np.asarray(chosen.todense() if hasattr(chosen, "todense") else chosen, float)
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        raise DataError(job.counts.uri, "X does not hold raw counts", "name a file whose X does")
    names = [str(name) for name in data.obs_names]
    obs = pd.DataFrame({key: data.obs[getattr(job.counts, key)].astype(str) for key in ("cell_type", "batch")})
    obs["fold"] = [_folds(sorted(names), job, "real cells")[name] for name in names]
    return _Real(values.astype(np.int64), [str(data.var_names[i]) for i in kept], obs)


def _folds(names: list[str], job: SemiReal, what: str) -> dict[str, int]:
    """Name -> fold, dealt evenly."""
    if len(names) < job.folds:
        raise JobError("folds", job.folds, f"there are only {len(names)} {what}", "choose fewer")
    order = keyed(job.seed, "folds", what).permutation(len(names))
    return {names[row]: int(place % job.folds) for place, row in enumerate(order)}


def _paired(job: SemiReal, cells: pd.DataFrame, real: _Real) -> np.ndarray:
    """The real cell (row) whose counts each crop gets: any of its fold."""
    pools = [np.flatnonzero(real.obs["fold"].to_numpy() == fold) for fold in range(job.folds)]
    draws = [keyed(job.seed, "pair", name).random() for name in cells["cell_id"]]
    return np.array([pools[f][int(u * len(pools[f]))] for f, u in zip(cells["fold"], draws, strict=True)], np.int64)


def _genes(job: SemiReal, real: _Real) -> pd.DataFrame:
    """The truth table: pairs of genes alike in mean and dispersion, of which one, at random, is planted.

    Raises:
        JobError: where there are too few such genes, or a strength cannot be reached.
    """
    import pandas as pd

    rng, planted = keyed(job.seed, "genes"), job.planted
    mean, variance = real.counts.mean(axis=0), real.counts.var(axis=0)
    dispersion = (variance - mean) / mean.clip(1e-9) ** 2
    usable = np.flatnonzero(mean >= planted.min_mean)
    if len(usable) < 2 * planted.count:
        raise JobError("planted.min_mean", planted.min_mean, f"only {len(usable)} genes reach it, of "
                       f"{2 * planted.count} that are needed")  # fmt: skip
    ranked = usable[np.argsort(mean[usable], kind="stable")]
    bins = [ranked[start : start + _BIN] for start in range(0, len(ranked), _BIN)]
    alike = np.concatenate([one[np.argsort(dispersion[one], kind="stable")] for one in bins])
    pairs = alike[: len(alike) // 2 * 2].reshape(-1, 2)
    pairs = rng.permuted(pairs[rng.permutation(len(pairs))[: planted.count]], axis=1)
    columns = {"role": BACKGROUND, "matched": "", "effect": "", "factor": "", "function": "", "slope": 0.0,
               "strength": 0.0, "mean": mean, "dispersion": dispersion}  # fmt: skip
    truth = pd.DataFrame(columns, index=pd.Index(real.genes, name="gene_id"))
    wanted = [(*effect, strength, sign) for effect in planted.effects.items() for strength in planted.strengths
              for sign in [1, -1] * (planted.replicates // 2)]  # fmt: skip
    scale, groups = _scale(real.counts), _groups(real.obs)
    for (name, effect, strength, sign), (ours, twin) in zip(wanted, pairs, strict=True):
        own = keyed(job.seed, "slope", real.genes[ours])
        slope = thinning.slope_for(real.counts[:, ours], scale, groups, effect.function, sign, strength, own)
        if slope is None:
            raise JobError("planted.strengths", strength, f"effect {name!r} cannot reach it in {real.genes[ours]}",
                           "raise planted.min_mean, or lower the strength")  # fmt: skip
        said = [name, effect.factor, effect.function, slope, strength]
        for role, gene, other in ((PLANTED, ours, twin), (CONTROL, twin, ours)):
            truth.iloc[gene, : len(said) + 2] = [role, real.genes[other], *said]
    truth.insert(0, "planted", truth["role"] == PLANTED)
    return truth


def _thinned(job: SemiReal, truth: pd.DataFrame, real: _Real, cells: pd.DataFrame, z: np.ndarray) -> np.ndarray:
    """Counts of all crops, (N, G) int64: those of their real cells, thinned. A control follows the factor of another
    crop, drawn at random and the same one for all controls."""
    counts = real.counts[cells["background"].to_numpy()]
    other = keyed(job.seed, "shadow").permutation(len(cells))
    for column, gene in enumerate(truth.itertuples()):
        if gene.role == BACKGROUND:
            continue
        seen = z[:, MEASURES.index(gene.factor)]
        share = thinning.kept_share(gene.slope, gene.function, seen if gene.planted else seen[other])
        counts[:, column] = keyed(job.seed, "thin", gene.Index).binomial(counts[:, column], share)
    return counts


def _judge(
    job: SemiReal, truth: pd.DataFrame, real: _Real, cells: pd.DataFrame, z: np.ndarray, counts: np.ndarray
) -> None:
    """Add `reached` and `ceiling` to the truth: correlations with log1p normalised counts within type and batch, of
    the noise-free function, and of E[y | factor, type, batch] (the Bayes ceiling). 0 for genes that are not planted.
    """
    y, groups = normalised(counts), _groups(cells)
    scale, real_groups = np.median(counts.sum(axis=1)) / _expected_totals(truth, real), _groups(real.obs)
    truth["reached"], truth["ceiling"] = 0.0, 0.0
    for column in np.flatnonzero(truth["planted"]):
        gene = truth.iloc[column]
        seen, own = z[:, MEASURES.index(gene["factor"])], keyed(job.seed, "ceiling", truth.index[column])
        means = thinning.conditional_means(real.counts[:, column], scale, real_groups, gene["slope"], gene["function"],
                                           own)  # fmt: skip
        best = thinning.predicted(means, seen, groups)
        both = np.stack([link(gene["function"], seen), best], axis=1)
        found = within(both, np.repeat(y[:, [column]], 2, axis=1), groups)
        truth.iloc[column, -2:] = found


def _expected_totals(truth: pd.DataFrame, real: _Real) -> np.ndarray:
    """Mean total of each real cell after thinning, over factors: (M,)."""
    from cosmic_ray.simulation.links import nodes

    places, weights = nodes()
    kept = [1.0 if not gene.slope else float(weights @ thinning.kept_share(gene.slope, gene.function, places))
            for gene in truth.itertuples()]  # fmt: skip
    return real.counts @ np.array(kept)


def _scale(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(axis=1)
    return np.median(totals) / np.maximum(totals, 1)


def _groups(obs: pd.DataFrame) -> np.ndarray:
    return (obs["cell_type"].astype(str) + " | " + obs["batch"].astype(str)).to_numpy()


def _publish(
    out: Any, job: SemiReal, real: _Real, truth: pd.DataFrame, cells: pd.DataFrame, z: np.ndarray, counts: np.ndarray
) -> None:
    import pyarrow as pa
    from scipy.sparse import csr_matrix

    from cosmic_ray.output import read_manifest
    from cosmic_ray.simulation.files import parquet_bytes
    from cosmic_ray.simulation.paired_files import NOTE, content, h5ad_bytes

    note = {**NOTE, "about": ABOUT}
    told = cells.assign(
        background=real.obs.index.to_numpy()[cells["background"]], fold=cells["fold"].map("fold-{:02}".format)
    )
    sparse = csr_matrix(counts.astype(np.int32))
    tables = [
        pa.Table.from_pandas(truth.reset_index(), preserve_index=False).replace_schema_metadata(note),
        pa.table({name: told[name].tolist() for name in ("cell_id", "cell_type", "batch", "field", "fold")}
                 | dict(zip(MEASURES, z.T, strict=True))).replace_schema_metadata(note),
    ]  # fmt: skip
    out.write("expression.h5ad", h5ad_bytes(sparse, told.to_dict("list"), real.genes, {"about": ABOUT}))
    for name, table in zip(("truth.parquet", "factors.parquet"), tables, strict=True):
        out.write(name, parquet_bytes(table))
    digest = hashlib.sha256(storage.read_bytes(job.counts.uri)).hexdigest()
    lineage = {"crops": {"uri": job.crops, "content_hash": read_manifest(job.crops)["content_hash"]},
               "counts": {"uri": job.counts.uri, "sha256": digest}}  # fmt: skip
    out.publish({
        "simulated": True,
        "about": ABOUT,
        "format": "semi-real-expression",
        "version": 1,
        "content": content(sparse, told["cell_id"], tables),
        "cells": len(cells),
        "genes": len(real.genes),
        "planted": job.planted.count,
        "lineage": lineage,
        "job": {key: value for key, value in job.resolved().items() if key != "out"},
    })  # fmt: skip
