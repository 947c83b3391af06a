# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from curvlab.runs.stats import Estimate, Verdict, judge, judge_tolerance


def estimate(value: float, low: float = math.nan, high: float = math.nan) -> Estimate:
    return Estimate(value, low, high, 3, "test")


@pytest.mark.parametrize(
    ("measured", "paper", "null", "verdict"),
    [
        (estimate(2.0, 1.0, 3.0), 2.25, 0.0, Verdict.REPRODUCED),  # holds the paper's value
        (estimate(2.0, 1.9, 2.1), 2.25, 0.0, Verdict.REPRODUCED),  # does not, but is more than half of it
        (estimate(1.125, 1.1, 1.15), 2.25, 0.0, Verdict.REPRODUCED),  # exactly half
        (estimate(0.9, 0.1, 2.3), 2.25, 0.0, Verdict.REPRODUCED),  # less than half, but holds the paper's value
        (estimate(1.0, 0.9, 1.1), 2.25, 0.0, Verdict.DIRECTION_ONLY),  # less than half
        (estimate(2.0, -0.5, 4.5), 2.25, 0.0, Verdict.DIRECTION_ONLY),  # holds no effect
        (estimate(2.0), 2.25, 0.0, Verdict.DIRECTION_ONLY),  # no interval
        (estimate(-0.1, -0.4, 0.2), 2.25, 0.0, Verdict.NOT_REPRODUCED),
        (estimate(-2.0, -2.1, -1.9), 2.25, 0.0, Verdict.NOT_REPRODUCED),
        (estimate(0.0, 0.0, 0.0), 2.25, 0.0, Verdict.NOT_REPRODUCED),
        (estimate(-2.0, -3.0, -1.0), -1.5, 0.0, Verdict.REPRODUCED),  # negative claims
        (None, 2.25, 0.0, Verdict.NOT_TESTABLE),
        (estimate(math.nan), 2.25, 0.0, Verdict.NOT_TESTABLE),
        (estimate(5.0, 4.5, 5.5), 11.3, 1.0, Verdict.DIRECTION_ONLY),  # 4 of 10.3
    ],
)
def test_the_rule(measured, paper, null, verdict):
    assert judge(measured, paper, null) is verdict


def test_ratios_are_judged_on_logs_where_asked():
    # log 5 / log 11.3 = 0.66 while (5 − 1)/(11.3 − 1) = 0.39
    assert judge(estimate(5.0, 4.5, 5.5), 11.3, 1.0, log_scale=True) is Verdict.REPRODUCED
    with pytest.raises(ValueError, match="log_scale needs positive values"):
        judge(estimate(-5.0, -6.0, -4.0), 11.3, 1.0, log_scale=True)


@pytest.mark.parametrize("paper", [0.0, math.nan])
def test_a_claim_of_no_effect_is_no_effect_claim(paper):
    with pytest.raises(ValueError, match="paper_value must be finite and differ from null_value"):
        judge(estimate(1.0, 0.5, 1.5), paper, 0.0)


def test_tolerance():
    whole = judge_tolerance(estimate(-0.501, -0.505, -0.497), -0.5, 0.03, null_value=0.0)
    assert whole.verdict is Verdict.REPRODUCED and whole.interval_within is True
    assert whole.text == "within ±0.03, so is the whole interval"
    partly = judge_tolerance(estimate(0.94, 0.80, 1.08), 0.9356, 0.05, relative=True)
    assert partly.verdict is Verdict.REPRODUCED and partly.interval_within is False and "±5 %" in partly.text
    assert judge_tolerance(estimate(0.94), 0.9356, 0.05, relative=True).interval_within is None
    assert judge_tolerance(estimate(0.2, 0.1, 0.3), 0.0, 0.5, unit="points").text.startswith(
        "within ±0.5 points, so is"
    )
    assert judge_tolerance(estimate(-0.53), -0.5, 0.03).verdict is Verdict.REPRODUCED  # exactly on the edge
    assert judge_tolerance(estimate(-0.54), -0.5, 0.03, null_value=0.0).verdict is Verdict.DIRECTION_ONLY
    beyond = judge_tolerance(estimate(-0.54), -0.5, 0.03)
    assert beyond.verdict is Verdict.NOT_REPRODUCED and beyond.text == "not within ±0.03"
    assert judge_tolerance(None, -0.5, 0.03).verdict is Verdict.NOT_TESTABLE
    with pytest.raises(ValueError, match="tolerance must be > 0"):
        judge_tolerance(estimate(1.0), 1.0, 0.0)
