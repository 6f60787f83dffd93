"""What is trained: the contract between the step loop and every network, and the samples that it is given.

An objective owns one or several networks and says what their losses are, as sums and counts: the loop adds both up
over micro-batches and ranks, so that the loss is the mean over the whole global batch however it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

Sum = tuple[torch.Tensor, torch.Tensor]
"""A sum over elements and the number (or total weight) of these elements: two scalars. Only the sum has a gradient."""

LOSS = "loss"
"""The entry of a phase's losses that its optimiser minimises."""


@dataclass(frozen=True)
class Share:
    """One rank's share of a global batch, or a part of it."""

    step: int
    """Global batch, from 0."""
    positions: torch.Tensor
    """Int64 (n,): global sample positions, the key of every sample's randomness."""
    tensors: Mapping[str, torch.Tensor]
    """What the objective reads, by name; each (n, ...)."""
    largest: int = 0
    """The largest share of any rank in this step; 0 where this is it."""
    wait_s: float = 0.0
    """Seconds that the loop waited for it."""
    names: Callable[[], list[str]] = list
    """The samples' ids, looked up only when they have to be told."""

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int) -> Share:
        """Samples `start` .. `stop`-1."""
        tensors = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
        return replace(
            self, positions=self.positions[start:stop], tensors=tensors, names=lambda: self.names()[start:stop]
        )

    def to(self, device: torch.device) -> Share:
        """The same on `device`; pinned memory is copied without waiting."""
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, positions=self.positions.to(device, non_blocking=True), tensors=tensors)


class Objective(Protocol):
    """What the step loop trains.

    All randomness is keyed by (seed, position, purpose) as in `ingest.keyed`, so that a loss does not depend on how the
    global batch was cut. No network may hold a BatchNorm, whose statistics would.
    """

    phases: tuple[str, ...]
    """The networks that have an optimiser, in the order in which they step: one phase each in every step. (A generator
    and its discriminator are two phases; a network that is only read is in none.)"""

    def networks(self) -> Mapping[str, nn.Module]:
        """Every network by name, made once. Parameters without `requires_grad` stay as they are."""

    def blocks(self, name: str) -> list[nn.Module]:
        """The repeated parts of a network: what FSDP2 shards and `torch.compile` compiles, one by one."""

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        """The sums of a training phase on augmented samples: `loss`, and what else is worth a curve.

        `networks` are those of `networks()`, wrapped for their parallel strategy: call them, do not reach inside.
        The names are the same in every call. Only the network of `phase` gets gradients.
        """

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        """The sums on held-out samples, without augmentation: `loss` among them."""
