# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the lottery-ticket study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from curvlab.runs import figures as draw
from curvlab.runs.estimates import Estimate
from curvlab.runs.tables import Table
from experiments.base import paper
from experiments.base.rows import counted, finals
from experiments.base.settings import Gap, gap_table, geometric, interval, mean, values
from experiments.base.tickets import TIMED, WORDS, Cell, decode_counts, dense
from experiments.base.tickets_claims import (
    NAMES,
    Tickets,
    fastest,
    layer_shares,
    percent,
    published,
    step_times,
    time_ratio,
)

STEP_ASIDE = 1.055  # factor between the arms' abscissas, that they do not hide each other
DOTS = "Dots: seeds ({}); markers: means with 95 % t intervals."
CONVOLUTIONS = tuple(f"features.{place}.weight" for place in (0, 3, 7, 10, 14, 17))
LAYERS = {
    "lenet": ("1.weight", "3.weight", "5.weight"),
    "cnn": (*CONVOLUTIONS, "classifier.1.weight", "classifier.3.weight"),
}
LAYER_NAMES = {
    "lenet": ("784 → 300", "300 → 100", "100 → 10"),
    "cnn": ("conv 1", "conv 2", "conv 3", "conv 4", "conv 5", "conv 6", "fc 1", "fc 2"),
}


def present(found: Tickets) -> list[str]:
    """Networks that have rows."""
    return [network for network in ("lenet", "cnn") if any(row.get("network") == network for row in found.rows)]


def arms_of(found: Tickets, network: str) -> list[tuple[str, str]]:
    """The arms of a network, in the order of tables and legends; dense is none of them."""
    cells = [cell for cell in found.cells if cell.network == network and cell.pruning != "none"]
    order = {"one-shot": 0, "iterative": 1}
    return sorted({(c.pruning, c.control): None for c in cells}, key=lambda arm: order[arm[0]])


# ------------------------------------------------------------------------------------------------ tables


def ticket_tables(found: Tickets) -> list[Table]:
    """Accuracy; gaps; masks by layer; time a step."""
    layers = [table for network in present(found) for table in layer_tables(found, network)]
    return [accuracy_table(found), ticket_gaps(found), *layers, time_table(found)]


def _ordered(found: Tickets) -> list[Cell]:
    cells: list[Cell] = []
    for network in present(found):
        cells.append(dense(network))
        for pruning, control in arms_of(found, network):
            shares = found.shares(network, pruning, control)
            cells += [cell for kept in shares if (cell := found.cell(network, pruning, control, kept)) is not None]
    return cells


def accuracy_table(found: Tickets) -> Table:
    """One row a cell."""
    lines: list[list[Any]] = []
    for cell in _ordered(found):
        tested = values(found.rows, "test_accuracy", cell.where)
        papers = papers_accuracy(cell) if cell.network == "cnn" and found.real["cnn"] else None
        lines.append([
            NAMES[cell.network], cell.arm, round(100 * cell.kept, 2), None if papers is None else round(papers, 2),
            mean(found.rows, "test_accuracy", cell.where, factor=100),
            100 * statistics.stdev(tested) if len(tested) > 1 else None,
            interval(found.gap(cell, dense(cell.network))) if cell.pruning != "none" else None,
            _exact(mean(found.rows, "train_accuracy", cell.where, factor=100)),
            geometric(found.rows, "fit_loss", cell.where),
            _exact(mean(found.rows, "early_stop_step", cell.where)),
            int(sum(values(found.rows, "diverged", cell.where))),
            round(found.seconds(cell), 1),
        ])  # fmt: skip
    columns = ["network", "arm", "kept %", "paper %", "test %", "SD", "minus dense", "train %", "train loss",
               "early stop", "diverged", "time s"]  # fmt: skip
    caption = (
        "Last epoch; means over seeds with 95 % t intervals, SD of the sample. Minus dense: points over common seeds, "
        "with the noise of seeds and of test images. Train %: the running accuracy of the last epoch; train loss: eval "
        "mode, geometric mean. Early stop: updates to the least held-out loss. Time: training and measuring, all "
        "seeds. The paper's numbers: CNN(32), 50,000 images, 60 epochs."
    )
    return Table("Accuracy by kept share", columns, lines, caption)


def papers_accuracy(cell: Cell) -> float | None:
    """The paper's mean test accuracy in % of a CNN's cell; None where it has none, as of all rounds of pruning."""
    if cell.pruning == "iterative":
        return None
    if (cell.control, cell.kept) == ("reinit", 0.1):
        return statistics.mean(paper.TICKET_REINIT)
    return published(cell.kept) if cell.control == "ticket" else None


def _exact(estimate: Estimate | None) -> Estimate | None:
    """Without the rounding errors of an interval whose values are all the same: its length decides the digits shown."""
    if estimate is None or not estimate.has_interval or estimate.high - estimate.low > 1e-9 * abs(estimate.value):
        return estimate
    value = float(f"{estimate.value:.10g}")
    return replace(estimate, value=value, low=value, high=value)


def ticket_gaps(found: Tickets) -> Table:
    """What each control takes from its ticket, and rounds against one cut."""
    gaps: dict[tuple[str, ...], Gap] = {}
    for cell in _ordered(found):
        name = NAMES[cell.network]
        ticket = found.cell(cell.network, cell.pruning, "ticket", cell.kept)
        if cell.control != "ticket" and (one := found.gap(ticket, cell)) is not None:
            gaps[name, f"{cell.pruning}: ticket − {cell.arm.split(', ')[1]}", f"{100 * cell.kept:.3g}"] = one
        if (cell.pruning, cell.control) == ("iterative", "ticket"):
            once = found.cell(cell.network, "one-shot", "ticket", cell.kept)
            if (one := found.gap(cell, once)) is not None:
                gaps[name, "iterative − one-shot", f"{100 * cell.kept:.3g}"] = one
    return gap_table(gaps, ["network", "difference", "kept %"], "What the controls take away")


def layer_tables(found: Tickets, network: str) -> list[Table]:
    """Kept shares by layer of the tickets, means over seeds; one table a way to prune, and the random masks."""
    tables = []
    for pruning, control in (("one-shot", "ticket"), ("iterative", "ticket"), ("one-shot", "random")):
        shares = found.shares(network, pruning, control)
        cells = [cell for kept in shares if (cell := found.cell(network, pruning, control, kept)) is not None]
        by_cell = [layer_shares(found, cell) for cell in cells]
        if not cells or not any(by_cell):
            continue
        lines = [
            [label, *(_mean_of(of.get(layer, {})) for of in by_cell)]
            for layer, label in zip(LAYERS[network], LAYER_NAMES[network], strict=True)
        ]
        title = f"Kept by layer, {NAMES[network]}, {cells[0].arm}"
        columns = ["layer", *(f"{100 * cell.kept:.3g} %" for cell in cells)]
        tables.append(Table(title, columns, lines, "Percent of each layer's weights; means over seeds."))
    return tables


def _mean_of(of: dict[int, float]) -> float | None:
    return round(100 * statistics.mean(of.values()), 1) if of else None


def time_table(found: Tickets) -> Table:
    """Time a step by engine, and what a whole training saves."""
    lines = []
    for cell in _ordered(found):
        times = step_times(found, cell)
        medians = {engine: statistics.median(of.values()) for engine, of in times.items() if of}
        if "sparse" not in medians:
            continue
        steps = statistics.median(values(found.rows, "updates", cell.where))
        saved = steps * (medians["masked dense"] - statistics.median(fastest(times).values()))
        lines.append([
            NAMES[cell.network], cell.arm, round(100 * cell.kept, 2),
            *(1e3 * medians[engine] if engine in medians else None for engine in TIMED),
            time_ratio(found, cell), round(saved, 1),
        ])  # fmt: skip
    columns = ["network", "arm", "kept %", *(f"{engine} ms" for engine in TIMED), "masked / ours", "saved s"]
    caption = (
        "One training step (forward, backward, update) of one batch on this machine, beside the run: medians of "
        "alternating calls, then over seeds. Fused: sparse, with batch normalization, ReLU and pooling as one layer, "
        "where there are any (the study's own training takes them apart). Masked dense: dense weights, channels-last, "
        "gradients multiplied by the mask. Masked / ours: over fused where there is one, else sparse, with a 95 % "
        "interval over the seeds' masks. Saved: what the whole training of one network takes less that way than with "
        "masked dense weights; below 0 it takes longer."
    )
    return Table("Time of a training step", columns, lines, caption)


# ------------------------------------------------------------------------------------------------ figures


def ticket_figures(found: Tickets) -> list[draw.Figure]:
    """Accuracy, masks by layer, masks by pixel, early stop and time."""
    networks = present(found)
    if not networks:
        return []
    papers = " Hollow diamonds: the paper's means." if found.as_written and "cnn" in networks else ""
    counts = [counted(values(found.rows, "test_accuracy", c.where) for c in found.cells if c.network == n)
              for n in networks]  # fmt: skip
    dots = DOTS.format("; ".join(f"{NAMES[n]}: {count}" for n, count in zip(networks, counts, strict=True)))
    figures = [
        draw.Figure("accuracy", "Test accuracy against the share of weights kept",
                    f"{dots}{papers} Arms of one share stand side by side around it; gray, dotted: the dense network. "
                    "Seeds are common to all arms: differences are known better than the bars suggest (table).",
                    accuracy_figure(found, networks)),
        draw.Figure("layers", "What one global threshold keeps of each layer",
                    "Kept share of each layer of the tickets, one line a share of all weights. Dots: seeds; markers: "
                    "means.", layers_figure(found, networks)),
    ]  # fmt: skip
    if "lenet" in networks:
        figures += pixel_figures(found)
        figures.append(draw.Figure("early_stop", "When LeNet stops, and what a training step takes",
                                   f"{dots} Left: updates to the least held-out loss, found at epoch ends (geometric "
                                   "means). Right: the time of masked dense training over that on sparse layers, "
                                   "tickets (the CNN's with the layers between fused); above the dotted line sparse "
                                   "layers are faster.",
                                   early_stop_figure(found, networks)))  # fmt: skip
    return figures


def accuracy_figure(found: Tickets, networks: Sequence[str]) -> MatplotlibFigure:
    """One panel a network and way to prune; a control has one color in all."""
    shown = [
        (n, p) for n in networks for p in ("one-shot", "iterative") if any(arm[0] == p for arm in arms_of(found, n))
    ]
    figure, panels = draw.new_figure(1, len(shown), size=(4.6 * len(shown), 4.4))
    for axes, (network, pruning) in zip(panels, shown, strict=True):
        controls = [control for way, control in arms_of(found, network) if way == pruning]
        for place, control in enumerate(controls):
            aside = STEP_ASIDE ** (place - (len(controls) - 1) / 2)
            groups = arm_values(found, network, pruning, control, "test_accuracy", factor=100, aside=aside)
            if groups:
                draw.plot_groups(axes, groups, series=list(WORDS).index(control), label=WORDS[control])
        ticks = _kept_axis(axes, found, network)
        base = [100 * value for value in values(found.rows, "test_accuracy", dense(network).where)]
        if base:
            draw.plot_groups(axes, {100.0: base}, series=len(WORDS), label="dense")
            draw.plot_guide(axes, [min(ticks), 100], [statistics.mean(base)] * 2)
        if (network, pruning) == ("cnn", "one-shot") and found.as_written:
            shares = [kept for kept in (1.0, *found.shares("cnn", "one-shot")) if published(kept) is not None]
            draw.plot_published(axes, [100 * kept for kept in shares], [published(kept) or 0.0 for kept in shares],
                                label="paper")  # fmt: skip
        draw.set_axes(axes, title=f"{NAMES[network]}, {pruning}", xlabel="weights kept (%)", ylabel="test accuracy (%)",
                      log_x=True, x_ticks=ticks)  # fmt: skip
        axes.invert_xaxis()
        draw.add_legend(axes, loc="lower left")
    same_heights(panels, [network for network, _ in shown])
    return figure


def arm_values(
    found: Tickets, network: str, pruning: str, control: str, metric: str, *, factor: float = 1.0, aside: float = 1.0
) -> dict[float, list[float]]:
    """Kept percent -> the seeds' values of one arm."""
    groups: dict[float, list[float]] = {}
    for kept in found.shares(network, pruning, control):
        cell = found.cell(network, pruning, control, kept)
        if cell is not None and (measured := values(found.rows, metric, cell.where)):
            groups[100 * kept * aside] = [factor * value for value in measured]
    return groups


def same_heights(panels: Sequence[Axes], networks: Sequence[str]) -> None:
    """Panels of one network share their ordinate."""
    for network in set(networks):
        own = [axes for axes, name in zip(panels, networks, strict=True) if name == network]
        limits = [axes.get_ylim() for axes in own]
        for axes in own:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _kept_axis(axes: Axes, found: Tickets, network: str) -> list[float]:
    """Ticks at the shares that were run, at least a factor 1.35 apart."""
    shares = sorted({100 * cell.kept for cell in found.cells if cell.network == network})
    kept: list[float] = []
    for share in shares:
        if not kept or share >= 1.35 * kept[-1]:
            kept.append(float(f"{share:.3g}"))
    axes.margins(x=0.06)
    return kept


def layers_figure(found: Tickets, networks: Sequence[str]) -> MatplotlibFigure:
    """Kept share along the layers, one line a share of all; one panel a network."""
    figure, panels = draw.new_figure(1, len(networks), size=(5.2 * len(networks), 4.0))
    for axes, network in zip(panels, networks, strict=True):
        pruning = "iterative" if network == "lenet" else "one-shot"
        shares = found.shares(network, pruning)
        places = sorted({round(place) for place in np.linspace(0, len(shares) - 1, min(5, len(shares)))})
        for series, kept in enumerate([shares[place] for place in places]):
            cell = found.cell(network, pruning, "ticket", kept)
            by_layer = layer_shares(found, cell) if cell is not None else {}
            line = {
                float(x): [100 * share for share in by_layer[layer].values()]
                for x, layer in enumerate(LAYERS[network])
                if by_layer.get(layer)
            }
            if line:  # two seeds' t intervals reach beyond 100 %: the dots say more
                means = {x: _alone(statistics.mean(of), len(of)) for x, of in line.items()}
                draw.plot_groups(axes, line, series=series, label=f"{percent(kept)} of all", intervals=means)
        draw.set_axes(axes, title=f"{NAMES[network]}, {pruning}", ylabel="the layer's weights kept (%)", log_y=True)
        axes.set_xticks(range(len(LAYERS[network])), LAYER_NAMES[network])
        draw.add_legend(axes)
    return figure


def _alone(value: float, n: int) -> Estimate:
    return Estimate(value, math.nan, math.nan, n, "mean, no interval")


def pixel_figures(found: Tickets) -> list[draw.Figure]:
    """How many of the first layer's weights each input pixel keeps."""
    shown = []
    for kept in found.shares("lenet", "iterative"):
        rows = finals(found.rows, "pixel_kept", network="lenet", pruning="iterative", kept=kept)
        if rows:
            shown.append((kept, sum(decode_counts(row["counts"]).astype(float) for row in rows) / len(rows)))
    if not shown:
        return []
    places = sorted({round(i) for i in np.linspace(0, len(shown) - 1, min(4, len(shown)))})
    shown = [shown[place] for place in places]
    figure, panels = draw.new_figure(1, len(shown), size=(2.9 * len(shown), 2.9))
    for axes, (kept, counts) in zip(panels, shown, strict=True):
        side = math.isqrt(len(counts))
        axes.imshow(np.asarray(counts).reshape(side, side), cmap="viridis", vmin=0)
        draw.set_axes(axes, title=f"{100 * kept:.3g} % kept, most: {np.max(counts):.0f} of 300")
        axes.set_axis_off()
    words = (
        "Weights of the first layer that each input pixel keeps after rounds of pruning by magnitude, means over "
        "seeds; each panel from none (dark) to its own most (bright)."
    )
    return [draw.Figure("pixels", "The pixels that LeNet's tickets look at", words, figure)]


def early_stop_figure(found: Tickets, networks: Sequence[str]) -> MatplotlibFigure:
    """Early stop by kept share; time of masked dense over sparse."""
    figure, (left, right) = draw.new_figure(1, 2, size=(10.8, 4.0))
    # Those of one cut are near those of rounds, and in the table.
    arms = [arm for arm in arms_of(found, "lenet") if arm[0] == "iterative" or arm[1] == "random"]
    for place, (pruning, control) in enumerate(arms):
        aside = STEP_ASIDE ** (place - (len(arms) - 1) / 2)
        groups = arm_values(found, "lenet", pruning, control, "early_stop_step", aside=aside)
        if groups and min(min(stops) for stops in groups.values()) > 0:
            words, series = f"{pruning}, {WORDS[control]}", list(WORDS).index(control)
            draw.plot_groups(left, groups, series=series, label=words, geometric=True)
    ticks = _kept_axis(left, found, "lenet")
    base = [stop for stop in values(found.rows, "early_stop_step", dense("lenet").where) if stop > 0]
    if base:
        draw.plot_groups(left, {100.0: base}, series=len(WORDS), label="dense", geometric=True)
        draw.plot_guide(left, [min(ticks), 100], [statistics.geometric_mean(base)] * 2)
    draw.set_axes(left, title=NAMES["lenet"], xlabel="weights kept (%)", ylabel="updates to the least held-out loss",
                  log_x=True, log_y=True, x_ticks=ticks)  # fmt: skip
    left.invert_xaxis()
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend above the bars
    draw.add_legend(left, loc="upper right", ncols=2)
    every: set[float] = {100.0}
    for series, network in enumerate(networks):
        pruning = "iterative" if network == "lenet" else "one-shot"
        groups = {}
        for kept in found.shares(network, pruning):
            cell = found.cell(network, pruning, "ticket", kept)
            times = step_times(found, cell) if cell is not None else {}
            ours, theirs = fastest(times), times.get("masked dense", {})
            if ours and theirs:
                groups[100 * kept] = [theirs[seed] / ours[seed] for seed in ours]
        if groups:
            every |= set(groups)
            draw.plot_groups(right, groups, series=series, label=f"{NAMES[network]}, {pruning}", geometric=True)
    draw.plot_guide(right, [min(every), 100], [1.0, 1.0])
    draw.set_axes(right, title="Time of a step", xlabel="weights kept (%)", ylabel="masked dense time / sparse time",
                  log_x=True, x_ticks=_kept_axis(right, found, "lenet"))  # fmt: skip
    right.invert_xaxis()
    draw.add_legend(right)
    return figure
