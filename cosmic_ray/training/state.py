"""All that training changes: weights, their averages, the optimisers' moments; to a checkpoint and back.

Tensors are whole in a checkpoint, whatever the strategy, so that a run goes on with another one or other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cosmic_ray.errors import DataError
from cosmic_ray.training import checkpoint
from cosmic_ray.training.collective import Collective
from cosmic_ray.training.ema import Ema
from cosmic_ray.training.optim import MOMENTS
from cosmic_ray.training.parallel import fill, whole


@dataclass(frozen=True)
class State:
    """The networks of an objective and what trains them. With several ranks, all methods are called by all together."""

    networks: Mapping[str, nn.Module]
    """As the objective made them, sharded in place under FSDP2."""
    optimizers: Mapping[str, torch.optim.AdamW]
    """By the name of the network."""
    ema: Ema | None
    collective: Collective

    def nbytes(self) -> int:
        """What a checkpoint takes."""
        return sum(
            tensor.numel() * tensor.element_size() for tensors in self._files().values() for tensor in tensors.values()
        )

    def save(self, checkpoints: str, step: int, state: Mapping[str, Any]) -> str:
        """Publish the checkpoint after `step` steps; return its URI.

        Raises:
            DataError: where there is no room for it.
        """
        files = self._files()
        if self.collective.rank == 0:
            makers = {name: _gather(tensors) for name, tensors in files.items()}
            uri = checkpoint.publish(checkpoints, step, makers, state, self.nbytes())
        else:
            uri = checkpoint.folder(checkpoints, step)
            for tensors in files.values():
                _gather(tensors)()
        self.collective.sum(torch.zeros(1, device=self._device()))  # nobody goes on before it is published
        return uri

    def restore(self, uri: str) -> None:
        """Load the checkpoint at `uri`.

        Raises:
            DataError: where it is not what was written, or belongs to other networks.
        """
        for name, tensors in self._files().items():
            self._read(uri, name, tensors)

    def _read(self, uri: str, name: str, wanted: Mapping[str, torch.Tensor]) -> None:
        stored = checkpoint.read_tensors(uri, name) if self.collective.rank == 0 else {}
        if self.collective.rank == 0:
            _require_fit(uri, name, stored, wanted)
        for key, tensor in wanted.items():
            fill(tensor, stored.get(key), self.collective)

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        files = {checkpoint.WEIGHTS: dict(self._weights())}
        if self.ema is not None:
            files[checkpoint.EMA] = dict(self.ema.averages)
        files[checkpoint.OPTIMIZER] = dict(self._moments())
        return files

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, network in self.networks.items():
            for key, tensor in network.state_dict().items():
                yield f"{name}.{key}", tensor

    def _moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, optimizer in self.optimizers.items():
            for key, parameter in self.networks[name].named_parameters():
                if parameter in optimizer.state:
                    for moment in ("step", *MOMENTS):
                        yield f"{name}.{key}/{moment}", optimizer.state[parameter][moment]

    def _device(self) -> torch.device:
        return next(parameter.device for network in self.networks.values() for parameter in network.parameters())


def _gather(tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {key: whole(tensor) for key, tensor in tensors.items()}


def _require_fit(uri: str, name: str, stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(set(wanted) - set(stored))
    surplus = sorted(set(stored) - set(wanted))
    other = [key for key in wanted if key in stored and stored[key].shape != wanted[key].shape]
    if missing or surplus or other:
        found = [f"no {missing[0]}"] if missing else []
        found += [f"a surplus {surplus[0]}"] if surplus else []
        found += [f"{other[0]} of shape {tuple(stored[other[0]].shape)}"] if other else []
        raise DataError(f"{uri}/{name}", f"belongs to another network: {', '.join(found)}", "was the model changed?")
