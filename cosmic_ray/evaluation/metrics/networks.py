"""The paper's two cell-type classifiers (App. C): four convolutions and two linear layers, and a two-layer MLP.

Widths, normalisation and dropout are not stated there; they are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cosmic_ray.ingest.augment import prepare

if TYPE_CHECKING:
    from cosmic_ray.evaluation.metrics.classifier import ClassifierConfig

_WIDTHS = (16, 32, 64, 128)
_POOLED = 4
_HIDDEN = {"images": 128, "expression": 256}
_DROPOUT = 0.3
_CLIP = 10.0
_AT_ONCE = 256


class ImageClassifier(nn.Sequential):
    """float32 (N, channels, S, S) in [0, 1], S >= 16 -> logits (N, classes).

    Each convolution (3 x 3) is followed by BatchNorm, ReLU and max-pooling by 2; what is left is averaged to 4 x 4.
    """

    def __init__(self, channels: int, classes: int):
        layers: list[nn.Module] = []
        for before, after in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        hidden = _HIDDEN["images"]
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(_POOLED),
            nn.Flatten(),
            nn.Linear(_WIDTHS[-1] * _POOLED**2, hidden),
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, classes),
        )


class ExpressionClassifier(nn.Module):
    """float32 (N, genes), normalised expression -> logits (N, classes).

    Genes are standardised by `centre` and `scale` (stored with the weights) and clipped to +-10: a gene that is nearly
    constant in training must not decide alone.
    """

    def __init__(self, genes: int, classes: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(genes))
        self.register_buffer("scale", torch.ones(genes))
        hidden = _HIDDEN["expression"]
        self.layers = nn.Sequential(
            nn.Linear(genes, hidden), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, classes)
        )

    def forward(self, expression: torch.Tensor) -> torch.Tensor:
        return self.layers(((expression - self.centre) * self.scale).clamp(-_CLIP, _CLIP))


def build(config: ClassifierConfig) -> nn.Module:
    """The network of a config, its weights drawn at random."""
    kind = ImageClassifier if config.kind == "images" else ExpressionClassifier
    return kind(config.shape[0], len(config.classes))


def tensor(values: np.ndarray, config: ClassifierConfig, device: torch.device) -> torch.Tensor:
    """What the network sees of a few inputs: float32."""
    if config.kind == "images":
        return prepare(torch.from_numpy(np.ascontiguousarray(values)).to(device), config.settings.size)
    return torch.from_numpy(values.astype(np.float32)).to(device)


@torch.inference_mode()
def logits(
    network: nn.Module, config: ClassifierConfig, inputs: np.ndarray, columns: np.ndarray | None = None
) -> Iterator[torch.Tensor]:
    """float32 (n, classes) of a few inputs at a time; `columns` puts genes in the network's order."""
    device = next(network.parameters()).device
    for start in range(0, len(inputs), _AT_ONCE):
        values = inputs[start : start + _AT_ONCE]
        yield network(tensor(values if columns is None else values[:, columns], config, device))
