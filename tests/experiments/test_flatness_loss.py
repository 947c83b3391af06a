# SPDX-License-Identifier: Apache-2.0
"""How λ_max goes with the loss: slopes that are known, shared networks counted once, and what it makes of a control."""

from __future__ import annotations

import math

import pytest
from scipy import stats as sps

from curvlab.runs.stats import Survives, Verdict
from experiments.base.flatness_claims import Flatness, flatness_claims
from experiments.base.flatness_loss import loss_control, loss_power_claim, loss_slope, over_power, slope_words

SMALL, MIDDLE, LARGE = 32, 128, 512
LOSSES = {("as-written", SMALL): 0.1, ("as-written", MIDDLE): 0.4, ("as-written", LARGE): 0.6,
          ("equal-updates", SMALL): 1.0, ("equal-updates", LARGE): 0.002}  # fmt: skip


def network(arm: str, batch: int) -> dict:
    """Factor values; the middle batch is the same network in both arms."""
    return {"batch_size": batch, "epochs": 20 if batch == MIDDLE or arm == "as-written" else 80}


def flatness(power: float, *, spread: float = 0.0, seeds: int = 3, extra: float = 1.0, mark: bool = True) -> Flatness:
    """λ_max = 300 loss^power, power shifted by ``spread`` a seed, the large batch ``extra`` times as sharp."""
    rows, settings = [], {}
    for (arm, batch), loss in LOSSES.items():
        for point in ("last", "mark") if arm == "as-written" else ("last",):
            where = {**network(arm, batch), "point": point}
            settings[arm, batch, point] = where
            here = loss if point == "last" else 0.6
            for seed in range(seeds if point == "last" or mark else 0):
                top = 300 * here ** (power + spread * (seed - 1)) * (extra if batch == LARGE else 1.0)
                values = {"sharpness": top, "hessian_loss": here, "relative_sharpness": top / here, "power_lambda": top,
                          "filter_sharpness": 2.0 if batch == LARGE else 1.0}  # fmt: skip
                rows += [{"run": f"{where}", "seed": seed, "metric": m, "value": v, **where} for m, v in values.items()]
    settings["equal-updates", MIDDLE, "last"] = settings["as-written", MIDDLE, "last"]
    return Flatness(rows, settings, SMALL, LARGE, faithful=True, is_cifar=True, sigmas=(), loss_mark=0.6)


def test_the_slope_is_that_of_every_different_network_with_the_interval_of_seeds() -> None:
    found = flatness(0.55, spread=0.02)
    slope = loss_slope(found)
    assert slope is not None and slope.n == 3 and "15 networks" in slope.method
    half = sps.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert (slope.low, slope.value, slope.high) == pytest.approx((0.55 - half, 0.55, 0.55 + half))
    assert loss_slope(flatness(0.55, seeds=0)) is None
    one = loss_slope(flatness(0.55, seeds=1))
    assert one is not None and not one.has_interval


def test_dividing_by_the_loss_is_a_control_only_where_sharpness_is_proportional_to_it() -> None:
    proportional, root = flatness(1.0, spread=0.02), flatness(0.55, spread=0.02)
    assert loss_control(proportional).name == "λ_max/loss"
    control = loss_control(root)
    assert "equal loss (≤ 0.6)" in control.name and control.found is not None
    assert control.found.value == pytest.approx(1.0)
    assert "takes out too much" in slope_words(root) and "takes the loss out" in slope_words(proportional)
    assert "too little" in slope_words(flatness(1.5, spread=0.02))
    assert "not known" in slope_words(flatness(0.55, seeds=1))


def test_over_the_right_power_nothing_is_left_and_over_the_loss_too_little() -> None:
    """The same law at both batches: λ_max/loss makes the large one flatter, which is loss and not batch."""
    found = flatness(0.55)
    over = found.ratio("relative_sharpness")
    assert over is not None and over.value == pytest.approx(6 ** (0.55 - 1)) and over.high < 1
    slope = loss_slope(found)
    assert slope is not None
    left = over_power(found, slope.value)
    assert left is not None and left.value == pytest.approx(1.0)
    claims = {claim.id: claim for claim in flatness_claims(found)}
    assert claims["lambda"].survives is not Survives.NO  # it was, by dividing by the loss
    sharper = {claim.id: claim for claim in flatness_claims(flatness(0.55, extra=2.0))}
    assert sharper["lambda"].survives is Survives.YES
    unreached = {claim.id: claim for claim in flatness_claims(flatness(0.55, extra=2.0, mark=False))}
    assert unreached["lambda"].survives is Survives.NOT_TESTED
    assert "0.6" in next(claim.text for claim in flatness_claims(found) if claim.id == "equal_loss")


def test_the_premise_is_a_claim_of_its_own() -> None:
    assert loss_power_claim(flatness(1.0, spread=0.02)).verdict is Verdict.REPRODUCED
    assert loss_power_claim(flatness(0.55, spread=0.02)).verdict is Verdict.DIRECTION_ONLY
    assert loss_power_claim(flatness(-0.5, spread=0.02)).verdict is Verdict.NOT_REPRODUCED
    assert loss_power_claim(flatness(0.55, seeds=0)).verdict is Verdict.NOT_TESTABLE
