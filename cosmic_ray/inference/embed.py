"""`embed`: every row of a store through a model, with Ray Data; Parquet and AnnData out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Job, Uri
from cosmic_ray.errors import JobError, NotFoundError
from cosmic_ray.inference.inputs import pinned, shared_model
from cosmic_ray.output import Output, canonical, claim, read_manifest

if TYPE_CHECKING:
    from cosmic_ray.registry.kinds.encoder import EncoderConfig
    from cosmic_ray.registry.model import ModelConfig, StoredModel
    from cosmic_ray.stores.cells import CellStore
    from cosmic_ray.stores.crops import CropStore

_KINDS = ("encoder", "transcriptome-encoder")


class Embed(Job):
    """Embed a crop store or a cell store: `part-*.parquet`, `embeddings.h5ad`, and a manifest with the lineage. Of a
    cell store, a crop encoder embeds the images, and a transcriptome encoder the expression.

    Rows are in store order. A killed run continues with the parts that are missing and ends with the same bytes.
    """

    kind: ClassVar[str] = "embed"
    incidental: ClassVar[frozenset[str]] = frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "tracking_uri"})

    store: Uri
    """URI of the crop store or the cell store."""

    model: Uri = "models:/morphology-fm@candidate"
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the URI of an exported model folder."""

    output: Literal["embedding", "tokens"] = "embedding"
    """`tokens`, of a crop encoder: what enters its last Transformer block, float16 (T, D) a crop, 2 * T * D bytes:
    403 kB with a ViT-L/16 at 224 px, so that 10,000 crops take 4 GB."""

    split: Uri | None = None
    """URI of a split of the store: its parts become a column. It leaves nothing out."""

    batch_size: int = Field(256, ge=1)
    """Rows on a device at once."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is several times faster on an accelerator, and exact to about three digits."""

    part_rows: int = Field(16384, ge=1)
    """Rows of one Parquet file, rounded up to whole batches: what a killed worker has to do again. Of tokens there are
    fewer, 256 MiB in all."""

    anndata: bool | None = None
    """Whether to write `embeddings.h5ad` too: it needs about half a kilobyte of memory a row. By default for
    embeddings, and not for tokens, which it cannot hold."""

    workers: int | None = Field(None, ge=1)
    """Processes that hold the model; by default as many as the cluster's accelerators, or else its CPUs, allow."""

    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of a worker."""

    gpus_per_worker: float | None = Field(None, ge=0)
    """Accelerators of a worker; by default 1 where the cluster has any."""

    tracking_uri: Uri | None = None
    """Where the registered model is; MLFLOW_TRACKING_URI by default, else `sqlite:///runs/mlflow.db`."""

    @model_validator(mode="after")
    def _tokens_are_no_table(self) -> Embed:
        if self.output == "tokens" and self.anndata:
            raise ValueError("an AnnData holds no tokens: leave `anndata` out")
        return self

    def check(self) -> None:
        """The store, the split and the model are there, and the model takes the store's rows."""
        from cosmic_ray.registry.load import require_model
        from cosmic_ray.registry.package import read_config
        from cosmic_ray.stores.cells import open_store

        try:
            store = open_store(self.store)
        except NotFoundError as error:
            raise JobError("store", self.store, error.problem, error.remedy) from None
        require_model(self.model, tracking=self.tracking_uri, kinds=_KINDS)
        if not self.model.startswith("models:"):
            self._require_fit(read_config(self.model), store)
        if self.split is not None and not storage.exists(storage.join(self.split, "manifest.json")):
            raise JobError("split", self.split, "no split is published here", "run its job first")

    def untold_tracking(self) -> str | None:
        """See `Job`."""
        return "tracking_uri" if self.model.startswith("models:") and self.tracking_uri is None else None

    def run(self) -> dict[str, Any]:
        """Embed what is not embedded yet.

        Returns:
            rows, width, content hash, and of this run rows/s and the share of time spent waiting for data.

        Raises:
            JobError: where the model does not take the store's rows, or the cluster is too small.
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
        from cosmic_ray.stores.cells import open_store
        from cosmic_ray.stores.embeddings import about_parts

        store = open_store(self.store)
        stored = fetch_model(self.model, tracking=self.tracking_uri)
        shape = self._require_fit(stored.config, store)
        codes = split_codes(self.split, store)
        lineage = pinned(output, self._lineage(store, stored))
        parts, speed = self._parts(output, store, stored, shape)
        facts = {**about_parts(parts, shape), "simulated": store.simulated or stored.config.simulated}
        if self.anndata is not False and self.output == "embedding":
            told = {key: facts[key] for key in ("rows", "width", "simulated", "content_hash")}
            uns = {"cosmic_ray": {**told, "lineage": canonical(lineage).decode()}}
            write_h5ad(output.uri, parts, facts["width"], store, codes, uns)
        return {"job": self.resolved(), "lineage": lineage, **facts}, speed

    def _lineage(self, store: CropStore | CellStore, stored: StoredModel) -> dict[str, Any]:
        """The inputs, and what the model itself was made from: evaluation refuses data that any of it was fitted on."""
        from cosmic_ray.stores.split import named

        model = {"uri": stored.uri, "content_hash": stored.config.digest, "lineage": stored.config.lineage}
        lineage = {"store": named(store), "model": model}
        if self.split is not None:
            digest = read_manifest(self.split)["content_hash"]
            lineage["split"] = {"uri": storage.absolute(self.split), "content_hash": digest}
        return lineage

    def _parts(
        self, output: Output, store: CropStore | CellStore, stored: StoredModel, shape: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Make the missing parts; return all, in order, and how fast this run was."""
        from cosmic_ray.cluster import require_seen_everywhere
        from cosmic_ray.inference.parts import EmbedParts, Work, sidecar_uri
        from cosmic_ray.inference.workers import make_parts, plan_pool
        from cosmic_ray.stores.embeddings import id_column, rows_a_part

        rows = self.part_rows if len(shape) == 1 else min(self.part_rows, rows_a_part(2 * shape[0] * shape[1]))
        rows = -(-rows // self.batch_size) * self.batch_size
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
                output=self.output,
            )
            inputs = {"store": store.uri, "model": work.model, **({"split": work.split} if work.split else {})}
            require_seen_everywhere({**inputs, "out": output.uri})
            sizes = {part: min(rows, len(store) - part * rows) for part in missing}
            unit = "cells" if id_column(store) == "cell_id" else "crops"
            speed = make_parts(EmbedParts, work, sizes, len(store), pool, "embed", unit)
        return [storage.read_json(sidecar_uri(output.uri, part)) for part in range(count)], speed

    def _require_fit(self, config: ModelConfig, store: CropStore | CellStore) -> tuple[int, ...]:
        """The shape of what a model makes of a row of the store.

        Raises:
            JobError: where it takes none of them.
        """
        if config.kind == "transcriptome-encoder":
            _require_expression(self.model, config, store)
            if self.output == "tokens":
                raise JobError("output", self.output, "a transcriptome encoder has no tokens", "leave it out")
            return (config.width,)
        if config.kind not in _KINDS:  # a registered model's alias has moved since `check`
            raise JobError("model", self.model, f"a {config.kind} model embeds nothing", f"one of {', '.join(_KINDS)}")
        _require_crops(self.store, self.model, config, store)
        if self.output == "tokens":
            return _token_shape(config)
        return (config.embedding_width,)


def _require_crops(store_uri: str, uri: str, config: ModelConfig, store: CropStore | CellStore) -> None:
    """One channel may bear another name (DNA, Hoechst); of several, the order counts."""
    if "image" not in store.columns:
        raise JobError("store", store_uri, "these cells have no images", "give a transcriptome encoder")
    takes, spec = config.input, store.spec
    if takes.shape != spec.shape:
        raise JobError("model", uri, f"takes crops of {takes.shape}; the store's are {spec.shape}", "(C, H, W)")
    if len(takes.channels) > 1 and takes.channels != spec.channels:
        raise JobError("model", uri, f"takes channels {takes.channels}; the store's are {spec.channels}")


def _token_shape(config: EncoderConfig) -> tuple[int, int]:
    """(T, D) of the tokens that `Encoder.tokens` gives."""
    import timm
    import torch

    with torch.device("meta"):
        network: Any = timm.create_model(**config.network)
    if not hasattr(network, "blocks") or not hasattr(network, "num_prefix_tokens"):
        name = config.network["model_name"]
        raise JobError("output", "tokens", f"{name} has no Transformer blocks", "use a ViT")
    return network.patch_embed.num_patches + network.num_prefix_tokens, network.embed_dim


def _require_expression(uri: str, config: ModelConfig, store: CropStore | CellStore) -> None:
    from cosmic_ray.models.transcriptome import columns_of
    from cosmic_ray.stores.cells import CellStore

    if not isinstance(store, CellStore):
        raise JobError("model", uri, "takes expression; this is a crop store", "give a cell store")
    if config.spec().raw_counts and store.manifest.values != "raw":
        raise JobError("model", uri, f"takes raw counts; the store holds {store.manifest.values} values")
    try:
        columns_of(config.needed_genes, store.genes["gene_id"].to_pylist())
    except ValueError as error:
        raise JobError("model", uri, str(error), "the same gene ids (Ensembl, symbols) and species?") from None


def _results(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("rows", "width", "content_hash", "simulated")
    return {key: manifest[key] for key in keys} | {"parts": len(manifest["parts"])}
