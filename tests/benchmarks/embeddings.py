"""What the encoder knows of real nuclei that it never saw: chromatin beyond area, and masked patches.

    python tests/benchmarks/embeddings.py --data $COSMIC_RAY_DATA --work DIR [--seeds 5] [--recipes better paper]

Real fields of dsb2018 and U2OS with their hand-made masks become crops; they are split by field. For each seed a `tiny`
masked autoencoder is pretrained on train, from scratch, in this process (no Ray). On test, which nothing was fitted or
chosen on:
- chromatin measures, less a cubic in log area, by ridge regression (penalty chosen on val) from the encoder, the same
  encoder untrained, and as many principal components of the pixels: mean R2 over the measures;
- mean squared error of masked foreground patches, by the autoencoder and by normalised convolution of the visible
  pixels with the Gaussian (of seven widths) that was best on val.
Student-t 95 % intervals over seeds; differences are paired by seed. Of two recipes, all is equal but the recipe: crops,
split, seeds, steps, optimiser, schedule, averaging of weights; which patches are masked is the recipe's own matter, so
that errors are compared over that of inpainting. DIR keeps the runs: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from cosmic_ray.evaluation import probe, texture
from cosmic_ray.evaluation.metrics.intervals import mean_interval
from cosmic_ray.ingest import keyed
from cosmic_ray.ingest.augment import prepare
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.jobs import make
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import Split
from cosmic_ray.training import checkpoint
from cosmic_ray.training.mae import MAEObjective
from cosmic_ray.training.mae_export import exported_model

WIDTHS_PX = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
AT_ONCE = 256


def main() -> None:
    """Prepare the crops, then train and judge one seed after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the development data set")
    parser.add_argument("--work", required=True, help="folder for the store and the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--recipes", nargs="+", choices=("better", "paper"), default=["better"])
    given = parser.parse_args()
    torch.set_num_threads(1)

    store, split = crops_of(given.data, given.work)
    rows = probe.Split3(*(split.rows(part) for part in ("train", "val", "test")))
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in vars(rows).items())
    print(f"real crops inside hand-made masks: {len(store):,}; by field: {sizes}; store {store.content_hash[:12]}")
    measured = {}
    for recipe in given.recipes:
        measured[recipe] = [measure_seed(given, recipe, store, split, rows, seed) for seed in range(given.seeds)]
        show(given, recipe, measured[recipe])
    if len(measured) == 2:
        compare(measured)


def crops_of(data: str, work: str) -> tuple[CropStore, Split]:
    """Crops inside the hand-made masks, split by field; no limits on area, no quality checks."""
    images = Path(data).absolute() / "images"
    dsb = {"uri": str(images / "dsb2018_train_fluo" / "manifest.csv"), "layout": "table",
           "channels": [{"name": "DNA", "file": "images/{image_id}.png"}], "labels": "labels/{image_id}.png",
           "columns": {"site": "image_id", "plate": "size_group"}}  # fmt: skip
    u2os = {"uri": str(images / "coelho2009_U2OS"), "pattern": "images/*.png", "labels": "labels/{stem}.png",
            "defaults": {"cell_line": "U2OS"}}  # fmt: skip
    make({"kind": "build-crops", "out": f"{work}/crops", "sources": {"dsb2018": dsb, "u2os": u2os}, "workers": 0,
          "rows_per_group": 128, "max_rejected_share": 1.0}).run()  # fmt: skip
    make({"kind": "split", "out": f"{work}/split", "store": f"{work}/crops", "by": ["field_uri"],
          "fractions": {"train": 0.7, "val": 0.1, "test": 0.2}}).run()  # fmt: skip
    store = CropStore.open(f"{work}/crops")
    return store, Split.open(f"{work}/split", store)


def measure_seed(
    given: argparse.Namespace, recipe: str, store: CropStore, split: Split, rows: probe.Split3, seed: int
) -> dict:
    """Train one seed and judge it; kept in a file, so that a killed benchmark goes on."""
    folder = Path(given.work) / f"{recipe}-{given.epochs:g}-{seed}"
    kept = folder / "judged.json"
    if kept.exists():
        return json.loads(kept.read_text())
    job = make({"kind": "pretrain-mae", "out": str(folder), "crops": store.uri, "split": split.uri, "seed": seed,
                "recipe": recipe, "model": {"preset": "tiny"}, "epochs": given.epochs, "global_batch": 128,
                "optim": {"lr": 2e-3}, "schedule": {"kind": "cosine", "warmup": 0.05}, "ema": 0.99,
                "checkpoint": {"every": 200}, "eval": {"every": 100000, "crops": 512}, "tracking": None})  # fmt: skip
    started = time.process_time()
    job.loop([], stream=plain_batches).run()
    trained = exported_model(job.stage().model, checkpoint.newest(str(folder / "checkpoints")))
    untrained = MAEObjective(trained.config, seed).model.eval()
    crops = store.crops(np.arange(len(store)))
    targets, usable = chromatin_beyond_area(store, crops, rows)
    encoders = {"trained": embed(trained, crops), "untrained": embed(untrained, crops)}
    encoders["pixel PCA"] = probe.pixel_pca(crops[:, 0], usable.train, trained.config.encoder.embed_dim)
    area = np.log(store.metadata(["area_px"])["area_px"].to_numpy())[:, None]
    found = {name: probe.ridge_r2(x, targets, usable).tolist() for name, x in encoders.items()}
    found["log area"] = probe.ridge_r2(area, targets, usable).tolist()
    result = {"r2": found, "error": masked_error(trained, crops, rows, seed), "cpu_s": time.process_time() - started}
    kept.write_text(json.dumps(result))
    print(
        f"{recipe}, seed {seed}: " + ", ".join(f"{name} {np.mean(values):.3f}" for name, values in found.items()),
        flush=True,
    )
    return result


def chromatin_beyond_area(store: CropStore, crops: np.ndarray, rows: probe.Split3) -> tuple[np.ndarray, probe.Split3]:
    """Chromatin measures (N, F) without their cubic in log area, and the rows where all are finite."""
    measures = texture.chromatin(crops[:, 0])
    finite = np.isfinite(measures).all(1)
    usable = probe.Split3(*(part[finite[part]] for part in (rows.train, rows.val, rows.test)))
    low, high = np.percentile(measures[usable.train], [0.5, 99.5], axis=0)
    area = np.log(store.metadata(["area_px"])["area_px"].to_numpy())[:, None]
    filled = np.where(finite[:, None], np.clip(measures, low, high), 0.0)
    return probe.beyond(filled, area, usable.train), usable


@torch.inference_mode()
def embed(model: torch.nn.Module, crops: np.ndarray) -> np.ndarray:
    """Float64 (N, D)."""
    size, recipe = model.config.encoder.img_size, model.config.recipe
    parts = [model.embed(prepare(torch.from_numpy(crops[i : i + AT_ONCE]), size, recipe))
             for i in range(0, len(crops), AT_ONCE)]  # fmt: skip
    return torch.cat(parts).double().numpy()


@torch.inference_mode()
def masked_error(model: torch.nn.Module, crops: np.ndarray, rows: probe.Split3, seed: int) -> dict[str, float]:
    """Mean squared error (intensities in [0, 1]) over the pixels of masked foreground patches of test crops."""
    val, test = (masked_views(model, crops[part[:1000]], seed) for part in (rows.val, rows.test))
    errors = {width: squared_error(inpainted(*val[:2], width), *val[:2], val[3]) for width in WIDTHS_PX}
    best = min(errors, key=errors.get)
    images, hidden, predicted, patches = test
    return {
        "autoencoder": squared_error(predicted, images, hidden, patches),
        "inpainting": squared_error(inpainted(images, hidden, best), images, hidden, patches),
        "width_px": best,
    }


def masked_views(model: torch.nn.Module, crops: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Images, hidden pixels and predictions (N, S, S), and which pixels lie in patches that hold a nucleus."""
    config, size = model.config, model.config.encoder.patch_size
    images = prepare(torch.from_numpy(crops), config.encoder.img_size, config.recipe)
    noise = keyed.uniform(seed, torch.arange(len(crops)), "benchmark", config.encoder.tokens)
    predicted, hidden = model.reconstruct(images, noise)
    side = config.encoder.img_size // size
    grey, predicted = images[:, 0].numpy(), predicted[:, 0].numpy()
    foreground = grey.reshape(-1, side, size, side, size).max((2, 4)) > 0

    def spread(patches: np.ndarray) -> np.ndarray:
        return patches.repeat(size, 1).repeat(size, 2)

    return grey, spread(hidden.numpy().reshape(-1, side, side)), predicted, spread(foreground)


def inpainted(images: np.ndarray, hidden: np.ndarray, width: float) -> np.ndarray:
    """Each hidden pixel as the Gaussian-weighted mean of the visible ones."""
    from scipy.ndimage import gaussian_filter

    seen = (~hidden).astype(np.float32)
    axes = (1, 2)
    blurred = gaussian_filter(images * seen, width, axes=axes) / np.maximum(
        gaussian_filter(seen, width, axes=axes), 1e-6
    )
    return np.where(hidden, blurred, images)


def squared_error(predicted: np.ndarray, images: np.ndarray, hidden: np.ndarray, patches: np.ndarray) -> float:
    """Mean over hidden pixels of foreground patches."""
    return float(((predicted - images) ** 2)[hidden & patches].mean())


def show(given: argparse.Namespace, recipe: str, measured: list[dict]) -> None:
    """Print the tables of one recipe."""
    print(f"\nrecipe {recipe}, preset tiny, {given.epochs:g} epochs, {len(measured)} seeds")
    seconds = np.mean([seed["cpu_s"] for seed in measured])
    print(f"torch {torch.__version__}, {platform.machine()}, {seconds:.0f} CPU-s a seed")
    means = {name: np.array([np.mean(seed["r2"][name]) for seed in measured]) for name in measured[0]["r2"]}
    print(f"\nR2 of {len(texture.NAMES)} chromatin measures beyond area, on test   mean    95 % interval")
    for name, values in means.items():
        print_interval(name, values)
    for name in ("untrained", "pixel PCA"):
        print_interval(f"trained - {name}", means["trained"] - means[name])
    print("\nmeasure                        " + "".join(f"{name:>12}" for name in means))
    for index, name in enumerate(texture.NAMES):
        columns = [np.mean([seed["r2"][of][index] for seed in measured]) for of in means]
        print(f"{name:<31}" + "".join(f"{value:12.3f}" for value in columns))
    print("\nerror of masked foreground pixels, on test                  mean    95 % interval")
    errors = {name: np.array([seed["error"][name] for seed in measured]) for name in ("autoencoder", "inpainting")}
    for name, values in errors.items():
        print_interval(name, values, 5)
    print_interval("autoencoder / inpainting", errors["autoencoder"] / errors["inpainting"])


def compare(measured: dict[str, list[dict]]) -> None:
    """Print the difference between two recipes, paired by seed."""
    one, other = measured
    pairs = list(zip(measured[one], measured[other], strict=True))
    print(f"\n{f'{one} against {other}, on test':<58}    mean    95 % interval")
    for what in ("trained", "untrained"):
        differences = np.array([np.mean(a["r2"][what]) - np.mean(b["r2"][what]) for a, b in pairs])
        print_interval(f"R2 beyond area, {what}: {one} - {other}", differences)
    quotients = [[seed["error"]["autoencoder"] / seed["error"]["inpainting"] for seed in measured[r]] for r in measured]
    print_interval(f"autoencoder / inpainting: {one} - {other}", np.subtract(*quotients))
    means = [np.mean([seed["r2"]["trained"] for seed in measured[recipe]], axis=0) for recipe in measured]
    print(f"{one} has the higher R2 in {np.sum(means[0] > means[1])} of {len(texture.NAMES)} measures")


def print_interval(name: str, values: np.ndarray, digits: int = 3) -> None:
    mean, low, high = mean_interval(values)
    print(f"{name:<58}{mean:8.{digits}f}  {low:.{digits}f} to {high:.{digits}f}")


if __name__ == "__main__":
    main()
