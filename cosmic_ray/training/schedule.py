"""The learning rate as a pure function of the step, so that a resumed run has the same one."""

from __future__ import annotations

import math

from cosmic_ray.training.settings import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor of the peak learning rate for optimiser step `step` (from 0) of `steps`, in [0, 1].

    With w = round(warmup * steps): (step + 1) / w while step < w; then 1 (`constant`), or
    final + (1 - final) * (1 + cos(pi * (step - w) / (steps - w))) / 2 (`cosine`, Loshchilov & Hutter 2017).
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * done))
