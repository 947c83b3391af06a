# SPDX-License-Identifier: Apache-2.0
"""Is there a peak along a sweep? Its height over the lower of both sides, valid although the peak was looked for.

For sizes s_1 < .. < s_k with group means m, the height of an interior peak is

    h = max_i min(m_i − min_{a<i} m_a, m_i − min_{b>i} m_b),

the smaller of the rise before it and the fall after it. Where peak and valleys are picked by looking at the means, a
plain t interval is too narrow; Tukey's intervals hold for all pairs of sizes at once (Kramer's form for unequal counts)
and so for whichever were picked: with half-widths q(level; k, df)/√2 · s_p √(1/n_i + 1/n_j) around every difference,
the lower (upper) end of h is the same max–min over the lower (upper) ends. Source: Tukey 1953; Kramer, Biometrics 12
(1956).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlab.runs.stats import Estimate, Verdict, pooled_sd


@dataclass(frozen=True)
class Peak:
    """The highest interior point of a sweep, measured over its lower side.

    Attributes:
        size: where it is.
        height: h with its simultaneous interval; negative or zero where the sweep has no interior peak.
    """

    size: float
    height: Estimate

    @property
    def is_there(self) -> bool:
        """Whether the whole interval of the height lies above 0."""
        return self.height.has_interval and self.height.low > 0


def interior_peak(groups: Mapping[float, Sequence[float]], *, level: float = 0.95) -> Peak | None:
    """The peak of ``groups`` (values by size, one a seed); None with fewer than three sizes.

    The spread is pooled over all sizes: a size of one seed is used under the assumption that it shares it.
    """
    found = {size: list(values) for size, values in sorted(groups.items()) if len(values)}
    sizes = list(found)
    if len(sizes) < 3:
        return None
    spread = pooled_sd(found)
    means = [math.fsum(found[size]) / len(found[size]) for size in sizes]
    counts = [len(found[size]) for size in sizes]
    scale = _tukey(level, len(sizes), spread.df) * spread.sd if spread.df else math.nan

    def height(i: int, sign: float) -> float:
        def over(others: range) -> float:
            return max(means[i] - means[j] + sign * scale * math.sqrt(1 / counts[i] + 1 / counts[j]) for j in others)

        return min(over(range(i)), over(range(i + 1, len(sizes))))

    interior = range(1, len(sizes) - 1)
    values = {i: min(means[i] - min(means[:i]), means[i] - min(means[i + 1 :])) for i in interior}
    best = max(values, key=lambda i: values[i])
    ends = [max(height(i, sign) for i in interior) for sign in (-1.0, 1.0)] if spread.df else [math.nan, math.nan]
    how = f"height of the interior peak, Tukey intervals over {len(sizes)} sizes (df={spread.df})"
    if not spread.df:
        how = "height of the interior peak: no interval"
    return Peak(sizes[best], Estimate(values[best], ends[0], ends[1], sum(counts), how, level, tuple(counts), "sizes"))


def judge_peak(peak: Peak | None) -> Verdict:
    """*Reproduced*: the interval lies above 0. *Direction only*: the height does. *Not reproduced*: it does not."""
    if peak is None:
        return Verdict.NOT_TESTABLE
    if peak.is_there:
        return Verdict.REPRODUCED
    return Verdict.DIRECTION_ONLY if peak.height.value > 0 else Verdict.NOT_REPRODUCED


def judge_no_peak(peak: Peak | None, margin: float) -> Verdict:
    """Equivalence with a margin stated beforehand: *Reproduced* where the whole interval lies below it.

    *Direction only* where the height alone does.
    """
    if peak is None:
        return Verdict.NOT_TESTABLE
    if peak.height.has_interval and peak.height.high < margin:
        return Verdict.REPRODUCED
    return Verdict.DIRECTION_ONLY if peak.height.value < margin else Verdict.NOT_REPRODUCED


@functools.cache
def _tukey(level: float, count: int, df: int) -> float:
    from scipy import stats as sps

    return float(sps.studentized_range.ppf(level, count, df)) / math.sqrt(2)
