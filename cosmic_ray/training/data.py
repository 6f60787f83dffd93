"""From a crop store to the loop: a rank's shares of the training crops, and its part of the held-out ones."""

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


class CropData:
    """What the loop's `Data` asks for, from a crop store."""

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
        """`held_out`: int64 (M,), rows of the store, evaluated in this order at positions 0..M-1, `at_once` at a time;
        by default as many as a rank has of a global batch.

        Raises:
            JobError: where there are too few samples for so many ranks.
        """
        self._store, self._plan, self._stream = store, plan, stream
        self._rank, self._world = rank, world
        self._first, self._last = (len(held_out) * r // world for r in (rank, rank + 1))
        self._held_out_rows = held_out[self._first : self._last]
        at_once = at_once or -(-plan.spec.global_batch // world)
        self._held_out_parts = -(-len(held_out) // (world * at_once))
        require_shares(plan, world)
        if 0 < len(held_out) < world:
            raise JobError("eval.crops", len(held_out), f"fewer held-out crops than the {world} workers")

    def shares(self, first_step: int, steps: int) -> Iterator[Share]:
        """This rank's share of the global batches `first_step` .. `steps`-1; `images`: uint8 (n, C, H, W).

        The memory of a share serves again once the next one is asked for.
        """
        for batch in self._stream(self._store.uri, self._plan, self._rank, self._world, first_step, steps):
            yield Share(
                batch.step,
                batch.positions,
                {"images": batch.images},
                self._largest(batch.step),
                names=lambda step=batch.step: self.crop_ids(step),
            )

    def held_out(self) -> list[Share]:
        """This rank's part of the held-out crops, read once and kept; in equally many shares on every rank."""
        if not len(self._held_out_rows):
            return []
        count, total = self._held_out_parts, len(self._held_out)
        cuts = [index * total // count for index in range(count + 1)]
        return [self._held_out.part(start, stop) for start, stop in pairwise(cuts)]

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
        return crop_ids(self._store, self._plan.rank_step(step, self._plan.lanes_of(self._rank, self._world)))

    @cached_property
    def _held_out(self) -> Share:
        crops = torch.from_numpy(self._store.crops(self._held_out_rows))
        return Share(0, torch.arange(self._first, self._last), {"images": crops})

    def _largest(self, step: int) -> int:
        lanes = (self._plan.lanes_of(rank, self._world) for rank in range(self._world))
        return max(len(self._plan.positions(step, some)) for some in lanes)


def require_shares(plan: Plan, world: int) -> None:
    """Raise JobError where some rank of `world` would get no sample of a global batch."""
    shares = [plan.positions(0, plan.lanes_of(rank, world)) for rank in range(world)]
    if min(len(share) for share in shares) < 2 and world > 1:
        problem = f"a worker's lanes give it hardly a sample of a global batch of {plan.spec.global_batch}"
        raise JobError("scaling.workers", world, problem, "use fewer workers or a larger global_batch")
