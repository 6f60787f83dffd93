"""What ranks say to each other beside gradients: one small vector a step, and rarely an object or a tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Collective:
    """The process group of a run, or the lack of one: a single process needs none."""

    def __init__(self) -> None:
        here = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if here else 0
        self.world: int = dist.get_world_size() if here else 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all ranks, in place, the same on every rank."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (plain data), in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor` on every rank, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def share(self, value: Any) -> Any:
        """Rank 0's `value` (plain data) on every rank."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]
