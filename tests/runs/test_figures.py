# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from matplotlib.collections import LineCollection

from curvlab.runs.figures import SERIES, Figure, new_figure, plot_groups, set_axes
from curvlab.runs.stats import mean_interval
from curvlab.runs.svg import DARK_INK, INK


def luminance(color: str) -> float:
    """Relative luminance as in WCAG 2.1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colors_are_seen_on_white_and_on_dark():
    for color in SERIES:
        assert contrast(color, "#ffffff") >= 3 and contrast(color, "#161b22") >= 3, color
    assert contrast(INK, "#ffffff") > 7 and contrast(DARK_INK, "#161b22") > 7


def test_nothing_global_is_touched(make_figure):
    before = dict(matplotlib.rcParams)
    make_figure().svg()
    assert dict(matplotlib.rcParams) == before
    assert "curvlab" in sys.modules and not [f for f in vars(sys.modules["curvlab.runs.figures"]) if f == "plt"]


def test_svg_follows_the_page(make_figure):
    svg = make_figure().svg(prefix="study")
    root = ElementTree.fromstring(svg)
    assert INK not in svg.lower() and svg.count("currentColor") > 20
    assert root.get("role") == "img" and root.get("width") is None and root.get("viewBox")
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"width", "measured", "published", "32", "4096"} <= texts
    assert "#ffffff" not in svg and "metadata" not in svg and re.search(r"<style[^>]*>#study-movement \*\{", svg)
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert references and references <= set(ids) and len(ids) == len(set(ids))
    assert all(name.startswith("study-movement") for name in ids)


def test_two_figures_on_one_page_share_no_id(make_figure):
    one, other = (set(re.findall(r'\bid="([^"]+)"', make_figure(name).svg())) for name in ("a", "b"))
    assert one and not one & other


def test_saved_files_are_repeatable(tmp_path, make_figure):
    figure, svg = make_figure(), make_figure().svg()
    assert make_figure().pdf() == figure.pdf()
    assert figure.svg() == svg == figure.svg()  # also after another format was drawn
    pdf = figure.save_pdf(tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"/Type /Font" in pdf
    assert figure.save_png(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    saved = figure.save_svg(tmp_path / "a.svg").read_text()
    assert "prefers-color-scheme: dark" in saved
    ElementTree.fromstring(saved)
    assert {p.name for p in tmp_path.iterdir()} == {"a.pdf", "a.png", "a.svg"}


def test_every_seed_is_a_dot_and_intervals_are_the_given_ones():
    _, (axes,) = new_figure()
    set_axes(axes, log_x=True, x_ticks=(32, 64))
    groups = {32: [1.0, 1.2, 1.1], 64: [0.5]}
    plot_groups(axes, groups, intervals={64: mean_interval([0.5], pooled_sd=0.1, df=2)})
    dots = [dot for line in axes.lines if line.get_marker() == "." for dot in zip(*line.get_data(), strict=True)]
    assert sorted(dots) == [(32, 1.0), (32, 1.1), (32, 1.2), (64, 0.5)]
    bars = next(c for c in axes.collections if isinstance(c, LineCollection)).get_segments()
    expected = [mean_interval(groups[32]), mean_interval([0.5], pooled_sd=0.1, df=2)]
    assert [end[1] for bar in bars for end in bar] == pytest.approx([end for e in expected for end in (e.low, e.high)])


def test_names_are_file_names():
    with pytest.raises(ValueError, match=r"name must be lower-case letters, digits, - and _, got '\.\./x'"):
        Figure("../x", "t", "c", new_figure()[0])
