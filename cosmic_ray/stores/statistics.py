"""What a manifest says about its rows: exact integer counts, so that merging shards in any order gives one answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from cosmic_ray.config import Config

COUNTED = ("source", "plate", "cell_line", "pixel_size_um")
AREA_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
PIXEL_PERCENTILES = (0.5, 50, 99.5)


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
    def of(cls, labels: Mapping[str, Iterable[Hashable]], areas: np.ndarray, images: np.ndarray) -> Statistics:
        """Count rows: `labels` holds the values of each of `COUNTED`, `areas` int (N,), `images` uint8 (N, C, H, W)."""
        values, times = np.unique(areas, return_counts=True)
        channels = range(images.shape[1])
        return cls(
            rows=len(images),
            counts={name: dict(Counter(map(str, labels[name]))) for name in COUNTED},
            areas=dict(zip(values.tolist(), times.tolist(), strict=True)),
            pixels=tuple(tuple(_histogram(images[:, channel]).tolist()) for channel in channels),
        )

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """The counts over all of `parts` (at least one), whatever their order."""
        parts = list(parts)
        by_channel = zip(*(part.pixels for part in parts), strict=True)
        return cls(
            rows=sum(part.rows for part in parts),
            counts={name: _total(part.counts[name] for part in parts) for name in COUNTED},
            areas=_total(part.areas for part in parts),
            pixels=tuple(tuple(map(sum, zip(*histograms, strict=True))) for histograms in by_channel),
        )

    def summary(self, channels: tuple[str, ...]) -> dict[str, Any]:
        """For a manifest: rows by each of `COUNTED`, area percentiles (px), nonzero pixels of each channel."""
        return {
            **{f"rows_by_{name}": self.counts[name] for name in COUNTED},
            "area_px_percentiles": {str(q): _percentile(self.areas, q) for q in AREA_PERCENTILES},
            "nonzero_pixels": {
                name: _moments(histogram) for name, histogram in zip(channels, self.pixels, strict=True)
            },
        }


def _total(counts: Iterable[dict[Any, int]]) -> dict[Any, int]:
    total: Counter = Counter()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Count uint8 values; image by image, since bincount makes an 8-byte copy of what it counts."""
    total = np.zeros(256, np.int64)
    for image in pixels:
        foreground = image[image > 0]
        total += np.bincount(foreground, minlength=256)
        total[0] += image.size - foreground.size
    return total


def _percentile(counts: dict[int, int], q: float) -> int:
    """The smallest value that at least `q` % of the rows do not exceed."""
    wanted, seen = math.ceil(sum(counts.values()) * q / 100), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= max(wanted, 1):
            return value
    return 0


def _moments(histogram: tuple[int, ...]) -> dict[str, Any]:
    count = sum(histogram[1:])
    total = sum(value * times for value, times in enumerate(histogram))
    squares = sum(value * value * times for value, times in enumerate(histogram))
    mean = total / count if count else 0.0
    variance = (squares * count - total * total) / (count * count) if count else 0.0
    nonzero = dict(enumerate(histogram[1:], start=1))
    return {
        **{"count": count, "sum": total, "sum_of_squares": squares, "mean": mean, "std": math.sqrt(variance)},
        "percentiles": {str(q): _percentile(nonzero, q) for q in PIXEL_PERCENTILES},
    }
