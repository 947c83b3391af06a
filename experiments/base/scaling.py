# SPDX-License-Identifier: Apache-2.0
"""How a measured quantity scales with a size (width, channels, samples): power-law fits, their table, their panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from curvlab.runs import figures as draw
from curvlab.runs.stats import Estimate, LogLogFit, geometric_mean_interval, loglog_fit, mean_interval, pooled_log_sd
from curvlab.runs.store import Row
from curvlab.runs.tables import Table, format_estimate
from experiments.base.rows import groups


@dataclass(frozen=True)
class Scaling:
    """The rows of one arm, read as functions of a size.

    Attributes:
        rows: long rows.
        size: the factor on the x axis.
        arm: factor values that pick the arm, for example ``{"parametrization": "ntk"}``.
    """

    rows: Sequence[Row]
    size: str
    arm: Mapping[str, object]

    def groups(self, metric: str) -> dict[float, list[float]]:
        """Last-epoch values by size, one a seed."""
        return groups(self.rows, metric, self.size, **self.arm)

    def fit(self, metric: str) -> LogLogFit | None:
        """Power law over all seeds; None with fewer than three sizes or where a value is not positive."""
        found = self.groups(metric)
        points = [(size, value) for size, values in found.items() for value in values]
        if len(found) < 3 or any(value <= 0 for _, value in points):
            return None
        return loglog_fit([float(size) for size, _ in points], [value for _, value in points])

    def slope(self, metric: str) -> Estimate | None:
        """The exponent, with its interval."""
        fit = self.fit(metric)
        return None if fit is None else fit.slope

    def means(self, metric: str) -> dict[float, Estimate]:
        """Arithmetic means by size. Interval: relative spread pooled over the sizes, so that one seed has one too."""
        found = self.groups(metric)
        if not found or any(value <= 0 for values in found.values() for value in values):
            return {size: mean_interval(values) for size, values in found.items()}
        spread, df = pooled_log_sd(found)
        if df == 0:
            return {size: mean_interval(values) for size, values in found.items()}
        centers = {size: sum(values) / len(values) for size, values in found.items()}
        return {size: mean_interval(values, pooled_sd=spread * centers[size], df=df) for size, values in found.items()}

    def geometric_mean(self, metric: str, size: float) -> Estimate | None:
        """At one size, with the pooled relative spread; None where nothing was measured."""
        found = self.groups(metric)
        if size not in found or any(value <= 0 for values in found.values() for value in values):
            return None
        spread, df = pooled_log_sd(found)
        if df == 0:
            return geometric_mean_interval(found[size])
        return geometric_mean_interval(found[size], pooled_sd=spread, df=df)


def slope_table(arms: Mapping[str, Scaling], metrics: Mapping[str, str], *, title: str, caption: str) -> Table:
    """One row a metric, one column an arm: the exponents with their intervals."""
    rows = [[text, *(arm.slope(metric) for arm in arms.values())] for metric, text in metrics.items()]
    return Table(title, ["quantity", *arms], rows, caption)


def panel(
    axes: Axes,
    arms: Mapping[str, Scaling],
    metric: str,
    *,
    ylabel: str,
    published: Mapping[float, float] | None = None,
) -> None:
    """Log–log: every seed a dot, means with intervals, the fitted law with its band and its slope in the legend."""
    sizes: set[float] = set()
    for series, (label, arm) in enumerate(arms.items()):
        found, fit = arm.groups(metric), arm.fit(metric)
        if not found:
            continue
        sizes |= set(found)
        # The law's legend line carries the slope; without a law the means carry the arm's name.
        words = label
        if fit is not None:
            words = f"{label}: slope {format_estimate(fit.slope, with_n=False)}"
            draw.plot_fit(axes, fit, min(found), max(found), series=series, label="")
        draw.plot_groups(
            axes, found, series=series, label=words, geometric=True, intervals=arm.means(metric), connect=False
        )
    if published:
        draw.plot_published(axes, list(published), list(published.values()), label="paper")
    name = next(iter(arms.values())).size
    draw.set_axes(axes, xlabel=name, ylabel=ylabel, log_x=True, log_y=True, x_ticks=sorted(sizes))
