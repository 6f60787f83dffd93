"""The run of a `pretrain-mae` job: resources, workers, then the exported encoder, its picture and its registration."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from cosmic_ray import cluster, storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.output import MANIFEST, Output, claim
from cosmic_ray.progress import say
from cosmic_ray.training import assemble, beginning, checkpoint, exclusions
from cosmic_ray.training.record import METRICS, read_metrics

if TYPE_CHECKING:
    from cosmic_ray.registry.tracking import Tracker
    from cosmic_ray.training.assemble import Inputs
    from cosmic_ray.training.job import PretrainMAE

FORMAT, VERSION = "cosmic-ray/pretrain-mae", 1
MODEL, PICTURE = "model", "reconstructions.png"


def run(job: PretrainMAE) -> dict[str, Any]:
    """See `PretrainMAE.run`."""
    job = job.model_copy(update={key: storage.absolute(getattr(job, key)) for key in ("crops", "split", "out")})
    if job.init_from and not job.init_from.startswith("models:"):
        job = job.model_copy(update={"init_from": storage.absolute(job.init_from)})
    with claim(job) as output:
        if not output.done:
            _make(job, output)
        elif job.tracking:
            from cosmic_ray.registry.tracking import deliver

            deliver(job.out, job.tracking.uri)
        return {**output.manifest()["results"], **_tracked(output)}


def _make(job: PretrainMAE, output: Output) -> None:
    from cosmic_ray.training.driver import train
    from cosmic_ray.training.preflight import require_resources

    found = assemble.inputs(job)
    gpus = require_resources(job, found, cluster.connect())
    cluster.require_seen_everywhere({"out": output.at("job.json"), **_manifests(job)})
    say(
        f"{found.plan.total_rows:,} crops to train on; {found.steps:,} steps of {job.global_batch}; "
        f"learning rate up to {job.optim.rate(job.global_batch):.3g}; {assemble.parameters(found.model):,} parameters"
    )
    lineage = _lineage(job, found, output)
    with _tracker(job, lineage, found.store.simulated) as tracker:
        for line in read_metrics(output.at(METRICS)) if tracker else []:
            tracker.on_step(line.pop("step"), line)  # what a killed driver did not deliver; the rest is known
        exclude = partial(exclusions.add, output, found.store) if job.on_bad_shard == "exclude" else lambda _: False
        steps = train(job, found.steps, gpus, [tracker] if tracker else [], output.require, exclude)
        if left_out := [each.model_dump() for each in exclusions.read(output.uri)]:
            found = assemble.inputs(job)
            lineage["plan"] = found.plan.digest
        results = _finish(job, output, found, lineage | {"step": steps}, tracker)
        output.publish(
            {
                "format": FORMAT,
                "version": VERSION,
                "job": job.resolved(),
                "lineage": lineage,
                "exclusions": left_out,
                "content_hash": results["content_hash"],
                "simulated": found.store.simulated,
                "results": results,
            }
        )


def _finish(
    job: PretrainMAE, output: Output, found: Inputs, lineage: dict[str, Any], tracker: Tracker | None
) -> dict[str, Any]:
    """Export the weights of the last checkpoint, draw what they reconstruct, hand both to MLflow; the results."""
    from cosmic_ray.training.export import export_model, exported_model, picture

    newest = checkpoint.newest(checkpoint.within(output.uri))
    metrics = _summary(output.at(METRICS))
    model = exported_model(found.model, newest)
    config = export_model(job, found, model, output.at(MODEL), lineage, metrics)
    output.write(PICTURE, picture(model, found, job.seed))
    if tracker:
        tracker.picture(output.at(PICTURE))
        if job.tracking.register_as:
            tracker.register(output.at(MODEL), job.tracking.register_as, job.tracking.alias)
    if found.left_out:
        metrics["excluded_crops"] = found.plan.excluded_rows
    facts = {"model": output.at(MODEL), "steps": lineage["step"], "weights": checkpoint.digest(newest)}
    return {**facts, **metrics, "content_hash": config.digest}


def _manifests(job: PretrainMAE) -> dict[str, str]:
    return {key: storage.join(getattr(job, key), MANIFEST) for key in ("crops", "split")}


def _lineage(job: PretrainMAE, found: Inputs, output: Output) -> dict[str, Any]:
    inputs = {
        "store": {"uri": job.crops, "content_hash": found.store.content_hash},
        "split": {"uri": job.split, "content_hash": found.split.content_hash},
    }
    tracking = job.tracking.uri if job.tracking else None
    begun = beginning.keep(job.init_from, output, tracking) if job.init_from else None
    return {**inputs, "init_from": begun, "plan": found.plan.digest, "job": job.fingerprint()}


def _tracker(job: PretrainMAE, lineage: dict[str, Any], simulated: bool) -> AbstractContextManager[Tracker | None]:
    if job.tracking is None:
        return nullcontext()
    from cosmic_ray.registry.tracking import Tracker

    return Tracker(job.out, job.resolved(), name=job.kind, lineage=lineage, simulated=simulated, uri=job.tracking.uri)


def _summary(uri: str) -> dict[str, float]:
    """The last losses, and the medians of speed and waiting."""
    lines = read_metrics(uri)
    last = {name: [line[name] for line in lines if name in line] for name in ("train/loss", "val/loss")}
    typical = {name: [line[name] for line in lines if name in line]
               for name in ("train/images_per_s", "train/data_wait_share")}  # fmt: skip
    found = {name.replace("/", "_"): values[-1] for name, values in last.items() if values}
    return found | {name.partition("/")[2]: statistics.median(values) for name, values in typical.items() if values}


def _tracked(output: Output) -> dict[str, Any]:
    """What MLflow knows of this job, where it does."""
    try:
        record = storage.read_json(output.at("tracking.json"))
    except NotFoundError:
        return {}
    return {key: record[key] for key in ("run_id", "registered") if key in record}
