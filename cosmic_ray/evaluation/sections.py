"""What each part of the report says, made from what the jobs published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cosmic_ray import storage
from cosmic_ray.errors import DataError, NotFoundError
from cosmic_ray.evaluation import figures, probe
from cosmic_ray.evaluation.page import Section, Table
from cosmic_ray.output import read_manifest
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.stores.show import montage
from cosmic_ray.stores.split import PARTS, Split

_SAMPLE, _FITTED, _MAPPED = 50_000, 20_000, 4000
"""The most crops whose embedding is read; of those the most that a linear model is fitted on, and that a map shows."""
_FEWEST_FOR_UMAP = 50
_PICTURES = {
    "reconstructions.png": (
        "Reconstructions",
        "Held-out crops: the crop, what the encoder saw of it, and what the decoder made of that.",
    ),
    "generated.png": ("Drawn from expression", "What the trained model draws for held-out cells."),
}
"""What a training run may leave."""
_CLASSES = 12


@dataclass
class Part:
    """Sections of the page, tiles above it, and figures for `summary.json`."""

    sections: list[Section]
    tiles: list[tuple[Any, str]]
    facts: dict[str, Any]


def crops(store: CropStore, split: Split) -> Part:
    """What went in, what was left out and why, a montage, and the split."""
    statistics = store.manifest.statistics
    build = statistics.get("build", {})
    objects, rejected = build.get("objects", len(store)), build.get("objects_rejected", {})
    fields, fields_rejected = build.get("fields"), build.get("fields_rejected", {})
    sizes = {name: int((split.codes == code).sum()) for code, name in enumerate(PARTS)}
    went_in = Section(
        "What went in",
        notes=[
            f"{objects:,} objects were found; {len(store):,} became crops. Why the rest was left out, the bars tell.",
            f"Intensities: {store.manifest.intensity.description.replace('->', '→')}.",
        ],
        figures=[
            figures.bars({"crops kept": len(store), **_descending(rejected)}, "objects found, by what became of them"),
            figures.bars(_descending(fields_rejected), "fields left out, by reason") if fields_rejected else "",
        ],
        tables=[
            _counts_table("source", statistics["rows_by_source"]),
            _counts_table("plate", statistics["rows_by_plate"]),
            _counts_table("cell line", statistics["rows_by_cell_line"]),
            *_rejected_fields(store.uri),
        ],
    )
    went_in.figures = [figure for figure in went_in.figures if figure]
    look = Section("The crops", wide=[_pixels(montage(store, 48, columns=12), "Crops taken evenly over the store.")])
    spread = Section(
        "The split",
        notes=["Training reads train, choices are made on val, test stays closed. Groups are never divided."],
        figures=[figures.bars(sizes, "crops")],
    )
    tiles = [(fields, "fields"), (objects, "objects found"), (len(store), "crops kept")]
    facts = {
        "fields": fields,
        "fields_rejected": fields_rejected,
        "objects": objects,
        "objects_rejected": rejected,
        "crops": len(store),
        "split": sizes,
        "content_hash": store.content_hash,
    }
    return Part([went_in, look, spread], [tile for tile in tiles if tile[0] is not None], facts)


def training(uri: str, name: str = "") -> Part:
    """Curves, picture, throughput of a training run; `name` tells it from others."""
    manifest = read_manifest(uri)
    lines = [json.loads(line) for line in storage.read_bytes(storage.join(uri, "metrics.jsonl")).splitlines() if line]
    curve = {name: _curve(lines, name) for name in sorted({key for line in lines for key in line} - {"step", "time"})}

    def chosen(*names: str) -> dict[str, Any]:
        return {name: curve[name] for name in names if name in curve and curve[name][0]}

    drawn = Section(
        f"Training: {name}" if name else "Training",
        figures=[
            figures.curves(chosen("train/loss", "val/loss"), "loss", log=True),
            figures.curves(chosen("train/lr"), "learning rate"),
            figures.curves(chosen("train/grad_norm"), "gradient norm before clipping", log=True),
            figures.curves(chosen("train/images_per_s"), "images/s, all workers"),
            figures.curves(chosen("train/data_wait_share"), "share of the time spent waiting for data"),
        ],
    )
    sections = [drawn]
    for file, (title, words) in _PICTURES.items():
        try:
            picture = storage.read_bytes(storage.join(uri, file))
        except NotFoundError:
            continue
        sections.append(Section(f"{title}: {name}" if name else title, wide=[_pixels(picture, words)]))
    facts = {
        "steps": max((line["step"] for line in lines), default=0),
        "train_loss": _last(curve, "train/loss"),
        "val_loss": _last(curve, "val/loss"),
        "images_per_s": _median(curve, "train/images_per_s"),
        "data_wait_share": _median(curve, "train/data_wait_share"),
        "model": manifest["results"].get("model"),
    }
    tiles = [
        (facts["steps"], "training steps"),
        (facts["val_loss"], "loss on val"),
        (facts["images_per_s"], "images/s (median)"),
        (
            None if facts["data_wait_share"] is None else f"{facts['data_wait_share']:.1%}",
            "time waiting for data (median)",
        ),
    ]
    return Part(sections, [] if name else tiles, {f"training: {name}" if name else "training": facts})


def embedding(uri: str, store: CropStore, split: Split, seed: int) -> Part:
    """Maps of the embedding, and how well a linear model reads the cell line from it on val; from a sample of the
    crops, so that memory does not grow with the store.
    """
    found = Embeddings.open(uri)
    if len(found) != len(store):
        raise DataError(uri, f"{len(found):,} embeddings for a store of {len(store):,} crops", "embed this store")
    rows = found.sample(_SAMPLE, seed)
    vectors = found.vectors(rows)
    about = store.metadata(["cell_line", "treatment", "plate", "area_px", "eccentricity", "mean_intensity"], rows)
    shown = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_MAPPED])
    seen = f"{len(rows):,} of {len(store):,} crops, drawn with seed {seed}" if len(rows) < len(store) else "all crops"
    section = Section(
        "What the embedding shows",
        notes=[f"From {seen}; the maps show {len(shown):,} of them."],
        figures=_maps(vectors[shown], _colours(about, shown), seed),
    )
    facts: dict[str, Any] = {"width": found.width, "rows": len(found), "sampled": len(rows)}
    lines = np.array(about["cell_line"].to_pylist())
    parts = _probed(split.codes[rows], seed)
    # A split by plate may leave a single cell line in train: then there is nothing to tell apart.
    if len(set(lines)) <= _CLASSES and len(set(lines[parts.train])) >= 2 and len(parts.val) and len(parts.test):
        read = _read_cell_line(vectors, about, lines, parts)
        facts["cell_line_balanced_accuracy_on_val"] = read
        section.notes.append(
            f"A linear model fitted on {len(parts.train):,} crops of train tells the cell line of {len(parts.test):,} "
            f"of val with balanced accuracy {read['embedding']:.3f} from the embedding and "
            f"{read['area, eccentricity, brightness']:.3f} from area, eccentricity and brightness alone "
            f"(chance {1 / len(set(lines)):.3f})."
        )
    return Part([section], [(found.width, "width of the embedding")], {"embedding": facts})


def origin(inputs: Mapping[str, str], manifests: Mapping[str, Mapping[str, Any]]) -> Section:
    """Where everything came from: URIs, hashes, and the resolved jobs."""
    rows = [[key, uri, manifests[key].get("content_hash") or ""] for key, uri in inputs.items()]
    jobs = [{"title": f"{key}: the job", "body": json.dumps(manifests[key].get("job", {}), indent=1)} for key in inputs]
    return Section("Where it came from", tables=[Table(["input", "URI", "content hash"], rows)], listings=jobs)


def _counts_table(name: str, counts: Mapping[str, int]) -> Table:
    rows = [[key or "(none)", count] for key, count in _descending(counts).items()]
    return Table([name, "crops"], rows[:100], f"crops by {name} ({len(rows)})")


def _descending(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _rejected_fields(uri: str) -> list[Table]:
    import pyarrow.parquet as pq

    try:
        rejected = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(uri, "rejected.parquet"))))
    except NotFoundError:
        return []
    names = [
        name for name in ("plate", "well", "site", "reason", "detail", "field_uri") if name in rejected.column_names
    ]
    rows = [list(row.values()) for row in rejected.select(names).slice(0, 200).to_pylist()]
    return [Table(names, rows, f"fields left out ({rejected.num_rows})")] if rows else []


def _pixels(png: bytes, words: str) -> dict[str, str]:
    return {"uri": figures.png_uri(png), "alt": words}


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values; of a step told twice (replayed after a kill) the later telling."""
    points = {line["step"]: line[name] for line in lines if name in line}
    return list(points), list(points.values())


def _last(curve: Mapping[str, tuple[list[float], list[float]]], name: str) -> float | None:
    return curve[name][1][-1] if curve.get(name, ([], []))[1] else None


def _median(curve: Mapping[str, tuple[list[float], list[float]]], name: str) -> float | None:
    return float(np.median(curve[name][1])) if curve.get(name, ([], []))[1] else None


def _colours(about: pa.Table, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What to colour a map by: every category with 2 to 12 values, then area."""
    found = {}
    for name in ("cell_line", "treatment", "plate"):
        values = np.array(about[name].to_pylist())[shown]
        if 2 <= len(set(values)) <= _CLASSES:
            found[name.replace("_", " ")] = values
    found["area (px)"] = about["area_px"].to_numpy()[shown].astype(float)
    return found


def _maps(vectors: np.ndarray, colours: Mapping[str, np.ndarray], seed: int) -> list[str]:
    """Every colouring on the UMAP and the first on the principal components; with few crops all on these."""
    points = _principal(vectors)
    flat = [figures.scatter(points, values, f"{name} (principal components)") for name, values in colours.items()]
    if len(vectors) < _FEWEST_FOR_UMAP:
        return flat
    points = _umap(vectors, seed)
    return [figures.scatter(points, values, f"{name} (UMAP)") for name, values in colours.items()] + flat[:1]


def _principal(vectors: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    return PCA(2, svd_solver="randomized", random_state=0).fit_transform(vectors)


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP

        return UMAP(random_state=seed, n_neighbors=15, min_dist=0.2).fit_transform(vectors)


def _probed(codes: np.ndarray, seed: int) -> probe.Split3:
    """Judged on val; the penalty is chosen on a fifth of train, so val is not fitted on in any way."""
    train, val = (np.flatnonzero(codes == PARTS.index(part)) for part in ("train", "val"))
    train = np.random.default_rng(seed).permutation(train)[:_FITTED]
    return probe.Split3(train[len(train) // 5 :], train[: len(train) // 5], val)


def _read_cell_line(vectors: np.ndarray, about: pa.Table, lines: np.ndarray, parts: probe.Split3) -> dict[str, float]:
    """Balanced accuracy on val."""
    simple = np.stack([about[name].to_numpy() for name in ("area_px", "eccentricity", "mean_intensity")], 1)
    return {
        "embedding": probe.logistic_accuracy(vectors, lines, parts),
        "area, eccentricity, brightness": probe.logistic_accuracy(simple.astype(float), lines, parts),
    }
