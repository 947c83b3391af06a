# SPDX-License-Identifier: Apache-2.0
"""Reading long rows: last-epoch values grouped by a factor, and the differences that groups of one seed still allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from curvlab.runs.stats import Estimate, PooledSD
from curvlab.runs.store import Row


def finals(rows: Iterable[Row], metric: str, **where: Any) -> list[Row]:
    """The row of the last epoch for every run and seed, of those with this metric and these factor values."""
    last: dict[tuple[Any, Any], Row] = {}
    for row in rows:
        if row["metric"] != metric or any(row.get(key) != value for key, value in where.items()):
            continue
        key = (row.get("run"), row.get("seed"))
        if key not in last or (row.get("epoch") or 0) >= (last[key].get("epoch") or 0):
            last[key] = row
    return list(last.values())


def groups(rows: Iterable[Row], metric: str, by: str, **where: Any) -> dict[Any, list[float]]:
    """Last-epoch values, one a seed, by the levels of factor ``by`` in ascending order.

    Values that are not finite are left out: a diverged run is counted beside the mean, never averaged in.
    """
    found: dict[Any, list[tuple[Any, float]]] = {}
    for row in finals(rows, metric, **where):
        if math.isfinite(row["value"]):
            found.setdefault(row[by], []).append((row.get("seed"), row["value"]))
    # Seeds in order: rows come sorted by run, and a float sum depends on its order.
    return {level: [value for _, value in sorted(found[level])] for level in sorted(found)}


def difference(
    a: Sequence[float], b: Sequence[float], pooled: PooledSD, *, image_variance: float = 0.0, level: float = 0.95
) -> Estimate:
    """m_a − m_b ± t(df') · √(s_p² (1/n_a + 1/n_b) + v), with a spread pooled over more groups than these two.

    So a group of one seed has an interval, under the stated assumption that all groups share the spread. ``v``
    (``image_variance``) is the variance that a fresh draw of test images would add; df' = df · (whole/seed variance)²
    (Satterthwaite, v taken as known).
    """
    from scipy import stats as sps

    value = sum(a) / len(a) - sum(b) / len(b)
    counts = (len(a), len(b))
    if pooled.df < 1:
        return Estimate(value, math.nan, math.nan, sum(counts), "difference of means: no interval", level, counts)
    seed_variance = pooled.sd**2 * (1 / len(a) + 1 / len(b))
    whole = seed_variance + image_variance
    df = pooled.df * (whole / seed_variance) ** 2 if image_variance > 0 and seed_variance > 0 else pooled.df
    half = float(sps.t.ppf(0.5 + level / 2, df)) * math.sqrt(whole)
    method = f"difference of means, t interval with the SD pooled over groups (df={pooled.df})"
    if image_variance > 0:
        method += f", and a standard error of {math.sqrt(image_variance):.2g} from the test images"
    return Estimate(value, value - half, value + half, sum(counts), method, level, counts)
