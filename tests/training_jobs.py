"""A small store with its split, and pretraining jobs on it; what an undisturbed run of one ends with, without Ray."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from making import make_store

from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.split import MakeSplit, Split
from cosmic_ray.training import checkpoint
from cosmic_ray.training.mae_job import PretrainMAE

sys.path.insert(0, str(Path(__file__).parent / "training"))


@dataclass
class Crops:
    """A crop store, its split, and where jobs may write."""

    store: CropStore
    split: str
    folder: str

    @classmethod
    def make(cls, folder: str, rows: int = 240, **options: Any) -> Crops:
        store = make_store(f"{folder}/crops", rows, **{"size": 32, "rows_per_group": 20, **options})
        MakeSplit(store=store.uri, out=f"{folder}/split", near_duplicates={"crops": None, "fields": None}).run()
        return cls(store, f"{folder}/split", folder)

    def opened_split(self) -> Split:
        return Split.open(self.split, self.store)

    def keys(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        """The keys of a small job: 12 steps of 16 crops."""
        keys = {
            "out": f"{self.folder}/{name}",
            "crops": self.store.uri,
            "split": self.split,
            "model": {"preset": "tiny", "img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_dim": 16},
            "steps": 12,
            "global_batch": 16,
            "optim": {"lr": 0.02},
            "log_every": 2,
            "eval": {"every": 6, "crops": 20},
            "checkpoint": {"every": 4},
            "data": {"lanes": 4},
            "tracking": None,
        }
        return keys | changes

    def job(self, name: str = "run", **changes: Any) -> PretrainMAE:
        return PretrainMAE(**self.keys(name, **changes))


def plain(rank: int, world: int, job: PretrainMAE) -> dict[int, str]:
    """Run a job's loop as one rank without Ray; step -> digest of the weights of each checkpoint that is kept."""
    from cosmic_ray.ingest.stream import plain_batches

    job.loop(stream=plain_batches, rank=rank, world=world).run()
    if rank:
        return {}  # rank 0 may still be deleting old checkpoints
    folders = Path(job.out, "checkpoints").iterdir()
    return {int(path.name.removeprefix("step-")): checkpoint.digest(str(path)) for path in folders}


def undisturbed(job: PretrainMAE, world: int) -> dict[int, str]:
    """What `plain` gives on `world` processes of one group."""
    from training_toys import on_ranks

    return on_ranks(world, plain, job)[0]


def stop_after(job: PretrainMAE, world: int, steps: int) -> None:
    """Train `steps` steps on `world` processes, then save and stop."""
    from training_toys import on_ranks

    on_ranks(world, _stopping, job, steps)


def _stopping(rank: int, world: int, job: PretrainMAE, steps: int) -> None:
    from cosmic_ray.ingest.stream import plain_batches

    asked = iter([False] * (steps - 1) + [True] * steps)
    ending = job.loop(stream=plain_batches, rank=rank, world=world, stopping=lambda: next(asked)).run()
    assert ending == ("stopped", steps)
