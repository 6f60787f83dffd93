"""The run of an `evaluate` job: inputs opened and questioned, figures made, tables and manifest published."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.evaluation import expression, images, truths
from cosmic_ray.evaluation.classified import expression_accuracy, image_accuracy
from cosmic_ray.evaluation.embedding import Space
from cosmic_ray.evaluation.generated import GeneratedExpression, Round, open_rounds
from cosmic_ray.evaluation.job import Evaluate
from cosmic_ray.evaluation.openings import open_test, openings
from cosmic_ray.evaluation.scores import scores_of
from cosmic_ray.evaluation.seen import Chain, hashes, objections
from cosmic_ray.output import Output, canonical, claim
from cosmic_ray.progress import say
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.split import Split

FORMAT, VERSION = "cosmic-ray/evaluate", 1
METRICS, GENES = "metrics.parquet", "genes.parquet"
_EXPRESSIONS = ("expression", "cycle")


@dataclass
class Inputs:
    """All that an evaluation reads, opened."""

    job: Evaluate
    store: CellStore
    split: Split
    rounds: list[Round] = field(default_factory=list)
    pictured: np.ndarray | None = None
    """Rows of the store whose images were generated."""
    space: Space | None = None
    made: dict[str, GeneratedExpression] = field(default_factory=dict)
    written: dict[str, np.ndarray] = field(default_factory=dict)
    """Rows of the store whose expression was generated, by `expression` and `cycle`."""

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Text of some cells."""
        return np.array(self.store.obs([name], rows)[name].to_pylist(), dtype=str)

    @cached_property
    def train(self) -> np.ndarray:
        """Rows of train cells, `train_cells` at most, ascending."""
        rows = self.split.rows("train")
        return np.sort(np.random.default_rng(self.job.seed).permutation(rows)[: self.job.train_cells])

    @cached_property
    def judged(self) -> np.ndarray:
        """Rows of all cells that are judged in any way, ascending."""
        parts = [rows for rows in (self.pictured, *self.written.values()) if rows is not None]
        return np.unique(np.concatenate(parts))

    def chain(self) -> Chain:
        """Every fitted thing behind what is judged, and behind the space that it is judged in."""
        chain = Chain(hashes(self.store) | {self.split.content_hash}, tracking=self.job.tracking_uri)
        for place, each in enumerate(self.rounds):
            chain.follow(f"images.{place}", each.store.manifest.lineage)
        for name, made in self.made.items():
            chain.follow(name, made.lineage)
        if self.space is not None:
            chain.add_model("fm", self.space.uri, self.space.lineage)
        return chain

    def lineage(self) -> dict[str, Any]:
        """The inputs and their hashes."""
        found: dict[str, Any] = {
            "cells": {"uri": self.store.uri, "content_hash": self.store.content_hash},
            "split": {"uri": self.split.uri, "content_hash": self.split.content_hash},
        }
        if self.rounds:
            found["images"] = [{"uri": each.store.uri, "content_hash": each.store.content_hash} for each in self.rounds]
            found["fm"] = {"uri": self.space.uri, "digest": self.space.digest}
        found |= {name: {"uri": made.uri, "content_hash": made.sha256} for name, made in self.made.items()}
        if self.job.truth is not None:
            digest = hashlib.sha256(storage.read_bytes(self.job.truth)).hexdigest()
            found["truth"] = {"uri": storage.absolute(self.job.truth), "content_hash": digest}
        return found

    @property
    def simulated(self) -> bool:
        """Whether anything that is looked at comes from a simulator."""
        made = any(made.simulated for made in self.made.values())
        return self.store.simulated or made or any(each.store.simulated for each in self.rounds)


def evaluate(job: Evaluate) -> dict[str, Any]:
    """See `Evaluate.run`."""
    with claim(job) as output, ExitStack() as opened:
        if not output.done:
            _make(_open(job, opened), output)
        manifest = output.manifest()
    told = {key: manifest[key] for key in ("part", "simulated", "flaws", "scores", "opened")}
    return {**told, **manifest["results"]}


def _open(job: Evaluate, opened: ExitStack) -> Inputs:
    store = CellStore.open(job.cells)
    inputs = Inputs(job, store, Split.open(job.split, store))
    held = inputs.split.rows(job.part)
    if job.images:
        inputs.pictured, inputs.rounds = open_rounds(job.images, store, held)
        inputs.space = Space.open(job.fm, store, job.features, job.device, job.tracking_uri)
    for name in _EXPRESSIONS:
        if (uri := getattr(job, name)) is not None:
            inputs.made[name] = opened.enter_context(GeneratedExpression.open(uri))
            inputs.written[name] = inputs.made[name].select(store, held)
    return inputs


def _make(inputs: Inputs, output: Output) -> None:
    job, chain = inputs.job, inputs.chain()
    foreign = [f"what made the ready embeddings {name} was fitted on is unknown" for name in chain.foreign]
    flaws = [*_seen(inputs, chain), *foreign, *inputs.split.flaws]
    lineage = inputs.lineage()
    opened = None
    if job.part == "test":
        key = open_test(inputs.split.uri, job.resolved(), job.fingerprint(), lineage)
        others = [record["key"] for record in openings(inputs.split.uri) if record["key"] != key]
        opened = {"key": key, "others": others}
        say(f"test is opened: {len(others)} other evaluations of it were made by this split")
    results: dict[str, Any] = {}
    if inputs.rounds:
        results["images"] = _images(inputs)
    tables = {name: _expression(inputs, name, results) for name in inputs.made}
    if job.truth is not None:
        results["planted"] = truths.judge(job.truth, tables["cycle" if "cycle" in tables else "expression"])
    written = {METRICS: metrics_table(results)} | ({GENES: _merged(tables)} if tables else {})
    digests = {name: _write(output, name, table) for name, table in written.items()}
    output.publish(
        {
            "format": FORMAT,
            "version": VERSION,
            "job": job.resolved(),
            "part": job.part,
            "cells": len(inputs.judged),
            "cells_of_part": len(inputs.split.rows(job.part)),
            "lineage": lineage,
            "fitted": [each.told() for each in chain.fitted],
            "simulated": inputs.simulated,
            "flaws": flaws,
            "opened": opened,
            "scores": scores_of(results),
            "results": results,
            "tables": digests,
            "content_hash": hashlib.sha256(canonical([results, digests])).hexdigest(),
        }
    )


def _seen(inputs: Inputs, chain: Chain) -> list[str]:
    """What the figures have to say of cells that were seen.

    Raises:
        DataError: where there is something, and the job does not say `seen`.
    """
    ids = inputs.store.obs(["cell_id"], inputs.judged)["cell_id"].to_pylist()
    found = objections(chain, inputs.store, inputs.split, inputs.job.part, ids)
    if found and not inputs.job.seen:
        remedy = "judge cells that no model has seen, or say openly: seen: true"
        raise DataError(inputs.job.out, "these cells are not held out: " + "; ".join(found), remedy)
    return [f"not held out: {each}" for each in found]


def _images(inputs: Inputs) -> dict[str, Any]:
    job, rows = inputs.job, inputs.pictured
    if len(rows) < images.FEWEST:
        raise DataError(inputs.rounds[0].store.uri, f"{len(rows)} cells; at least {images.FEWEST} are needed")
    types = inputs.column(job.cell_type, rows)
    real = inputs.space.real(rows)
    embedded = images.Embedded(real, [inputs.space.generated(each) for each in inputs.rounds])
    near = images.near_train(embedded, inputs.space.real(inputs.train))
    return {
        "rounds": len(inputs.rounds),
        "samples": int(inputs.rounds[0].rows.shape[1]),
        "cells": len(rows),
        "groups": images.distances(embedded, images.groups_of(types), job.seed),
        "near_train": near,
        "near_train_of_real": images.NEAR,
        "train_searched": [len(inputs.train), len(inputs.split.rows("train"))],
        "accuracy": image_accuracy(inputs, types),
    }


def _expression(inputs: Inputs, name: str, results: dict[str, Any]) -> dict[str, np.ndarray]:
    """The genes' figures; their summary goes to `results[name]`."""
    job, made, rows = inputs.job, inputs.made[name], inputs.written[name]
    columns = inputs.store.columns_of(made.genes)
    total = float(made.note.get("total") or expression.median_total(inputs.store, inputs.split.rows("train")))
    types = inputs.column(job.cell_type, rows)
    real = expression.Real(
        held=expression.normalised(inputs.store, rows, columns, total),
        train=expression.normalised(inputs.store, inputs.train, columns, total),
        types=types,
        train_types=inputs.column(job.cell_type, inputs.train),
        batches=_known(inputs.column(job.batch, rows)),
        groups={key: cells for key, cells in images.groups_of(types).items() if key != "all"},
        oracle=_oracle(inputs, rows),
    )
    genes = expression.judged(made, real, job.seed)
    results[name] = {"cells": len(rows), "total": total} | expression.summary(genes, made)
    results[name]["accuracy"] = expression_accuracy(inputs, made, real)
    symbols = inputs.store.genes["symbol"].to_numpy(zero_copy_only=False)[columns]
    return {"gene_id": np.array(made.genes, dtype=object), "symbol": symbols, **genes}


def _oracle(inputs: Inputs, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    if inputs.job.truth is None:
        return None
    held, train = (
        truths.oracle_design(inputs.job.truth, inputs.store.obs(["cell_id"], some)["cell_id"].to_pylist())
        for some in (rows, inputs.train)
    )
    return None if held is None else (held, train)


def _known(batches: np.ndarray) -> np.ndarray:
    """Cells of no known batch are one batch of their own."""
    return np.where(batches == "", "(unknown)", batches)


def metrics_table(results: Mapping[str, Any]) -> pa.Table:
    """A row a figure: `what` (`images`, `expression`...), `group`, `metric`, `kind`, `round` (-1: of all), `value`."""
    rows: list[tuple[str, str, str, str, int, float | None]] = []
    for group, about in results.get("images", {}).get("groups", {}).items():
        for metric in images.METRICS:
            for kind in images.KINDS:
                for place, value in enumerate(about[metric][kind]["rounds"]):
                    rows.append(("images", group, metric, kind, place, value))
    for what in _EXPRESSIONS:
        for metric, value in results.get(what, {}).items():
            if isinstance(value, int | float):
                rows.append((what, "all", metric, "value", -1, float(value)))
    names = ("what", "group", "metric", "kind", "round", "value")
    types = (pa.string(), pa.string(), pa.string(), pa.string(), pa.int32(), pa.float64())
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})


def _merged(tables: Mapping[str, Mapping[str, np.ndarray]]) -> pa.Table:
    """All genes of all that was generated, a row each: `of` is `expression` or `cycle`; NaN where undefined."""
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    parts = []
    for of, table in tables.items():
        count = len(table["gene_id"])
        columns = {name: table.get(name, np.full(count, np.nan)) for name in names}
        parts.append(pa.table({"of": [of] * count, **{name: pa.array(values) for name, values in columns.items()}}))
    return pa.concat_tables(parts)


def _write(output: Output, name: str, table: pa.Table) -> str:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    output.write(name, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()
