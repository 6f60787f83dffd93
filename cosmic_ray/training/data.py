"""From a store to the loop: a rank's shares of the training samples, and its part of the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cosmic_ray.errors import JobError
from cosmic_ray.ingest.cursor import Cursor
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.show import crop_ids
from cosmic_ray.ingest.stream import Batch
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.training.objective import Share

Stream = Callable[..., Iterator[Batch]]
"""`ingest.stream.batches`, through Ray Data, or `plain_batches`, in this process."""


class PlannedData:
    """What the loop's `Data` asks for, in the order of a plan; what a sample consists of, its subclasses say."""

    def __init__(self, plan: Plan, held_out: np.ndarray, rank: int, world: int, at_once: int | None):
        """`held_out`: int64 (M,), rows of the store, evaluated in this order at positions 0..M-1, `at_once` at a time;
        by default as many as a rank has of a global batch.

        Raises:
            JobError: where there are too few samples for so many ranks.
        """
        self._plan, self._rank, self._world = plan, rank, world
        self._first, self._last = (len(held_out) * r // world for r in (rank, rank + 1))
        self._held_out_rows = held_out[self._first : self._last]
        at_once = at_once or -(-plan.spec.global_batch // world)
        self._held_out_parts = -(-len(held_out) // (world * at_once))
        require_shares(plan, world)
        if 0 < len(held_out) < world:
            raise JobError("eval.crops", len(held_out), f"fewer held-out crops than the {world} workers")

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        """This rank's share of the global batches `first_step` .. `steps`-1.

        The memory of a share serves again once the next one is asked for.
        """
        for step, tensors in self._steps(first_step, steps):
            positions = self._plan.positions(step, self._lanes)
            yield Share(
                step,
                torch.arange(positions.start, positions.stop),
                tensors,
                self._largest(step),
                names=lambda step=step: self.crop_ids(step),
            )

    def held_out(self) -> Iterator[Share]:
        """This rank's part of the held-out samples; in equally many shares on every rank."""
        count, total = self._held_out_parts, len(self._held_out_rows)
        for start, stop in pairwise(index * total // count for index in range(count + 1)) if total else ():
            positions = torch.arange(self._first + start, self._first + stop)
            yield Share(0, positions, self._held_out(start, stop))

    def cursor(self, step: int) -> dict[str, Any]:
        """The next global sample position of the plan."""
        return Cursor.at(self._plan, step).to_json()

    def require(self, cursor: Mapping[str, Any]) -> None:
        """Raises JobError where `cursor` is another plan's."""
        Cursor.from_json(dict(cursor)).step(self._plan)

    def counts(self) -> dict[str, float]:
        """`excluded_crops`, where the plan excludes any."""
        return {"excluded_crops": float(self._plan.excluded_rows)} if self._plan.spec.exclusions else {}

    def crop_ids(self, step: int) -> list[str]:
        """The ids of this rank's share of global batch `step`, in order."""
        raise NotImplementedError

    def _steps(self, first_step: int, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Each global batch with what this rank has of it."""
        raise NotImplementedError

    def _held_out(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """What this rank evaluates from its held-out row `start` to `stop`-1."""
        raise NotImplementedError

    @property
    def _lanes(self) -> range:
        return self._plan.lanes_of(self._rank, self._world)

    def _largest(self, step: int) -> int:
        lanes = (self._plan.lanes_of(rank, self._world) for rank in range(self._world))
        return max(len(self._plan.positions(step, some)) for some in lanes)


class CropData(PlannedData):
    """The crops of a crop store; `images`: uint8 (n, C, H, W). The held-out ones are read once and kept."""

    def __init__(
        self,
        store: CropStore,
        plan: Plan,
        held_out: np.ndarray,
        stream: Stream,
        rank: int = 0,
        world: int = 1,
        at_once: int | None = None,
    ):
        """As `PlannedData`."""
        super().__init__(plan, held_out, rank, world, at_once)
        self._store, self._stream = store, stream

    def crop_ids(self, step: int) -> list[str]:
        """The ids of this rank's share of global batch `step`, in order."""
        return crop_ids(self._store, self._plan.rank_step(step, self._lanes))

    def _steps(self, first_step: int, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for batch in self._stream(self._store.uri, self._plan, self._rank, self._world, first_step, steps):
            yield batch.step, {"images": batch.images}

    def _held_out(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {"images": self._crops[start:stop]}

    @cached_property
    def _crops(self) -> torch.Tensor:
        return torch.from_numpy(self._store.crops(self._held_out_rows))


def require_shares(plan: Plan, world: int) -> None:
    """Raise JobError where some rank of `world` would get no sample of a global batch."""
    shares = [plan.positions(0, plan.lanes_of(rank, world)) for rank in range(world)]
    if min(len(share) for share in shares) < 2 and world > 1:
        problem = f"a worker's lanes give it hardly a sample of a global batch of {plan.spec.global_batch}"
        raise JobError("scaling.workers", world, problem, "use fewer workers or a larger global_batch")
