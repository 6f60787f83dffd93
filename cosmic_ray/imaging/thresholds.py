"""Which nuclei are too small or too large: percentiles of the area over a whole source, exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosmic_ray.config import Config
from cosmic_ray.imaging.histogram import Histogram

Percent = Annotated[float, Field(ge=0, le=100)]


class AreaLimits(Config):
    """Keep nuclei whose area lies inside two percentiles, limits included (COSMIC §3.1)."""

    low: Percent = 5.0
    """Lower percentile of the area in px."""

    high: Percent = 95.0
    """Upper percentile of the area in px."""

    scope: Literal["source", "all"] = "source"
    """Over what percentiles are taken: each source by itself, or all of them together."""

    @model_validator(mode="after")
    def _ordered(self) -> AreaLimits:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


def area_limits(areas: Mapping[str, Histogram], settings: AreaLimits) -> dict[str, tuple[float, float]]:
    """The smallest and the largest area in px that are kept, for each source.

    The percentiles are those of `numpy.percentile` over every whole nucleus (not touching the border, of good quality;
    those larger than the crop count), from histograms of integer areas and hence exact.

    Args:
        areas: source -> histogram of its nuclei's areas in px, none empty.
    """
    if settings.scope == "all":
        areas = dict.fromkeys(areas, Histogram.merged(areas.values()))
    return {source: (area.percentile(settings.low), area.percentile(settings.high)) for source, area in areas.items()}
