# SPDX-License-Identifier: Apache-2.0
"""Reading long rows: last-epoch values grouped by a factor, and the differences that groups of one seed still allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from curvlab.runs.stats import Estimate, PooledSD, geometric_mean_interval
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


def counted(found: Iterable[Sequence[float]]) -> str:
    """How many seeds the groups of a figure have, for its caption: ``n = 3``, ``n = 1 to 3``."""
    counts = sorted({len(values) for values in found if len(values)})
    if not counts:
        return "n = 0"
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def by_seed(rows: Iterable[Row], metric: str, **where: Any) -> dict[int, float]:
    """Seed -> last-epoch value, in the order of seeds; what is not finite is left out, as in :func:`groups`."""
    found = {row["seed"]: row["value"] for row in finals(rows, metric, **where) if math.isfinite(row["value"])}
    return dict(sorted(found.items()))


def paired_ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Estimate | None:
    """Geometric mean of above/below over the seeds that both have, t interval of the logs' differences seed by seed.

    Seeds are common to the arms of a study (the same initial weights where the network is the same, the same order of
    the data), and what they share falls out of the difference; Welch's interval would count it twice.

    Returns:
        None where they share no seed or a value is not positive.
    """
    seeds = sorted(set(above) & set(below))
    if not seeds or min(*above.values(), *below.values()) <= 0:
        return None
    found = geometric_mean_interval([above[seed] / below[seed] for seed in seeds])
    if not found.has_interval:
        return replace(found, method="ratio of one seed: no interval")
    return replace(found, method=f"ratio over common seeds, paired t interval on logs (df={len(seeds) - 1})")


def within_one(share: Estimate) -> Estimate:
    """A share's interval without what lies outside of [0, 1], where no share is: it covers as often."""
    if not share.has_interval:
        return share
    return replace(share, low=min(max(share.low, 0.0), 1.0), high=max(min(share.high, 1.0), 0.0))


def difference(
    a: Sequence[float], b: Sequence[float], pooled: PooledSD, *, image_variance: float = 0.0, level: float = 0.95
) -> Estimate:
    """m_a − m_b ± √(t(df)² s_p² (1/n_a + 1/n_b) + z² v), with a spread pooled over more groups than these two.

    So a group of one seed has an interval, under the stated assumption that all groups share the spread. ``v``
    (``image_variance``) is an upper bound, taken as known, of the variance that a fresh draw of test images would add.
    The two half-widths are joined by square-and-add, as in :func:`~curvlab.runs.stats.hierarchical_bootstrap`: the
    seeds' quantile keeps the df of their own spread.
    """
    from scipy import stats as sps

    value = sum(a) / len(a) - sum(b) / len(b)
    counts = (len(a), len(b))
    if pooled.df < 1:
        return Estimate(value, math.nan, math.nan, sum(counts), "difference of means: no interval", level, counts)
    seeds = float(sps.t.ppf(0.5 + level / 2, pooled.df)) * pooled.sd * math.sqrt(1 / len(a) + 1 / len(b))
    half = math.hypot(seeds, float(sps.norm.ppf(0.5 + level / 2)) * math.sqrt(image_variance))
    method = f"difference of means, t interval with the SD pooled over groups (df={pooled.df})"
    if image_variance > 0:
        method += f", squares added with those of a standard error of at most {math.sqrt(image_variance):.2g} from "
        method += "the test images"
    return Estimate(value, value - half, value + half, sum(counts), method, level, counts)
