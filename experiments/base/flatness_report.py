# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the sharpness study: functions of its rows."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from curvlab.runs import figures as draw
from curvlab.runs.stats import Estimate, mean_interval
from curvlab.runs.svg import INK
from curvlab.runs.tables import Table
from curvlab.sharpness.plots import plane_levels, plot_line, plot_plane
from experiments.base import paper
from experiments.base.flatness import INVARIANCE, MEASURES, Rows, density_of, slice_of
from experiments.base.flatness_rows import Flatness, Key
from experiments.base.rows import counted, finals

ONLY_LAST = ("power_lambda", "half_accuracy_noise")
SUBSET = "Intervals are over seeds; the images are one fixed subset, whose noise is in no interval."


def flatness_tables(found: Flatness) -> list[Table]:
    """T2: every measure by batch; the ratios; noise; symmetries."""
    made = [_measure_table(found), _ratio_table(found), _noise_table(found), _symmetry_table(found)]
    return [table for table in made if table.rows]


def _measure_table(found: Flatness) -> Table:
    columns = ["arm", "batch", "point", "n", "test %", "loss", "λ_max", "‖Hv−λv‖/λ", "30 power iterations", "trace",
               "λ_max/loss", "λ_max‖θ‖²", "element-adaptive", "filter-adaptive", "Keskar box %", "σ50",
               "batch sharpness"]  # fmt: skip
    lines = []
    for arm, batch, point in found.settings:
        where: dict[str, Any] = {"arm": arm, "point": point}
        tested = found.values("test_accuracy", batch, **where)
        if not tested:
            continue
        pairs = zip(*(found.values(m, batch, **where) for m in ("lambda_residual", "sharpness")), strict=True)
        residual = max((r / abs(top) for r, top in pairs if top), default=None)
        metrics = ("power_lambda", "trace", "relative_sharpness", "norm_sharpness", "element_sharpness",
                   "filter_sharpness", "box", "half_accuracy_noise", "batch_sharpness")  # fmt: skip
        lines.append(
            [
                arm,
                batch,
                point,
                len(tested),
                mean_interval([100 * value for value in tested]),
                found.mean("hessian_loss", batch, **where),
                found.mean("sharpness", batch, **where),
                residual,
                *(found.mean(metric, batch, **where) for metric in metrics),
            ]
        )
    caption = (
        "Geometric means over seeds with 95 % t intervals (test %: arithmetic); the residual is the largest. loss: of "
        "the images that curvature is taken on. σ50: filter-relative noise that costs half the accuracy above chance. "
        f"{SUBSET}"
    )
    same = [
        f"{arm} {batch}"
        for (arm, batch, point), setting in found.settings.items()
        if arm != "as-written" and found.settings.get(("as-written", batch, point)) == setting
    ]
    if same:
        caption += f" {', '.join(same)} is the as-written network."
    return Table("Measures by batch size", columns, lines, caption)


def _comparisons(found: Flatness) -> dict[str, tuple[str, str]]:
    """Label -> (arm, point) of all comparisons that were measured at both batches."""
    names = {
        ("as-written", "last"): "last epoch",
        ("as-written", "mark"): "equal loss",
        ("equal-updates", "last"): "equal updates",
    }
    return {
        label: (arm, point)
        for (arm, point), label in names.items()
        if found.ratio("sharpness", arm=arm, point=point) is not None
    }


def _ratio_table(found: Flatness) -> Table:
    compared = _comparisons(found)
    lines = [
        [words, *(found.ratio(metric, arm=arm, point=point) for arm, point in compared.values())]
        for metric, words in {"hessian_loss": "loss", "trace": "trace", **MEASURES}.items()
    ]
    caption = (
        f"Batch {found.large} over batch {found.small}, common seeds paired, t intervals on logs. Of σ50 less is "
        f"sharper. {SUBSET}"
    )
    shown = lines if compared else []
    return Table("Large over small batch", ["measure", *compared], shown, caption)


def _noise_table(found: Flatness) -> Table:
    lines = []
    for sigma in found.sigmas:
        published = paper.GEOMETRY_NOISE.get(sigma)
        line: list[Any] = [sigma]
        for batch in (found.small, found.large):
            line.append(found.mean("noise_percent", batch, sigma=sigma))
        line += [
            found.ratio("noise_percent", sigma=sigma),
            round(published[1] / published[0], 2) if published else None,
        ]
        line.append(found.ratio("noise_increase", sigma=sigma))
        lines.append(line)
    shown = lines if any(any(cell is not None for cell in line[1:4]) for line in lines) else []
    heads = ["σ", f"batch {found.small}: increase %", f"batch {found.large}: increase %", "ratio",
             "paper's ratio (1024/32)", "ratio of absolute increases"]  # fmt: skip
    caption = (
        "N(0, σ²) on all parameters; geometric means over seeds of means over draws; dash: an increase below 0. "
        f"Ratios: common seeds paired. {SUBSET}"
    )
    return Table("Loss under noise", heads, shown, caption)


def _symmetry_table(found: Flatness) -> Table:
    moved = {
        symmetry: [
            next((r["value"] for r in finals(found.rows, f"moved_{m}", symmetry=symmetry)), None) for m in INVARIANCE
        ]
        for symmetry in ("relu_rescaling", "bn_scale")
    }
    lines = [[symmetry, *line] for symmetry, line in moved.items() if any(value is not None for value in line)]
    caption = "The same function at other parameters: each measure over its value before; 1 where it sees no change."
    return Table("Symmetries", ["change", *INVARIANCE], lines, caption)


# --------------------------------------------------------------------------------------------------------- figures


def flatness_figures(found: Flatness) -> list[draw.Figure]:
    """Ratios, noise, spectra, slices; what has no rows is left out."""
    made = []
    if _comparisons(found):
        made.append(ratio_figure(found))
    if found.values("noise_increase", found.small, sigma=found.sigmas[0]):
        made.append(noise_figure(found))
    looks = {batch: _landscape(found, batch) for batch in (found.small, found.large)}
    if all(density_of(rows) is not None for rows in looks.values()):
        made.append(spectrum_figure(looks))
    if all(slice_of(rows, "plane") is not None for rows in looks.values()):
        made += [plane_figure(looks), line_figure(looks)]
    return made


def _landscape(found: Flatness, batch: int) -> Rows:
    """Rows of the batch's landscape unit (the only one that names another batch)."""
    return [row for row in found.rows if row.get("batch_size") == batch and row.get("other_batch") is not None]


def ratio_figure(found: Flatness) -> draw.Figure:
    """A line a measure, a marker a comparison: how much sharper the large batch is."""
    compared = _comparisons(found)
    metrics = {"hessian_loss": "loss", "trace": "trace", **MEASURES}
    figure, (axes,) = draw.new_figure(size=(7.6, 0.9 + 0.42 * len(metrics)))
    seen: list[float] = [1.0]
    for series, (label, (arm, point)) in enumerate(compared.items()):
        held: list[tuple[float, Estimate]] = []
        for place, metric in enumerate(metrics):
            ratio = found.ratio(metric, arm=arm, point=point)
            if ratio is not None:
                held.append((place + 0.22 * (series - (len(compared) - 1) / 2), ratio))
        color, marker = draw.SERIES[series], draw.MARKERS[series]
        for y, one in held:
            if one.has_interval:
                axes.plot([one.low, one.high], [y, y], color=color, linewidth=1.3, zorder=3)
                seen += [max(one.low, one.value / 100), min(one.high, one.value * 100)]
            seen.append(one.value)
        axes.plot([one.value for _, one in held], [y for y, _ in held], linestyle="none", marker=marker, color=color,
                  markersize=5.5, zorder=4, label=label)  # fmt: skip
    draw.set_axes(axes, xlabel=f"batch {found.large} over batch {found.small}", log_x=True)
    axes.axvline(1.0, color=INK, alpha=0.6, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    axes.set_xlim(min(seen) / 1.3, max(seen) * 1.3)
    axes.set_ylim(len(metrics) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(metrics)))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(list(range(len(metrics))), list(metrics.values()))
    draw.add_legend(axes)
    caption = (
        "Geometric means over common seeds, paired t intervals on logs (cut at a factor of 100). Right of 1 the large "
        f"batch is sharper; of σ50, where more noise is borne by the flatter network, left of 1. {SUBSET}"
    )
    return draw.Figure("ratios", "How much sharper is the large batch, by every measure", caption, figure)


def noise_figure(found: Flatness) -> draw.Figure:
    """Increase of the loss against σ, in percent as the paper has it, and absolute."""
    figure, panels = draw.new_figure(1, 2, size=(10.4, 4.2))
    keys: list[Key] = [key for key in found.settings if key[0] == "as-written" and key[2] == "last"]
    for axes, metric, ylabel in zip(
        panels,
        ("noise_percent", "noise_increase"),
        ("increase of the loss (%)", "increase of the loss (nats)"),
        strict=True,
    ):
        for series, (_, batch, _) in enumerate(keys):
            groups = {sigma: [v for v in found.values(metric, batch, sigma=sigma) if v > 0] for sigma in found.sigmas}
            groups = {sigma: values for sigma, values in groups.items() if values}
            draw.plot_groups(axes, groups, series=series, label=f"batch {batch}", geometric=True)
        draw.set_axes(axes, xlabel="σ of the noise on every weight", ylabel=ylabel, log_x=True, log_y=True)
        axes.xaxis.set_major_locator(FixedLocator([0.0005, 0.002, 0.005, 0.02, 0.05]))
        draw.add_legend(axes)
    if found.faithful:
        for index, words in enumerate(("paper, batch 32", "paper, batch 1024")):
            shown = [pair[index] for pair in paper.GEOMETRY_NOISE.values()]
            draw.plot_published(panels[0], list(paper.GEOMETRY_NOISE), shown, label=words)
        draw.add_legend(panels[0])
    dots = counted(found.values("noise_percent", batch, sigma=found.sigmas[-1]) for _, batch, _ in keys)
    caption = (
        f"Dots: seeds ({dots}; mean over draws); markers: geometric means with 95 % t intervals; increases below 0 are "
        "left out. Left as the paper has it: over losses that differ between the batches. Right: the same increases."
    )
    return draw.Figure("noise", "Loss under Gaussian noise on the weights", caption, figure)


def spectrum_figure(looks: dict[int, Rows]) -> draw.Figure:
    """Spectral densities of seed 0, over a scale that is linear around 0 and logarithmic outside."""
    figure, (axes,) = draw.new_figure(size=(7.4, 4.2))
    found = {batch: density_of(rows) for batch, rows in looks.items()}
    densities = {batch: one for batch, one in found.items() if one is not None}
    largest = max(abs(end) for one in densities.values() for end in one.support)
    linear = largest * 1e-4
    # Evenly spaced where the axis is: the kernel's width follows, or the bulk would hide what stands out.
    grid = linear * np.sinh(np.linspace(-np.arcsinh(0.3 * largest / linear), np.arcsinh(1.5 * largest / linear), 500))
    for series, (batch, one) in enumerate(densities.items()):
        nodes, weights = one.nodes.numpy(), one.weights.numpy()
        distance = (np.arcsinh(grid[:, None, None] / linear) - np.arcsinh(nodes / linear)) / 0.08
        probes = (weights * np.exp(-0.5 * distance**2)).sum(2) / (0.08 * np.sqrt(2 * np.pi))
        color, ends = draw.SERIES[series], np.maximum([probes.min(1), probes.max(1)], 1e-12)
        axes.fill_between(grid, ends[0], ends[1], color=color, alpha=0.2, linewidth=0)
        axes.plot(grid, np.maximum(probes.mean(1), 1e-12), color=color, linewidth=1.3, label=f"batch {batch}")
        top = nodes[weights > 0].max()
        axes.plot([top], [2e-8], marker="v", color=draw.SERIES[series], markersize=7, clip_on=False)
    draw.set_axes(
        axes, xlabel="eigenvalue of the Hessian", ylabel="share of eigenvalues per unit of the axis", log_y=True
    )
    axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
    powers = [float(p) for p in 10.0 ** np.arange(np.ceil(np.log10(linear)), np.floor(np.log10(1.5 * largest)) + 1)]
    axes.xaxis.set_major_locator(FixedLocator([-powers[-2] if len(powers) > 1 else -powers[0], 0.0, *powers]))
    axes.set_ylim(1e-8, None)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    draw.add_legend(axes)
    count = max(len(one.nodes) for one in densities.values())
    caption = (
        f"Stochastic Lanczos quadrature, seed 0: the mean over {count} probes and their range; triangles: the largest "
        "node of each. The axis is linear around 0 and logarithmic outside, the kernel of equal width on it."
    )
    return draw.Figure("spectra", "Spectra of the Hessian", caption, figure)


def plane_figure(looks: dict[int, Rows]) -> draw.Figure:
    """Two planes with the same levels."""
    figure, panels = draw.new_figure(1, len(looks), size=(5.2 * len(looks), 4.4))
    planes = {batch: plane for batch, rows in looks.items() if (plane := slice_of(rows, "plane")) is not None}
    levels = plane_levels(list(planes.values()))
    with matplotlib.rc_context(draw.STYLE):
        for axes, (batch, plane) in zip(panels, planes.items(), strict=True):
            plot_plane(plane, axes, levels=levels, title=f"batch {batch}")
            axes.grid(visible=False)
    for axes in panels:
        axes.set_xlabel("first direction (filter norms)")
        axes.set_ylabel("second direction (filter norms)")
    caption = (
        "Loss (nats) on planes of two filter-normalized random directions (the same random numbers for both networks), "
        "seed 0, the same levels; the cross is the network."
    )
    return draw.Figure("planes", "Filter-normalized planes", caption, figure)


def line_figure(looks: dict[int, Rows]) -> draw.Figure:
    """A filter-normalized line through each network; the straight line between them."""
    figure, panels = draw.new_figure(1, 2, size=(10.4, 4.0))
    lines = {f"batch {batch}": line for batch, rows in looks.items() if (line := slice_of(rows, "line")) is not None}
    between = {
        f"batch {batch} to {rows[0]['other_batch']}": line
        for batch, rows in looks.items()
        if (line := slice_of(rows, "between")) is not None
    }
    with matplotlib.rc_context(draw.STYLE):
        if lines:
            plot_line(lines, panels[0])
        if between:
            plot_line(between, panels[1], chord=True)
        panels[0].set_title("Through each network")
        panels[1].set_title("Between the two")
    panels[0].set_xlabel("step along the direction (filter norms)")
    ends = [rows[0] for batch, rows in looks.items() if slice_of(rows, "between") is not None]
    if ends:
        batch, other = ends[0]["batch_size"], ends[0]["other_batch"]
        panels[1].set_xlabel(f"share of the way from batch {batch} (0) to batch {other} (1)")
    for axes in panels:
        axes.set_ylabel("loss (nats)")
    caption = (
        "One network a batch, seed 0. Left: along one filter-normalized random direction, the same random numbers for "
        "both. Right: the straight line between the two; dotted: between the losses of its ends, over which a barrier "
        "is measured."
    )
    return draw.Figure("lines", "Loss along lines", caption, figure)
