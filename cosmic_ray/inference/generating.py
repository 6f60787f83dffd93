"""The run of a `generate` job: its inputs opened and held fast, then images, then expression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.inference.inputs import pinned, shared_model
from cosmic_ray.stores.cells import CellStore, open_store
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.stores.split import Split

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosmic_ray.inference.generate import Generate
    from cosmic_ray.output import Output
    from cosmic_ray.registry.model import StoredModel

IMAGES = "images"
FORMAT, VERSION = "cosmic-ray/generated", 1


@dataclass(frozen=True)
class Inputs:
    """What a job starts from."""

    store: CellStore | CropStore
    rows: np.ndarray
    """Rows of the store that are generated from: int64, ascending."""
    split: Split | None
    latents: Embeddings | None

    @property
    def crops(self) -> CropStore:
        """Of a cell store, its images."""
        return self.store.crops if isinstance(self.store, CellStore) else self.store


def opened_inputs(job: Generate) -> Inputs:
    """Open what the job reads, models aside.

    Raises:
        JobError: naming the key, where there is nothing, or it belongs to other cells.
        DataError: where it is damaged.
    """
    key = "cells" if job.seq2img else "crops"
    store = _opened(job, key, CellStore.open if job.seq2img else open_store)
    if key == "crops" and isinstance(store, CellStore) and store.manifest.images is None:
        raise JobError(key, job.crops, "these cells have no images", "give a crop store")
    latents = _opened(job, "latents", Embeddings.open) if job.seq2img else None
    if latents is not None:
        try:
            latents.require(store)
        except DataError as error:
            raise JobError("latents", job.latents, error.problem, "give those of these cells") from None
    split = _opened(job, "split", partial(Split.open, store=store)) if job.split else None
    rows = np.arange(len(store)) if split is None else split.rows(job.part)
    if not len(rows):
        raise JobError("part", job.part, "holds no cell", "choose another part")
    return Inputs(store, rows, split, latents)


def generate(job: Generate, output: Output) -> dict[str, Any]:
    """See `Generate.run`; `output` is the job's, claimed."""
    from cosmic_ray.inference.generated_expression import generate_expression
    from cosmic_ray.inference.generated_images import generate_images

    cycle = bool(job.seq2img and job.img2seq)
    if output.done:
        manifest = output.manifest()
        return manifest["results"] if "results" in manifest else {IMAGES: told(CropStore.open(output.uri))}
    found = opened_inputs(job)
    models = {key: _fetched(job, key) for key in ("seq2img", "fm", "img2seq") if getattr(job, key)}
    _require_fit(job, found, models)
    lineage = pinned(output, _lineage(job, found, models))
    places = {key: shared_model(stored, output, f"models/{key}") for key, stored in models.items()}
    speeds: dict[str, Any] = {}
    crops, rows = (found.crops, found.rows) if job.crops else (None, None)
    if job.seq2img:
        target = output.inside(IMAGES) if cycle else output
        crops, speeds[IMAGES] = generate_images(job, target, found, models["seq2img"], places["seq2img"], lineage)
        rows = np.arange(len(crops))
    results: dict[str, Any] = {IMAGES: told(crops)} if job.seq2img else {}
    if job.img2seq:
        made, speed = generate_expression(job, output, crops, rows, models, places, lineage)
        results["expression"], speeds["expression"] = made, speed
        simulated = crops.simulated or any(stored.config.simulated for stored in models.values())
        about = {"format": FORMAT, "version": VERSION, "job": job.resolved(), "lineage": lineage, "results": results}
        output.publish({**about, "simulated": simulated, "content_hash": made["content_hash"]})
    return {key: {**about, **speeds.get(key, {})} for key, about in results.items()}


def told(crops: CropStore) -> dict[str, Any]:
    """What the results say of generated images."""
    return {"uri": crops.uri, "rows": len(crops), "content_hash": crops.content_hash, "simulated": crops.simulated}


def _opened(job: Generate, key: str, opening: Callable[[str], Any]) -> Any:
    uri = getattr(job, key)
    try:
        return opening(uri)
    except NotFoundError as error:
        raise JobError(key, uri, error.problem, error.remedy) from None


def _fetched(job: Generate, key: str) -> StoredModel:
    from cosmic_ray.registry.load import fetch_model

    return fetch_model(getattr(job, key), tracking=job.tracking_uri)


def _lineage(job: Generate, found: Inputs, models: dict[str, StoredModel]) -> dict[str, Any]:
    """By name {"uri", "content_hash"}; of a model what it was made from, too."""
    named: dict[str, Any] = {"store": {"uri": found.store.uri, "content_hash": found.store.content_hash}}
    if found.split is not None:
        named["split"] = {"uri": storage.absolute(job.split), "content_hash": found.split.content_hash}
    if found.latents is not None:
        made = {"content_hash": found.latents.content_hash, "lineage": found.latents.lineage}
        named["latents"] = {"uri": found.latents.uri, **made}
    for key, stored in models.items():
        made = {"content_hash": stored.config.digest, "lineage": stored.config.lineage}
        named[key] = {"uri": stored.uri, **made}
    return named


def _require_fit(job: Generate, found: Inputs, models: dict[str, StoredModel]) -> None:
    """Raise JobError where a model was trained with another one than is given, or takes other crops."""
    if job.seq2img:
        wanted, latents = models["seq2img"].config.latents, found.latents
        given = (latents.lineage.get("model") or {}).get("content_hash")
        if (given, latents.width) != (wanted.model, wanted.width):
            problem = f"latents of width {latents.width} of model {_short(given)}; {job.seq2img} was trained with "
            problem += f"width {wanted.width} of model {_short(wanted.model)}"
            raise JobError("latents", job.latents, problem, "give those of the encoder that its lineage names")
        if models["seq2img"].config.condition_drop == 0 and job.images.guidance not in (None, 0.0, 1.0):
            problem = f"{job.seq2img} was never trained without latents, which guidance needs"
            raise JobError("images.guidance", job.images.guidance, problem, "give 1")
    if job.img2seq:
        digest, wanted = models["fm"].config.digest, models["img2seq"].config.features.model
        if digest != wanted:
            problem = f"its digest is {_short(digest)}; {job.img2seq} was trained with {_short(wanted)}"
            raise JobError("fm", job.fm, problem, "give the morphology FM that its lineage names")
        takes, made = models["fm"].config.input, (models["seq2img"].config.output if job.seq2img else found.crops.spec)
        if takes.shape != made.shape:
            raise JobError("fm", job.fm, f"takes crops of {takes.shape}; these are {made.shape}", "(C, H, W)")


def _short(digest: str | None) -> str:
    return (digest or "none of ours")[:12]
