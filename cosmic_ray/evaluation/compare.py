"""`compare`: evaluations of several arms, seed by seed, with intervals, margins fixed beforehand, and a verdict."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from cosmic_ray import storage
from cosmic_ray.config import Job, Uri
from cosmic_ray.errors import DataError, JobError
from cosmic_ray.evaluation.metrics.intervals import equivalence, mean_interval, paired_interval
from cosmic_ray.evaluation.scores import SCORES, number
from cosmic_ray.output import MANIFEST, claim, read_manifest

FORMAT, VERSION = "cosmic-ray/compare", 1
TABLE = "comparison.parquet"
_ALIKE = ("cells", "split", "fm", "truth")


class Compare(Job):
    """Compare arms (recipes, samplers, models) by the evaluations of several seeds each, paired by seed.

    Below `out`: `comparison.parquet` and `manifest.json`: of each figure and arm the mean over seeds with its interval,
    the paired difference from the baseline, and where a margin was fixed a verdict, which may be a loss.
    """

    kind: ClassVar[str] = "compare"

    arms: dict[str, Annotated[list[Uri], Field(min_length=2)]]
    """Name -> URIs of its evaluations, one a seed, the same seeds in the same order in every arm."""

    baseline: str
    """The arm that the others are compared with."""

    margins: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Figure -> the difference that would matter, in its own units, fixed before anything was measured. Verdicts are
    given for these alone: `cov`, `swd`, `knna_excess`, `image_accuracy`, `pearson`, `crps`... (all that `evaluate`
    puts under `scores`)."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of intervals; 1 - confidence is the level of each test."""

    @field_validator("margins")
    @classmethod
    def _known(cls, margins: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(set(margins) - set(SCORES)):
            raise ValueError(f"no figures {', '.join(unknown)}; there are {', '.join(SCORES)}")
        return margins

    @model_validator(mode="after")
    def _paired(self) -> Compare:
        if self.baseline not in self.arms or len(self.arms) < 2:
            raise ValueError(f"baseline {self.baseline!r} must be one of two arms at least: {', '.join(self.arms)}")
        if len({len(uris) for uris in self.arms.values()}) > 1:
            raise ValueError("every arm needs as many evaluations: they are paired seed by seed")
        every = [storage.absolute(uri) for uris in self.arms.values() for uri in uris]
        if len(set(every)) < len(every):
            raise ValueError("an evaluation stands twice: seeds must be independent")
        return self

    def check(self) -> None:
        """Every evaluation is published."""
        for arm, uris in self.arms.items():
            for place, uri in enumerate(uris):
                if not storage.exists(storage.join(uri, MANIFEST)):
                    key = f"arms.{arm}.{place}"
                    raise JobError(key, uri, "nothing is published there", "run its evaluate job first")

    def run(self) -> dict[str, Any]:
        """Compare, or find it compared.

        Returns:
            `figures`: for each figure and arm what `compared` says; `flaws`, `part`, `simulated`, `seeds`.

        Raises:
            DataError: where something is no evaluation, or they differ in cells, split, part, encoder or truth.
        """
        with claim(self) as output:
            if not output.done:
                self._make(output)
            manifest = output.manifest()
        return {key: manifest[key] for key in ("figures", "flaws", "part", "seeds", "simulated", "opened_besides")}

    def _make(self, output: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        arms = {arm: [_evaluation(uri) for uri in uris] for arm, uris in self.arms.items()}
        every = [each for evaluations in arms.values() for each in evaluations]
        _require_alike(arms, self.arms)
        figures = holm(compared(arms, self.baseline, self.margins, self.confidence), 1 - self.confidence)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(figures), sink)
        output.write(TABLE, sink.getvalue())
        known = {each["opened"]["key"] for each in every if each["opened"]}
        others = {key for each in every if each["opened"] for key in each["opened"]["others"]} - known
        output.publish(
            {
                "format": FORMAT,
                "version": VERSION,
                "job": self.resolved(),
                "figures": figures,
                "flaws": sorted({flaw for each in every for flaw in each["flaws"]}),
                "part": every[0]["part"],
                "seeds": len(next(iter(arms.values()))),
                "simulated": any(each["simulated"] for each in every),
                "opened_besides": len(others) if known else None,
                "lineage": {
                    arm: [
                        {"uri": storage.absolute(uri), "content_hash": each["content_hash"]}
                        for uri, each in zip(self.arms[arm], evaluations, strict=True)
                    ]
                    for arm, evaluations in arms.items()
                },
            }
        )


def compared(
    arms: Mapping[str, Sequence[Mapping[str, Any]]],
    baseline: str,
    margins: Mapping[str, float],
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """One row for each figure that every evaluation has, and arm.

    `mean`, `low`, `high` over seeds (Student t). Of arms other than the baseline: `gain`, the paired difference turned
    so that more is better, with its interval `gain_low`, `gain_high`, `p` of no difference (two-sided), and where a
    margin was fixed `equivalent` (TOST) and `verdict`.
    """
    rows = []
    for name in SCORES:
        values = {arm: [each["scores"].get(name) for each in seeds] for arm, seeds in arms.items()}
        if any(value is None for seeds in values.values() for value in seeds):
            continue
        for arm, seeds in values.items():
            about = mean_interval(np.array(seeds), confidence)
            row = {"figure": name, "arm": arm, "mean": about.mean, "low": about.low, "high": about.high}
            if arm != baseline:
                margin, pair = margins.get(name), (np.array(seeds), np.array(values[baseline]))
                row |= Gain.of(*pair, SCORES[name].better, margin, confidence).told(margin)
            rows.append(row | {"baseline": arm == baseline})
    return [{key: row.get(key) for key in _COLUMNS} for row in rows]


_COLUMNS = (
    "figure", "arm", "baseline", "mean", "low", "high", "gain", "gain_low", "gain_high", "p", "p_holm", "margin",
    "equivalent", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """A paired difference, turned so that more is better."""

    mean: float
    low: float
    high: float
    p: float
    equivalent: bool | None

    @classmethod
    def of(cls, arm: np.ndarray, baseline: np.ndarray, better: int, margin: float | None, confidence: float) -> Gain:
        """From one value a seed of each: (n,) and (n,)."""
        from scipy.stats import t

        first, second = better * arm, better * baseline
        found = paired_interval(first, second, confidence)
        differences = first - second
        error = differences.std(ddof=1) / np.sqrt(len(differences))
        p = float(2 * t.sf(abs(found.mean) / error, len(differences) - 1)) if error > 0 else float(found.mean == 0)
        same = None if margin is None else equivalence(first, second, margin=margin, alpha=1 - confidence).equivalent
        return cls(found.mean, found.low, found.high, p, same)

    def told(self, margin: float | None) -> dict[str, Any]:
        """As columns of a row."""
        facts = {"gain": self.mean, "gain_low": number(self.low), "gain_high": number(self.high), "p": self.p}
        verdict = None if margin is None else verdict_of(self, margin)
        return facts | {"margin": margin, "equivalent": self.equivalent, "verdict": verdict}


def verdict_of(gain: Gain, margin: float) -> str:
    """In words: `better`, `worse` (the interval of the difference leaves 0 out), `equivalent` (within the margin, and
    0 inside the interval), or `undecided`; a sure difference that is surely within the margin says that, too.
    """
    if gain.low > 0 or gain.high < 0:
        sure = "better" if gain.low > 0 else "worse"
        return f"{sure}, by less than the margin" if gain.equivalent else sure
    return "equivalent" if gain.equivalent else "undecided"


def holm(rows: list[dict[str, Any]], level: float) -> list[dict[str, Any]]:
    """Add `p_holm`, adjusted over all verdicts (Holm 1979); a `better` or `worse` that does not hold at `level` then
    says so."""
    judged = sorted((row for row in rows if row["verdict"]), key=lambda row: row["p"])
    highest = 0.0
    for place, row in enumerate(judged):
        highest = max(highest, min(1.0, (len(judged) - place) * row["p"]))
        row["p_holm"] = highest
        if row["verdict"].startswith(("better", "worse")) and highest >= level:
            row["verdict"] += " (not after correction for several figures)"
    return rows


def _evaluation(uri: str) -> dict[str, Any]:
    manifest = read_manifest(uri)
    if (manifest.get("format"), manifest.get("version")) != ("cosmic-ray/evaluate", 1):
        raise DataError(uri, f"no evaluation of version 1, but {manifest.get('format')!r}", "run an evaluate job")
    return manifest


def _require_alike(arms: Mapping[str, Sequence[Mapping[str, Any]]], uris: Mapping[str, Sequence[str]]) -> None:
    """Every seed's evaluations are of the same cells, by the same split, encoder and truth; all are of one part."""
    names = list(arms)
    part = arms[names[0]][0]["part"]
    for place, first in enumerate(arms[names[0]]):
        for name in names:
            each = arms[name][place]
            odd = [key for key, value in _facts(each).items() if value != _facts(first)[key]]
            if each["part"] != part:
                odd.append("part")
            if odd:
                problem = f"differs from {uris[names[0]][place]} in {', '.join(odd)}"
                raise DataError(uris[name][place], problem, "compare what was judged alike")


def _facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: evaluation["lineage"].get(key, {}) for key in _ALIKE}
    hashes = {key: node.get("content_hash") or node.get("digest") for key, node in named.items()}
    return hashes | {"number of cells": evaluation["cells"]}
