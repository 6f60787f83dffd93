"""What a pretraining run leaves for others: the encoder as a model folder, and a picture of what it reconstructs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from cosmic_ray.registry.card import model_card
from cosmic_ray.registry.package import ModelConfig, write_model
from cosmic_ray.training.beginning import exported_weights

if TYPE_CHECKING:
    import numpy as np

    from cosmic_ray.models.mae import MAEConfig, MaskedAutoencoder
    from cosmic_ray.training.mae_stage import MAEStage

SHOWN = 8


def exported_model(config: MAEConfig, checkpoint_uri: str) -> MaskedAutoencoder:
    """The network with the weights that are exported, on the CPU, for evaluation."""
    from cosmic_ray.training.mae import MAEObjective

    objective = MAEObjective(config, 0)
    objective.load_checkpoint(exported_weights(checkpoint_uri), checkpoint_uri)
    return objective.model.eval().requires_grad_(False)


def export_model(
    stage: MAEStage, model: MaskedAutoencoder, uri: str, lineage: dict[str, Any], metrics: dict[str, float]
) -> ModelConfig:
    """Write the encoder as a model folder."""
    from cosmic_ray.models.mae import export_encoder

    kwargs, weights = export_encoder(model)
    job, size = stage.job, stage.model.encoder
    card = model_card(
        "encoder",
        (job.tracking.register_as if job.tracking else None) or "morphology-fm",
        recipe=job.recipe,
        facts={
            "encoder": f"timm {size.model_name}: {size.depth} blocks, width {size.embed_dim}, {size.num_heads} heads, "
            f"{size.patch_size} px patches of {size.img_size} px",
            "parameters of the encoder": f"{sum(weight.numel() for weight in weights.values()):,}",
            "embedding": f"mean over patch tokens, {size.embed_dim} numbers",
            "training crops": f"{stage.plan.total_rows:,}",
            "optimiser steps": f"{lineage['step']:,} of {job.global_batch} crops",
        },
        lineage=lineage,
        metrics=metrics,
        simulated=stage.store.simulated,
        job=job.resolved(),
    )
    return write_model(
        uri,
        "encoder",
        {
            "network": kwargs,
            "input": stage.store.spec,
            "preprocessing": {"recipe": job.recipe, "size": size.img_size},
            "embedding_width": size.embed_dim,
        },
        weights,
        lineage=lineage,
        card=card,
        simulated=stage.store.simulated,
    )


def picture(model: MaskedAutoencoder, stage: MAEStage) -> bytes:
    """A PNG: held-out crops, what the network saw of them, and what it made of that; one column a crop."""
    import numpy as np
    from PIL import Image

    rows = stage.held_out[:SHOWN]
    if not len(rows):
        rows = np.flatnonzero(stage.plan.selection.mask())[:SHOWN]
    seen, masked, made = _reconstructed(model, stage.store.crops(rows), stage.job.seed)
    grid = np.concatenate([np.concatenate(list(line), axis=1) for line in (seen, masked, made)], axis=0)
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG")
    return buffer.getvalue()


def _reconstructed(model: MaskedAutoencoder, crops: np.ndarray, seed: int) -> list[np.ndarray]:
    """The first channel of images, of their visible patches, and of their reconstructions: uint8 (N, S, S) each."""
    import torch

    from cosmic_ray.ingest import keyed
    from cosmic_ray.ingest.augment import prepare
    from cosmic_ray.training.mae import MASK

    size = model.config.encoder
    images = prepare(torch.from_numpy(crops), size.img_size, model.config.recipe)
    noise = keyed.uniform(seed, torch.arange(len(crops)), MASK, size.tokens)
    made, hidden = model.reconstruct(images, noise)
    side = size.img_size // size.patch_size
    cover = hidden.view(-1, 1, side, side).float()
    cover = torch.nn.functional.interpolate(cover, scale_factor=size.patch_size, mode="nearest")
    visible = images * (1 - cover) + 0.5 * cover
    return [(255 * part[:, 0].clamp(0, 1)).round().byte().numpy() for part in (images, visible, made)]
