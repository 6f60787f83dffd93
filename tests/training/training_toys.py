"""A small objective with a known loss, data without a store, and real process groups, for the loop's own tests."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cosmic_ray.ingest import keyed
from cosmic_ray.training.loop import LoopSettings
from cosmic_ray.training.objective import Share, Sum
from cosmic_ray.training.settings import Optim, Schedule

GLOBAL_BATCH, WIDTH = 24, 5


class Regression:
    """Masked regression: a sample counts a keyed 1 to 4 of its outputs, so shares differ in weight and in size."""

    phases = ("net",)

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))

    def networks(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def blocks(self, name: str) -> list[nn.Module]:
        return [self.net[0], self.net[3]]

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        return self._sums(networks, share, keyed.bits(seed, share.positions, "kept", 1) % 4)

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        return self._sums(networks, share, torch.full((len(share), 1), 3))

    def _sums(self, networks: Mapping[str, nn.Module], share: Share, last: torch.Tensor) -> dict[str, Sum]:
        inputs = share.tensors["inputs"].to(self.net[0].weight.dtype)
        mask = torch.arange(4)[None] <= last
        error = (networks["net"](inputs) - inputs[:, :4].sin()) ** 2
        return {
            "loss": ((error * mask).sum(), mask.sum()),
            "share_of_ones": ((last == 0).sum().double(), torch.tensor(len(share))),
        }


class Adversaries:
    """A generator and a discriminator, one optimiser each: the generator's loss runs through the discriminator."""

    phases = ("generator", "discriminator")

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.nets = nn.ModuleDict({"generator": nn.Linear(2, WIDTH), "discriminator": nn.Linear(WIDTH, 1)})

    def networks(self) -> Mapping[str, nn.Module]:
        return dict(self.nets)

    def blocks(self, name: str) -> list[nn.Module]:
        return []

    def losses(self, networks: Mapping[str, nn.Module], share: Share, seed: int, phase: str) -> dict[str, Sum]:
        noise = keyed.normal(seed, share.positions, "noise", 2).to(self.nets["generator"].weight.dtype)
        made = networks["generator"](noise)
        count = torch.tensor(len(share))
        if phase == "generator":
            return {"loss": (nn.functional.softplus(-networks["discriminator"](made)).sum(), count)}
        real = share.tensors["inputs"].to(noise.dtype)
        judged = networks["discriminator"](torch.cat([made.detach(), real]))
        signs = torch.cat([torch.ones(len(share), 1), -torch.ones(len(share), 1)])
        return {"loss": (nn.functional.softplus(judged * signs).sum(), count)}

    def metrics(self, networks: Mapping[str, nn.Module], share: Share, seed: int) -> dict[str, Sum]:
        return self.losses(networks, share, seed, "discriminator")


class Samples:
    """Inputs drawn from their global position; a rank's slice of a global batch is contiguous and unequal."""

    def __init__(self, rank: int = 0, world: int = 1, poison: int | None = None, batch: int = GLOBAL_BATCH):
        self._rank, self._world, self._poison, self._batch = rank, world, poison, batch
        self._cuts = [round(batch * (r / world) ** 1.3) for r in range(world + 1)]

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        for step in range(first_step, steps):
            low, high = (step * self._batch + self._cuts[self._rank + i] for i in (0, 1))
            yield self._share(step, torch.arange(low, high))

    def held_out(self) -> list[Share]:
        low, high = (20 * r // self._world for r in (self._rank, self._rank + 1))
        return [self._share(0, torch.arange(10**6 + low, 10**6 + high))]

    def cursor(self, step: int) -> dict[str, Any]:
        return {"position": step * self._batch}

    def counts(self) -> dict[str, float]:
        return {}

    def require(self, cursor: Mapping[str, Any]) -> None:
        assert cursor["position"] % self._batch == 0

    def _share(self, step: int, positions: torch.Tensor) -> Share:
        inputs = keyed.normal(1, positions, "inputs", WIDTH).double()
        if self._poison is not None:
            inputs[positions == self._poison] = torch.inf
        largest = 0 if positions[0] >= 10**6 else max(b - a for a, b in itertools.pairwise(self._cuts))
        return Share(step, positions, {"inputs": inputs}, largest, names=lambda: [f"crop-{p}" for p in positions])


def settings(folder: str, **changes: Any) -> LoopSettings:
    """Float64, AdamW with a high rate, a schedule that moves, clipping that bites, EMA."""
    optim = Optim(lr=0.02, lr_rule="fixed", clip=0.3, weight_decay=0.1)
    given = {
        "steps": 20,
        "global_batch": GLOBAL_BATCH,
        "seed": 3,
        "checkpoints": folder,
        "optim": {"net": optim, "generator": optim, "discriminator": optim},
        "schedule": Schedule(warmup=0.2),
        "ema": 0.9,
        "precision": "fp64",
        "log_every": 5,
        "eval_every": 5,
        "checkpoint_every": 10,
    }
    return LoopSettings(**(given | changes))


class Recorder:
    """Keeps what a loop tells."""

    def __init__(self):
        self.told: list[tuple] = []

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *facts: self.told.append((event, *facts))

    def metrics(self, name: str) -> dict[int, float]:
        events = ("on_step", "on_eval")
        return {fact[1]: fact[2][name] for fact in self.told if fact[0] in events and name in fact[2]}


def on_ranks(world: int, scenario: Callable[..., Any], *args: Any) -> list[Any]:
    """`scenario(rank, world, *args)` in `world` processes of one gloo group: what each returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cosmic_ray.training.mae", "cosmic_ray.training.data", "torch._dynamo", "torch.distributed.fsdp"]
    )
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, scenario, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
    for result in found:
        if isinstance(result, _Failure):
            raise AssertionError(result.text)
    return found


class _Failure:
    def __init__(self, text: str):
        self.text = text


def _rank(rank: int, world: int, folder: str, scenario: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        result = scenario(rank, world, *args)
    except BaseException:
        result = _Failure(traceback.format_exc())
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
