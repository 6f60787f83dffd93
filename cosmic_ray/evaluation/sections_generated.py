"""What the report says of generated cells: images beside real ones, metrics, genes, planted truth, comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.evaluation import figures
from cosmic_ray.evaluation.generated import open_rounds
from cosmic_ray.evaluation.images import KINDS
from cosmic_ray.evaluation.page import Section, Table, shown
from cosmic_ray.evaluation.scores import SCORES
from cosmic_ray.evaluation.sections import Part
from cosmic_ray.output import read_manifest
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.split import Split

_SHOWN, _TYPES, _GENES = 12, 8, 20
"""Cells a type and types on a montage; genes in a table."""
_METRICS = {"cov": "COV (more is better)", "swd": "SWD (less)", "knna": "k-NNA (0.5 is ideal)"}
_WORDS = {"expression": "image → expression", "cycle": "expression → image → expression"}


def evaluation(name: str, uri: str, seed: int) -> Part:
    """Everything of one evaluation. Its flaws stand in every section of it."""
    manifest = _manifest(uri, "cosmic-ray/evaluate")
    results = manifest["results"]
    sections = []
    if "images" in results:
        sections += [_montage(name, manifest, seed), _images(name, results["images"])]
    sections += _genes(name, uri, manifest, results)
    if "planted" in results:
        sections.append(_planted(name, results["planted"]))
    for section in sections:
        section.notes[:0] = _caveats(manifest)
    facts = {key: manifest[key] for key in ("part", "cells", "cells_of_part", "flaws", "opened", "scores")}
    return Part(sections, _tiles(results), {f"evaluation: {name}": facts})


def comparison(name: str, uri: str) -> Part:
    """The figures and verdicts of one comparison."""
    manifest = _manifest(uri, "cosmic-ray/compare")
    figures_ = manifest["figures"]
    head = ["figure", "arm", "mean over seeds", "interval", "gain", "its interval", "margin", "verdict"]
    rows = [
        [
            SCORES[row["figure"]].words,
            row["arm"],
            row["mean"],
            _interval(row, "low", "high"),
            row["gain"],
            _interval(row, "gain_low", "gain_high"),
            row["margin"],
            row["verdict"] or ("the baseline" if row["baseline"] else "no margin was fixed: none"),
        ]
        for row in figures_
    ]
    notes = [
        f"{manifest['seeds']} seeds an arm, judged on {manifest['part']}, paired by seed. A gain is turned so that "
        "more is better; margins were fixed in the job file."
    ]
    if manifest["opened_besides"]:
        notes.append(f"Test was opened {manifest['opened_besides']} times besides these evaluations.")
    notes += [f"Caveat: {flaw}" for flaw in manifest["flaws"]]
    section = Section(f"Comparison: {name}", notes=notes, tables=[Table(head, rows)])
    return Part([section], [], {f"comparison: {name}": {"figures": figures_, "flaws": manifest["flaws"]}})


def _manifest(uri: str, form: str) -> dict[str, Any]:
    manifest = read_manifest(uri)
    if (manifest.get("format"), manifest.get("version")) != (form, 1):
        raise DataError(uri, f"not {form} of version 1, but {manifest.get('format')!r}")
    return manifest


def _caveats(manifest: Mapping[str, Any]) -> list[str]:
    """What every figure has to say of itself."""
    found = [f"Judged on {manifest['part']}: {manifest['cells']:,} of its {manifest['cells_of_part']:,} cells."]
    if manifest["simulated"]:
        found[0] += " Simulated data."
    if manifest["opened"] and (others := manifest["opened"]["others"]):
        found.append(f"Caveat: test was opened {len(others)} other times by this split.")
    return found + [f"Caveat: {flaw}" for flaw in manifest["flaws"]]


def _montage(name: str, manifest: Mapping[str, Any], seed: int) -> Section:
    job, lineage = manifest["job"], manifest["lineage"]
    store = CellStore.open(lineage["cells"]["uri"])
    held = Split.open(lineage["split"]["uri"], store).rows(manifest["part"])
    rows, rounds = open_rounds([lineage["images"][0]["uri"]], store, held)
    types = np.array(store.obs([job["cell_type"]], rows)[job["cell_type"]].to_pylist())
    random = np.random.default_rng(seed)
    groups = {}
    for kind in np.unique(types)[:_TYPES]:
        places = np.sort(random.permutation(np.flatnonzero(types == kind))[:_SHOWN])
        made = rounds[0].store.crops(rounds[0].rows[places, 0])
        groups[str(kind) or "(no type)"] = (store.crops.crops(rows[places]), made)
    top = max(1.0, float(np.percentile(np.concatenate([real[real > 0] for real, _ in groups.values()]), 99.5)))
    word = "simulated" if store.simulated else "real"
    words = f"Held-out cells drawn at random: the {word} nucleus above, below it the one generated from its expression."
    picture = figures.paired_montage(groups, top, (word, "generated"))
    return Section(f"Generated beside real nuclei: {name}", wide=[{"uri": figures.png_uri(picture), "alt": words}])


def _images(name: str, found: Mapping[str, Any]) -> Section:
    head = ["cells", "number", "metric", "generated", "as many others: generated", "as many others: real"]
    rows = [
        [group, about["cells"], _METRICS[metric], *(_over_rounds(about[metric][kind]) for kind in KINDS)]
        for group, about in found["groups"].items()
        for metric in _METRICS
    ]
    near, searched = found["near_train"], found["train_searched"]
    notes = [
        f"{found['rounds']} rounds of generation, {found['samples']} samples a cell; intervals are over rounds and "
        "know nothing of other cells or of models trained anew. No generator is expected to reach 1 or 0: the last "
        "column is what other real cells get, and the one before it generated ones at the same sizes.",
        f"Copies: a share of {_over_rounds(near)} of the generated images is as near to a train cell as the nearest "
        f"{found['near_train_of_real']:.0%} of real held-out cells are ({searched[0]:,} of {searched[1]:,} train cells "
        "were looked through).",
    ]
    if accuracy := found.get("accuracy"):
        notes.append(
            f"A CNN trained on {accuracy['train_cells']:,} real train cells tells the cell type of "
            f"{_share(accuracy['real'])} of real held-out and of {_over_rounds(accuracy['generated'])} of generated "
            f"images (always the commonest: {accuracy['chance']:.3f})."
        )
    return Section(f"Images, by the paper's metrics: {name}", notes=notes, tables=[Table(head, rows)])


def _genes(name: str, uri: str, manifest: Mapping[str, Any], results: Mapping[str, Any]) -> list[Section]:
    made = [of for of in _WORDS if of in results]
    if not made:
        return []
    data = storage.read_bytes(storage.join(uri, "genes.parquet"))
    genes = pq.read_table(pa.BufferReader(data)).to_pandas()
    found = []
    for of in made:
        mine = genes[genes["of"] == of]
        series = {"generated": mine["r"].to_numpy(), "cell type's mean": mine["r_cell_type"].to_numpy()}
        within = {"generated": mine["r_within"].to_numpy()}
        drawn = [
            figures.histogram(series, "r of a gene within batch"),
            figures.histogram(within, "r of a gene within batch and cell type"),
        ]
        best = mine.nlargest(_GENES, "r")
        rows = [[row.gene_id, row.symbol, row.r, row.q, row.r_within] for row in best.itertuples()]
        top = Table(
            ["gene", "symbol", "r", "q", "r within cell type"], rows, f"the {len(rows)} genes with the largest r"
        )
        tables = [_summary(results[of]), top]
        found.append(Section(f"Genes, {_WORDS[of]}: {name}", notes=_told(results[of]), figures=drawn, tables=tables))
    return found


def _told(found: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{found['genes']:,} genes of {found['cells']:,} cells; r is taken within each batch and averaged. It is "
        f"undefined for {found['undefined']:,} genes, which vary in no batch. `cell type's mean` knows the cell type "
        "alone: what lies beyond it is more than telling types apart."
    ]
    if accuracy := found.get("accuracy"):
        sample = accuracy.get("generated_sample")
        notes.append(
            f"An MLP trained on {accuracy['train_cells']:,} real train cells tells the cell type of "
            f"{_share(accuracy['real'])} of real held-out and of {_share(accuracy['generated'])} of generated cells"
            + (f" ({_share(sample)} of single samples)." if sample else ".")
        )
    return notes


def _summary(found: Mapping[str, Any]) -> Table:
    rows = [
        ["mean r", found["pearson"], found["pearson_of_cell_type_mean"]],
        ["genes with r above 0.4", found["pearson_above_0.4"], found["cell_type_mean_above_0.4"]],
        ["mean r within cell type", found["pearson_within_cell_type"], None],
        ["genes with q below 0.05", found["q_below_0.05"], None],
        ["mean squared error (second: the train mean's)", found["error"], found["error_of_train_mean"]],
    ]
    if "crps" in found:
        rows.append(["CRPS (second: that of train cells drawn at random)", found["crps"], found["crps_of_train_cells"]])
    if interval := found.get("interval"):
        rows.append([f"held by the interval, which says {shown(interval['level'])}", interval["held"], None])
    rows += [[f"mean r, {kind}", value, None] for kind, value in found["pearson_by_cell_type"].items()]
    return Table(["", "generated", "cell type's mean"], rows)


def _planted(name: str, found: Mapping[str, Any]) -> Section:
    rows = [row for row in found["strengths"] if row["auroc"] is not None]
    lines = {"generated": [(row["auroc"], row["low"], row["high"]) for row in rows]}
    if rows and rows[0]["oracle"] is not None:
        lines["oracle, which sees the truth"] = [(row["oracle"], None, None) for row in rows]
    drawn = figures.bands(
        [row["strength"] for row in rows], lines, "AUROC of planted against matched unplanted genes", "planted strength"
    )
    about = found["unplanted"]
    notes = [
        f"{found['planted']} planted genes, told by r within batch and cell type. The {about['genes']:,} unplanted "
        f"ones have r = {about['mean']:.3f} on average ({_interval(about, 'low', 'high') or 'no interval'}); "
        f"{found['undefined']} genes have none."
    ]
    head = ["strength", "genes", "AUROC", "interval", "oracle", "mean r"]
    table = [
        [
            row["strength"] or "all",
            row["genes"],
            row["auroc"],
            _interval(row, "low", "high"),
            row["oracle"],
            row["mean_r"],
        ]
        for row in [*found["strengths"], found["all"]]
    ]
    return Section(f"Planted truth (simulated): {name}", notes=notes, figures=[drawn], tables=[Table(head, table)])


def _tiles(results: Mapping[str, Any]) -> list[tuple[Any, str]]:
    tiles: list[tuple[Any, str]] = []
    if accuracy := results.get("images", {}).get("accuracy"):
        tiles.append((accuracy["generated"]["mean"], "cell type told from generated images"))
        tiles.append((accuracy["real"]["accuracy"], "cell type told from real images"))
    for of in _WORDS:
        if of in results:
            tiles.append((results[of]["pearson"], f"mean r of genes, {_WORDS[of]}"))
    return [tile for tile in tiles if tile[0] is not None]


def _over_rounds(found: Mapping[str, Any]) -> str:
    interval = _interval(found, "low", "high")
    return shown(_short(found["mean"])) + (f" ({interval})" if interval else "")


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _interval(row: Mapping[str, Any], low: str, high: str) -> str:
    return "" if row[low] is None else f"{shown(_short(row[low]))} to {shown(_short(row[high]))}"


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
