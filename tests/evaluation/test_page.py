"""The report page: whole in itself, and nothing that a file name says becomes markup."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cosmic_ray.evaluation import figures
from cosmic_ray.evaluation.page import Page, Section, Table, shown


def page(**changes) -> str:
    table = Table(["field_uri"], [["<script>alert(1)</script>"]], "fields left out")
    drawn = [
        figures.bars({"crops kept": 3, "blurred": 1}, "objects"),
        figures.curves({"loss": ([1, 2], [3, 2])}, "loss"),
    ]
    parts = {"title": "A & B", "subtitle": "s", "simulated": False, "tiles": [(1234567, "crops")]}
    return Page(**{**parts, **changes}, sections=[Section("One", figures=drawn, tables=[table])]).html()


def test_the_page_fetches_nothing_and_escapes_what_it_is_given():
    html = page()
    assert "<script" not in html and "&lt;script&gt;" in html and "A &amp; B" in html
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]+)|url\(([^)]+)\)""", html)
    targets = [link or style for link, style in fetched]
    assert [target for target in targets if not target.startswith(("data:", "#"))] == []
    assert html.count("<svg") == 2 and "1,234,567" in html


def test_simulated_data_is_called_so():
    assert "simulated data" in page(simulated=True)
    assert "simulated data" not in page()


def test_a_figure_is_the_same_each_time_it_is_drawn():
    points = np.random.default_rng(0).normal(size=(50, 2))
    assert figures.bars({"a": 1}, "t") == figures.bars({"a": 1}, "t")
    assert figures.scatter(points, np.arange(50.0), "t") == figures.scatter(points, np.arange(50.0), "t")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"), (43210.7, "43,211"), ("x", "x")],
)
def test_numbers_are_shown_as_a_reader_wants_them(value, text):
    assert shown(value) == text
