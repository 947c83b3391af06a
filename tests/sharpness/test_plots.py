# SPDX-License-Identifier: Apache-2.0
"""Figures show the numbers that they are given, and leave out what has no place on a logarithmic scale."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from curvlab.sharpness.perturbation import Flatness
from curvlab.sharpness.plots import plane_levels, plot_flatness, plot_line, plot_plane, plot_surface
from curvlab.sharpness.slices import LossSlice

AXIS = np.linspace(-1.0, 1.0, 11)


def line(depth: float = 0.01, *, accuracy: bool = True) -> LossSlice:
    losses = depth + AXIS**2
    return LossSlice((AXIS,), losses, 1.0 - 0.3 * AXIS**2 if accuracy else None)


def plane() -> LossSlice:
    losses = 1e-5 + AXIS[:, None] ** 2 + 10 * AXIS[None, :] ** 2
    losses[0, 0], losses[0, 1] = np.inf, np.nan
    return LossSlice((AXIS, AXIS), losses, None)


def render(axes: Axes) -> bytes:
    out = BytesIO()
    figure = axes.get_figure()
    assert figure is not None
    figure.savefig(out, format="png", dpi=40)  # type: ignore[union-attr]
    return out.getvalue()


def test_lines_and_accuracies_have_panels_of_their_own() -> None:
    axes = plot_line({"a": line(), "b": line(0.1)}, chord=True)
    figure = axes.get_figure()
    assert figure is not None and len(figure.axes) == 2
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), line().losses)
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), line().losses[0])  # the chord
    accuracies = figure.axes[1]
    np.testing.assert_allclose(accuracies.get_lines()[1].get_ydata(), 100 * (1.0 - 0.3 * AXIS**2))  # type: ignore[arg-type]
    assert [text.get_text() for text in accuracies.get_legend().get_texts()] == ["a", "b"]  # type: ignore[union-attr]
    assert axes.get_yscale() == "log" and render(axes)
    bare = plot_line(line(accuracy=False))
    assert len(bare.get_figure().axes) == 1  # type: ignore[union-attr]


def test_planes_put_the_first_direction_on_x_and_share_levels() -> None:
    axes = plot_plane(plane(), title="net")
    assert render(axes)
    levels = plane_levels([plane(), LossSlice((AXIS, AXIS), np.full((11, 11), 100.0), None)])
    assert levels[0] == pytest.approx(1e-5, rel=1e-2) and levels[-1] == pytest.approx(10.0)  # 1e6 times the lowest
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    # The valley is flatter along the first direction: the contour at 0.1 reaches farther in x than in y.
    steep = plot_plane(plane(), levels=np.array([1e-5, 0.1, 10.0]), labels=False, colorbar=False)
    valley = steep.collections[0].get_paths()[0].vertices  # the fill below 0.1
    assert np.ptp(np.asarray(valley)[:, 0]) > 2 * np.ptp(np.asarray(valley)[:, 1])


def test_surfaces_are_drawn_with_a_ceiling() -> None:
    axes = plot_surface(plane(), ceiling=1.0)
    assert axes.get_zlim()[1] < 0.5 and render(axes)


def flat() -> Flatness:
    losses = torch.tensor([[1.0, 0.9], [2.0, 3.0]], dtype=torch.float64)
    return Flatness(torch.tensor([0.1, 0.2]), losses, 1.0, None, None, 4, "filter")


def test_noise_curves_leave_out_losses_that_fell() -> None:
    axes = plot_flatness({"net": flat()}, relative=True)
    dots, means = axes.get_lines()
    assert len(np.asarray(dots.get_ydata())) == 2
    np.testing.assert_allclose(means.get_ydata(), [1.5])
    np.testing.assert_allclose(means.get_xdata(), [0.2], rtol=1e-6)
    assert axes.get_xlabel() == "noise σ relative to the weights" and render(axes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"plot_line: slices must have 1 direction\(s\), got 2"):
        plot_line(plane())
    with pytest.raises(ValueError, match=r"plot_plane: slices must have 2 direction\(s\), got 1"):
        plot_plane(line())
    with pytest.raises(ValueError, match=r"plot_line: slices must hold at least one"):
        plot_line({})
    with pytest.raises(ValueError, match=r"plot_flatness: results must hold at least one"):
        plot_flatness({})
    with pytest.raises(ValueError, match=r"plot_surface: axes must have projection '3d'"):
        plot_surface(plane(), plot_line(line()))
    with pytest.raises(ValueError, match=r"plane_levels: planes must hold a positive finite loss"):
        plane_levels([LossSlice((AXIS, AXIS), np.zeros((11, 11)), None)])
