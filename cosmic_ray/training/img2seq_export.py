"""What an img2seq run leaves for others: the model folder, its intervals calibrated by held-out cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cosmic_ray.models.img2seq import Img2SeqConfig
from cosmic_ray.registry.card import model_card
from cosmic_ray.registry.kinds.img2seq import Img2SeqModelConfig
from cosmic_ray.registry.package import write_model
from cosmic_ray.training.beginning import exported_weights
from cosmic_ray.training.img2seq import NAME
from cosmic_ray.training.img2seq_calibration import calibrate
from cosmic_ray.training.run import MODEL

if TYPE_CHECKING:
    from cosmic_ray.registry.model import ModelConfig
    from cosmic_ray.training.img2seq_stage import Img2SeqStage

PUBLISHED = (
    "10 steps of betas from 5e-5 to 5e-4: abar ends at 0.997, so training never reaches the noise that sampling begins "
    "with. Mean: the regression plus 0.3 of the mean of 7 samples. The intervals are not published, but ours."
)


def export_model(
    stage: Img2SeqStage, uri: str, newest: str, lineage: dict[str, Any], metrics: dict[str, float]
) -> tuple[ModelConfig, dict[str, float]]:
    """Write the network of the checkpoint at `newest`, its averages where it has any, as a model folder below `uri`;
    its config, and what the results tell of it: `coverage_90`, `val_r`."""
    from cosmic_ray import storage

    job, network = stage.job, trained(stage.model, newest)
    measured = calibrate(network, stage.calibrating().held_out(), job.seed)
    facts = {
        "network": str(stage.model),
        "parameters": f"{stage.parameters:,}",
        "values": "counts" if stage.model.counts == "negative binomial" else "log1p, normalised to the median total",
        "median total": f"{network.total.item():,.0f}",
        "training cells": f"{stage.plan.total_rows:,}",
        "optimiser steps": f"{lineage['step']:,} of {job.global_batch} cells",
        "val cells that the intervals were calibrated by": f"{measured.cells:,}",
        **({"as published": PUBLISHED} if job.recipe == "paper" else {}),
    }
    stated = {f"val coverage of {float(level):.0%} intervals": share for level, share in measured.coverage.items()}
    correlation = {"val median Pearson r over genes": measured.correlation}
    card = model_card(
        "img2seq",
        (job.tracking.register_as if job.tracking else None) or "img2seq",
        recipe=job.recipe,
        facts=facts,
        lineage=lineage,
        metrics={**metrics, **stated, **correlation},
        simulated=stage.simulated,
        job=job.resolved(),
    )
    shape = stage.embeddings.shape
    features = {"width": shape[-1], "tokens": shape[0] if len(shape) > 1 else None, "model": stage.made_by}
    keys = Img2SeqModelConfig.facts(stage.model, genes=stage.store.genes["gene_id"].to_pylist(), features=features)
    folder = storage.join(uri, MODEL)
    config = write_model(
        folder, "img2seq", keys, network.state_dict(), lineage=lineage, card=card, simulated=stage.simulated
    )
    return config, {"coverage_90": measured.coverage["0.9"], "val_r": measured.correlation}


def trained(config: Img2SeqConfig, checkpoint_uri: str) -> torch.nn.Module:
    """The network with the weights that are exported, on the CPU, not calibrated yet."""
    network = config.build()
    weights = {key.removeprefix(f"{NAME}."): value.float() for key, value in exported_weights(checkpoint_uri).items()}
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
