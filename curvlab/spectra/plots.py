# SPDX-License-Identifier: Apache-2.0
"""Figures of spectra: densities with their bands, eigenvalues along a training run.

They draw on axes that are given, or on a new ``matplotlib.figure.Figure``; pyplot and its global state are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvlab.spectra.slq import SpectralDensity

__all__ = ["plot_density", "plot_track"]

COLORS = ("#2b7bcb", "#d55e00", "#008f6b", "#b0569b", "#8a7400", "#5f7485")
BAND = 0.2  # opacity


def plot_density(
    density: SpectralDensity,
    axes: Axes | None = None,
    *,
    sigma: float | None = None,
    num_points: int = 1000,
    floor: float | None = None,
    label: str = "",
    color: str = COLORS[0],
) -> Axes:
    """The density on a logarithmic scale with its 95 % band over probes (where there are two probes or more).

    Args:
        density: of :func:`curvlab.spectra.slq_density`.
        axes: where; None makes a figure.
        sigma: width of the kernel; None: 1 % of the support.
        num_points: points of the grid, which reaches 5 sigma beyond the support.
        floor: lower end of the scale; None: a tenth of what a single eigenvalue's peak reaches, or 1e-7 of the top.
        label: for the legend.
        color: of line and band.

    Returns:
        The axes.
    """
    axes = axes or _new_axes()
    width = sigma or density.default_sigma
    low, high = density.support
    grid = torch.linspace(low - 5 * width, high + 5 * width, num_points, dtype=torch.float64)
    values = density.density(grid, width)
    top = float(values.max())
    if floor is None:
        floor = min(max(0.1 / (density.size * width * 2.5), 1e-7 * top), 0.1 * top)
    if density.num_probes > 1:
        below, above = density.band(grid, width)
        axes.fill_between(
            grid.numpy(), below.clamp(min=floor).numpy(), above.clamp(min=floor).numpy(), color=color, alpha=BAND,
            linewidth=0,
        )  # fmt: skip
    axes.plot(grid.numpy(), values.clamp(min=floor).numpy(), color=color, linewidth=1.4, label=label or None)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return axes


def plot_track(
    rows: Sequence[Mapping[str, Any]], axes: Axes | None = None, *, x: str = "step", threshold: float | None = None
) -> Axes:
    """Eigenvalues along a run with their error bounds as bars.

    Args:
        rows: of :class:`curvlab.spectra.EigenpairTracker`.
        axes: where; None makes a figure.
        x: ``"step"`` or ``"epoch"``.
        threshold: a level to mark, such as 2 / lr.

    Returns:
        The axes.

    Raises:
        ValueError: no rows; x is no column of theirs.
    """
    if not rows or x not in rows[0]:
        raise ValueError(f"plot_track: rows must hold at least one row with {x!r}, got {len(rows)} rows")
    axes = axes or _new_axes()
    places = [row[x] for row in rows]
    for i in range(max(len(row["values"]) for row in rows)):
        values = [row["values"][i] if i < len(row["values"]) else float("nan") for row in rows]
        bounds = [row["error_bounds"][i] if i < len(row["error_bounds"]) else 0.0 for row in rows]
        color = COLORS[i % len(COLORS)]
        axes.errorbar(places, values, yerr=bounds, color=color, marker="o", markersize=3, label=f"λ{i + 1}")
    if threshold is not None:
        axes.axhline(threshold, color="0.4", linestyle=":", linewidth=1.2)
    axes.legend(frameon=False)
    axes.set_xlabel(x)
    axes.set_ylabel("eigenvalue")
    return axes


def _new_axes() -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=(6.0, 3.8), layout="constrained").subplots()
