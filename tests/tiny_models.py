"""Small real models of the kinds beside the encoder (`tiny_encoder`), untrained, exported as a job exports them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from cosmic_ray.models.img2seq import Img2SeqConfig
from cosmic_ray.models.seq2img import Seq2ImgConfig
from cosmic_ray.models.transcriptome import TranscriptomeSpec, build_transcriptome
from cosmic_ray.models.unet import UNetConfig
from cosmic_ray.models.unet_imagen import ImagenConfig
from cosmic_ray.registry.kinds.img2seq import Img2SeqModelConfig
from cosmic_ray.registry.kinds.seq2img import Seq2ImgModelConfig
from cosmic_ray.registry.package import ModelConfig, write_model

LATENT, SIDE = 6, 16
LATENTS_BY, FM = "e" * 64, "d" * 64
TOKENS = 5
GENES = tuple(f"ENSG{number:03}" for number in range(12))
_TOLD = {
    "lineage": {
        "store": {"uri": "s3://bucket/cells", "content_hash": "5" * 64},
        "split": {"uri": "s3://bucket/split", "content_hash": "7" * 64},
        "encoder": {"uri": "models:/scvi/1", "digest": LATENTS_BY},
        "job": "0123456789abcdef",
    },
    "card": "# a card\n",
    "simulated": True,
}


def shaken(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The network with every weight drawn anew: as made, a network's last layers are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2)
    return network.eval()


def seq2img(seed: int = 0, recipe: str = "better", channels: int = 1) -> tuple[Seq2ImgConfig, torch.nn.Module]:
    """An untrained seq2img of 16 px for latents of width 6."""
    if recipe == "better":
        shape = {"image_size": SIDE, "widths": (8, 32), "depths": (1, 1), "attention_from": 2}
        config = Seq2ImgConfig(recipe, UNetConfig(**shape, condition_size=LATENT, channels=channels))
    else:
        config = Seq2ImgConfig(recipe, ImagenConfig(SIDE, LATENT, dim=8, token_dim=8, widths=(1, 2)))
    torch.manual_seed(seed)
    return config, shaken(config.build(), seed)


def export_seq2img(
    folder: str, seed: int = 0, recipe: str = "better", channels: int = 1, **changes: Any
) -> ModelConfig:
    """Write the model folder of `seq2img(seed)`; `changes`: keys of its config, `state_dict`, `lineage`, `card`..."""
    config, network = seq2img(seed, recipe, channels)
    facts = Seq2ImgModelConfig.facts(
        config,
        latents={"width": LATENT, "model": LATENTS_BY},
        input={"channels": [f"channel-{c}" for c in range(channels)], "height": SIDE, "width": SIDE},
        sampling={"sampler": "unipc", "steps": 4, "guidance": 1.5},
    )
    return _written(folder, "seq2img", facts, network, changes)


def transcriptome(seed: int = 0, method: str = "scvi") -> tuple[TranscriptomeSpec, torch.nn.Module]:
    """An untrained transcriptome encoder of the first 8 genes, of width 6."""
    spec = TranscriptomeSpec(method, 8, LATENT, hidden=10, layers=2, target_total=100.0)
    torch.manual_seed(seed)
    return spec, shaken(build_transcriptome(spec), seed)


def export_transcriptome(folder: str, seed: int = 0, method: str = "scvi", **changes: Any) -> ModelConfig:
    """Write the model folder of `transcriptome(seed)`; `changes` as above."""
    spec, network = transcriptome(seed, method)
    facts = {
        "network": asdict(spec),
        "genes": GENES[:8],
        "total_genes": GENES if method == "pca" else None,
        "batches": ["first", "second"],
    }
    return _written(folder, "transcriptome-encoder", facts, network, changes)


def img2seq(seed: int = 0, recipe: str = "better", counts: str = "normalised") -> tuple[Img2SeqConfig, torch.nn.Module]:
    """An untrained, calibrated img2seq of 12 genes for features of width 8."""
    sizes = {"heads": 2, "depth": 0, "programs": 0} if recipe == "paper" else {"depth": 1, "programs": 4}
    config = Img2SeqConfig(recipe, len(GENES), 8, counts, hidden=16, **sizes)
    torch.manual_seed(seed)
    network = shaken(config.build(), seed)
    network.calibration.fit(torch.randn(50, len(GENES), generator=torch.Generator().manual_seed(seed)))
    return config, network


def export_img2seq(
    folder: str, seed: int = 0, recipe: str = "better", counts: str = "normalised", **changes: Any
) -> ModelConfig:
    """Write the model folder of `img2seq(seed)`; `changes` as above."""
    config, network = img2seq(seed, recipe, counts)
    features = {"width": 8, "model": FM, "tokens": TOKENS if recipe == "paper" else None}
    facts = Img2SeqModelConfig.facts(config, genes=list(GENES), features=features)
    return _written(folder, "img2seq", facts, network, changes)


def _written(
    folder: str, kind: str, facts: dict[str, Any], network: torch.nn.Module, changes: dict[str, Any]
) -> ModelConfig:
    facts |= {key: changes.pop(key) for key in facts if key in changes}
    weights = changes.pop("state_dict", network.state_dict())
    return write_model(folder, kind, facts, weights, **(_TOLD | changes))
