"""The report's figures, as SVG or PNG text for one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#2a6fbb", "#d1663c", "#3a9a78", "#8a5fb0", "#c2a133", "#c0507f", "#5a7684", "#7f8f2f", "#46a5b8", "#a0522d")
_INK, _FAINT = "#22303c", "#d9dfe4"
_CAPTION = 14


def png_uri(data: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, log: bool = False) -> str:
    """Lines over the step.

    Args:
        series: name -> (steps, values); a short series gets markers.
        title: what the vertical axis shows.
        log: a logarithmic vertical axis.
    """
    figure, axes = _figure(4.4, 2.7)
    for number, (name, (steps, values)) in enumerate(series.items()):
        marker = "o" if len(steps) < 40 else None
        axes.plot(steps, values, label=name, color=PALETTE[number % 10], linewidth=1.4, marker=marker, markersize=2.5)
    if log:
        axes.set_yscale("log")
        _plain_numbers(axes)
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel("step", fontsize=8)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def bars(counts: Mapping[str, int], title: str) -> str:
    """Horizontal bars, one a name from the top, with their counts written beside."""
    figure, axes = _figure(5.2, 0.35 + 0.26 * max(len(counts), 1))
    names = list(counts)[::-1]
    drawn = axes.barh(names, [counts[name] for name in names], color=PALETTE[0], height=0.62)
    axes.bar_label(drawn, [f"{counts[name]:,}" for name in names], padding=3, fontsize=7, color=_INK)
    axes.margins(x=0.15)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def scatter(points: np.ndarray, values: np.ndarray, title: str) -> str:
    """A map of crops, coloured by a category (strings) or by a number.

    Args:
        points: float (N, 2).
        values: (N,) strings or numbers.
        title: what the colour shows.

    Returns:
        A PNG data URI: thousands of SVG circles would make the page slow.
    """
    figure, axes = _figure(4.2, 3.4)
    size = float(np.clip(6000 / max(len(points), 1), 1.5, 14))
    order = np.random.default_rng(0).permutation(len(points))
    points, values = points[order], np.asarray(values)[order]
    if values.dtype.kind in "OUS":
        names, codes = np.unique(values.astype(str), return_inverse=True)
        axes.scatter(*points.T, c=np.array(PALETTE)[codes % 10], s=size, linewidths=0, alpha=0.8)
        handles = [axes.scatter([], [], color=PALETTE[i % 10], s=14) for i in range(min(len(names), 12))]
        axes.legend(handles, names[:12], fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        low, high = np.nanpercentile(values, [1, 99])
        drawn = axes.scatter(*points.T, c=values, s=size, linewidths=0, cmap="viridis", vmin=low, vmax=high, alpha=0.8)
        figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    return _png(figure)


def histogram(series: Mapping[str, np.ndarray], title: str, limits: tuple[float, float] = (-1.0, 1.0)) -> str:
    """Outlined histograms over one another, as shares; NaN is left out.

    Args:
        series: name -> values (N,).
        title: what the horizontal axis shows.
        limits: of the horizontal axis.
    """
    figure, axes = _figure(4.4, 2.7)
    edges = np.linspace(*limits, 51)
    for number, (name, values) in enumerate(series.items()):
        known = np.clip(values[np.isfinite(values)], *limits)
        weights = np.full(len(known), 1 / max(len(known), 1))
        colour = PALETTE[number % 10]
        axes.hist(known, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.18, linewidth=0)
        axes.hist(known, edges, weights=weights, histtype="step", color=colour, label=f"{name} ({len(known):,})")
    axes.axvline(0, color=_INK, linewidth=0.6)
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_ylabel("share of genes", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def bands(
    x: Sequence[float], lines: Mapping[str, Sequence[tuple[float, float | None, float | None]]], title: str, label: str
) -> str:
    """Lines with intervals over a number, and chance (0.5) as a thin line.

    Args:
        x: the number, ascending.
        lines: name -> (value, low, high) at each x; no interval where they are None.
        title: what the vertical axis shows.
        label: what the horizontal axis shows.
    """
    figure, axes = _figure(4.4, 2.7)
    for number, (name, points) in enumerate(lines.items()):
        values = [point[0] for point in points]
        below, above = (
            [abs(v - (v if p[k] is None else p[k])) for v, p in zip(values, points, strict=True)] for k in (1, 2)
        )
        axes.errorbar(
            x,
            values,
            [below, above],
            label=name,
            color=PALETTE[number % 10],
            linewidth=1.4,
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.axhline(0.5, color=_INK, linewidth=0.6, linestyle=":")
    axes.set_ylim(min(0.3, axes.get_ylim()[0]), 1.03)
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel(label, fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def paired_montage(groups: Mapping[str, tuple[np.ndarray, np.ndarray]], top: float, words: tuple[str, str]) -> bytes:
    """A PNG: for each group a line of real crops, and below each the generated one of the same cell.

    Args:
        groups: name -> real and generated crops, uint8 (n, C, H, W) each; several channels are averaged.
        top: the stored value shown as full brightness.
        words: what the upper and the lower line are.
    """
    from PIL import Image, ImageDraw

    first = next(iter(groups.values()))[0]
    side_y, side_x = first.shape[2] + 2, first.shape[3] + 2
    across = max(len(real) for real, _ in groups.values())
    canvas = np.zeros((len(groups) * (2 * side_y + _CAPTION), max(across * side_x, 240)), np.uint8)
    for line, pair in enumerate(groups.values()):
        for below, crops in enumerate(pair):
            y = line * (2 * side_y + _CAPTION) + _CAPTION + below * side_y
            for column, crop in enumerate(crops):
                pixels = np.clip(crop.mean(0) * (255 / top), 0, 255)
                canvas[y : y + side_y - 2, column * side_x : (column + 1) * side_x - 2] = pixels
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for line, name in enumerate(groups):
        text = f"{name}: {words[0]} above, {words[1]} below"
        draw.text((2, line * (2 * side_y + _CAPTION) + 1), text, fill=255)
    with io.BytesIO() as data:
        picture.save(data, "PNG")
        return data.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(labelsize=7, color=_FAINT, labelcolor=_INK)
    return figure, axes


def _plain_numbers(axes: Any) -> None:
    """1 2 5 10 on a logarithmic axis, where matplotlib writes powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    import matplotlib

    # The ids and the date in an SVG would otherwise differ from run to run.
    with io.StringIO() as text, matplotlib.rc_context({"svg.hashsalt": "cosmic_ray", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
        drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _png(figure: Figure) -> str:
    with io.BytesIO() as data:
        figure.savefig(data, format="png", dpi=130)
        return png_uri(data.getvalue())
