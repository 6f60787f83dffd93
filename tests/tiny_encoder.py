"""Small real encoders, untrained, as a training run exports them."""

from __future__ import annotations

from typing import Any

import timm
import torch

from cosmic_ray.registry.package import ModelConfig, write_model

SIDE = 16


def encoder(seed: int = 0, channels: int = 1, size: int = 32) -> tuple[dict[str, Any], torch.nn.Module]:
    """`timm.create_model` arguments and an untrained encoder of width 24."""
    kwargs = {
        "model_name": "vit_tiny_patch16_224",
        "img_size": size,
        "patch_size": 8,
        "in_chans": channels,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 0,
        "global_pool": "avg",
    }
    torch.manual_seed(seed)
    return kwargs, timm.create_model(**kwargs).eval()


def export(folder: str, seed: int = 0, channels: int = 1, recipe: str = "better", **changes: Any) -> ModelConfig:
    """Write the model folder of `encoder(seed)`; `changes`: keys of its config, `state_dict`, `lineage`, `card`..."""
    kwargs, network = encoder(seed, 3 if recipe == "paper" else channels)
    spec = {"channels": [f"channel-{c}" for c in range(channels)], "height": SIDE, "width": SIDE}
    facts = {
        "network": kwargs,
        "input": spec,
        "preprocessing": {"recipe": recipe, "size": 32},
        "embedding_width": 24,
    }
    told = {
        "lineage": {
            "store": {"uri": "s3://bucket/crops", "content_hash": "5" * 64},
            "split": {"uri": "s3://bucket/split", "content_hash": "7" * 64},
            "job": "0123456789abcdef",
        },
        "card": "# a card\n",
        "simulated": True,
    }
    facts |= {key: changes.pop(key) for key in facts if key in changes}
    weights = changes.pop("state_dict", network.state_dict())
    return write_model(folder, "encoder", facts, weights, **(told | changes))
