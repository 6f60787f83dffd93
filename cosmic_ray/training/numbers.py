"""The scalars of a step: on the device until they are read, which an accelerator need not wait for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Key = tuple[str, str]
"""(`sum`, `count`, `norm` or `told`, name)."""


@dataclass
class Numbers:
    """What all ranks know of a step, the same on each."""

    told: dict[str, float] = field(default_factory=dict)
    """Sums over ranks of what each told."""
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(sum, count) of every loss over the global batch."""
    norms: dict[str, float] = field(default_factory=dict)
    """The gradient's norm before clipping, of every phase."""

    def non_finite(self) -> str | None:
        """What is not finite, in words; None where all is well."""
        checked = {name: total for name, (total, _) in self.sums.items()} | self.norms
        bad = [f"{name} is {value}" for name, value in checked.items() if not math.isfinite(value)]
        return ", ".join(bad) or None


class Pending:
    """Scalars on their way to the host."""

    def __init__(self, scalars: Mapping[Key, torch.Tensor]):
        """Begin to copy `scalars`; returns at once."""
        self._keys = list(scalars)
        self._values = torch.stack([value.detach().double() for value in scalars.values()])
        self._ready: torch.cuda.Event | None = None
        if self._values.device.type == "cuda":
            host = torch.empty(self._values.shape, dtype=torch.float64, pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> Numbers:
        """Wait for them."""
        if self._ready is not None:
            self._ready.synchronize()
        found = dict(zip(self._keys, self._values.tolist(), strict=True))
        numbers = Numbers()
        for (what, name), value in found.items():
            if what == "told":
                numbers.told[name] = value
            elif what == "norm":
                numbers.norms[name] = value
            elif what == "sum":
                numbers.sums[name] = (value, found["count", name])
        return numbers
