# SPDX-License-Identifier: Apache-2.0
"""Figures of the loss around a network: lines, planes, surfaces, noise curves.

They draw on axes that are given, or on a new ``matplotlib.figure.Figure`` (``axes.figure.savefig(...)``); pyplot and
its global state are not touched. Losses span decades, so their scale is logarithmic; what overflowed is left blank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvlab.sharpness.perturbation import Flatness
    from curvlab.sharpness.slices import LossSlice

__all__ = ["plane_levels", "plot_flatness", "plot_line", "plot_plane", "plot_surface"]

COLORS = ("#2b7bcb", "#d55e00", "#008f6b", "#b0569b", "#8a7400", "#5f7485")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLORMAP = "viridis"


def plot_line(
    slices: LossSlice | Mapping[str, LossSlice],
    axes: Axes | None = None,
    *,
    accuracy: Axes | None = None,
    chord: bool = False,
) -> Axes:
    """Losses along a line, a curve for each network; accuracies on axes of their own.

    Args:
        slices: one line, or label -> line.
        axes: where; None makes a figure, with a second panel for accuracies where there are any.
        accuracy: where accuracies go, in percent; None (with ``axes`` given): they are not drawn.
        chord: draw the straight line between the ends as well, from which a barrier is measured.

    Returns:
        The axes of the losses.

    Raises:
        ValueError: a plane, or nothing.
    """
    named = _named("plot_line", slices, 1)
    if axes is None:
        has_accuracy = any(one.accuracies is not None for one in named.values())
        panels = _new_axes(2 if has_accuracy else 1)
        axes, accuracy = panels[0], panels[1] if has_accuracy else None
    for i, (label, one) in enumerate(named.items()):
        (a,), color = one.coordinates, COLORS[i % len(COLORS)]
        style: dict[str, Any] = {"color": color, "marker": MARKERS[i % len(MARKERS)], "markersize": 3, "linewidth": 1.5}
        style["markevery"] = max(1, len(a) // 25)
        axes.plot(a, _finite(one.losses), label=label or None, **style)
        if chord:
            ends = np.interp(a, a[[0, -1]], one.losses[[0, -1]])
            axes.plot(a, ends, color=color, linestyle=(0, (1, 2)), linewidth=1.1)
        if accuracy is not None and one.accuracies is not None:
            accuracy.plot(a, 100.0 * one.accuracies, label=label or None, **style)
    axes.set_yscale("log")
    shown = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    _plain_log_ticks(axes.yaxis, shown.max() / shown.min() if len(shown) else 1.0)
    for panel, name in ((axes, "loss"), (accuracy, "accuracy (%)")):
        if panel is not None:
            panel.set_xlabel("position on the line")
            panel.set_ylabel(name)
            panel.locator_params(axis="x", nbins=6)
            _tidy(panel)
    if any(named):
        (accuracy or axes).legend(frameon=False)
    return axes


def plane_levels(planes: Sequence[LossSlice], num_levels: int = 18, *, ceiling: float | None = None) -> np.ndarray:
    """Contour levels in equal ratios that several planes can share, from their lowest loss to their highest finite one.

    Args:
        planes: losses must be positive somewhere.
        num_levels: how many.
        ceiling: highest level; None: the largest finite loss, but at most 1e6 times the lowest.

    Raises:
        ValueError: no positive finite loss.
    """
    values = np.concatenate([_finite(one.losses).reshape(-1) for one in planes])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        raise ValueError("plane_levels: planes must hold a positive finite loss, got none")
    low = values.min()
    high = ceiling if ceiling is not None else min(values.max(), 1e6 * low)
    return np.geomspace(low * 0.999, max(high, low * 1.01), num_levels)


def plot_plane(
    plane: LossSlice,
    axes: Axes | None = None,
    *,
    levels: np.ndarray | None = None,
    labels: bool = True,
    colorbar: bool = True,
    title: str = "",
) -> Axes:
    """Contours of a plane, filled, with levels in equal ratios and theta in the middle.

    Args:
        plane: two directions.
        axes: where; None makes a figure.
        levels: of the contours, :func:`plane_levels` of several planes to compare them; None: of this one.
        labels: write losses on the lines.
        colorbar: draw one.
        title: above.

    Raises:
        ValueError: a line.
    """
    from matplotlib.colors import LogNorm

    _named("plot_plane", plane, 2)
    axes = axes or _new_axes(size=(5.4, 4.4))[0]
    levels = plane_levels([plane]) if levels is None else levels
    a, b = plane.coordinates
    values = np.ma.masked_invalid(np.clip(plane.losses, levels[0], None)).T  # contours take [rows of y, columns of x]
    norm = LogNorm(levels[0], levels[-1])
    filled = axes.contourf(a, b, values, levels=levels, norm=norm, cmap=COLORMAP, extend="max")
    # White on the dark half of the colors, black on the bright one.
    inks = ["white" if norm(level) < 0.6 else "black" for level in levels[::2]]
    lines = axes.contour(a, b, values, levels=levels[::2], colors=inks, linewidths=0.6, alpha=0.75)
    if labels:
        axes.clabel(lines, fmt=lambda value: f"{value:.2g}", fontsize=7, inline_spacing=2, colors=inks)
    if a[0] <= 0 <= a[-1] and b[0] <= 0 <= b[-1]:
        axes.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=1.6)
    if colorbar:
        bar = axes.get_figure().colorbar(filled, ax=axes, label="loss", pad=0.02)  # type: ignore[union-attr]
        _plain_log_ticks(bar.ax.yaxis, levels[-1] / levels[0])
    axes.set_aspect("equal" if np.isclose(np.ptp(a), np.ptp(b)) else "auto")
    axes.locator_params(nbins=5)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    return axes


def plot_surface(plane: LossSlice, axes: Any = None, *, ceiling: float | None = None, title: str = "") -> Any:
    """The plane as a surface in three dimensions, height log10 of the loss.

    Args:
        plane: two directions.
        axes: 3-d axes; None makes a figure.
        ceiling: losses above are cut off there; None: the largest finite loss.
        title: above.

    Raises:
        ValueError: a line, or axes that are not 3-d.
    """
    _named("plot_surface", plane, 2)
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(6.2, 5.0), layout="constrained").add_subplot(projection="3d")
    if getattr(axes, "name", "") != "3d":
        raise ValueError(f"plot_surface: axes must have projection '3d', got {getattr(axes, 'name', type(axes))!r}")
    losses = _finite(plane.losses)
    positive = losses[np.isfinite(losses) & (losses > 0)]
    top = ceiling if ceiling is not None else float(positive.max())
    heights = np.log10(np.clip(np.nan_to_num(losses, nan=top), positive.min(), top))
    a, b = np.meshgrid(*plane.coordinates, indexing="ij")
    axes.plot_surface(
        a, b, heights, cmap=COLORMAP, rcount=100, ccount=100, linewidth=0.1, edgecolor=(1, 1, 1, 0.12), antialiased=True
    )
    axes.contour(a, b, heights, levels=12, zdir="z", offset=heights.min(), cmap=COLORMAP, linewidths=0.7)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.set_zlabel("log₁₀ loss")
    axes.locator_params(nbins=5)
    axes.tick_params(labelsize=8, pad=1)
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.92)
    axes.set_title(title, fontweight="bold", fontsize=10, y=0.96)
    return axes


def plot_flatness(
    results: Flatness | Mapping[str, Flatness], axes: Axes | None = None, *, relative: bool = False
) -> Axes:
    """Mean increase of the loss against sigma, every draw a dot; both scales logarithmic.

    A mean that is not positive (a loss that fell) has no place on the scale and is left out, as are such draws; the
    scale ends at a tenth of the lowest mean.

    Args:
        results: one, or label -> result.
        axes: where; None makes a figure.
        relative: the increase as a share of the loss without noise.

    Raises:
        ValueError: nothing to draw.
    """
    named: Mapping[str, Flatness] = results if isinstance(results, Mapping) else {"": results}
    if not named:
        raise ValueError("plot_flatness: results must hold at least one result, got none")
    axes = axes or _new_axes()[0]
    floor = np.inf
    for i, (label, one) in enumerate(named.items()):
        color, order = COLORS[i % len(COLORS)], one.stds.argsort()
        by = one.base_loss if relative else 1.0
        stds, draws = one.stds[order].numpy(), one.increases[order].numpy() / by
        means = draws.mean(1)
        # Side by side where several networks share the levels.
        spread = np.geomspace(1.0, 1.06, draws.shape[1]) * 1.02
        x = stds[:, None] * spread[None, :] * 1.04**i
        shown = draws > 0
        axes.plot(x[shown], draws[shown], ".", color=color, alpha=0.45, markersize=5.5, markeredgewidth=0, zorder=2)
        held = means > 0
        floor = min([floor, *(0.1 * means[held])])
        axes.plot(
            stds[held], means[held], color=color, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.5,
            label=label or None, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    if np.isfinite(floor):
        axes.set_ylim(bottom=floor)
    axes.set_xlabel("noise σ" + ("" if _scales(named) == {"absolute"} else " relative to the weights"))
    axes.set_ylabel("increase of the loss" + (" / loss" if relative else ""))
    _tidy(axes)
    if any(named):
        axes.legend(frameon=False)
    return axes


def _scales(named: Mapping[str, Flatness]) -> set[str]:
    return {one.scale for one in named.values()}


def _named(function: str, slices: LossSlice | Mapping[str, LossSlice], dimensions: int) -> Mapping[str, LossSlice]:
    named: Mapping[str, LossSlice] = slices if isinstance(slices, Mapping) else {"": slices}
    if not named:
        raise ValueError(f"{function}: slices must hold at least one slice, got none")
    for one in named.values():
        if len(one.coordinates) != dimensions:
            raise ValueError(f"{function}: slices must have {dimensions} direction(s), got {len(one.coordinates)}")
    return named


def _finite(losses: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(losses), losses, np.nan)


def _plain_log_ticks(axis: Any, ratio: float) -> None:
    """Plain numbers (0.05, 20) where they are short, and more of them where the scale spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = (1.0,) if ratio > 300 else (1.0, 3.0) if ratio > 30 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.5", alpha=0.18, linewidth=0.6)
    axes.set_axisbelow(True)


def _new_axes(columns: int = 1, size: tuple[float, float] | None = None) -> list[Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or ((6.0, 3.8) if columns == 1 else (4.6 * columns, 3.6)), layout="constrained")
    return list(figure.subplots(1, columns, squeeze=False).flat)
