"""Segmentation against hand-made masks, and what it costs.

    python tests/benchmarks/segmentation.py --data DATA

DATA holds `images/dsb2018_train_fluo` and `images/coelho2009_U2OS`, each with `images/`, `labels/` and `manifest.csv`.
All recipes see every field one after another in one run, in turning order; times are CPU-seconds of this process on
one thread. `--weights FILE` judges another network than the shipped one, for figures across sets.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pandas as pd
from PIL import Image
from skimage.filters import threshold_otsu
from skimage.measure import label

from cosmic_ray.imaging.agreement import Counts, match_centres, match_objects
from cosmic_ray.imaging.nucleus_net import load_layers
from cosmic_ray.imaging.quality import Quality, check_objects
from cosmic_ray.imaging.read import read_field
from cosmic_ray.imaging.segment import Segmentation, measure, segment
from cosmic_ray.imaging.segment_better import segment_better

SETS = ("dsb2018_train_fluo", "coelho2009_U2OS")
PERCENTILES = (5, 95)
"""COSMIC §3.1: of the areas that `paper` keeps."""


@dataclass
class Seen:
    """What one recipe did with the fields of a set, in their order."""

    objects: list[Counts] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    centres: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """Of the objects off the border and of good quality: y, x, area."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a network made by cosmic_ray.imaging.fit.train")
    parser.add_argument("--every", type=int, default=1, help="take every n-th field")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    layers = load_layers(arguments.weights) if arguments.weights else None
    results = {}
    for name in SETS:
        fields = _fields(arguments.data / "images" / name)[:: arguments.every]
        seen, truths = _run(fields, layers)
        groups = [group for _, _, group in fields]
        results[name] = _quality_table(name, seen, groups) | _cost_table(seen) | _detection_table(seen, truths)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def _fields(folder: Path) -> list[tuple[Path, Path, str]]:
    """Image, labels and size group of each field of a set."""
    table = pd.read_csv(folder / "manifest.csv")
    groups = dict(zip(table["image_id"], table["size_group"], strict=True)) if "size_group" in table else {}
    images = sorted((folder / "images").glob("*.png"))
    return [(image, folder / "labels" / image.name, groups.get(image.stem, folder.name)) for image in images]


def _run(fields: list, layers: dict | None) -> tuple[dict[str, Seen], list[np.ndarray]]:
    recipes = {
        "otsu": lambda data: _otsu(data),
        "paper": lambda data: segment(read_field(data, ""), Segmentation(recipe="paper")),
        "better": lambda data: segment_better(read_field(data, ""), Segmentation(), layers),
    }
    seen, truths = {name: Seen() for name in recipes}, []
    for recipe in recipes.values():
        recipe(fields[0][0].read_bytes())
    for turn, (image_path, labels_path, _) in enumerate(fields):
        data, true = image_path.read_bytes(), np.asarray(Image.open(labels_path))
        truths.append(true)
        order = list(recipes)
        for name in order[turn % 3 :] + order[: turn % 3]:
            start = process_time()
            labels = recipes[name](data)
            seen[name].seconds.append(process_time() - start)
            seen[name].objects.append(match_objects(labels, true))
            seen[name].centres.append(_kept(labels, read_field(data, ""), Quality(enabled=name == "better")))
    return seen, truths


def _otsu(data: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(data)))
    return label(image > threshold_otsu(image))


def _kept(labels: np.ndarray, image: np.ndarray, quality: Quality) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = measure(labels, image)
    _, reasons = check_objects(labels, image, columns, quality)
    kept = (reasons == "") & ~columns["touches_border"]
    return columns["centroid_y"][kept], columns["centroid_x"][kept], columns["area_px"][kept]


def _quality_table(name: str, seen: dict[str, Seen], groups: list[str]) -> dict:
    print(f"\n{name}: {len(groups)} fields; objects with IoU > 0.5 before any filter, micro-averaged; 95 % bootstrap")
    print(
        f"{'':8}{'group':14}{'fields':>7}{'true':>7}{'found':>7}{'F1':>7}{'':4}interval{'':6}{'precision':>9}{'recall':>8}"
    )
    members = {"all": list(range(len(groups)))}
    members |= {group: [i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))}
    if len(members) == 2:
        members = {"all": members["all"]}
    rows = defaultdict(dict)
    for recipe, what in seen.items():
        for group, chosen in members.items():
            counts = [what.objects[i] for i in chosen]
            total, (low, high) = sum(counts, Counts()), _interval(counts)
            print(
                f"{recipe:8}{group:14}{len(chosen):7}{total.true:7}{total.found:7}{total.f1:7.3f}"
                f"{low:9.3f}-{high:.3f}{total.precision:11.3f}{total.recall:8.3f}"
            )
            rows[recipe][group] = {"f1": total.f1, "low": low, "high": high, "p": total.precision, "r": total.recall}
    return {"objects": rows}


def _interval(counts: list[Counts], draws: int = 1000) -> tuple[float, float]:
    """Bootstrap over fields."""
    rng = np.random.default_rng(0)
    table = np.array([(one.hits, one.found, one.true) for one in counts])
    drawn = table[rng.integers(len(table), size=(draws, len(table)))].sum(1)
    low, high = np.percentile(2 * drawn[:, 0] / (drawn[:, 1] + drawn[:, 2]), [2.5, 97.5])
    return float(low), float(high)


def _cost_table(seen: dict[str, Seen]) -> dict:
    print("CPU-seconds a field, read included; ratio to decode + threshold_otsu + label of the same field")
    base, rows = np.array(seen["otsu"].seconds), {}
    for recipe, what in seen.items():
        seconds = np.array(what.seconds)
        median, low, high = np.percentile(seconds, [50, 10, 90])
        ratio = np.percentile(seconds / base, [50, 10, 90])
        print(
            f"{recipe:8}median {median:.4f} (10-90 %: {low:.4f}-{high:.4f}); "
            f"ratio {ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f}); of the sums {seconds.sum() / base.sum():.2f}"
        )
        rows[recipe] = {"median_s": median, "ratio": ratio[0], "ratio_of_sums": seconds.sum() / base.sum()}
    return {"cost": rows}


def _detection_table(seen: dict[str, Seen], truths: list[np.ndarray]) -> dict:
    print("detection after the filters: a crop's centre inside a hand mask, one to one; recall over whole masks, too")
    whole = [_off_border(true) for true in truths]
    rows = {}
    for recipe, what in seen.items():
        areas = np.concatenate([area for _, _, area in what.centres])
        low, high = (0, np.inf) if recipe == "better" else np.percentile(areas, PERCENTILES)
        total = among_whole = Counts()
        for (y, x, area), true, inner in zip(what.centres, truths, whole, strict=True):
            kept = (area >= low) & (area <= high)
            total += match_centres(y[kept], x[kept], true)
            among_whole += match_centres(y[kept], x[kept], inner)
        print(
            f"{recipe:8}crops {total.found:6}  precision {total.precision:.3f}  recall {total.recall:.3f}, "
            f"of whole nuclei {among_whole.recall:.3f}"
        )
        rows[recipe] = {"crops": total.found, "p": total.precision, "r": total.recall, "r_whole": among_whole.recall}
    return {"detection": rows}


def _off_border(true: np.ndarray) -> np.ndarray:
    cut = np.unique(np.concatenate([true[0], true[-1], true[:, 0], true[:, -1]]))
    return np.where(np.isin(true, cut), 0, true)


if __name__ == "__main__":
    main()
