"""What one kind of training adds to the trainer: its inputs, its objective with its samples, and what it leaves.

A stage is made anew in the driver and in every worker, from the job alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cosmic_ray import storage
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.output import MANIFEST

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from cosmic_ray.ingest.plan import Plan
    from cosmic_ray.output import Output
    from cosmic_ray.registry.package import ModelConfig
    from cosmic_ray.stores.cells import CellStore
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.stores.split import Split
    from cosmic_ray.training.base import TrainingJob
    from cosmic_ray.training.data import Stream
    from cosmic_ray.training.loop import Data
    from cosmic_ray.training.objective import Objective

Opened = TypeVar("Opened")


class Stage(ABC):
    """A training job's inputs, opened and checked, and what its kind makes of them.

    Raises, as it is made:
        JobError: where an input is missing or does not fit the job.
        DataError: where an input is damaged.
    """

    inputs: ClassVar[Mapping[str, str]]
    """The job's keys that name what it reads and that a manifest makes real, each with the kind of job that makes it;
    `split` aside."""

    samples: ClassVar[str]
    """What it trains on, in the plural."""

    picture: ClassVar[str | None] = None
    """Name of the picture that `export` leaves below `out`."""

    plan: Plan
    held_out: np.ndarray
    """Rows of the split's `val` that the job looks at: int64, ascending."""

    def __init__(self, job: TrainingJob):
        self.job = job
        self.store = self.open_store()
        self.split = self.opened("split", self._open_split, "split")

    @abstractmethod
    def open_store(self) -> CropStore | CellStore:
        """The store whose rows are split and planned."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a sample as it is read ahead."""

    @abstractmethod
    def network(self) -> nn.Module:
        """All that is trained, as one module, for its parameters to be counted."""

    @abstractmethod
    def objective(self, begins: bool) -> Objective:
        """The objective; `begins`: with the weights that a new run begins with, else those of a checkpoint follow."""

    @abstractmethod
    def data(self, stream: Stream, rank: int, world: int) -> Data:
        """One rank's samples. `stream` reads crops, where it reads any."""

    @abstractmethod
    def export(self, output: Output, newest: str, lineage: dict[str, Any], metrics: dict[str, float]) -> ModelConfig:
        """Write the model folder, from the checkpoint at `newest`, and the picture, if there is one."""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.job.steps or self.plan.steps(self.job.epochs)

    @property
    def simulated(self) -> bool:
        """Whether any of the training data comes from a simulator."""
        return self.store.simulated

    @cached_property
    def parameters(self) -> int:
        """Parameters of the network, which is not made for that.

        Raises:
            JobError: for sizes that do not fit each other.
        """
        import torch

        try:
            with torch.device("meta"):
                return sum(parameter.numel() for parameter in self.network().parameters())
        except (ValueError, AssertionError) as error:
            keys = self.job.model.model_dump(exclude_none=True)
            raise JobError("model", keys, str(error)) from None

    def check(self) -> None:
        """Everything that can be known without Ray.

        Raises:
            JobError: naming the key, its value and the remedy.
        """
        from cosmic_ray.registry.register import check_alias
        from cosmic_ray.training.data import require_shares
        from cosmic_ray.training.disk import require_disk

        most = self.job.scaling.most
        self.plan.lanes_of(0, most)
        require_shares(self.plan, most)
        if self.job.tracking:
            check_alias(self.job.tracking.alias, "tracking.alias")
        require_disk(self.job, self.parameters)

    def mend(self, output: Output) -> Callable[[Mapping[str, Any]], bool]:
        """Whether the run can go on after a failure that starting again alone would not mend; see `driver.train`."""
        return lambda failure: False

    def lineage(self, output: Output) -> dict[str, Any]:
        """What the run is made from; may leave things below `out`."""
        return {
            "store": {"uri": self.store.uri, "content_hash": self.store.content_hash},
            "split": {"uri": self.job.split, "content_hash": self.split.content_hash},
            "plan": self.plan.digest,
            "job": self.job.fingerprint(),
        }

    def counts(self) -> dict[str, float]:
        """What the results tell of the data beside the metrics."""
        return {}

    def manifests(self) -> dict[str, str]:
        """By key, what every node has to see."""
        return {key: storage.join(getattr(self.job, key), MANIFEST) for key in (*self.inputs, "split")}

    def opened(self, key: str, opening: Callable[[], Opened], kind: str) -> Opened:
        """`opening()`; where there is nothing, a JobError that names `key` and the kind of job that makes it."""
        try:
            return opening()
        except NotFoundError as error:
            raise JobError(
                key, getattr(self.job, key), error.problem, f"run the {kind} job that makes it first"
            ) from None

    def _open_split(self) -> Split:
        from cosmic_ray.stores.split import Split

        return Split.open(self.job.split, self.store)
