"""What a manifest says about its rows: exact integer counts, so that merging shards in any order gives one answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from cosmic_ray.config import Config

COUNTED = ("source", "plate", "cell_line")
QUANTILES = (0, 5, 25, 50, 75, 95, 100)


class Statistics(Config):
    """Counts over the rows of a shard, or of several."""

    rows: int
    counts: dict[str, dict[str, int]]
    """For each of `COUNTED`: rows by value."""
    areas: dict[int, int]
    """Rows by `area_px`."""
    pixels: tuple[tuple[int, ...], ...]
    """For each channel: pixels by stored value 0..255."""

    @classmethod
    def of(cls, labels: dict[str, list[str]], areas: np.ndarray, images: np.ndarray) -> Statistics:
        """Count rows: `labels` holds the values of each of `COUNTED`, `areas` int (N,), `images` uint8 (N, C, H, W)."""
        values, times = np.unique(areas, return_counts=True)
        channels = range(images.shape[1])
        return cls(
            rows=len(images),
            counts={name: dict(Counter(labels[name])) for name in COUNTED},
            areas=dict(zip(values.tolist(), times.tolist(), strict=True)),
            pixels=tuple(tuple(_histogram(images[:, channel]).tolist()) for channel in channels),
        )

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """The counts over all of `parts` (at least one), whatever their order."""
        parts = list(parts)
        counts = {name: sum((Counter(part.counts[name]) for part in parts), Counter()) for name in COUNTED}
        areas = sum((Counter(part.areas) for part in parts), Counter())
        return cls(
            rows=sum(part.rows for part in parts),
            counts={name: dict(sorted(counter.items())) for name, counter in counts.items()},
            areas=dict(sorted(areas.items())),
            pixels=tuple(
                tuple(map(sum, zip(*channel, strict=True))) for channel in zip(*(p.pixels for p in parts), strict=True)
            ),
        )

    def summary(self, channels: tuple[str, ...]) -> dict[str, Any]:
        """For a manifest: rows by source, plate, cell line; area percentiles (px); nonzero pixels of each channel."""
        return {
            **{f"rows_by_{name}": self.counts[name] for name in COUNTED},
            "area_px_percentiles": {str(q): _percentile(self.areas, q) for q in QUANTILES},
            "nonzero_pixels": {
                name: _moments(histogram) for name, histogram in zip(channels, self.pixels, strict=True)
            },
        }


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Count uint8 values; image by image, since bincount makes an 8-byte copy of what it counts."""
    total = np.zeros(256, np.int64)
    for image in pixels:
        foreground = image[image > 0]
        total += np.bincount(foreground, minlength=256)
        total[0] += image.size - foreground.size
    return total


def _percentile(counts: dict[int, int], q: int) -> int:
    """The smallest value that at least `q` % of the rows do not exceed."""
    wanted, seen = math.ceil(sum(counts.values()) * q / 100), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= max(wanted, 1):
            return value
    return 0


def _moments(histogram: tuple[int, ...]) -> dict[str, float]:
    count = sum(histogram[1:])
    total = sum(value * times for value, times in enumerate(histogram))
    squares = sum(value * value * times for value, times in enumerate(histogram))
    mean = total / count if count else 0.0
    variance = (squares * count - total * total) / (count * count) if count else 0.0
    return {"count": count, "sum": total, "sum_of_squares": squares, "mean": mean, "std": math.sqrt(variance)}
