"""Expression of nuclei: parts of mean, limits and draws, then one AnnData file.

scratch/part-00000.npy     float32 (K, n, G): mean, lower, upper and, where they are kept, the draws; n crops
scratch/part-00000.json    rows, sha256 of the file; written after it: without it, no part
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray import storage
from cosmic_ray.errors import DamagedError, DataError
from cosmic_ray.inference import h5ad
from cosmic_ray.inference.actors import PartsActor
from cosmic_ray.output import Output, canonical, encode
from cosmic_ray.stores.crops import CropStore

if TYPE_CHECKING:
    from cosmic_ray.inference.generate import Generate
    from cosmic_ray.registry.model import StoredModel

FILE, SCRATCH = "expression.h5ad", "scratch"
_PART_BYTES = 2**27
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Work:
    """What every worker is told."""

    crops: str
    out: str
    models: Mapping[str, str]
    """URIs of the folders of `fm` and `img2seq`."""
    digests: Mapping[str, str]
    rows: np.ndarray
    """Of the crops: int64."""
    samples: int
    keep: int
    """Draws that are kept."""
    level: float
    seed: int
    size: int
    """Rows of a part, the last one aside."""
    batch_size: int
    device: str | None
    """None: an accelerator."""

    def span(self, part: int) -> slice:
        """Which of `rows` are a part's."""
        return slice(part * self.size, min((part + 1) * self.size, len(self.rows)))


def generate_expression(
    job: Generate,
    output: Output,
    crops: CropStore,
    rows: np.ndarray,
    models: Mapping[str, StoredModel],
    places: Mapping[str, str],
    lineage: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Make the missing parts and write the file; what the results say of it, and how fast that was.

    Args:
        rows: those of `crops` that are looked at.
        places: URIs of the models' folders that every worker reads.
    """
    from cosmic_ray.cluster import require_seen_everywhere
    from cosmic_ray.inference.workers import make_parts, plan_pool

    genes, asked = models["img2seq"].config.genes, job.expression
    keep = asked.samples if asked.keep_samples else 0
    work = Work(
        crops=crops.uri,
        out=output.uri,
        models={key: places[key] for key in ("fm", "img2seq")},
        digests={key: models[key].config.digest for key in ("fm", "img2seq")},
        rows=rows,
        samples=asked.samples,
        keep=keep,
        level=asked.level,
        seed=job.seed,
        size=max(1, min(_MOST_ROWS, _PART_BYTES // (4 * len(genes) * (3 + max(keep, asked.samples))))),
        batch_size=job.batch_size,
        device=None,
    )
    count = -(-len(rows) // work.size)
    made = set(storage.listing(output.at(SCRATCH), "part-*.json"))
    speed: dict[str, float] = {}
    if missing := [part for part in range(count) if _sidecar(output.uri, part) not in made]:
        pool = plan_pool(job.workers, job.cpus_per_worker, job.gpus_per_worker)
        work = work if pool.gpus else replace(work, device="cpu")
        require_seen_everywhere({"crops": work.crops, **work.models, "out": output.uri})
        sizes = {part: len(rows[work.span(part)]) for part in missing}
        speed = make_parts(ExpressionParts, work, sizes, len(rows), pool, "predict", "crops")
    output.require()
    facts = [storage.read_json(_sidecar(output.uri, part)) for part in range(count)]
    digest = hashlib.sha256(canonical([genes, [[each["rows"], each["content"]] for each in facts]])).hexdigest()
    about = {"uri": output.at(FILE), "rows": len(rows), "genes": len(genes), "content_hash": digest}
    simulated = crops.simulated or any(stored.config.simulated for stored in models.values())
    values = (
        "counts" if models["img2seq"].config.network.counts == "negative binomial" else "log1p of normalised counts"
    )
    uns = {"simulated": simulated, "values": values, "level": asked.level, "content_hash": digest}
    uns["lineage"] = canonical(dict(lineage)).decode()
    _assemble(work, crops, facts, genes, {"cosmic_ray": uns})
    storage.delete(output.at(SCRATCH))
    return {**about, "simulated": simulated}, speed


class ExpressionParts(PartsActor[Work]):
    """Holds the morphology FM and the img2seq model."""

    def open(self) -> None:
        """The models and the crops."""
        from cosmic_ray.registry.kinds.encoder import Encoder
        from cosmic_ray.registry.kinds.img2seq import Img2Seq
        from cosmic_ray.registry.package import read_model

        stored = {key: read_model(uri) for key, uri in self.work.models.items()}
        for key, model in stored.items():
            if model.config.digest != self.work.digests[key]:
                raise DataError(model.uri, "the model was replaced while it was in use", "choose another out")
        self._fm = Encoder(stored["fm"], self.work.device)
        self._img2seq = Img2Seq(stored["img2seq"], self.work.device)
        self._crops = CropStore.open(self.work.crops)

    def make(self, part: int) -> dict[str, Any]:
        """Predict and write the expression of one part."""
        began, work = time.monotonic(), self.work
        rows = work.rows[work.span(part)]
        crops, ids = self._crops.crops(rows), self._crops.metadata(["crop_id"], rows)["crop_id"].to_pylist()
        wait_s = time.monotonic() - began
        tokens = self._img2seq.config.features.tokens is not None
        features = (self._fm.tokens if tokens else self._fm.embed)(crops, batch_size=work.batch_size)
        found = self._img2seq.sample(
            features, ids, samples=work.samples, seed=work.seed, encoder=self._fm, batch_size=work.batch_size
        )
        limits = found.interval(work.level)
        drawn = [found.samples[:, number] for number in range(work.keep)]
        _write(work.out, part, np.stack([found.mean, *limits, *drawn]).astype(np.float32, copy=False))
        return {"rows": len(rows), "seconds": time.monotonic() - began, "read_wait_s": wait_s}


def _write(out: str, part: int, values: np.ndarray) -> None:
    sink = io.BytesIO()
    np.save(sink, values, allow_pickle=False)
    data = sink.getbuffer()
    storage.write_bytes(_part(out, part), data)
    content = hashlib.sha256(np.ascontiguousarray(values, "<f4")).hexdigest()
    facts = {"rows": values.shape[1], "sha256": hashlib.sha256(data).hexdigest(), "content": content}
    storage.write_bytes(_sidecar(out, part), encode(facts))


def _read(out: str, part: int, facts: Mapping[str, Any]) -> np.ndarray:
    uri = _part(out, part)
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DamagedError(uri, "its bytes do not match its sha256", "delete it with its .json and run the job again")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _assemble(
    work: Work, crops: CropStore, facts: list[dict[str, Any]], genes: tuple[str, ...], uns: dict[str, Any]
) -> None:
    """`expression.h5ad`, a part in memory at a time."""
    import pandas as pd

    table = crops.metadata([name for name in crops.columns if name != "image"], work.rows)
    columns = {name: h5ad.series(table[name]) for name in table.column_names if name != "crop_id"}
    ids = table["crop_id"].to_numpy(zero_copy_only=False)
    columns.setdefault("cell_id", ids)
    obs = pd.DataFrame(columns, index=pd.Index(ids, dtype=object))
    names = ["X", "layers/lower", "layers/upper", *(f"layers/sample_{number}" for number in range(work.keep))]
    with h5ad.written(storage.join(work.out, FILE), obs, pd.DataFrame(index=list(genes)), uns) as file:
        matrices = [h5ad.dense(file, name, (len(obs), len(genes))) for name in names]
        row = 0
        for part, each in enumerate(facts):
            for matrix, values in zip(matrices, _read(work.out, part, each), strict=True):
                matrix[row : row + each["rows"]] = values
            row += each["rows"]


def _part(out: str, part: int) -> str:
    return storage.join(out, SCRATCH, f"part-{part:05}.npy")


def _sidecar(out: str, part: int) -> str:
    return storage.join(out, SCRATCH, f"part-{part:05}.json")
