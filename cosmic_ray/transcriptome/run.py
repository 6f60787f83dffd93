"""The run of a `fit-transcriptome` job: the fit, then the model folder, the latents of all cells, and MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cosmic_ray import storage
from cosmic_ray.errors import NotFoundError
from cosmic_ray.output import Output, claim
from cosmic_ray.progress import progress, say
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.embeddings import write_embeddings
from cosmic_ray.stores.split import Split, named

if TYPE_CHECKING:
    import numpy as np

    from cosmic_ray.registry.tracking import Tracker
    from cosmic_ray.transcriptome.fitted import Fitted
    from cosmic_ray.transcriptome.job import FitTranscriptome

FORMAT, VERSION = "cosmic-ray/fit-transcriptome", 1
MODEL, LATENTS = "model", "latents"
_NAME = "transcriptome-encoder"


def run(job: FitTranscriptome) -> dict[str, Any]:
    """See `FitTranscriptome.run`."""
    job = _absolute(job)
    with claim(job) as output:
        if not output.done:
            _make(job, output)
        elif job.tracking:
            from cosmic_ray.registry.tracking import deliver

            deliver(job.out, job.tracking.uri)
        return {**output.manifest()["results"], **_tracked(output)}


def _make(job: FitTranscriptome, output: Output) -> None:
    store = CellStore.open(job.cells)
    job.require(store)
    lineage: dict[str, Any] = {"store": named(store), "job": job.fingerprint()}
    if job.split is not None:
        lineage["split"] = {"uri": job.split, "content_hash": Split.open(job.split, store).content_hash}
    with _tracker(job, lineage, store.simulated) as tracker:
        results = _ready(job, output, store) if job.method == "obsm" else _fit(job, output, store, lineage, tracker)
        output.publish(
            {
                "format": FORMAT,
                "version": VERSION,
                "job": job.resolved(),
                "lineage": lineage,
                "content_hash": results["content_hash"],
                "simulated": store.simulated,
                "results": results,
            }
        )


def _fit(
    job: FitTranscriptome, output: Output, store: CellStore, lineage: Mapping[str, Any], tracker: Tracker | None
) -> dict[str, Any]:
    """Fit, write the model and the latents, hand the model to MLflow; the results."""
    from cosmic_ray.transcriptome.remote import fit_remotely

    epochs = job.scvi.epochs if job.method == "scvi" else 1
    with progress(f"fit {job.method}", epochs, "epochs") as shown:
        shown.update(0)

        def report(said: Mapping[str, Any]) -> None:
            if "say" in said:
                return say(said["say"])
            values = {key: value for key, value in said.items() if key != "epoch"}
            shown.update(said["epoch"], ", ".join(f"{key} {value:,.5g}" for key, value in values.items()))
            if tracker:
                tracker.on_step(said["epoch"], values)

        fitted = fit_remotely(job, report)
    output.require()
    config = _write_model(job, output, store, fitted, lineage)
    model = {"uri": output.at(MODEL), "content_hash": config.digest, "lineage": config.lineage}
    latents = _write_latents(job, output, store, fitted.latents, {"model": model, "split": lineage["split"]})
    if tracker and job.tracking.register_as:
        tracker.register(output.at(MODEL), job.tracking.register_as, job.tracking.alias)
    return {"model": output.at(MODEL), "model_digest": config.digest, **latents, **fitted.facts}


def _ready(job: FitTranscriptome, output: Output, store: CellStore) -> dict[str, Any]:
    """The embedding that others made, joined to the cells; the results."""
    from cosmic_ray.transcriptome.ready import read_obsm

    values, source = read_obsm(job.obsm, store)
    made = {"model": None, "ready": {**source, "fitted_on": "unknown"}}
    return {"model": None, **_write_latents(job, output, store, values, made)}


def _write_latents(
    job: FitTranscriptome, output: Output, store: CellStore, values: np.ndarray, lineage: Mapping[str, Any]
) -> dict[str, Any]:
    ids = store.obs(["cell_id"])["cell_id"].combine_chunks()
    target, about = output.inside(LATENTS), {"simulated": store.simulated, "job": job.resolved()}
    manifest = write_embeddings(target, ids, values, store=store, lineage=lineage, **about)
    kept = {key: manifest[key] for key in ("rows", "width", "content_hash")}
    return {"latents": target.uri, **kept}


def _write_model(
    job: FitTranscriptome, output: Output, store: CellStore, fitted: Fitted, lineage: Mapping[str, Any]
) -> Any:
    from cosmic_ray.registry.card import model_card
    from cosmic_ray.registry.package import write_model

    spec, facts = fitted.spec, fitted.facts
    what = {"scvi": f"scVI, {spec.layers} hidden layers of {spec.hidden}", "pca": "log1p of scaled counts, PCA"}
    card = model_card(
        _NAME,
        (job.tracking.register_as if job.tracking else None) or _NAME,
        recipe=job.method,
        facts={
            "encoder": what[spec.method],
            "genes": f"{spec.genes:,} of {facts['genes_of_store']:,}",
            "latent": f"{spec.latent} numbers",
            "fitted on": f"{facts['cells_fitted']:,} cells of {len(fitted.batches)} batches: the split's train",
            "unseen batches": "need nothing: the encoder does not see the batch",
        },
        lineage=lineage,
        metrics={key: value for key, value in facts.items() if "/" in key},
        simulated=store.simulated,
        job=job.resolved(),
    )
    network = dataclasses.asdict(spec)
    told = {"network": network, "genes": fitted.genes, "total_genes": fitted.total_genes, "batches": fitted.batches}
    about = {"lineage": lineage, "card": card, "simulated": store.simulated}
    return write_model(output.at(MODEL), _NAME, told, fitted.weights, **about)


def _absolute(job: FitTranscriptome) -> FitTranscriptome:
    """The job with its URIs as they mean in every process."""
    given = {key: getattr(job, key) for key in ("cells", "split", "out")}
    update: dict[str, Any] = {key: storage.absolute(uri) for key, uri in given.items() if uri is not None}
    if job.obsm is not None:
        update["obsm"] = job.obsm.model_copy(update={"adata": storage.absolute(job.obsm.adata)})
    return job.model_copy(update=update)


def _tracker(job: FitTranscriptome, lineage: dict[str, Any], simulated: bool) -> AbstractContextManager[Tracker | None]:
    if job.tracking is None:
        return nullcontext()
    from cosmic_ray.registry.tracking import Tracker

    return Tracker(job.out, job.resolved(), name=job.kind, lineage=lineage, simulated=simulated, uri=job.tracking.uri)


def _tracked(output: Output) -> dict[str, Any]:
    """What MLflow knows of this job, where it does."""
    try:
        record = storage.read_json(output.at("tracking.json"))
    except NotFoundError:
        return {}
    return {key: record[key] for key in ("run_id", "registered") if key in record}
