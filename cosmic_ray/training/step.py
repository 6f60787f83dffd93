"""One step of training on every rank, and one look at the held-out samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from cosmic_ray.errors import JobError
from cosmic_ray.training.collective import Collective
from cosmic_ray.training.numbers import Key, Pending
from cosmic_ray.training.objective import LOSS, Objective, Share, Sum
from cosmic_ray.training.optim import finish_gradient, trained_by
from cosmic_ray.training.parallel import syncing


@dataclass
class Launched:
    """A step whose device work is queued."""

    share: Share
    pending: Pending
    parts: list[tuple[Share, torch.Tensor]]
    """This rank's micro-batches of each phase with the sum of their loss."""

    def suspects(self) -> list[str]:
        """The ids of this rank's samples in micro-batches whose loss is not finite."""
        bad = [part for part, loss in self.parts if not torch.isfinite(loss)]
        return list(dict.fromkeys(name for part in bad for name in part.names()))


class Stepper:
    """Turns shares into steps; its only state is the networks' and optimisers'."""

    def __init__(
        self,
        objective: Objective,
        wrapped: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.AdamW],
        clips: Mapping[str, float | None],
        collective: Collective,
        *,
        seed: int,
        micro_batch: int | None,
        bf16: bool,
        device: torch.device,
    ):
        """`wrapped`: the networks, ready for their strategy. `clips`: by phase. The rest as in `LoopSettings`."""
        self._objective, self._wrapped, self._optimizers, self._clips = objective, wrapped, optimizers, clips
        self._collective, self._seed, self._micro_batch, self._bf16 = collective, seed, micro_batch, bf16
        self._device = device

    def launch(self, share: Share, stopping: bool) -> Launched:
        """Queue all device work of one step: every phase's gradients, their reduction, and its optimiser's step.

        `stopping`: this rank's wish to stop, told to all. The caller has set the learning rates.

        Raises:
            JobError: where a rank's share is too small to be cut as the other ranks' shares are.
        """
        parts = list(self._parts(share.to(self._device)))
        scalars: dict[Key, torch.Tensor] = {}
        kept: list[tuple[Share, torch.Tensor]] = []
        told = {"stop": float(stopping), "wait_s": share.wait_s}
        for phase in self._objective.phases:
            with self._only(phase):
                sums, losses = self._backward(phase, parts)
            scalars |= self._update(phase, sums, told)
            kept += zip(parts, losses, strict=True)
            told = {}
        return Launched(share, Pending(scalars), kept)

    @torch.no_grad()
    def held_out(self, shares: Iterable[Share]) -> dict[str, float]:
        """Each metric's mean over the held-out samples of all ranks."""
        totals: dict[str, Sum] = {}
        for share in shares:
            for part in self._parts(share.to(self._device)):
                with self._autocast():
                    _add(totals, self._objective.metrics(self._wrapped, part, self._seed))
        if not totals:
            return {}
        vector = self._collective.sum(torch.stack([value for pair in totals.values() for value in pair]))
        return {name: total / count for name, (total, count) in zip(totals, vector.view(-1, 2).tolist(), strict=True)}

    def name_of(self, phase: str, name: str) -> str:
        """A phase's metric: its plain name where there is but one phase."""
        return name if len(self._objective.phases) == 1 else f"{phase}/{name}"

    def _parts(self, share: Share) -> Iterator[Share]:
        """Micro-batches, equally many on every rank: under FSDP2 each forward pass is a collective."""
        largest = max(share.largest, len(share))
        count = -(-largest // self._micro_batch) if self._micro_batch else 1
        if count > len(share):
            problem = f"a rank has {len(share)} samples of a step and another {largest}: not enough for {count} parts"
            raise JobError("micro_batch", self._micro_batch, problem, "choose a larger one, or fewer workers")
        for part in range(count):
            yield share.part(part * len(share) // count, (part + 1) * len(share) // count)

    def _backward(self, phase: str, parts: list[Share]) -> tuple[dict[str, Sum], list[torch.Tensor]]:
        """Gradients of the loss's sum over all ranks; this rank's sums, and the loss of each micro-batch."""
        self._optimizers[phase].zero_grad(set_to_none=True)
        totals: dict[str, Sum] = {}
        losses = []
        for part in parts:
            with syncing(self._wrapped[phase], part is parts[-1]):
                with self._autocast():
                    sums = self._objective.losses(self._wrapped, part, self._seed, phase)
                sums[LOSS][0].backward()
            _add(totals, sums)
            losses.append(sums[LOSS][0].detach())
        return totals, losses

    def _update(self, phase: str, sums: Mapping[str, Sum], told: Mapping[str, float]) -> dict[Key, torch.Tensor]:
        """Reduce the sums, finish the gradient and step; the reduced scalars."""
        scalars: dict[Key, torch.Tensor] = {
            ("told", name): torch.full((), value, dtype=torch.float64, device=self._device)
            for name, value in told.items()
        }
        for name, (total, count) in sums.items():
            scalars["sum", self.name_of(phase, name)] = total
            scalars["count", self.name_of(phase, name)] = count
        reduced = self._collective.sum(torch.stack(list(scalars.values())))
        scalars = dict(zip(scalars, reduced, strict=True))
        optimizer = self._optimizers[phase]
        count = scalars["count", self.name_of(phase, LOSS)]
        norm = finish_gradient(trained_by(optimizer), count, self._clips[phase])
        optimizer.step()
        return scalars | {("norm", self.name_of(phase, "grad_norm")): norm}

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext()

    @contextmanager
    def _only(self, phase: str) -> Iterator[None]:
        """Within, only the network of `phase` gets gradients, where several are trained."""
        others = [name for name in self._objective.phases if name != phase]
        parameters = [parameter for name in others for parameter in trained_by(self._optimizers[name])]
        for parameter in parameters:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            for name in others:
                stack.enter_context(syncing(self._wrapped[name], False))
            yield
        for parameter in parameters:
            parameter.requires_grad_(True)


def _add(totals: dict[str, Sum], sums: Mapping[str, Sum]) -> None:
    """Add float64 copies of `sums` to `totals`; float32 would lose the last images of a large batch."""
    for name, (total, count) in sums.items():
        total, count = total.detach().double(), count.detach().double()
        before = totals.get(name)
        totals[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
