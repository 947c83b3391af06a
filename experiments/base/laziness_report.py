# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the laziness study: functions of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from curvlab.runs import figures as draw
from curvlab.runs.tables import Table
from experiments.base import paper
from experiments.base.laziness import MEASURES
from experiments.base.laziness_claims import deviations
from experiments.base.rows import counted
from experiments.base.scaling import Scaling, panel


def laziness_tables(arms: Mapping[str, Scaling], published: Mapping[int, float], *, note: str) -> list[Table]:
    """Movement, and what laziness is, by arm and width; published numbers stand beside the arm named ``standard``."""
    places = [(name, arm, width) for name, arm in arms.items() for width in arm.groups("diverged")]
    moved = ["parametrization", "width", "Δ", "SD", "paper's Δ", "deviation %", "‖θ_T−θ_0‖", "‖θ_0‖"]
    lines = [_movement_line(name, arm, width, published if name == "standard" else {}) for name, arm, width in places]
    caption = (
        "Means over seeds with 95 % t intervals, relative spread pooled over widths (so one seed has an interval too); "
        "SD is the sample's."
    )
    lazy = ["parametrization", "width", "kernel drift", "kernel alignment", "linearization error", "train loss",
            "test %", "diverged", "time s"]  # fmt: skip
    about = (
        f"{note} Alignment: cosine of K_T and K_0. Train loss: the last epoch's running one, geometric mean. "
        "Time: training and measuring, all seeds."
    )
    return [
        Table("Movement by width", moved, lines, caption),
        Table("Kernel, linearization and accuracy by width", lazy, [_lazy_line(*place) for place in places], about),
    ]


def _movement_line(name: str, arm: Scaling, width: float, published: Mapping[int, float]) -> list[Any]:
    moved = arm.groups("relative_movement").get(width, [])
    return [
        name,
        width,
        arm.means("relative_movement").get(width),
        statistics.stdev(moved) if len(moved) > 1 else None,
        published.get(int(width)),
        deviations(arm, published).get(width),
        arm.means("absolute_movement").get(width),
        arm.means("initial_norm").get(width),
    ]


def _lazy_line(name: str, arm: Scaling, width: float) -> list[Any]:
    accuracy = arm.means("test_accuracy").get(width)
    spent = [sum(arm.groups(metric).get(width, [])) for metric in ("train_seconds", "measure_seconds")]
    return [
        name,
        width,
        arm.means("kernel_drift").get(width),
        arm.means("kernel_alignment").get(width),
        arm.means("linearization_error").get(width),
        arm.geometric_mean("train_loss", width),
        None if accuracy is None else accuracy.scaled(100),
        int(sum(arm.groups("diverged")[width])),
        round(sum(spent), 1),
    ]


def laziness_figures(
    arms: Mapping[str, Scaling], widths: Sequence[int], published: Mapping[int, float]
) -> list[draw.Figure]:
    """F7: four laziness curves; then accuracy against width. ``published``: mean Δ by width, empty where none is."""
    shown = {width: moved for width, moved in published.items() if width in widths}
    figure, panels = draw.new_figure(2, 2, size=(10.4, 8.0))
    metrics = ("relative_movement", "absolute_movement", "kernel_drift", "linearization_error")
    papers = {"relative_movement": shown, "absolute_movement": {w: d * (w + 4) ** 0.5 for w, d in shown.items()}}
    for axes, metric in zip(panels, metrics, strict=True):
        panel(axes, arms, metric, ylabel=MEASURES[metric], published=papers.get(metric))
        draw.add_legend(axes)
    seeds = counted(values for arm in arms.values() for values in arm.groups("test_accuracy").values())
    caption = (
        f"Dots: seeds ({seeds}); markers: means with 95 % t intervals, relative spread pooled over widths; dashed: "
        "power law with its band; "
        + ("hollow diamonds: the paper (absolute movement: its Δ times √(w + 4))." if published
           else "the paper has no numbers for this data set.")
    )  # fmt: skip
    words = f"Last epoch; dots: seeds ({seeds}); markers: means with 95 % t intervals, spread pooled over widths"
    words += "; hollow diamonds: the paper's means." if published else "."
    return [
        draw.Figure("laziness", "Four laziness curves", caption, figure),
        draw.Figure("accuracy", "Test accuracy by width", words, accuracy_panel(arms, widths, bool(published))),
    ]


def accuracy_panel(arms: Mapping[str, Scaling], widths: Sequence[int], as_written: bool) -> Any:
    """Test accuracy in percent against width."""
    figure, (axes,) = draw.new_figure()
    for series, (name, arm) in enumerate(arms.items()):
        found = {width: [100 * value for value in values] for width, values in arm.groups("test_accuracy").items()}
        means = {width: mean.scaled(100) for width, mean in arm.means("test_accuracy").items()}
        draw.plot_groups(axes, found, series=series, label=name, intervals=means)
    if as_written:
        means = {w: sum(pair) / 2 for w, pair in paper.NTK_ACCURACY.items() if w in widths}
        draw.plot_published(axes, list(means), list(means.values()), label="paper")
    draw.set_axes(axes, xlabel="width", ylabel="test accuracy (%)", log_x=True, x_ticks=list(widths))
    draw.add_legend(axes)
    return figure
