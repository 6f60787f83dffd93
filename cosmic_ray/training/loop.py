"""The step loop: plain PyTorch, for every objective; it knows neither Ray nor MLflow.

One step: this rank's share of the global batch in micro-batches; gradients of sums, added up over micro-batches and
ranks; one small all-reduced vector with sums, counts and wishes to stop; then, once: divide by the global count, clip,
step, average. On an accelerator a step's numbers are read while the next one runs, so that the CPU never holds it up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from cosmic_ray.training import checkpoint
from cosmic_ray.training.collective import Collective
from cosmic_ray.training.ema import Ema
from cosmic_ray.training.errors import NonFiniteError
from cosmic_ray.training.meter import Meter
from cosmic_ray.training.objective import Objective, Share
from cosmic_ray.training.optim import adamw
from cosmic_ray.training.parallel import Strategy, wrap
from cosmic_ray.training.schedule import factor
from cosmic_ray.training.settings import Optim, Schedule
from cosmic_ray.training.state import State
from cosmic_ray.training.step import Launched, Stepper

Ending = Literal["finished", "stopped"]


class Data(Protocol):
    """Where the loop's samples come from."""

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        """This rank's share of the global batches `first_step` .. `steps`-1, in order."""

    def held_out(self) -> Iterable[Share]:
        """This rank's part of the held-out samples, the same each time; equally many shares on every rank."""

    def cursor(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps remembers of the data."""

    def require(self, cursor: Mapping[str, Any]) -> None:
        """Raise JobError where `cursor` belongs to other data."""

    def counts(self) -> Mapping[str, float]:
        """What every line of metrics tells of the data: what is left out of it, for one."""


class Callback(Protocol):
    """Told what happens, in plain data, on rank 0 alone. A step is told as the number of steps done."""

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Training begins, or goes on, after `info["step"]` steps."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every `log_every` steps: `train/loss`, `train/lr`, `train/grad_norm`, `train/images_per_s`..."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """`val/loss` and the objective's other metrics."""

    def on_saving(self, step: int) -> None:
        """A checkpoint is about to be published: what was told so far must outlive this process."""

    def on_checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint is published."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know beside the objective and the data."""

    steps: int
    """Optimiser steps in the whole run."""
    global_batch: int
    seed: int
    checkpoints: str
    """URI of the folder of checkpoints."""
    optim: Mapping[str, Optim]
    """By phase."""
    schedule: Schedule = field(default_factory=Schedule)
    ema: float | None = None
    """Decay of the weights' average; None has none."""
    micro_batch: int | None = None
    """The most samples of a rank in one forward pass; None takes its whole share."""
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"
    """`bf16` is autocast: weights, optimiser and sums stay float32. `fp64` is for proofs."""
    compile: bool = False
    strategy: Strategy = "ddp"
    log_every: int = 10
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2


class Loop:
    """Trains an objective from its newest checkpoint to its last step."""

    def __init__(
        self,
        objective: Objective,
        settings: LoopSettings,
        data: Data,
        callbacks: Sequence[Callback] = (),
        device: torch.device | str = "cpu",
        stopping: Callable[[], bool] = lambda: False,
        beat: Callable[[], None] = lambda: None,
    ):
        """Place the networks on `device`, and make optimisers and averages.

        Args:
            callbacks: told on rank 0.
            stopping: whether this process was asked to save and stop; asked once a step.
            beat: called whenever something has moved on, for a watch over hangs.
        """
        self.settings, self.data, self.collective = settings, data, Collective()
        self._objective, self._stopping, self._beat = objective, stopping, beat
        self._device = torch.device(device)
        self._callbacks = list(callbacks) if self.collective.rank == 0 else []
        self._networks = dict(objective.networks())
        _require_exact(self._networks)
        wrapped = {name: self._placed(name, network) for name, network in self._networks.items()}
        trained = {name: self._networks[name] for name in objective.phases}
        self.rates = {name: settings.optim[name].rate(settings.global_batch) for name in trained}
        optimizers = {name: adamw(net, settings.optim[name], self.rates[name]) for name, net in trained.items()}
        ema = None if settings.ema is None else Ema(trained, settings.ema)
        self.state = State(trained, optimizers, ema, self.collective)
        self._stepper = Stepper(
            objective,
            wrapped,
            optimizers,
            {name: settings.optim[name].clip for name in trained},
            self.collective,
            seed=settings.seed,
            micro_batch=settings.micro_batch,
            bf16=settings.precision == "bf16",
            device=self._device,
        )
        self._meter = Meter(settings.global_batch)
        self._saved, self._stop_agreed = -1, False

    def run(self) -> tuple[Ending, int]:
        """Train to the last step, or until asked to stop; returns which, and the steps done. A checkpoint is made.

        Raises:
            NonFiniteError: on every rank alike, where a loss or gradient is not finite.
            DataError: where a checkpoint cannot be read or written.
        """
        first = self._resume()
        parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in self._networks.items()}
        self._tell("on_start", {"step": first, "steps": self.settings.steps, "workers": self.collective.world,
                                "parameters": parameters, "peak_lr": self.rates})  # fmt: skip
        done = self._train(first)
        self._save(done)
        return ("finished" if done == self.settings.steps else "stopped"), done

    def _train(self, first: int) -> int:
        """Train from step `first` until the end or an agreed stop; return the steps done."""
        done, pending = first, None
        self._meter.restart()
        for share in self._shares(first):
            self._set_rates(share.step)
            launched = self._stepper.launch(share, self._stopping())
            if self.state.ema is not None:
                self.state.ema.update(share.step)
            done = share.step + 1
            if pending is not None:
                self._settle(pending)
            pending = launched
            if self._stop_agreed or self._due(done) or self._device.type == "cpu":
                self._settle(pending)
                pending = None
            self._beat()
            if self._stop_agreed:
                break
            self._periodic(done)
        return done

    def _shares(self, first: int) -> Iterator[Share]:
        """The data's shares with the time that was spent waiting for each."""
        shares = iter(self.data.shares(first, self.settings.steps))
        while True:
            asked = time.perf_counter()
            share = next(shares, None)
            if share is None:
                return
            yield replace(share, wait_s=time.perf_counter() - asked)

    def _set_rates(self, step: int) -> None:
        scale = factor(self.settings.schedule, step, self.settings.steps)
        for name, optimizer in self.state.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * scale

    def _due(self, done: int) -> bool:
        every = (self.settings.checkpoint_every, self.settings.eval_every)
        return done == self.settings.steps or any(done % steps == 0 for steps in every)

    def _periodic(self, done: int) -> None:
        """Evaluate and save where it is time; the time that takes is no part of the throughput."""
        last = done == self.settings.steps
        with self._meter.paused():
            if last or done % self.settings.eval_every == 0:
                self._evaluate(done)
            if not last and done % self.settings.checkpoint_every == 0:
                self._save(done)

    def _settle(self, launched: Launched) -> None:
        """Read a step's numbers: the same on every rank, so that all decide alike."""
        numbers = launched.pending.read()
        step, steps = launched.share.step, self.settings.steps
        if problem := numbers.non_finite():
            raise self._non_finite(launched, problem)
        self._stop_agreed |= numbers.told["stop"] > 0
        scale = factor(self.settings.schedule, step, steps)
        rates = {self._stepper.name_of(phase, "lr"): rate * scale for phase, rate in self.rates.items()}
        self._meter.add(numbers.sums, {**numbers.norms, **rates}, numbers.told["wait_s"] / self.collective.world)
        done = step + 1
        if done % self.settings.log_every == 0 or done == steps:
            line = {**self._meter.line(), **self.data.counts()}
            self._tell("on_step", done, {f"train/{name}": value for name, value in line.items()})

    def _non_finite(self, launched: Launched, problem: str) -> NonFiniteError:
        """The same error on every rank."""
        mine = (launched.suspects(), launched.share.names())
        suspects, batch = zip(*self.collective.gather(mine), strict=True)
        every = [name for names in batch for name in names]
        return NonFiniteError(
            launched.share.step, problem, [name for names in suspects for name in names] or every, every
        )

    def _evaluate(self, done: int) -> None:
        """The held-out metrics of the weights that would be exported: the averages, where there are any."""
        for network in self._networks.values():
            network.eval()
        with self.state.ema.applied() if self.state.ema is not None else nullcontext():
            means = self._stepper.held_out(self._beating(self.data.held_out()))
        for network in self._networks.values():
            network.train()
        self._tell("on_eval", done, {f"val/{name}": value for name, value in means.items()})

    def _beating(self, shares: Iterable[Share]) -> Iterator[Share]:
        for share in shares:
            self._beat()
            yield share

    # Checkpoints

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one; return the steps done."""
        newest = checkpoint.newest(self.settings.checkpoints) if self.collective.rank == 0 else None
        uri, state = self.collective.share((newest, checkpoint.read_state(newest) if newest else None))
        if uri is None:
            return 0
        self.data.require(state["cursor"])
        self.state.restore(uri)
        self._saved = state["step"]
        self._beat()
        return self._saved

    def _save(self, done: int) -> None:
        """Publish a checkpoint after `done` steps, unless there is one; forget the oldest."""
        if done == self._saved:
            return
        self._tell("on_saving", done)
        record = {"step": done, "cursor": self.data.cursor(done), "workers": self.collective.world}
        uri = self.state.save(self.settings.checkpoints, done, record)
        self._saved = done
        if self.collective.rank == 0:
            checkpoint.retain(self.settings.checkpoints, self.settings.keep)
        self._tell("on_checkpoint", done, uri)
        self._beat()

    def _placed(self, name: str, network: nn.Module) -> nn.Module:
        """The network on the device, in its precision, compiled, and wrapped for its strategy."""
        network.to(self._device, torch.float64 if self.settings.precision == "fp64" else torch.float32)
        blocks = self._objective.blocks(name)
        if self.settings.compile:
            for block in blocks:
                block.compile()
        return wrap(network.train(), blocks, self.settings.strategy, self.collective)

    def _tell(self, event: str, *facts: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*facts)


def _require_exact(networks: Mapping[str, nn.Module]) -> None:
    """Refuse what depends on how a batch is cut."""
    for name, network in networks.items():
        for key, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise TypeError(f"{name}.{key} is a BatchNorm: its statistics depend on how a global batch is cut")
