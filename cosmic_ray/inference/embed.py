"""`embed`: every crop of a store through a model, with Ray Data; Parquet and AnnData out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cosmic_ray import storage
from cosmic_ray.config import Job, Uri
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.inference.inputs import pinned, shared_model
from cosmic_ray.output import Output, canonical, claim, read_manifest

if TYPE_CHECKING:
    from cosmic_ray.registry.package import ModelConfig, StoredModel
    from cosmic_ray.stores.crops import CropStore
    from cosmic_ray.stores.manifest import CropSpec


class Embed(Job):
    """Embed a crop store: `part-*.parquet` (crop_id, embedding), `embeddings.h5ad`, and a manifest with the lineage.

    Rows are in store order. A killed run continues with the parts that are missing and ends with the same bytes.
    """

    kind: ClassVar[str] = "embed"
    incidental: ClassVar[frozenset[str]] = frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "tracking_uri"})

    store: Uri
    """URI of the crop store."""

    model: Uri = "models:/morphology-fm@candidate"
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the URI of an exported model folder."""

    split: Uri | None = None
    """URI of a split of the store: its parts become a column. It leaves nothing out."""

    batch_size: int = Field(256, ge=1)
    """Crops on a device at once."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is several times faster on an accelerator, and exact to about three digits."""

    part_rows: int = Field(16384, ge=1)
    """Crops in one Parquet file, rounded up to whole batches: what a killed worker has to do again."""

    anndata: bool = True
    """Whether to write `embeddings.h5ad` too: it needs about half a kilobyte of memory a crop."""

    workers: int | None = Field(None, ge=1)
    """Processes that hold the model; by default as many as the cluster's accelerators, or else its CPUs, allow."""

    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of a worker."""

    gpus_per_worker: float | None = Field(None, ge=0)
    """Accelerators of a worker; by default 1 where the cluster has any."""

    tracking_uri: Uri | None = None
    """Where the registered model is; MLFLOW_TRACKING_URI by default, else `sqlite:///runs/mlflow.db`."""

    def check(self) -> None:
        """The store, the split and the model are there, and the model takes the store's crops."""
        from cosmic_ray.registry.load import require_model
        from cosmic_ray.registry.package import read_config
        from cosmic_ray.stores.crops import CropStore

        try:
            store = CropStore.open(self.store)
        except NotFoundError as error:
            raise JobError("store", self.store, error.problem, error.remedy) from None
        require_model(self.model, tracking=self.tracking_uri)
        if not self.model.startswith("models:"):
            _require_fit(self.model, read_config(self.model), store.spec)
        if self.split is not None and not storage.exists(storage.join(self.split, "manifest.json")):
            raise JobError("split", self.split, "no split is published here", "run its job first")

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        return "tracking_uri" if self.model.startswith("models:") and self.tracking_uri is None else None

    def run(self) -> dict[str, Any]:
        """Embed what is not embedded yet.

        Returns:
            rows, width, content hash, and of this run crops/s and the share of time spent waiting for data.

        Raises:
            JobError: where the model does not take the store's crops, or the cluster is too small.
            DataError: where an input is missing or damaged, or is not the one that a killed run began with.
        """
        with claim(self) as output:
            if output.done:
                return _results(output.manifest())
            manifest, speed = self._embed(output)
            output.publish(manifest)
            return {**_results(manifest), **speed}

    def _embed(self, output: Output) -> tuple[dict[str, Any], dict[str, float]]:
        from cosmic_ray.inference.annotated import write_h5ad
        from cosmic_ray.inference.parts import split_codes
        from cosmic_ray.registry.load import fetch_model
        from cosmic_ray.stores.crops import CropStore

        store = CropStore.open(self.store)
        stored = fetch_model(self.model, tracking=self.tracking_uri)
        _require_fit(self.model, stored.config, store.spec)
        codes = split_codes(self.split, store)
        lineage = pinned(output, self._lineage(store, stored))
        parts, speed = self._parts(output, store, stored)
        facts = {
            "rows": len(store),
            "width": stored.config.embedding_width,
            "simulated": store.simulated or stored.config.simulated,
            "content_hash": hashlib.sha256(canonical([[part["rows"], part["content"]] for part in parts])).hexdigest(),
        }
        if self.anndata:
            uns = {"cosmic_ray": {**facts, "lineage": canonical(lineage).decode()}}
            write_h5ad(output.uri, parts, facts["width"], store, codes, uns)
        manifest = {"format": "cosmic-ray/embed", "version": 1, "job": self.resolved(), "lineage": lineage}
        return {**manifest, **facts, "parts": parts}, speed

    def _lineage(self, store: CropStore, stored: StoredModel) -> dict[str, Any]:
        """The inputs, and what the model itself was made from: evaluation refuses data that any of it was fitted on."""
        model = {"uri": stored.uri, "content_hash": stored.config.digest, "lineage": stored.config.lineage}
        lineage = {"store": {"uri": store.uri, "content_hash": store.content_hash}, "model": model}
        if self.split is not None:
            digest = read_manifest(self.split)["content_hash"]
            lineage["split"] = {"uri": storage.absolute(self.split), "content_hash": digest}
        return lineage

    def _parts(
        self, output: Output, store: CropStore, stored: StoredModel
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Make the missing parts; return all, in order, and how fast this run was."""
        from cosmic_ray.cluster import require_seen_everywhere
        from cosmic_ray.inference.parts import EmbedParts, Work, sidecar_uri
        from cosmic_ray.inference.workers import make_parts, plan_pool

        rows = -(-self.part_rows // self.batch_size) * self.batch_size
        count = -(-len(store) // rows)
        made = set(storage.listing(output.uri, "part-*.json"))
        speed: dict[str, float] = {}
        if missing := [part for part in range(count) if sidecar_uri(output.uri, part) not in made]:
            pool = plan_pool(self.workers, self.cpus_per_worker, self.gpus_per_worker)
            work = Work(
                store=store.uri,
                out=output.uri,
                model=shared_model(stored, output),
                digest=stored.config.digest,
                split=None if self.split is None else storage.absolute(self.split),
                rows=rows,
                batch_size=self.batch_size,
                precision=self.precision,
                device=None if pool.gpus else "cpu",
            )
            inputs = {"store": store.uri, "model": work.model, **({"split": work.split} if work.split else {})}
            require_seen_everywhere({**inputs, "out": output.uri})
            sizes = {part: min(rows, len(store) - part * rows) for part in missing}
            speed = make_parts(EmbedParts, work, sizes, len(store), pool, "embed", "crops")
        facts = [storage.read_json(sidecar_uri(output.uri, part)) for part in range(count)]
        return [{key: fact[key] for key in ("part", "rows", "sha256", "content")} for fact in facts], speed


def _require_fit(uri: str, config: ModelConfig, spec: CropSpec) -> None:
    """One channel may bear another name (DNA, Hoechst); of several, the order counts."""
    takes = config.input
    if takes.shape != spec.shape:
        raise JobError("model", uri, f"takes crops of {takes.shape}; the store's are {spec.shape}", "(C, H, W)")
    if len(takes.channels) > 1 and takes.channels != spec.channels:
        raise JobError("model", uri, f"takes channels {takes.channels}; the store's are {spec.channels}")


def _results(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("rows", "width", "content_hash", "simulated")
    return {key: manifest[key] for key in keys} | {"parts": len(manifest["parts"])}
