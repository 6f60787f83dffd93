"""The run of a training job: resources, workers, then the exported model, its picture and its registration."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cosmic_ray import cluster, storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.output import Output, claim
from cosmic_ray.progress import say
from cosmic_ray.reach import uris
from cosmic_ray.training import checkpoint, exclusions
from cosmic_ray.training.record import METRICS, read_metrics

if TYPE_CHECKING:
    from cosmic_ray.registry.tracking import Tracker
    from cosmic_ray.training.base import TrainingJob
    from cosmic_ray.training.stage import Stage

VERSION = 1
MODEL = "model"


def run(job: TrainingJob) -> dict[str, Any]:
    """See `TrainingJob.run`."""
    own = {key: uri for key, uri in uris(job) if "." not in key and not uri.startswith("models:")}
    job = job.model_copy(update={key: storage.absolute(uri) for key, uri in own.items()})
    with claim(job) as output:
        if not output.done:
            _make(job, output)
        elif job.tracking:
            from cosmic_ray.registry.tracking import deliver

            deliver(job.out, job.tracking.uri)
        return {**output.manifest()["results"], **_tracked(output)}


def _make(job: TrainingJob, output: Output) -> None:
    from cosmic_ray.training.driver import train
    from cosmic_ray.training.preflight import require_resources

    stage = job.stage()
    gpus = require_resources(stage, cluster.connect())
    cluster.require_seen_everywhere({"out": output.at("job.json"), **stage.manifests()})
    say(
        f"{stage.plan.total_rows:,} {stage.samples} to train on; {stage.steps:,} steps of {job.global_batch}; "
        f"learning rate up to {job.optim.rate(job.global_batch):.3g}; {stage.parameters:,} parameters"
    )
    lineage = stage.lineage(output)
    with _tracker(job, lineage, stage.simulated) as tracker:
        for line in read_metrics(output.at(METRICS)) if tracker else []:
            tracker.on_step(line.pop("step"), line)  # what a killed driver did not deliver; the rest is known
        steps = train(job, stage.steps, gpus, [tracker] if tracker else [], output.require, stage.mend(output))
        if left_out := [each.model_dump() for each in exclusions.read(output.uri)]:
            stage = job.stage()
            lineage["plan"] = stage.plan.digest
        results = _finish(stage, output, lineage | {"step": steps}, tracker)
        output.publish(
            {
                "format": f"cosmic-ray/{job.kind}",
                "version": VERSION,
                "job": job.resolved(),
                "lineage": lineage,
                "exclusions": left_out,
                "content_hash": results["content_hash"],
                "simulated": stage.simulated,
                "results": results,
            }
        )


def _finish(stage: Stage, output: Output, lineage: dict[str, Any], tracker: Tracker | None) -> dict[str, Any]:
    """Export the weights of the last checkpoint, with a picture, hand both to MLflow; the results."""
    newest = checkpoint.newest(checkpoint.within(output.uri))
    metrics = _summary(output.at(METRICS))
    config = stage.export(output, newest, lineage, metrics)
    if tracker:
        if stage.picture:
            tracker.picture(output.at(stage.picture))
        tracking = stage.job.tracking
        if tracking.register_as:
            tracker.register(output.at(MODEL), tracking.register_as, tracking.alias)
    facts = {"model": output.at(MODEL), "steps": lineage["step"], "weights": checkpoint.digest(newest)}
    return {**facts, **metrics, **stage.counts(), "content_hash": config.digest}


def _tracker(job: TrainingJob, lineage: dict[str, Any], simulated: bool) -> AbstractContextManager[Tracker | None]:
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
