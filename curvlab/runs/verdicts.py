# SPDX-License-Identifier: Apache-2.0
"""Verdicts: one rule for every claim, decided by the estimate's interval and never by eye.

*Reproduced*: the interval excludes the null value **and** (it holds the paper's value **or** the effect is at least
half of the paper's). *Direction only*: the effect has the paper's sign, but one of these fails. *Not reproduced*: the
sign is not the paper's. *Not testable at this preset*: nothing was measured. An estimate without interval (n = 1)
reaches *Direction only* at best.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from curvlab.runs.estimates import Estimate


class Verdict(enum.Enum):
    """What became of a claim."""

    REPRODUCED = "Reproduced"
    DIRECTION_ONLY = "Direction only"
    NOT_REPRODUCED = "Not reproduced"
    NOT_TESTABLE = "Not testable at this preset"

    def __str__(self) -> str:
        return self.value


class Survives(enum.Enum):
    """Whether a claim still holds once the missing control is run."""

    YES = "yes"
    NO = "no"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ToleranceJudgement:
    """Verdict of an equivalence-type claim, and whether the whole interval lies within the tolerance as well."""

    verdict: Verdict
    interval_within: bool | None  # None: no interval
    text: str


def judge(
    estimate: Estimate | None,
    paper_value: float,
    null_value: float,
    *,
    log_scale: bool = False,
) -> Verdict:
    """Verdict of "the effect is there": see the module's text for the rule.

    Effects are differences to ``null_value``; with ``log_scale`` (ratios, null 1) differences of logarithms.

    Args:
        estimate: what was measured, or None if this preset cannot.
        paper_value: the published value; must differ from ``null_value``.
        null_value: the value of no effect (0 for differences, 1 for ratios).
        log_scale: compare logarithms; all values must be positive.

    Raises:
        ValueError: ``paper_value`` equals ``null_value`` (an equivalence: use :func:`judge_tolerance`), not finite, or
            not positive with ``log_scale``.
    """
    if not (math.isfinite(paper_value) and math.isfinite(null_value)) or paper_value == null_value:
        raise ValueError(
            f"judge: paper_value must be finite and differ from null_value (else judge_tolerance), got {paper_value} "
            f"and {null_value}"
        )
    if estimate is None or math.isnan(estimate.value):
        return Verdict.NOT_TESTABLE
    if log_scale and min(paper_value, null_value, estimate.value) <= 0:
        raise ValueError(f"judge: log_scale needs positive values, got {estimate.value}, {paper_value}, {null_value}")
    effect = _effect(estimate.value, null_value, log_scale) / _effect(paper_value, null_value, log_scale)
    if effect <= 0:
        return Verdict.NOT_REPRODUCED
    if estimate.excludes(null_value) and (estimate.contains(paper_value) or effect >= 0.5):
        return Verdict.REPRODUCED
    return Verdict.DIRECTION_ONLY


def judge_tolerance(
    estimate: Estimate | None,
    paper_value: float,
    tolerance: float,
    *,
    relative: bool = False,
    null_value: float | None = None,
    unit: str = "",
) -> ToleranceJudgement:
    """Verdict of "the number is the paper's": *Reproduced* where |value − paper| ≤ tolerance.

    Beyond the tolerance: *Direction only* if ``null_value`` is given and the value lies on the paper's side of it, else
    *Not reproduced*. Whether the whole interval is within the tolerance too is reported, not required: with three
    seeds it asks more of the noise than of the claim.

    Args:
        estimate: what was measured, or None if this preset cannot.
        paper_value: the published value.
        tolerance: half-width, > 0; with ``relative`` a share of ``|paper_value|`` (0.05 for 5 %).
        relative: see ``tolerance``.
        null_value: the value of no effect, if the claim has one.
        unit: of the values, for the text.
    """
    if not tolerance > 0 or not math.isfinite(paper_value):
        raise ValueError(
            f"judge_tolerance: tolerance must be > 0 and paper_value finite, got {tolerance}, {paper_value}"
        )
    if estimate is None or math.isnan(estimate.value):
        return ToleranceJudgement(Verdict.NOT_TESTABLE, None, "not measured")
    width = tolerance * abs(paper_value) if relative else tolerance
    # 1e-12: a value printed as exactly on the edge is within (0.53 − 0.50 is 0.030000000000000027 in binary).
    width *= 1 + 1e-12
    within = abs(estimate.value - paper_value) <= width
    inside = estimate.low >= paper_value - width and estimate.high <= paper_value + width
    interval_within = inside if estimate.has_interval else None
    shown = f"{tolerance:.3g} {unit}".strip() if not relative else f"{100 * tolerance:.3g} %"
    whole = {True: ", so is the whole interval", False: ", the interval is not wholly", None: ", no interval"}
    text = f"{'within' if within else 'not within'} ±{shown}" + (whole[interval_within] if within else "")
    verdict = Verdict.REPRODUCED if within else Verdict.NOT_REPRODUCED
    if not within and null_value is not None and (estimate.value - null_value) * (paper_value - null_value) > 0:
        verdict = Verdict.DIRECTION_ONLY
    return ToleranceJudgement(verdict, interval_within, text)


def _effect(value: float, null_value: float, log_scale: bool) -> float:
    return math.log(value / null_value) if log_scale else value - null_value
