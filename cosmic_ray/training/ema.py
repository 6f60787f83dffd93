"""The exponential moving average of the weights (Polyak averaging): what is evaluated and exported where it is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from cosmic_ray.training.parallel import forget_gathered, local


def decay_at(decay: float, step: int) -> float:
    """The decay of optimiser step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The ramp forgets the random start of a short run; a long run soon has `decay`.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Averages of every trained parameter of some networks, beside them on their device (FSDP2: shard by shard)."""

    def __init__(self, networks: Mapping[str, nn.Module], decay: float):
        self.decay = decay
        self._networks = list(networks.values())
        self.averages: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, network in networks.items():
            for key, parameter in network.named_parameters():
                if parameter.requires_grad:
                    self._parameters[f"{name}.{key}"] = parameter
                    self.averages[f"{name}.{key}"] = parameter.detach().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`: average = d * average + (1 - d) * weight, d = `decay_at(decay, step)`."""
        averages = [local(average) for average in self.averages.values()]
        weights = [local(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay_at(self.decay, step))

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again from the present weights."""
        for key, parameter in self._parameters.items():
            local(self.averages[key]).copy_(local(parameter))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the networks hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, parameter in self._parameters.items():
            average, weight = local(self.averages[key]), local(parameter)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for network in self._networks:
            forget_gathered(network)
