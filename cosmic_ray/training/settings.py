"""The keys that every training job shares: optimiser, schedule, checkpoints, evaluation, data order, scaling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cosmic_ray.config import Config, Uri

REFERENCE_BATCH = 256
"""The global batch that `optim.lr` speaks of."""
Count = Annotated[int, Field(ge=1)]


class Optim(Config):
    """AdamW (Loshchilov & Hutter 2019), and the rule for its learning rate."""

    lr: float = Field(1.5e-4, gt=0)
    """Learning rate at a global batch of 256. What is used at another one, `lr_rule` says. (App. A states 1.5e-4 at
    batch 256, where base and actual rate agree.)"""

    lr_rule: Literal["linear", "sqrt", "fixed"] = "linear"
    """How the rate follows the global batch B: `linear` lr * B / 256 (Goyal et al. 2017; the MAE paper's rule), `sqrt`
    lr * sqrt(B / 256) (Malladi et al. 2022, for Adam), `fixed` lr as it stands."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay."""

    decay: Literal["matrices", "all"] = "matrices"
    """What decays: `matrices`, parameters of two or more dimensions (no bias, no norm), or `all`."""

    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; null never clips."""

    def rate(self, global_batch: int) -> float:
        """The peak learning rate at `global_batch`."""
        ratio = global_batch / REFERENCE_BATCH
        return self.lr * {"linear": ratio, "sqrt": ratio**0.5, "fixed": 1.0}[self.lr_rule]


class Schedule(Config):
    """The learning rate over the run, as a factor of its peak."""

    kind: Literal["cosine", "constant"] = "cosine"
    """`cosine` falls from the peak to `final` over the rest of the run; `constant` stays."""

    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the run's steps over which the rate rises linearly to its peak."""

    final: float = Field(0.0, ge=0, le=1)
    """Factor at the end of `cosine`."""


class Checkpointing(Config):
    """What a kill may cost, and what it costs to be safe."""

    every: int = Field(1000, ge=1)
    """Steps between checkpoints: the most that a kill throws away. One is always made at the end."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""


class Evaluation(Config):
    """The loss on the split's `val` part, with the weights that would be exported and noise that never changes."""

    every: int = Field(1000, ge=1)
    """Steps between evaluations. One is always made at the end."""

    crops: int = Field(2048, ge=1)
    """The most crops looked at; they stay in memory."""


class DataOrder(Config):
    """The order of the training crops; see `cosmic_ray.ingest.plan`."""

    lanes: int = Field(16, ge=1)
    """The most lanes; each worker owns whole ones, so this bounds the workers too. Fewer where the store is small."""

    window: int = Field(4, ge=1)
    """Row groups whose crops are shuffled together in each lane."""

    remainder: Literal["carry", "drop"] = "carry"
    """What an epoch leaves over of its last global batch goes on into the next epoch, or is dropped."""


class Scaling(Config):
    """Workers and what each of them gets. Another number of workers continues the same run."""

    workers: Count | tuple[Count, Count] = 1
    """Training processes; the global batch is shared among them. `[2, 8]`: as many as there is room for, between the
    two; fewer when nodes go, more when they come. The samples of every global batch stay the same."""

    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray sets aside for a worker; its threads are this, rounded down, and at least 1."""

    cpus_per_reader: float = Field(0.25, gt=0)
    """CPUs set aside beside each worker, on its node, for Ray Data to read for it."""

    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker; null takes one where the cluster has any."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp` keeps the whole network on each worker; `fsdp2` shards weights, gradients and optimiser over them."""

    max_failures: int = Field(3, ge=0)
    """Worker deaths or hangs in a row, without a new checkpoint in between, before the run gives up."""

    hang_timeout_s: float = Field(600.0, gt=0)
    """A worker without progress for so long is ended, and the run goes on from its newest checkpoint. It must exceed
    the longest step, the compilation of the first one included."""

    grow_every_s: float = Field(60.0, gt=0)
    """Of a range of workers: seconds from one look for room for more workers to the next. Growing costs no step, but
    the start of the new workers."""

    patience_s: float = Field(1800.0, gt=0)
    """Seconds to wait for room for the fewest workers, at the start and after nodes went, before the run gives up; the
    same file goes on from its newest checkpoint."""

    @property
    def fewest(self) -> int:
        """The least workers that the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers that it uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @field_validator("workers")
    @classmethod
    def _ascending(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError("a range is written [fewest, most]")
        return workers


class Tracking(Config):
    """MLflow: one run for this job, however often it is interrupted, and the registered model."""

    uri: Uri | None = None
    """Tracking URI; by default MLFLOW_TRACKING_URI, else `sqlite:///runs/mlflow.db` in the working directory."""

    register_as: str | None = "morphology-fm"
    """Name of the registered model; null registers none."""

    alias: str = "candidate"
    """Alias of the version that this run registers."""
