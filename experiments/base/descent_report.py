# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and notes of the double descent study: functions of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from curvlab.runs import figures as draw
from curvlab.runs.stats import Estimate, geometric_mean_interval, mean_interval
from curvlab.runs.svg import INK
from curvlab.runs.tables import Table
from experiments.base import paper
from experiments.base.descent_rows import Features, Groups, Sweeps, pooled_means
from experiments.base.rows import groups, within_one


def descent_tables(sweeps: Sweeps) -> list[Table]:
    """Every network; then the random features."""
    lines = [
        _line(sweeps, label, where, size, sum(lost), len(lost))
        for label, where in sweeps.arms().items()
        for size, lost in groups(sweeps.rows, "collapsed", "size", **where).items()
    ]
    heads = ["arm", "size", "parameters", "train %", "test %", "paper's test %", "collapsed", "train loss", "λ_max",
             "λ_max/loss", "trace", "‖Hv−λv‖/λ", "time s"]  # fmt: skip
    about = (
        "Means over seeds with 95 % t intervals, the spread pooled over the sizes of an arm (train %: each size's own, "
        "cut at 100); losses, λ and traces: geometric. Train % and loss: eval mode, the labels trained on. Collapsed "
        "networks are counted and in no mean. Time: training and measuring."
    )
    found = [Table("Error and curvature by size", heads, lines, about)] if lines else []
    return [*found, *_feature_table(sweeps.features)]


def _line(sweeps: Sweeps, label: str, where: Mapping[str, Any], size: float, lost: float, count: int) -> list[Any]:
    def values(metric: str) -> list[float]:
        return _arm(sweeps, metric, where).get(size, [])

    def percent(metric: str, *, pooled: bool) -> Estimate | None:
        found = _arm(sweeps, metric, where)
        # Near 100 % there is no spread left to share with sizes that have not fitted.
        mean = pooled_means(found).get(size) if pooled else mean_interval(found[size]) if size in found else None
        return within_one(mean).scaled(100) if mean else None

    def geometric(metric: str) -> Estimate | None:
        return pooled_means(_positive(_arm(sweeps, metric, where)), geometric=True).get(size)

    published = {"mlp": paper.DESCENT_MLP, "cnn": paper.DESCENT_CNN}[where["network"]].get(int(size))
    compared = (
        published and sweeps.as_written[where["network"]] and not where["label_noise"] and not where["batch_norm"]
    )
    largest, residual = values("lambda_max"), values("lambda_residual")
    worst = max((r / abs(top) for r, top in zip(residual, largest, strict=True) if top), default=None)
    return [
        label,
        size,
        next((v for v in values("parameters")), None),
        percent("fit_accuracy", pooled=False),
        percent("test_accuracy", pooled=True),
        sum(published) / 2 if published and compared else None,
        f"{lost:g} of {count}",
        geometric("fit_loss"),
        geometric("lambda_max"),
        geometric("lambda_over_loss"),
        geometric("trace"),
        worst,
        round(sum(values("train_seconds")) + sum(values("measure_seconds")), 1),
    ]


def _arm(sweeps: Sweeps, metric: str, where: Mapping[str, Any]) -> Groups:
    return sweeps.groups(metric, where["network"], noise=where["label_noise"], batch_norm=where["batch_norm"])


def _feature_table(features: Features) -> list[Table]:
    columns = {name: _means(features, name, "both") for name in ("lambda_max", "lambda_min", "trace")}
    norms = _means(features, "norm", "clean")
    squares = {labels: _means(features, "test_mse", labels) for labels in ("clean", "noisy")}
    shares = {
        labels: {ratio: mean_interval(v) for ratio, v in features.groups("test_accuracy", labels).items()}
        for labels in squares
    }
    lines = []
    for ratio in columns["lambda_max"]:
        line: list[Any] = [ratio]
        for labels in ("clean", "noisy"):
            line += [squares[labels].get(ratio), _error(shares[labels].get(ratio))]
        lines.append([*line, norms.get(ratio), *(found.get(ratio) for found in columns.values())])
    if not lines:
        return []
    heads = [
        "N/n",
        "test MSE",
        "test error %",
        "test MSE, noisy",
        "test error %, noisy",
        "‖A‖",
        "λ_max",
        "λ_min>0",
        "trace",
    ]
    about = (
        f"n = {features.num_samples} training images, minimum-norm least squares; geometric means over draws of the "
        "features (test error: arithmetic), each N with its own spread. "
        "λ: eigenvalues of ΦᵀΦ/n, exact."
    )
    return [Table("Random ReLU features", heads, lines, about)]


def _positive(found: Groups) -> Groups:
    """Sizes whose values all have a logarithm."""
    return {size: values for size, values in found.items() if min(values) > 0}


def _means(features: Features, metric: str, labels: str) -> dict[float, Estimate]:
    """Geometric means by N/n, each with its own spread: at N = n it is a hundred times that elsewhere."""
    return {ratio: geometric_mean_interval(v) for ratio, v in _positive(features.groups(metric, labels)).items()}


def _error(share: Estimate | None) -> Estimate | None:
    """Percent of errors from a share of hits."""
    if share is None:
        return None
    return replace(share, value=100 - 100 * share.value, low=100 - 100 * share.high, high=100 - 100 * share.low)


# --------------------------------------------------------------------------------------------------------- figures


def descent_figures(sweeps: Sweeps) -> list[draw.Figure]:
    """The sweeps, the map of width and noise, the random features; what has no rows is left out."""
    found = []
    if sweeps.arms():
        found.append(sweep_figure(sweeps))
    if len(sweeps.groups("test_error", "mlp")) > 1 and sweeps.noise:
        found.append(phase_figure(sweeps))
    if sweeps.features.groups("test_mse", "clean"):
        found.append(feature_figure(sweeps.features))
    return found


def sweep_figure(sweeps: Sweeps) -> draw.Figure:
    """Test error of both networks, λ_max, trace, λ_max over the loss; columns: MLP and CNN."""
    figure, panels = draw.new_figure(4, 2, size=(10.6, 13.4))
    metrics = {
        "test_error": "test error (%)",
        "lambda_max": "λ_max of the Hessian",
        "trace": "trace of the Hessian",
        "lambda_over_loss": "λ_max / training loss",
    }
    for row, (metric, ylabel) in enumerate(metrics.items()):
        for column, (network, xlabel) in enumerate((("mlp", "width (MLP)"), ("cnn", "channels (CNN)"))):
            _sweep_panel(sweeps, panels[2 * row + column], network, metric, xlabel, ylabel, is_first=row == 0)
    lost = sum(row["value"] for row in sweeps.rows if row["metric"] == "collapsed")
    seeds = {row["seed"] for row in sweeps.rows if row["metric"] == "collapsed"}
    caption = (
        f"Dots: seeds (n = {len(seeds)}); markers: means (λ, trace: geometric) with 95 % t intervals, spread pooled "
        "over the sizes of an arm; "
        + ("crosses at the top: collapsed networks, in no mean" if lost else "no network collapsed")
    )
    if any(sweeps.as_written.values()):
        caption += "; hollow diamonds: the paper's means"
        caption += " (its c = 8 averages a diverged run in)" if sweeps.as_written["cnn"] else ""
    caption += ". Curvature is taken on the first training images, with the labels trained on."
    return draw.Figure("sweeps", "Error and curvature along the size", caption, figure)


def _sweep_panel(
    sweeps: Sweeps, axes: Axes, network: str, metric: str, xlabel: str, ylabel: str, *, is_first: bool
) -> None:
    sizes: set[float] = set()
    is_log = metric != "test_error"
    arms = {label: where for label, where in sweeps.arms().items() if where["network"] == network}
    for series, (label, where) in enumerate(arms.items()):
        found = _arm(sweeps, metric, where)
        found = _positive(found) if is_log else found
        if found:
            draw.plot_groups(
                axes, found, series=series, label=label if is_first else "", geometric=is_log,
                intervals=pooled_means(found, geometric=is_log),
            )  # fmt: skip
        sizes |= set(found)
        if is_first:
            _plot_collapsed(axes, groups(sweeps.rows, "collapsed", "size", **where), series)
    published = {"mlp": paper.DESCENT_MLP, "cnn": paper.DESCENT_CNN}[network]
    shown = {size: 100 - sum(pair) / 2 for size, pair in published.items() if size in sizes}
    if is_first and sweeps.as_written[network] and shown:
        draw.plot_published(axes, list(shown), list(shown.values()), label="paper")
    title = network.upper() if is_first else ""
    draw.set_axes(axes, title=title, xlabel=xlabel, ylabel=ylabel, log_x=True, log_y=is_log, x_ticks=sorted(sizes))
    if is_first and arms:
        draw.add_legend(axes)


def _plot_collapsed(axes: Axes, found: Groups, series: int) -> None:
    """A cross and a count at the upper edge, at every size that lost networks."""
    for size, values in found.items():
        if sum(values):
            axes.plot(
                [size], [0.97], "x", transform=axes.get_xaxis_transform(), color=draw.SERIES[series], markersize=7
            )
            axes.annotate(
                f"{sum(values):g} of {len(values)} collapsed", (size, 0.97), xycoords=axes.get_xaxis_transform(),
                xytext=(-6 if size == max(found) else 6, -3), textcoords="offset points", fontsize=8, color=INK,
                ha="right" if size == max(found) else "left",
            )  # fmt: skip


def phase_figure(sweeps: Sweeps) -> draw.Figure:
    """Mean test error of the MLP by width and share of wrong labels: one cell each, its number inside."""
    shares = (0.0, *sorted(sweeps.noise))
    table = {share: sweeps.groups("test_error", "mlp", noise=share) for share in shares}
    widths = sorted(set().union(*table.values()))
    means = [[(sum(v) / len(v) if (v := table[share].get(w)) else float("nan")) for w in widths] for share in shares]
    figure, (axes,) = draw.new_figure(size=(7.4, 1.3 + 0.62 * len(shares)))
    colors = matplotlib.colormaps["cividis_r"]
    mesh = axes.pcolormesh(means, cmap=colors, edgecolors="none")
    largest, smallest = mesh.get_clim()[1] or 1.0, mesh.get_clim()[0] or 0.0
    for y, line in enumerate(means):
        for x, value in enumerate(line):
            if value == value:
                share = (value - smallest) / max(largest - smallest, 1e-9)
                axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=9,
                          color="#ffffff" if share > 0.5 else "#111111")  # fmt: skip
    draw.set_axes(axes, title="Test error (%)", xlabel="width (MLP)", ylabel="wrong labels (%)")
    axes.grid(visible=False)
    axes.set_xticks([x + 0.5 for x in range(len(widths))], [f"{width:g}" for width in widths])
    axes.set_yticks([y + 0.5 for y in range(len(shares))], [f"{100 * share:g}" for share in shares])
    caption = "Test error (%), mean over seeds, at the last epoch; empty: not run at this preset."
    return draw.Figure("phases", "Width and label noise", caption, figure)


def feature_figure(features: Features) -> draw.Figure:
    """Test error, and the exact spectrum, against N/n."""
    figure, panels = draw.new_figure(1, 2, size=(10.4, 4.2))
    tops = []
    for series, (labels, words) in enumerate((("clean", "true labels"), ("noisy", "wrong labels in part"))):
        found = features.groups("test_mse", labels)
        tops += [max(values) for values in found.values()]
        draw.plot_groups(panels[0], found, series=series, label=words, geometric=True, aside=2.0,
                         intervals=_means(features, "test_mse", labels))  # fmt: skip
    draw.plot_guide(panels[0], [1.0, 1.0], [0.2, max(tops)], label="N = n")
    draw.set_axes(
        panels[0], xlabel="N/n (features / training images)", ylabel="squared test error", log_x=True, log_y=True
    )
    names = {"lambda_max": "λ_max", "trace": "trace", "lambda_min": "smallest nonzero eigenvalue"}
    for series, (metric, words) in enumerate(names.items()):
        found = features.groups(metric, "both")
        draw.plot_groups(panels[1], found, series=series, label=words, geometric=True, aside=2.0,
                         intervals=_means(features, metric, "both"))  # fmt: skip
    ends = [value for values in features.groups("lambda_min", "both").values() for value in values]
    draw.plot_guide(panels[1], [1.0, 1.0], [min(ends), max(features.groups("trace", "both")[1.0])] if 1.0 in
                    features.groups("trace", "both") else [min(ends), max(ends)])  # fmt: skip
    draw.set_axes(
        panels[1], xlabel="N/n (features / training images)", ylabel="eigenvalues of ΦᵀΦ/n", log_x=True, log_y=True
    )
    for axes in panels:
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        draw.add_legend(axes)
    draws = max(len(values) for values in features.groups("test_mse", "clean").values())
    caption = (
        f"Minimum-norm least squares on N random ReLU features and n = {features.num_samples} training images. Dots: "
        f"{draws} draws of the features (hidden by the markers where they agree); markers: geometric means with 95 % t "
        "intervals, each N with its own spread."
    )
    return draw.Figure("features", "The exactly solvable double descent", caption, figure)


def descent_notes(sweeps: Sweeps) -> list[str]:
    """Rules and limits."""
    found = [
        "A peak is the smaller of the rise before it and the fall after it, with Tukey's simultaneous intervals over "
        "all sizes and a spread pooled over them (experiments/base/peaks.py): peak and valleys are picked from the "
        "same means, and a plain interval would be too narrow.",
        "Wrong labels are one fixed draw, the same for all seeds and sizes; test labels are always the true ones.",
        "Near zero training loss λ_max and trace scale with the loss; λ_max/loss stands beside them.",
    ]
    if sweeps.as_written["mlp"]:
        found.append(
            "The MLPs train on the first 10,000 MNIST images; the paper draws its 10,000 by a seed (by which generator "
            "is not stated). Its means can differ from ours by that choice alone."
        )
    for network, count in sweeps.num_samples.items():
        if not sweeps.as_written[network]:
            found.append(
                f"The {network.upper()} arms do not follow the paper's protocol at this preset ({count:,} images)."
            )
    lost = sum(row["value"] for row in sweeps.rows if row["metric"] == "collapsed")
    every = sum(row["metric"] == "collapsed" for row in sweeps.rows)
    return [*found, f"Collapsed networks: {lost:g} of {every}."] if every else found
