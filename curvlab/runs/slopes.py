# SPDX-License-Identifier: Apache-2.0
"""Power laws: the slope of log y on log x over seeds, with an interval that does not hide curvature.

Model: log y_i = α + β log x_i + ε_i over all points (one a seed and x). Three intervals for β:

``honest`` (default): ordinary least squares over all points; the error variance is the larger of the residual mean
    square RSS/(n−2) and the lack-of-fit mean square Σ_x n_x (m_x − fit_x)²/(k−2) over the k distinct x, each with its
    own df. Where the means leave the line by more than seeds explain (a law that is only approximately a power), points
    of one x share that departure, and RSS/(n−2) alone would count it n_x times as if it were independent: intervals
    √n_x too narrow. Taking the larger makes it conservative where the line is exact (97–98 % for a nominal 95 %).
``points``: RSS/(n−2) alone; right only where the law is exactly a power.
``clusters``: one slope per cluster (seed), then the t interval of their mean (df = clusters − 1); for seeds whose
    values go together across x. It knows nothing of lack of fit, which all seeds share.

The default is ``honest`` because "slope −0.50 ± 0.03" is a claim about a law, not about these seeds' noise.
Source: Draper & Smith, Applied Regression Analysis, 3rd ed., section 2.1 (lack of fit and pure error).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as sps

from curvlab.runs.estimates import Array, Estimate, check_level, check_values, mean_interval, t_interval

METHODS = ("honest", "points", "clusters")


@dataclass(frozen=True)
class LogLogFit:
    """A fitted power law y = exp(intercept) · x^slope with what its confidence band needs."""

    slope: Estimate
    intercept: float
    center: float  # mean of log x
    spread: float  # Σ (log x − center)²
    sigma: float  # error SD of log y used for the interval
    df: int
    n: int

    def predict(self, x: ArrayLike) -> tuple[Array, Array, Array]:
        """Line and pointwise confidence band of its mean at ``x``: three arrays like ``x``, on the scale of y.

        log y ± t(df) · σ · √(1/n + (log x − center)²/spread); NaN ends where the fit has no interval.
        """
        log_x = np.log(check_values(x, "LogLogFit.predict", "x", positive=True))
        line = self.intercept + self.slope.value * log_x
        half = np.full_like(line, math.nan)
        if self.df > 0 and not math.isnan(self.sigma):
            quantile = float(sps.t.ppf(0.5 + self.slope.level / 2, self.df))
            half = quantile * self.sigma * np.sqrt(1 / self.n + (log_x - self.center) ** 2 / self.spread)
        return np.exp(line), np.exp(line - half), np.exp(line + half)


def loglog_slope(
    x: ArrayLike,
    y: ArrayLike,
    *,
    method: str = "honest",
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Slope of log y on log x with its t interval; see the module's text for the three methods.

    Args:
        x: positive, ``[n]``, at least two different values.
        y: positive, ``[n]``.
        method: ``honest``, ``points`` or ``clusters``; giving ``clusters`` selects the last.
        clusters: label of each point's cluster (its seed), ``[n]``.
        level: of the interval.

    Raises:
        ValueError: lengths differ, values not positive or not finite, one x only, unknown method.
    """
    return loglog_fit(x, y, method=method, clusters=clusters, level=level).slope


def loglog_fit(
    x: ArrayLike,
    y: ArrayLike,
    *,
    method: str = "honest",
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> LogLogFit:
    """:func:`loglog_slope` together with the line and its band, for figures."""
    check_level(level, "loglog_fit")
    log_x = np.log(check_values(x, "loglog_fit", "x", positive=True))
    log_y = np.log(check_values(y, "loglog_fit", "y", positive=True))
    if log_x.size != log_y.size:
        raise ValueError(f"loglog_fit: y must have {log_x.size} values like x, got {log_y.size}")
    method = "clusters" if clusters is not None else method
    if method not in METHODS or (method == "clusters" and clusters is None):
        raise ValueError(
            f"loglog_fit: method must be one of {', '.join(METHODS)} (the last with labels), got {method!r}"
        )
    slope, intercept = _line(log_x, log_y)
    center, spread = float(log_x.mean()), float(((log_x - log_x.mean()) ** 2).sum())
    sigma, df, how = _error(log_x, log_y - intercept - slope * log_x, method)
    if clusters is not None:
        estimate = _by_cluster(log_x, log_y, clusters, level)
        intercept = float(log_y.mean()) - estimate.value * center
    else:
        low, high = t_interval(slope, sigma / math.sqrt(spread), df, level)
        text = f"log–log least squares over {log_x.size} points, {how}" if df > 0 else "log–log slope: no interval"
        estimate = Estimate(slope, low, high, log_x.size, text, level)
    return LogLogFit(estimate, intercept, center, spread, sigma, df, log_x.size)


def _line(log_x: Array, log_y: Array) -> tuple[float, float]:
    centered = log_x - log_x.mean()
    spread = float((centered**2).sum())
    if np.unique(log_x).size < 2:
        raise ValueError(f"loglog_fit: x must have at least two different values, got only {np.exp(log_x[0]):g}")
    slope = float((centered * log_y).sum()) / spread
    return slope, float(log_y.mean()) - slope * float(log_x.mean())


def _error(log_x: Array, residuals: Array, method: str) -> tuple[float, int, str]:
    """Error SD, its df, and words for the method text."""
    n = residuals.size
    levels, inverse, counts = np.unique(log_x, return_inverse=True, return_counts=True)
    square = float((residuals**2).sum()) / (n - 2) if n > 2 else math.nan
    sigma, df, how = math.sqrt(square) if n > 2 else math.nan, max(n - 2, 0), f"residual error (df={n - 2})"
    if method == "honest" and levels.size > 2 and n > levels.size:
        means = np.bincount(inverse, weights=residuals) / counts
        lack = float((counts * means**2).sum()) / (levels.size - 2)
        if lack > square:
            return (
                math.sqrt(lack),
                levels.size - 2,
                f"lack-of-fit error of the {levels.size} means (df={levels.size - 2})",
            )
    return sigma, df, how


def _by_cluster(log_x: Array, log_y: Array, clusters: Sequence[Hashable], level: float) -> Estimate:
    labels = list(clusters)
    if len(labels) != log_x.size:
        raise ValueError(f"loglog_fit: clusters must have {log_x.size} labels like x, got {len(labels)}")
    slopes = []
    for label in dict.fromkeys(labels):
        picked = np.array([other == label for other in labels])
        slopes.append(_line(log_x[picked], log_y[picked])[0])
    mean = mean_interval(slopes, level=level)
    text = f"mean of {mean.n} slopes, one per seed, t interval (df={mean.n - 1})"
    if not mean.has_interval:
        text = "log–log slope of one seed: no interval"
    return Estimate(mean.value, mean.low, mean.high, mean.n, text, level)
