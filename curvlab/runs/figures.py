# SPDX-License-Identifier: Apache-2.0
"""The house style of figures: every seed a dot, means with intervals, published values as hollow markers.

Figures are functions of saved rows. They use matplotlib's ``Figure`` objects and never pyplot, so nothing global is
touched. Colors: text and lines are one ink that turns into ``currentColor`` in SVG; the six series colors keep a
contrast of at least 3:1 on white and on the report's dark page, stay apart for color-blind eyes (after Okabe & Ito),
and always come with a marker of their own shape.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from curvlab.runs.estimates import Estimate, geometric_mean_interval, mean_interval
from curvlab.runs.journal import atomic_save, atomic_write
from curvlab.runs.slopes import LogLogFit
from curvlab.runs.svg import INK, standalone_svg, themed_svg

SERIES = ("#2b7bcb", "#d55e00", "#008f6b", "#b0569b", "#8a7400", "#5f7485")
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same metrics everywhere
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK + "99",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK + "99",
    "ytick.color": INK + "99",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "pdf.fonttype": 42,  # whole fonts: editable text, and what journals ask for
    "svg.fonttype": "none",  # text stays text: found by search, set in the page's own face
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its words. ``draw`` is the matplotlib figure; ``name`` is a file name without suffix."""

    name: str
    title: str
    caption: str
    draw: MatplotlibFigure

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"Figure: name must be lower-case letters, digits, - and _, got {self.name!r}")
        # The layout is made once and then kept: made again for each format it moves by fractions of a pixel, and the
        # same figure would not give the same bytes.
        with matplotlib.rc_context(STYLE):
            self.draw.draw_without_rendering()
        self.draw.set_layout_engine("none")

    def svg(self, prefix: str = "") -> str:
        """An ``<svg>`` element for a page: neutral colors follow the page's text, ids carry ``prefix`` and the name."""
        name = f"{prefix}-{self.name}" if prefix else self.name
        return themed_svg(self._render("svg").decode(), name, title=self.title, description=self.caption)

    def save_svg(self, path: Path | str) -> Path:
        """A file of its own; light or dark as the viewer prefers, on a transparent background."""
        atomic_write(Path(path), standalone_svg(self.svg()).encode())
        return Path(path)

    def pdf(self) -> bytes:
        """The PDF's bytes; the same figure gives the same bytes (no dates)."""
        return self._render("pdf")

    def save_pdf(self, path: Path | str) -> Path:
        """:meth:`pdf` into a file, atomically."""
        atomic_write(Path(path), self.pdf())
        return Path(path)

    def save_png(self, path: Path | str, *, dpi: int = 200) -> Path:
        """For a README: on white, since an image cannot follow its page."""
        atomic_save(
            Path(path), lambda temporary: temporary.write_bytes(self._render("png", dpi=dpi, facecolor="white"))
        )
        return Path(path)

    def _render(self, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}, "png": {"Software": None}}
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.draw.savefig(out, format=kind, metadata=dateless[kind], **options)
        return out.getvalue()


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None
) -> tuple[MatplotlibFigure, list[Axes]]:
    """A styled figure and its panels, row by row. ``size`` in inches; default 6.2 × 3.9 (one), 4.4 × 3.5 each."""
    wide, high = size or ((6.2, 3.9) if rows * columns == 1 else (4.4 * columns, 3.5 * rows))
    with matplotlib.rc_context(STYLE):
        figure = MatplotlibFigure(figsize=(wide, high), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.flat)


def set_axes(
    axes: Axes,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> None:
    """Labels and scales. Logarithmic axes show plain numbers (0.05, 0.1, 512), not powers of ten."""
    with matplotlib.rc_context(STYLE):
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        for on, axis, setter in ((log_x, axes.xaxis, axes.set_xscale), (log_y, axes.yaxis, axes.set_yscale)):
            if on:
                setter("log")
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
                axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−")))
        if x_ticks is not None:
            axes.xaxis.set_major_locator(FixedLocator(list(x_ticks)))


def plot_groups(
    axes: Axes,
    groups: Mapping[float, Sequence[float]],
    *,
    series: int = 0,
    label: str = "",
    geometric: bool = False,
    intervals: Mapping[float, Estimate] | None = None,
    connect: bool = True,
    aside: float = 7.0,
) -> None:
    """One series: per x every seed as a dot beside the mean's marker, its 95 % interval as a bar.

    Args:
        axes: where.
        groups: seeds' values by x.
        series: index of color and marker.
        label: for the legend.
        geometric: geometric means and intervals (for log axes).
        intervals: estimates to show instead of those computed here (pooled SD, say).
        connect: join the means by a line.
        aside: points between a mean and its first dot; fewer where the next abscissa is near, or it would seem its own.
    """
    color, marker = SERIES[series % len(SERIES)], MARKERS[series % len(MARKERS)]
    average: Callable[..., Estimate] = geometric_mean_interval if geometric else mean_interval
    shown = {x: (intervals or {}).get(x) or average(values) for x, values in sorted(groups.items())}
    xs, means = list(shown), [e.value for e in shown.values()]
    axes.plot(xs, means, color=color, marker="", linestyle="-" if connect else "none", alpha=0.55, zorder=2)
    _plot_seeds(axes, groups, color, aside)
    held = {x: e for x, e in shown.items() if e.has_interval and np.isfinite([e.low, e.high]).all()}
    if held:
        lows = [max(0.0, e.value - e.low) for e in held.values()]
        highs = [max(0.0, e.high - e.value) for e in held.values()]
        centers = [e.value for e in held.values()]
        axes.errorbar(
            list(held), centers, yerr=[lows, highs], fmt="none", ecolor=color, elinewidth=1.3, capsize=3, zorder=4
        )
    axes.plot(xs, means, marker=marker, linestyle="none", color=color, markersize=5.5, zorder=5, label=label or None)


def _plot_seeds(axes: Axes, groups: Mapping[float, Sequence[float]], color: str, aside: float) -> None:
    """Each seed a dot, fanned out to the right of its mean (7 to 13 points), where the mean's marker would hide it."""
    most = max((len(values) for values in groups.values()), default=0)
    for seed in range(most):
        here = {x: values[seed] for x, values in groups.items() if len(values) > seed}
        shift = aside / 7 * (7 + 6 * seed / max(1, most - 1)) / 72
        moved = axes.transData + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)
        axes.plot(
            list(here), list(here.values()), ".", color=color, alpha=0.7, markersize=4.5, markeredgewidth=0, zorder=3,
            transform=moved,
        )  # fmt: skip


def plot_fit(axes: Axes, fit: LogLogFit, low: float, high: float, *, series: int = 0, label: str | None = None) -> None:
    """The fitted power law between x = low and high, with its 95 % band; the label defaults to the slope's interval."""
    color = SERIES[series % len(SERIES)]
    x = np.geomspace(low, high, 60)
    line, below, above = fit.predict(x)
    if np.isfinite(below).all():
        axes.fill_between(x, below, above, color=color, alpha=0.16, linewidth=0, zorder=1)
    if label is None:
        slope = fit.slope
        interval = f" [{slope.low:.3f}, {slope.high:.3f}]" if slope.has_interval else ""
        label = f"slope {slope.value:.3f}{interval}".replace("-", "−")
    axes.plot(x, line, color=color, linestyle=(0, (5, 2)), linewidth=1.2, zorder=2, label=label or None)


def plot_published(axes: Axes, x: Sequence[float], y: Sequence[float], *, label: str = "published") -> None:
    """Published values: hollow diamonds in ink, on top of everything."""
    axes.plot(
        x, y, marker="D", linestyle="none", markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.1,
        markersize=8.5, zorder=6, label=label or None,
    )  # fmt: skip


def plot_guide(
    axes: Axes, x: Sequence[float], y: Sequence[float], *, label: str = "", note_at_end: bool = False
) -> None:
    """A thin dotted line in ink: a theoretical law or a threshold. ``note_at_end`` writes the label beside its end."""
    axes.plot(x, y, color=INK, alpha=0.6, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1,
              label=None if note_at_end else label or None)  # fmt: skip
    if note_at_end and label:
        axes.annotate(label, (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", color=INK, alpha=0.75,
                      fontsize=8, va="center")  # fmt: skip


def add_legend(axes: Axes, **options: Any) -> None:
    """The legend, without a frame, where it covers least unless ``loc`` says otherwise."""
    with matplotlib.rc_context(STYLE):
        axes.legend(**{"loc": "best", "handlelength": 1.8, "borderaxespad": 0.2, **options})
