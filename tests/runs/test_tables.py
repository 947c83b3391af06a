# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import io
import math

import pytest
import rich.console

from curvlab.runs.stats import Estimate, Verdict
from curvlab.runs.tables import Table, format_cell, format_number, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (32, "32"),
        (-3, "−3"),
        (4096, "4096"),
        (36818954, "36,818,954"),
        (0.93561, "0.9356"),
        (123.456, "123.5"),
        (12345.67, "12,346"),
        (-0.5, "−0.5"),
        (0.005, "0.005"),
        (93.3, "93.3"),
        (93.30001, "93.30"),
        (0.0001, "0.0001"),
        (1.5e-7, "1.500e−07"),
        (2e20, "2.000e+20"),
        (math.nan, "–"),
        (-math.inf, "−∞"),
        (True, "yes"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.934, 0.921, 0.947), "0.934 [0.921, 0.947], n=3"),
        ((0.93412, 0.93389, 0.93435), "0.93412 [0.93389, 0.93435], n=3"),
        ((85.5234, 84.9, 86.1), "85.52 [84.90, 86.10], n=3"),
        ((1234567.0, 1234000.0, 1235134.0), "1,234,567 [1,234,000, 1,235,134], n=3"),
        ((-0.0004, -0.1, 0.1), "0.00 [−0.10, 0.10], n=3"),
        ((1e-7, 0.9e-7, 1.1e-7), "1.00e−07 [9.0e−08, 1.10e−07], n=3"),
        ((2.0, 2.0, 2.0), "2 [2, 2], n=3"),
        ((5.0, math.nan, math.nan), "5 [no interval], n=3"),
        ((5.0, -math.inf, math.inf), "5 [−∞, ∞], n=3"),
    ],
)
def test_estimates_get_the_digits_that_their_interval_deserves(numbers, text):
    assert format_cell(Estimate(*numbers, n=3, method="mean")) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (47.6, "48 s"),
        (59.7, "1 min"),
        (750, "12 min 30 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (None, "–"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def table() -> Table:
    estimate = Estimate(0.934, 0.921, 0.947, 4, "ratio", counts=(3, 1))
    rows = [
        (32, estimate, "a|b\n<i>", Verdict.REPRODUCED),
        (4096, Estimate(0.1, math.nan, math.nan, 1, "mean"), None, None),
    ]
    return Table("Movement <b>", ("width", "Δ", "note|", "verdict"), rows, "A caption.")


def test_markdown():
    assert table().to_markdown().splitlines() == [
        "| width |                           Δ | note\\|   | verdict    |",
        "| ----: | --------------------------: | -------- | ---------- |",
        "|    32 | 0.934 [0.921, 0.947], n=3+1 | a\\|b <i> | Reproduced |",
        "|  4096 |      0.1 [no interval], n=1 | –        | –          |",
        "",
        "A caption.",
    ]


def test_html_is_escaped_and_sortable():
    page = table().to_html()
    assert "<i>" not in page and "&lt;i&gt;" in page and "Movement &lt;b&gt;" in page
    assert '<td class="num" data-sort="0.934">0.934 [0.921, 0.947], n=3+1</td>' in page
    assert '<td data-sort="">–</td>' in page


def test_csv_keeps_full_precision():
    rows = list(csv.reader(io.StringIO(table().to_csv())))
    assert rows[0] == ["width", "Δ", "Δ low", "Δ high", "Δ n", "note|", "verdict"]
    assert rows[1] == ["32", "0.934", "0.921", "0.947", "4", "a|b\n<i>", "Reproduced"]
    assert rows[2] == ["4096", "0.1", "", "", "1", "", ""]


def test_rich_shows_markup_as_text():
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(Table("[red]T", ("[bold]a",), [("[link]x",)]).to_rich())
    text = console.export_text()
    assert "[red]T" in text and "[bold]a" in text and "[link]x" in text


def test_rows_must_fit():
    with pytest.raises(ValueError, match="Table 'T': row 1 must have 2 cells, got 1"):
        Table("T", ("a", "b"), [(1, 2), (1,)])
    assert Table("T", ("a",), []).to_markdown().splitlines()[0] == "| a   |"
