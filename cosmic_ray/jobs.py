"""A job file -> one typed job; the table of kinds."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from cosmic_ray.config import Job, apply_overrides, parse_yaml, validate
from cosmic_ray.errors import ABSENT, JobError

KINDS: dict[str, str] = {
    "simulate-plates": "cosmic_ray.simulation.job:SimulatePlates",
    "simulate-cells": "cosmic_ray.simulation.paired_job:SimulateCells",
    "semi-real": "cosmic_ray.simulation.semi_real_job:SemiReal",
    "build-crops": "cosmic_ray.imaging.job:BuildCrops",
    "build-cells": "cosmic_ray.cells.job:BuildCells",
    "split": "cosmic_ray.stores.split:MakeSplit",
    "pretrain-mae": "cosmic_ray.training.mae_job:PretrainMAE",
    "train-seq2img": "cosmic_ray.training.seq2img_job:TrainSeq2Img",
    "train-img2seq": "cosmic_ray.training.img2seq_job:TrainImg2Seq",
    "tune": "cosmic_ray.tuning.job:Tune",
    "fit-transcriptome": "cosmic_ray.transcriptome.job:FitTranscriptome",
    "embed": "cosmic_ray.inference.embed:Embed",
    "evaluate": "cosmic_ray.evaluation.job:Evaluate",
    "compare": "cosmic_ray.evaluation.compare:Compare",
    "generate": "cosmic_ray.inference.generate:Generate",
    "report": "cosmic_ray.evaluation.report:Report",
    "pipeline": "cosmic_ray.pipeline:Pipeline",
}
"""kind -> where its schema lives. A module here imports neither torch nor Ray: a file is checked without them."""


def job_class(kind: object, key: str = "kind") -> type[Job]:
    """The schema of `kind`.

    Raises:
        JobError: for an unknown kind, with the nearest valid one.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(KINDS)}"
        raise JobError(key, kind, "unknown kind", remedy)
    module, _, name = KINDS[str(kind)].partition(":")
    return getattr(importlib.import_module(module), name)


def load(path: str, overrides: list[str] = ()) -> Job:
    """Read a job file (`-`: standard input), lay the dotted overrides over it, and check it against its kind's schema.

    Raises:
        JobError: naming the file or the key, its value and the remedy.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(path, ABSENT, f"cannot be read as a job file: {error}") from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise JobError(path, ABSENT, "not a job file: expected a mapping with kind: and that kind's keys")
    return make(apply_overrides(tree, overrides))


def make(tree: dict[str, Any], prefix: str = "") -> Job:
    """One typed job from plain data; `prefix` is where in a file it stands, for the errors."""
    key = f"{prefix}.kind" if prefix else "kind"
    if not isinstance(tree, dict) or "kind" not in tree:
        raise JobError(key, ABSENT, "missing", f"one of {', '.join(KINDS)}")
    rest = {name: value for name, value in tree.items() if name != "kind"}
    return validate(job_class(tree["kind"], key), rest, prefix)
