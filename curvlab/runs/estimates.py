# SPDX-License-Identifier: Apache-2.0
"""Intervals for means, ratios and slopes over few seeds. Every :class:`Estimate` carries its n and its method.

Notation: values y_1..y_n are one number per seed, m their mean, s² = Σ(y_i − m)²/(n−1) their sample variance, t(p; df)
the Student quantile. Two-sided level 0.95 means p = 0.975. A diverged run is counted and shown by the caller, never
averaged in: NaN and infinite values are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, its sample size and how both were made.

    ``low`` and ``high`` are NaN where no interval can be had (n = 1); ``level`` is NaN where they are the range of all
    values and no confidence interval. ``counts`` are the group sizes where more than
    one group enters (a ratio of 3 seeds to 1: ``n=4, counts=(3, 1)``, shown as "n=3+1"). ``grouped_by`` names the
    groups where there are many: eight sizes of two seeds are shown as "n=2 × 8 sizes".
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95
    counts: tuple[int, ...] = ()
    grouped_by: str = ""

    @property
    def has_interval(self) -> bool:
        """Whether both ends are numbers (an unbounded interval has infinite ones)."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def n_text(self) -> str:
        """The sample size as shown: ``3``; ``3+1`` for two groups; ``2 × 8 sizes``, or ``13 of 8 sizes``, for many."""
        if self.grouped_by and len(set(self.counts)) == 1:
            return f"{self.counts[0]} × {len(self.counts)} {self.grouped_by}"
        if self.grouped_by:
            return f"{self.n} of {len(self.counts)} {self.grouped_by}" if self.counts else f"{self.n} {self.grouped_by}"
        return "+".join(map(str, self.counts)) if self.counts else str(self.n)

    def contains(self, x: float) -> bool:
        """Whether the interval holds ``x``; False where there is no interval."""
        return self.has_interval and self.low <= x <= self.high

    def excludes(self, x: float) -> bool:
        """Whether the interval is there and leaves ``x`` out."""
        return self.has_interval and not self.contains(x)

    def scaled(self, factor: float) -> Estimate:
        """The same estimate in other units (``factor=100`` for percent)."""
        ends = sorted((self.low * factor, self.high * factor)) if self.has_interval else (math.nan, math.nan)
        return replace(self, value=self.value * factor, low=ends[0], high=ends[1])

    def __str__(self) -> str:
        from curvlab.runs.tables import format_estimate

        return format_estimate(self)


class PooledSD(NamedTuple):
    """A standard deviation pooled over groups, with its degrees of freedom; NaN and 0 where no group has two values."""

    sd: float
    df: int


def check_values(values: ArrayLike, caller: str, name: str = "values", *, positive: bool = False) -> Array:
    """One-dimensional, non-empty, finite (and positive) float64, or an error that says which of these failed."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{caller}: {name} must be a non-empty list of numbers, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{caller}: {name} must be finite (count diverged runs, do not average them), got {array}")
    if positive and not (array > 0).all():
        raise ValueError(f"{caller}: {name} must be > 0 (a logarithm is taken), got {array.min()}")
    return array


def check_level(level: float, caller: str) -> None:
    """Refuse a level outside (0, 1), such as 95."""
    if not 0 < level < 1:
        raise ValueError(f"{caller}: level must be between 0 and 1, got {level}")


def t_interval(value: float, se: float, df: float, level: float) -> tuple[float, float]:
    """``value ± t(½ + level/2; df) · se``; NaN, NaN where ``df`` is 0 or ``se`` is NaN."""
    if not df > 0 or math.isnan(se):
        return math.nan, math.nan
    half = float(sps.t.ppf(0.5 + level / 2, df)) * se
    return value - half, value + half


def mean_interval(
    values: ArrayLike, *, level: float = 0.95, pooled_sd: float | None = None, df: int | None = None
) -> Estimate:
    """Mean over seeds with Student's interval ``m ± t(df) · s/√n``, df = n − 1.

    With ``pooled_sd`` and ``df`` (from :func:`pooled_sd`) these replace s and n − 1, so that n = 1 has an interval too;
    without them n = 1 gives NaN ends and a method that says so.
    """
    check_level(level, "mean_interval")
    y = check_values(values, "mean_interval")
    value = float(y.mean())
    if pooled_sd is not None:
        sd, freedom = pooled_sd, _check_df(df, "mean_interval")
        method = f"mean, t interval with the SD pooled over groups (df={freedom})"
    else:
        sd, freedom = float(y.std(ddof=1)) if y.size > 1 else math.nan, y.size - 1
        method = f"mean, t interval (df={freedom})"
    if not freedom > 0 or math.isnan(sd):
        return Estimate(value, math.nan, math.nan, y.size, f"mean, n={y.size}: no interval", level)
    low, high = t_interval(value, sd / math.sqrt(y.size), freedom, level)
    return Estimate(value, low, high, y.size, method, level)


def geometric_mean_interval(
    values: ArrayLike, *, level: float = 0.95, pooled_sd: float | None = None, df: int | None = None
) -> Estimate:
    """Exp of :func:`mean_interval` of log y: for positive quantities whose spread grows with their size."""
    y = check_values(values, "geometric_mean_interval", positive=True)
    return _exp(mean_interval(np.log(y), level=level, pooled_sd=pooled_sd, df=df), "geometric ")


def pooled_sd(groups: Mapping[Any, ArrayLike] | Iterable[ArrayLike]) -> PooledSD:
    """s_p = √(Σ_g Σ_i (y_gi − m_g)² / df), df = Σ_g (n_g − 1): one spread for groups that are assumed to share it."""
    arrays = [check_values(group, "pooled_sd", "each group") for group in _groups(groups)]
    df = sum(array.size - 1 for array in arrays)
    squares = sum(float(((array - array.mean()) ** 2).sum()) for array in arrays)
    return PooledSD(math.sqrt(squares / df) if df else math.nan, df)


def pooled_log_sd(groups: Mapping[Any, ArrayLike] | Iterable[ArrayLike]) -> PooledSD:
    """:func:`pooled_sd` of log y: the relative spread over seeds, pooled over (for example) widths.

    Gives an honest interval to a group with a single seed, under the stated assumption that all groups share the
    relative spread. ``(nan, 0)`` where every group has one value.
    """
    arrays = [check_values(group, "pooled_log_sd", "each group", positive=True) for group in _groups(groups)]
    return pooled_sd([np.log(array) for array in arrays])


def log_ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    *,
    pooled_sd: float | None = None,
    df: int | None = None,
    level: float = 0.95,
) -> Estimate:
    """Ratio of geometric means exp(m_a − m_b), of logs, with its t interval on the log scale.

    Standard error of the log: √(s_a²/n_a + s_b²/n_b) with Welch–Satterthwaite df; or, with ``pooled_sd`` and ``df``
    (from :func:`pooled_log_sd`), ``pooled_sd · √(1/n_a + 1/n_b)``, which also covers groups of one.
    """
    check_level(level, "log_ratio_interval")
    log_a = np.log(check_values(a, "log_ratio_interval", "a", positive=True))
    log_b = np.log(check_values(b, "log_ratio_interval", "b", positive=True))
    value = float(log_a.mean() - log_b.mean())
    if pooled_sd is not None:
        freedom: float = _check_df(df, "log_ratio_interval")
        se = pooled_sd * math.sqrt(1 / log_a.size + 1 / log_b.size)
        method = f"ratio, t interval on logs with the SD pooled over groups (df={freedom})"
    else:
        se, freedom = welch_error(log_a, log_b)
        method = f"ratio, Welch interval on logs (df={freedom:.1f})"
    low, high = t_interval(value, se, freedom, level)
    if math.isnan(low):
        method = "ratio, a group with n=1: no interval"
    counts = (log_a.size, log_b.size)
    return _exp(Estimate(value, low, high, sum(counts), method, level, counts), "")


def ratio_of_means(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Ratio of arithmetic means r = m_a/m_b with Fieller's interval (independent groups, common variance).

    The ends solve (m_a − r m_b)² = t² s² (1/n_a + r²/n_b), s² pooled with df = n_a + n_b − 2. Where m_b is not
    significantly different from 0 the set is unbounded, reported as (−∞, ∞). Source: Fieller, JRSS B 16 (1954).
    """
    check_level(level, "ratio_of_means")
    y_a, y_b = check_values(a, "ratio_of_means", "a"), check_values(b, "ratio_of_means", "b")
    sd, df = pooled_sd([y_a, y_b])
    m_a, m_b, counts = float(y_a.mean()), float(y_b.mean()), (y_a.size, y_b.size)
    if m_b == 0:
        raise ValueError("ratio_of_means: the mean of b must not be 0, got 0.0")
    value, n = m_a / m_b, sum(counts)
    if df == 0:
        return Estimate(value, math.nan, math.nan, n, "ratio, n=1: no interval", level, counts)
    spread = (float(sps.t.ppf(0.5 + level / 2, df)) * sd) ** 2
    quadratic, constant = m_b**2 - spread / y_b.size, m_a**2 - spread / y_a.size
    method = f"ratio of means, Fieller interval (df={df})"
    if quadratic <= 0:
        return Estimate(value, -math.inf, math.inf, n, method + ": unbounded", level, counts)
    root = math.sqrt(max(0.0, (m_a * m_b) ** 2 - quadratic * constant))
    return Estimate(value, (m_a * m_b - root) / quadratic, (m_a * m_b + root) / quadratic, n, method, level, counts)


def welch_error(a: Array, b: Array) -> tuple[float, float]:
    """Standard error of m_a − m_b and the Welch–Satterthwaite df; (NaN, 0) where a group has one value.

    se² = s_a²/n_a + s_b²/n_b; df = se⁴ / (Σ (s²/n)²/(n−1)). Source: Welch, Biometrika 34 (1947).
    """
    if a.size < 2 or b.size < 2:
        return math.nan, 0.0
    parts = [float(group.var(ddof=1)) / group.size for group in (a, b)]
    total = sum(parts)
    if total == 0:
        return 0.0, float(a.size + b.size - 2)
    return math.sqrt(total), total**2 / sum(p**2 / (g.size - 1) for p, g in zip(parts, (a, b), strict=True))


def _groups(groups: Mapping[Any, ArrayLike] | Iterable[ArrayLike]) -> list[ArrayLike]:
    found = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if not found:
        raise ValueError("pooled_sd: groups must hold at least one group, got none")
    return found


def _check_df(df: int | None, caller: str) -> int:
    if df is None or df < 0:
        raise ValueError(f"{caller}: pooled_sd needs df >= 0 beside it, got {df}")
    return df


def _exp(estimate: Estimate, prefix: str) -> Estimate:
    return replace(
        estimate,
        value=math.exp(estimate.value),
        low=math.exp(estimate.low),
        high=math.exp(estimate.high),
        method=prefix + estimate.method,
    )
