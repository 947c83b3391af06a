# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the batch size study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from curvlab.runs import figures as draw
from curvlab.runs.stats import mean_interval
from curvlab.runs.store import Row
from curvlab.runs.tables import Table
from experiments.base.image_networks import BatchGrid, Cell, published
from experiments.base.rows import counted
from experiments.base.settings import (
    RESULTS,
    RESULTS_CAPTION,
    Gap,
    Setting,
    gap,
    gap_table,
    results,
    values,
)

Cells = Mapping[str, Mapping[int, Cell]]

SEEDS = "Dots: seeds ({}); markers: means with 95 % t intervals over seeds."


def batch_tables(rows: Sequence[Row], config: BatchGrid, cells: Cells) -> list[Table]:
    """Every arm by batch; then the gaps with their tests."""
    lines = []
    for arm, found in cells.items():
        for batch, cell in found.items():
            updates = cell.epochs * config.steps_per_epoch(batch)
            about = round(published(batch), 2) if arm == "as-written" and config.has_papers_rates else None
            start = [arm, batch, cell.lr, cell.epochs, updates, round(1e5 * cell.lr / batch, 2), about]
            lines.append(start + results(rows, cell.where))
    columns = ["arm", "batch", "lr", "epochs", "updates", "lr/batch ×1e5", "paper %", *RESULTS]
    caption = (
        f"{RESULTS_CAPTION} Cells that two arms share were trained once. The paper's numbers: CNN(32), 50,000 images, "
        "80 epochs."
    )
    gaps = gap_table(batch_gaps(rows, config, cells), ["arm", "batch", "minus"], "Gaps between batch sizes")
    return [Table("Accuracy by batch size", columns, lines, caption), gaps]


def batch_gaps(rows: Sequence[Row], config: BatchGrid, cells: Cells) -> dict[tuple[str, ...], Gap]:
    """Every batch against the reference, and the smallest against the largest, which is what the claims are about."""
    pairs = [(batch, config.reference) for batch in sorted(config.batches) if batch != config.reference]
    if config.reference not in config.ends:
        pairs.append(config.ends)
    return {
        (arm, str(one), str(other)): found
        for arm, by_batch in cells.items()
        for one, other in pairs
        if (found := gap(rows, by_batch[one].where, by_batch[other].where)) is not None
    }


def batch_figures(rows: Sequence[Row], config: BatchGrid, cells: Cells) -> list[draw.Figure]:
    """Accuracy against batch, lr/batch and updates; then loss and norms against the batch."""
    papers = " Hollow diamonds: the paper's means." if config.trains_as_written else ""
    found = [values(rows, "test_accuracy", cell.where) for by_batch in cells.values() for cell in by_batch.values()]
    dots = SEEDS.format(counted(found))
    together = (
        f"{dots}{papers} The same networks against three things that change together as written; numbers: batch "
        "sizes, each cell in the color of its first arm. Points that (nearly) share an abscissa stand side by "
        "side around it."
    )
    return [
        draw.Figure("accuracy", "Test accuracy against batch, lr/batch and updates", together,
                    accuracy_figure(rows, config, cells)),
        draw.Figure("confounds", "What else the batch size changes",
                    f"{dots} Losses: geometric means. Arms that share a cell coincide.",
                    confounds_figure(rows, config, cells)),
    ]  # fmt: skip


def accuracy_figure(rows: Sequence[Row], config: BatchGrid, cells: Cells) -> MatplotlibFigure:
    """Three panels, one for each thing that the batch size moves as written."""
    figure, panels = draw.new_figure(1, 3, size=(12.6, 4.0))
    axes_of: dict[str, Callable[[Cell], float]] = {
        "batch size": lambda cell: cell.batch_size,
        "learning rate / batch × 1e5": lambda cell: 1e5 * cell.lr / cell.batch_size,
        "updates": lambda cell: cell.epochs * config.steps_per_epoch(cell.batch_size),
    }
    for axes, (label, x_of) in zip(panels, axes_of.items(), strict=True):
        arms = {
            arm: {str(batch): (x_of(cell), cell.where) for batch, cell in by_batch.items()}
            for arm, by_batch in cells.items()
        }
        ticks = accuracy_panel(axes, rows, arms, lines=label == "batch size")
        if config.trains_as_written:
            written = cells["as-written"]
            draw.plot_published(axes, list(map(x_of, written.values())), list(map(published, written)), label="paper")
        draw.set_axes(axes, xlabel=label, ylabel="test accuracy (%)", log_x=True, x_ticks=ticks)
        axes.margins(x=0.1)
        draw.add_legend(axes)
    return figure


def accuracy_panel(
    axes: Axes, rows: Sequence[Row], arms: Mapping[str, Mapping[str, tuple[float, Setting]]], *, lines: bool
) -> list[float]:
    """Test accuracy against a logarithmic abscissa; returns the ticks.

    Args:
        axes: where.
        rows: long rows.
        arms: per arm, label of each setting -> (abscissa, setting).
        lines: join the settings of an arm and show a setting in every arm that holds it; else each setting once, in the
            color of its first arm, with its label above it.
    """
    points: list[tuple[int, str, float, Setting, list[float]]] = []
    for series, found in enumerate(arms.values()):
        for label, (x, setting) in found.items():
            accuracies = [100 * value for value in values(rows, "test_accuracy", setting)]
            if accuracies and (lines or all(setting != drawn for _, _, _, drawn, _ in points)):
                points.append((series, label, x, setting, accuracies))
    if not points:
        return []
    shown = side_by_side([x for _, _, x, _, _ in points])
    joined: dict[int, list[tuple[float, float]]] = {}
    for (series, label, _, _, accuracies), x in zip(points, shown, strict=True):
        line = joined.setdefault(series, [])
        named = "" if line else list(arms)[series]
        draw.plot_groups(axes, {x: accuracies}, series=series, label=named, connect=False)
        line.append((x, statistics.mean(accuracies)))
        if not lines:
            about = mean_interval(accuracies)
            top = (
                about.high if about.has_interval else max(accuracies)
            )  # beside it a neighbor's bar would cross the label
            axes.annotate(label, (x, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7.5,
                          color=draw.SERIES[series])  # fmt: skip
    for series, line in joined.items() if lines else ():
        axes.plot(*zip(*line, strict=True), color=draw.SERIES[series], alpha=0.55)
    return _spaced({float(f"{x:.4g}") for _, _, x, _, _ in points})


def side_by_side(xs: Sequence[float]) -> list[float]:
    """Abscissae of a logarithmic axis: those less than a 20th of its length apart would hide each other.

    They are set that far apart around their common middle; all others stay where they are.
    """
    step = (max(xs) / min(xs)) ** 0.05
    shown = list(xs)
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    while order:
        near = [i for i in order if xs[i] <= xs[order[0]] * step]
        order = order[len(near) :]
        middle = statistics.geometric_mean([xs[i] for i in near])
        if len(near) > 1:
            for place, i in enumerate(near):
                shown[i] = middle * step ** (place - (len(near) - 1) / 2)
    return shown


def _spaced(ticks: set[float]) -> list[float]:
    """Ticks at least a factor 1.6 apart: labels of nearer ones would touch."""
    kept: list[float] = []
    for tick in sorted(ticks):
        if not kept or tick >= 1.6 * kept[-1]:
            kept.append(tick)
    return kept


def confounds_figure(rows: Sequence[Row], config: BatchGrid, cells: Cells) -> MatplotlibFigure:
    """Training loss and the norm of the scale-free weights."""
    figure, panels = draw.new_figure(1, 2)
    measures = {"fit_loss": "training loss (nats)", "conv_norm": "norm of the convolutions' weights"}
    for axes, (metric, label) in zip(panels, measures.items(), strict=True):
        for series, (arm, found) in enumerate(cells.items()):
            shown = {float(batch): values(rows, metric, cell.where) for batch, cell in found.items()}
            shown = {batch: group for batch, group in shown.items() if group and min(group) > 0}
            if shown:
                draw.plot_groups(axes, shown, series=series, label=arm, geometric=metric == "fit_loss")
        ticks, is_loss = sorted(config.batches), metric == "fit_loss"
        draw.set_axes(axes, xlabel="batch size", ylabel=label, log_x=True, log_y=is_loss, x_ticks=ticks)
        axes.margins(x=0.1)
        draw.add_legend(axes)
    return figure
