# SPDX-License-Identifier: Apache-2.0
"""Two arms and ordered arms: Welch, paired t, Holm, non-inferiority, equivalence (TOST), Page, Jonckheere–Terpstra.

"No loss" is claimed by :func:`non_inferiority` or :func:`equivalence` with a stated margin, never by p > 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as sps

from curvlab.runs.estimates import Array, Estimate, check_level, check_values, t_interval, welch_error

KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class Comparison:
    """A named test's result: effect with interval (None for pure trend tests), statistic, p-value."""

    name: str
    effect: Estimate | None
    statistic: float
    p_value: float
    n: int
    df: float = math.nan


def welch(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Comparison:
    """Difference of means m_a − m_b of independent arms with Welch's interval and two-sided p.

    t = (m_a − m_b) / √(s_a²/n_a + s_b²/n_b), Welch–Satterthwaite df. NaN p where an arm has one seed.
    """
    check_level(level, "welch")
    y_a, y_b = check_values(a, "welch", "a"), check_values(b, "welch", "b")
    se, df = welch_error(y_a, y_b)
    return _t_result("Welch", float(y_a.mean() - y_b.mean()), se, df, (y_a.size, y_b.size), level)


def paired(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Comparison:
    """Mean of a_i − b_i over common seeds, with Student's interval and two-sided p; df = n − 1."""
    check_level(level, "paired")
    d = _differences(a, b, "paired")
    se = float(d.std(ddof=1)) / math.sqrt(d.size) if d.size > 1 else math.nan
    return _t_result("paired t", float(d.mean()), se, d.size - 1, (d.size,), level)


def holm(p_values: Mapping[KeyT, float]) -> dict[KeyT, float]:
    """Holm's step-down adjusted p-values, in the order given: p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)).

    Controls the family-wise error under any dependence. Source: Holm, Scand. J. Statist. 6 (1979).
    """
    for key, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"holm: every p-value must be within [0, 1], got {p} for {key}")
    adjusted: dict[KeyT, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def non_inferiority(
    a: ArrayLike, b: ArrayLike, margin: float, *, use_pairs: bool = False, level: float = 0.95
) -> Comparison:
    """Is a worse than b by less than ``margin``? One-sided test of H0: mean(a) − mean(b) ≤ −margin (larger is better).

    p ≤ 1 − level claims non-inferiority; the effect's interval is the two-sided one at ``2·level − 1``, whose lower
    end lies above −margin exactly then.

    Args:
        a: the arm that may lose a little, one value a seed.
        b: the arm that it is compared to.
        margin: the loss that is still accepted, > 0, in units of the values; state it before looking.
        use_pairs: the two arms share their seeds, in order.
        level: confidence of the claim.
    """
    result = _shifted("non_inferiority", a, b, margin, use_pairs, level)
    return _one_sided(result, result.effect.value + margin, margin, f"non-inferiority, margin {margin:g}")


def equivalence(
    a: ArrayLike, b: ArrayLike, margin: float, *, use_pairs: bool = False, level: float = 0.95
) -> Comparison:
    """TOST: is |mean(a) − mean(b)| < ``margin``? p is the larger of the two one-sided p-values.

    The effect's interval is the two-sided one at ``2·level − 1`` (90 % for level 0.95), within ±margin exactly where
    p ≤ 1 − level. Source: Schuirmann, J. Pharmacokin. Biopharm. 15 (1987).
    """
    result = _shifted("equivalence", a, b, margin, use_pairs, level)
    return _one_sided(result, margin - abs(result.effect.value), margin, f"TOST, margin {margin:g}")


def page_trend(table: ArrayLike) -> Comparison:
    """Page's test for an increasing trend over ordered conditions, within blocks: ``table`` is ``[seeds, conditions]``.

    L = Σ_j j · R_j with R_j the rank sum of condition j. One-sided p by scipy (exact for small tables).
    Source: Page, JASA 58 (1963). Reverse the columns for a decreasing trend.
    """
    values = np.asarray(table, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 3 or not np.isfinite(values).all():
        raise ValueError(f"page_trend: table must be finite [>= 2 seeds, >= 3 conditions], got {list(values.shape)}")
    result = sps.page_trend_test(values)
    return Comparison("Page trend", None, float(result.statistic), float(result.pvalue), values.shape[0])


def jonckheere(groups: Sequence[ArrayLike]) -> Comparison:
    """Jonckheere–Terpstra test for an increasing trend over independent ordered groups; one-sided p.

    J = Σ_{i<j} Σ_{x in group i, y in group j} ([x < y] + ½[x = y]), compared with a normal of its exact mean
    (N² − Σn_i²)/4 and its tie-corrected variance (Hollander & Wolfe, Nonparametric Statistical Methods, eq. 6.19),
    with a continuity correction of ½. With fewer than about 4 values a group prefer :func:`page_trend`.
    """
    arrays = [check_values(group, "jonckheere", "each group") for group in groups]
    if len(arrays) < 3:
        raise ValueError(f"jonckheere: groups must be at least 3 (two: use welch), got {len(arrays)}")
    statistic = sum(_larger_pairs(x, y) for i, x in enumerate(arrays) for y in arrays[i + 1 :])
    mean, variance = jonckheere_moments(arrays)
    total = sum(array.size for array in arrays)
    if variance == 0:
        return Comparison("Jonckheere–Terpstra", None, statistic, 1.0, total)
    z = (statistic - mean - 0.5) / math.sqrt(variance)
    return Comparison("Jonckheere–Terpstra", None, statistic, float(sps.norm.sf(z)), total)


def jonckheere_moments(arrays: Sequence[Array]) -> tuple[float, float]:
    """Mean and tie-corrected variance of the Jonckheere–Terpstra statistic under no difference."""
    sizes = np.array([array.size for array in arrays], dtype=np.float64)
    _, ties = np.unique(np.concatenate(arrays), return_counts=True)
    ties = ties.astype(np.float64)
    total = float(sizes.sum())

    def cubic(k: Array) -> float:
        return float((k * (k - 1) * (2 * k + 5)).sum())

    def three(k: Array) -> float:
        return float((k * (k - 1) * (k - 2)).sum())

    def two(k: Array) -> float:
        return float((k * (k - 1)).sum())

    mean = (total**2 - float((sizes**2).sum())) / 4
    variance = (cubic(np.array([total])) - cubic(sizes) - cubic(ties)) / 72
    if total > 2:
        variance += three(sizes) * three(ties) / (36 * total * (total - 1) * (total - 2))
    variance += two(sizes) * two(ties) / (8 * total * (total - 1))
    return mean, max(variance, 0.0)


def _larger_pairs(x: Array, y: Array) -> float:
    return float((x[:, None] < y[None, :]).sum() + 0.5 * (x[:, None] == y[None, :]).sum())


def _differences(a: ArrayLike, b: ArrayLike, caller: str) -> Array:
    y_a, y_b = check_values(a, caller, "a"), check_values(b, caller, "b")
    if y_a.size != y_b.size:
        raise ValueError(f"{caller}: b must have {y_a.size} values like a (common seeds), got {y_b.size}")
    return y_a - y_b


def _t_result(name: str, value: float, se: float, df: float, counts: tuple[int, ...], level: float) -> Comparison:
    low, high = t_interval(value, se, df, level)
    method = f"difference of means, {name} interval (df={df:.3g})" if df > 0 else "difference of means: no interval"
    groups = counts if len(counts) > 1 else ()
    effect = Estimate(value, low, high, sum(counts), method, level, groups)
    statistic = value / se if se > 0 else math.nan if math.isnan(se) or value == 0 else math.copysign(math.inf, value)
    p_value = float(2 * sps.t.sf(abs(statistic), df)) if df > 0 else math.nan
    return Comparison(name, effect, statistic, p_value, sum(counts), df)


@dataclass(frozen=True)
class _Shifted:
    effect: Estimate
    se: float
    df: float
    n: int


def _shifted(caller: str, a: ArrayLike, b: ArrayLike, margin: float, use_pairs: bool, level: float) -> _Shifted:
    check_level(level, caller)
    if level <= 0.5:
        raise ValueError(f"{caller}: level must be above 0.5, got {level}")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"{caller}: margin must be > 0 and stated beforehand, got {margin}")
    result = (paired if use_pairs else welch)(a, b, level=round(2 * level - 1, 12))
    if result.effect is None or not result.df > 0:
        raise ValueError(f"{caller}: each arm must have at least 2 seeds, got n={result.n}")
    half = (result.effect.high - result.effect.low) / 2
    return _Shifted(result.effect, half / float(sps.t.ppf(level, result.df)), result.df, result.n)


def _one_sided(shifted: _Shifted, distance: float, margin: float, name: str) -> Comparison:
    statistic = distance / shifted.se if shifted.se > 0 else math.copysign(math.inf, distance) if distance else 0.0
    p_value = float(sps.t.sf(statistic, shifted.df))
    return Comparison(name, shifted.effect, statistic, p_value, shifted.n, shifted.df)
