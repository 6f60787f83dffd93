"""One self-contained HTML page from plain parts: no script, no font, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass
class Table:
    """Rows under a head; behind a click where `folded` names it."""

    head: list[str]
    rows: list[list[Any]]
    folded: str = ""


@dataclass
class Section:
    """One box of the page. `figures` hold SVG text or PNG data URIs; `wide` holds {uri, alt} of pixel PNGs."""

    title: str
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    wide: list[dict[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    listings: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Page:
    """The whole page; `tiles` are (value, label)."""

    title: str
    subtitle: str
    simulated: bool
    tiles: list[tuple[Any, str]]
    sections: list[Section]

    def html(self) -> str:
        """The page as HTML; every text is escaped."""
        from jinja2 import Environment, select_autoescape

        environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True))
        environment.filters["figure"] = shown
        template = environment.from_string(_TEMPLATE.read_text())
        tiles = [{"value": shown(value), "label": label} for value, label in self.tiles]
        return template.render(
            title=self.title, subtitle=self.subtitle, simulated=self.simulated, tiles=tiles, sections=self.sections
        )


def shown(value: Any) -> str:
    """A value as a reader wants it: thousands separated, four significant digits, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
