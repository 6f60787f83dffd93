"""What a seq2img run leaves for others: the model folder, and a picture of what it draws for held-out cells."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from cosmic_ray.registry.card import model_card
from cosmic_ray.registry.kinds.seq2img import Seq2Img, Seq2ImgModelConfig
from cosmic_ray.registry.package import read_model, write_model
from cosmic_ray.training.beginning import exported_weights

if TYPE_CHECKING:
    from cosmic_ray.registry.model import ModelConfig
    from cosmic_ray.training.seq2img_stage import Seq2ImgStage

SHOWN = 8
_QUICK = {"sampler": "unipc", "steps": 12}


def export_model(
    stage: Seq2ImgStage, uri: str, newest: str, lineage: dict[str, Any], metrics: dict[str, float]
) -> ModelConfig:
    """Write the U-Net of the checkpoint at `newest`, its averages where it has any, as a model folder."""
    from cosmic_ray.training.seq2img import NAME

    job, config = stage.job, stage.model
    weights = {key.removeprefix(f"{NAME}."): value for key, value in exported_weights(newest).items()}
    facts = {
        "network": f"{type(config.network).__name__.removesuffix('Config')}: {config.network}",
        "parameters": f"{stage.parameters:,}",
        "sampled by default": str(job.sampling),
        "training cells": f"{stage.plan.total_rows:,}",
        "optimiser steps": f"{lineage['step']:,} of {job.global_batch} cells",
    }
    card = model_card(
        "seq2img",
        (job.tracking.register_as if job.tracking else None) or "seq2img",
        recipe=job.recipe,
        facts=facts,
        lineage=lineage,
        metrics=metrics,
        simulated=stage.simulated,
        job=job.resolved(),
    )
    latents = {"width": stage.embeddings.width, "model": stage.made_by}
    keys = Seq2ImgModelConfig.facts(config, latents=latents, input=stage.store.spec, sampling=job.sampling)
    return write_model(uri, "seq2img", keys, weights, lineage=lineage, card=card, simulated=stage.simulated)


def picture(stage: Seq2ImgStage, uri: str) -> bytes:
    """A PNG: the first channel of held-out cells' images, and below each what the model at `uri` draws for it, in a few
    steps, since the driver may have no accelerator."""
    import numpy as np
    from PIL import Image

    rows = stage.held_out[:SHOWN]
    if not len(rows):
        rows = stage.split.rows("train")[:SHOWN]
    ids = stage.store.obs(["cell_id"], rows)["cell_id"].to_pylist()
    drawn = Seq2Img(read_model(uri)).sample(stage.latents[rows], ids, seed=stage.job.seed, **_QUICK)
    lines = [np.concatenate(list(images[:, 0]), axis=1) for images in (stage.store.crops.crops(rows), drawn)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(lines)).save(buffer, "PNG")
    return buffer.getvalue()
