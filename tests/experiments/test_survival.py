# SPDX-License-Identifier: Apache-2.0
"""The one survival rule: four outcomes, by intervals alone; the interaction against its t interval by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as sps

from curvlab.runs.stats import Estimate, Survives, Verdict
from experiments.base.survival import Control, effect_controls, interaction, survival


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value, low, high, 3, "made up")


HOLDS, HOLDS_TOO = estimate(0.1, 1.0, 1.9), estimate(0.5, 2.0, 3.5)
FAILS, OPEN = estimate(-3.0, -2.0, -1.0), estimate(-1.0, 1.0, 3.0)
NO_INTERVAL = Estimate(-1.0, math.nan, math.nan, 1, "one seed")


def answer(*found: Estimate | None, verdict: Verdict = Verdict.REPRODUCED) -> Survives:
    return survival(verdict, [Control(f"control {i}", one) for i, one in enumerate(found)])[0]


def test_intervals_decide_and_values_never_do() -> None:
    assert answer(HOLDS, HOLDS_TOO) is Survives.YES
    assert answer(HOLDS, FAILS) is Survives.NO
    # A value on the failing side whose interval holds the bound was a No, and one on the claim's side too, before.
    assert answer(HOLDS, OPEN) is Survives.UNDECIDED
    assert answer(HOLDS, estimate(-3.0, -1.0, 1.0)) is Survives.UNDECIDED
    assert answer(estimate(0.0, 1.0, 2.0)) is Survives.UNDECIDED  # on the bound is not beyond it


def test_what_was_not_measured_is_not_tested_unless_another_control_fails() -> None:
    assert answer() is Survives.NOT_TESTED
    assert answer(None) is Survives.NOT_TESTED
    assert answer(HOLDS, None) is Survives.NOT_TESTED
    assert answer(HOLDS, NO_INTERVAL) is Survives.NOT_TESTED
    assert answer(FAILS, None) is Survives.NO


@pytest.mark.parametrize("verdict", list(Verdict))
def test_only_what_was_found_can_survive(verdict: Verdict) -> None:
    for found in itertools.product((HOLDS, FAILS, OPEN), repeat=2):
        outcome = answer(*found, verdict=verdict)
        tested = verdict in (Verdict.REPRODUCED, Verdict.DIRECTION_ONLY)
        assert (outcome is not Survives.NOT_TESTED) == tested


def test_sides_and_bounds() -> None:
    ratio = estimate(1.2, 1.5, 1.9)
    assert Control("ratio", ratio, bound=1.0).holds and Control("ratio", ratio, bound=2.0).fails
    assert Control("ratio", ratio, bound=1.0, side="below").fails
    below = Control("slope", FAILS, bound=-0.5, side="below")
    assert below.holds and not below.fails
    answered, words = survival(Verdict.DIRECTION_ONLY, [below])
    assert answered is Survives.YES and words == "slope (−2.0 [−3.0, −1.0], n=3; asked: below −0.5)"
    assert "not measured" in str(Control("slope", None))


def test_the_interaction_is_a_t_interval_of_differences_of_differences() -> None:
    written, control = {0: 4.0, 1: 1.0, 2: 2.5, 7: 9.0}, {0: 3.0, 1: 0.7, 2: 2.0, 5: 100.0}
    found = interaction(control, written)
    differences = np.array([3.0 - 2.0, 0.7 - 0.5, 2.0 - 1.25])
    half = sps.t.ppf(0.975, 2) * sps.sem(differences)
    assert found is not None and found.n == 3
    assert (found.low, found.value, found.high) == pytest.approx(
        (differences.mean() - half, differences.mean(), differences.mean() + half)
    )
    plain = interaction(control, written, share=1.0)
    assert plain is not None and plain.value == pytest.approx(-(1.0 + 0.3 + 0.5) / 3)
    assert interaction({0: 1.0}, {1: 1.0}) is None
    lonely = interaction({0: 1.0}, written)
    assert lonely is not None and not lonely.has_interval


def test_an_effect_must_be_there_and_half_of_it_kept() -> None:
    written = {seed: -1.0 + 0.1 * seed for seed in range(4)}

    def asked(share: float) -> Survives:
        control = {seed: share * effect + 0.01 * (-1) ** seed for seed, effect in written.items()}
        return survival(Verdict.REPRODUCED, effect_controls(written, {"c": control}, "below"))[0]

    assert asked(0.9) is Survives.YES and asked(0.5) is Survives.UNDECIDED
    assert asked(0.2) is Survives.NO and asked(-1.0) is Survives.NO
    gone = effect_controls(written, {"c": {}}, "below")
    assert [control.found for control in gone] == [None, None]
