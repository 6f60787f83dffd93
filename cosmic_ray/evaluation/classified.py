"""Cell-type accuracy: classifiers that have seen real train cells alone judge real held-out and generated cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cosmic_ray.evaluation.metrics.accuracy import Scores
from cosmic_ray.evaluation.metrics.classifier import CellTypeClassifier
from cosmic_ray.evaluation.scores import number, over_rounds

if TYPE_CHECKING:
    from cosmic_ray.evaluation.evaluate import Inputs
    from cosmic_ray.evaluation.expression import Real
    from cosmic_ray.evaluation.generated import GeneratedExpression

_CHOOSING = 5
"""One of so many train cells chooses the epoch, so that val is held out of that, too: whole groups of the split, where
there are as many."""


def image_accuracy(inputs: Inputs, types: np.ndarray) -> dict[str, Any] | None:
    """The paper's CNN: `real` (with its Wilson interval) and `generated` (the first sample of each cell, over rounds;
    of one round with its Wilson interval). None, where train has not two cell types.
    """
    job, crops = inputs.job, inputs.store.crops
    fitting, choosing, known = _parts(inputs, types)
    if known is None:
        return None
    labels = inputs.column(job.cell_type, fitting), inputs.column(job.cell_type, choosing)
    settings = job.classifier.model_copy(update={"size": max(16, min(job.classifier.size, crops.spec.height))})
    model = CellTypeClassifier.fit(
        crops.crops(fitting), labels[0], crops.crops(choosing), labels[1], settings, device=_device(job.device)
    )
    real = model.score(crops.crops(inputs.pictured[known]), types[known])
    rounds = [model.score(each.store.crops(each.rows[known, 0]), types[known]) for each in inputs.rounds]
    made = over_rounds([scores.accuracy.mean for scores in rounds])
    if len(rounds) == 1:
        made |= {"low": rounds[0].accuracy.low, "high": rounds[0].accuracy.high}
    balanced = over_rounds([scores.balanced_accuracy for scores in rounds])
    return _told(model, real, known) | {"generated": made, "generated_balanced": balanced}


def expression_accuracy(inputs: Inputs, made: GeneratedExpression, real: Real) -> dict[str, Any] | None:
    """The two-layer MLP on log expression: `real`, `generated` (the mean), and `generated_sample`, one sample of each
    cell, where there are samples: a mean is smoother than any real cell. None, where train has not two cell types.
    """
    job, everything = inputs.job, slice(0, len(made.genes))
    fitting, choosing, known = _parts(inputs, real.types)
    if known is None:
        return None
    at = np.searchsorted(inputs.train, fitting), np.searchsorted(inputs.train, choosing)
    labels = inputs.column(job.cell_type, fitting), inputs.column(job.cell_type, choosing)
    model = CellTypeClassifier.fit(
        real.train[at[0]].toarray(),
        labels[0],
        real.train[at[1]].toarray(),
        labels[1],
        job.classifier,
        device=_device(job.device),
    )
    truth = real.types[known]
    found = _told(model, model.score(real.held[known].toarray(), truth), known)
    found["generated"] = _scores(model.score(made.block(everything)[known], truth))
    if made.samples and made.single:
        found["generated_sample"] = _scores(model.score(made.block(everything, made.samples[0])[known], truth))
    return found


def _parts(inputs: Inputs, types: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Train rows to fit on, train rows to choose on, and the places of judged cells whose type was fitted (None where
    there are not two types)."""
    of = inputs.split.group_codes[inputs.train]
    if len(np.unique(of)) < _CHOOSING:  # whole groups would be too much of train
        of = np.arange(len(inputs.train))
    groups = np.unique(of)
    choosing = np.isin(of, np.random.default_rng(inputs.job.seed).permutation(groups)[: len(groups) // _CHOOSING])
    labels = inputs.column(inputs.job.cell_type, inputs.train)
    fitted = set(labels[~choosing]) - {""}
    usable = np.isin(labels, list(fitted))
    known = np.flatnonzero(np.isin(types, list(fitted)))
    fitting, chosen = inputs.train[~choosing & usable], inputs.train[choosing & usable]
    enough = len(fitted) >= 2 and len(chosen) and len(known)
    return fitting, chosen, known if enough else None


def _told(model: CellTypeClassifier, real: Scores, known: np.ndarray) -> dict[str, Any]:
    about = model.config
    largest = real.confusion.sum(1).max() / real.confusion.sum()
    return {
        "classes": list(about.classes),
        "train_cells": sum(about.train_cells.values()),
        "cells": len(known),
        "chance": float(largest),
        "real": _scores(real),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    low, high = scores.accuracy.low, scores.accuracy.high
    balanced = number(scores.balanced_accuracy)
    return {"accuracy": scores.accuracy.mean, "low": low, "high": high, "balanced": balanced}


def _device(named: str | None) -> str:
    from cosmic_ray.registry.model import default_device

    return named or default_device()
