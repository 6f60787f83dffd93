"""From a `pretrain-mae` job to its parts: inputs, plan, network, loop; the same in a worker and in a plain process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cosmic_ray import storage
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.training import beginning, checkpoint, exclusions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cosmic_ray.ingest.plan import Plan
    from cosmic_ray.models.mae import MAEConfig
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.stores.split import Split
    from cosmic_ray.training.data import Stream
    from cosmic_ray.training.job import PretrainMAE
    from cosmic_ray.training.loop import Callback, Loop

MODEL_DECODER = ("mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "background_weight")
MODEL_ENCODER = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")


@dataclass(frozen=True)
class Inputs:
    """What a job reads and what follows from it."""

    store: CropStore
    split: Split
    plan: Plan
    held_out: np.ndarray
    """Rows of the split's `val` that the job's filter and exclusions leave: int64, ascending."""
    steps: int
    model: MAEConfig
    left_out: list[exclusions.Exclusion]


def inputs(job: PretrainMAE) -> Inputs:
    """Open the store and its split, and make the plan.

    Raises:
        JobError: where an input is missing or does not fit the job.
        DataError: where an input is damaged.
    """
    store, split = opened(job)
    model = mae_config(job, store)
    plan, held_out = planned(job, store, split)
    left_out = exclusions.read(job.out)
    steps, held_out = job.steps or plan.steps(job.epochs), exclusions.kept(left_out, store, held_out)
    return Inputs(store, split, exclusions.applied(left_out, plan), held_out, steps, model, left_out)


def opened(job: PretrainMAE) -> tuple[CropStore, Split]:
    """The job's store and its split. Raises as `inputs`."""
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.stores.split import Split

    store = _opened("crops", job.crops, lambda: CropStore.open(job.crops), "build-crops")
    return store, _opened("split", job.split, lambda: Split.open(job.split, store), "split")


def planned(job: PretrainMAE, store: CropStore, split: Split) -> tuple[Plan, np.ndarray]:
    """The plan of the training crops, without exclusions, and the rows that are held out. Raises as `inputs`."""
    from cosmic_ray.ingest.mixing import mixed
    from cosmic_ray.ingest.plan import Plan
    from cosmic_ray.ingest.selection import Selection
    from cosmic_ray.ingest.where import matching

    selection, held_out = Selection.of(store, split, "train"), split.rows("val")
    if job.where:
        kept, all_held_out = matching(store, job.where), held_out
        selection, held_out = selection.narrowed(kept), held_out[kept[held_out]]
        if len(all_held_out) and not len(held_out):
            raise JobError("where", job.where, "no held-out crop meets the conditions", "widen them")
    if job.mixing:
        selection = mixed(store, selection, job.mixing, job.seed)
    order = job.data
    options = {"lanes": order.lanes, "window": order.window, "remainder": order.remainder}
    return Plan.fitted(store.content_hash, selection, job.global_batch, job.seed, **options), held_out


def current_plan(job: PretrainMAE) -> tuple[CropStore, Plan]:
    """The store, and the run's own plan, with its exclusions so far. Raises as `inputs`."""
    store, split = opened(job)
    return store, exclusions.applied(exclusions.read(job.out), planned(job, store, split)[0])


def check(job: PretrainMAE) -> None:
    """Everything that can be known without Ray. Raises as `inputs`."""
    from cosmic_ray.registry.register import check_alias
    from cosmic_ray.training.data import require_shares

    found = inputs(job)
    found.plan.lanes_of(0, job.scaling.most)
    require_shares(found.plan, job.scaling.most)
    if job.init_from:
        beginning.check(job.init_from)
    if job.tracking:
        check_alias(job.tracking.alias, "tracking.alias")
    require_disk(job, parameters(found.model))


def require_disk(job: PretrainMAE, count: int) -> None:
    """Raise JobError where the disk has no room for the checkpoints that are kept and one more."""
    if not storage.is_local(job.out):
        return
    path = storage.local_path(storage.absolute(job.out))
    while not path.exists():
        path = path.parent
    one = 4 * count * (4 if job.ema else 3)
    there = len(storage.listing(checkpoint.within(job.out), f"*/{checkpoint.STATE}"))
    needed, free = one * max(1, job.checkpoint.keep + 1 - there), checkpoint.room(path)
    if free < needed:
        problem = (
            f"{free / 1e9:.1f} GB are free there; the checkpoints of {one / 1e9:.1f} GB each that are still to come,"
        )
        problem += f" at most {job.checkpoint.keep + 1} at a time, take {needed / 1e9:.1f} GB more"
        raise JobError("out", job.out, problem, "free disk space, lower checkpoint.keep, or choose another out")


def parameters(config: MAEConfig) -> int:
    """Parameters of the network, without making it."""
    import torch

    from cosmic_ray.models.mae import MaskedAutoencoder

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaskedAutoencoder(config).parameters())


def mae_config(job: PretrainMAE, store: CropStore) -> MAEConfig:
    """The network's configuration for these crops.

    Raises:
        JobError: for crops that the recipe cannot take, or sizes that do not fit each other.
    """
    from cosmic_ray.models.mae import MAEConfig, MaskedAutoencoder

    channels, height, width = store.spec.shape
    if height != width:
        raise JobError("crops", job.crops, f"its crops are {height}x{width}; the network takes square ones")
    if job.recipe == "paper" and channels != 1:
        problem = f"`paper` repeats one grey channel; these crops have {channels}"
        raise JobError("recipe", job.recipe, problem, "use recipe: better")
    given = {key: value for key in MODEL_DECODER if (value := getattr(job.model, key)) is not None}
    config = MAEConfig.of(job.model.preset, job.recipe, channels=3 if job.recipe == "paper" else channels, **given)
    sizes = {key: value for key in MODEL_ENCODER if (value := getattr(job.model, key)) is not None}
    config = replace(config, encoder=replace(config.encoder, **sizes))
    try:
        import torch

        with torch.device("meta"):
            MaskedAutoencoder(config)
    except (ValueError, AssertionError) as error:
        raise JobError("model", job.model.model_dump(exclude_none=True), str(error)) from None
    return config


def make_loop(
    job: PretrainMAE,
    callbacks: Sequence[Callback] = (),
    *,
    device: torch.device | str = "cpu",
    stopping: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
    rank: int = 0,
    world: int = 1,
    stream: Stream | None = None,
) -> Loop:
    """The loop of one rank. `stream`: `ingest.stream.batches` by default, which needs Ray; or `plain_batches`.

    Raises:
        JobError, DataError: as `inputs` and `beginning.find`; and where `init_from` is another network's.
    """
    import torch

    from cosmic_ray.ingest.stream import batches
    from cosmic_ray.training.data import CropData
    from cosmic_ray.training.loop import Loop, LoopSettings
    from cosmic_ray.training.mae import NAME, MAEObjective

    found = inputs(job)
    beat()
    device = torch.device(device)
    objective = MAEObjective(found.model, job.seed)
    if job.init_from and checkpoint.newest(checkpoint.within(job.out)) is None:
        begun = beginning.kept(job.out) or beginning.find(job.init_from, job.tracking.uri if job.tracking else None)
        begun.load(objective)
    beat()
    # The reader's CPUs are part of the worker's bundle: asked for apart, they might be left on other nodes only.
    stream = stream or partial(batches, read_cpus=0)
    held_out = found.held_out[: job.eval.crops]
    data = CropData(found.store, found.plan, held_out, stream, rank, world, job.micro_batch)
    settings = LoopSettings(
        steps=found.steps,
        global_batch=job.global_batch,
        seed=job.seed,
        checkpoints=checkpoint.within(storage.absolute(job.out)),
        optim={NAME: job.optim},
        schedule=job.schedule,
        ema=job.ema,
        micro_batch=job.micro_batch,
        precision=_precision(job.precision, device),
        compile=job.compile,
        strategy=job.scaling.strategy,
        log_every=job.log_every,
        eval_every=job.eval.every,
        checkpoint_every=job.checkpoint.every,
        keep=job.checkpoint.keep,
    )
    return Loop(objective, settings, data, callbacks, device, stopping, beat)


def _opened(key: str, uri: str, opening: Callable, kind: str):
    try:
        return opening()
    except NotFoundError as error:
        raise JobError(key, uri, error.problem, f"run the {kind} job that makes it first") from None


def _precision(wanted: str, device: torch.device) -> str:
    import torch

    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
