# SPDX-License-Identifier: Apache-2.0
"""Intervals: closed forms against scipy, and coverage in 2,000 seeded simulations (0.95 ± 0.015 is 3 SE)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as sps

from curvlab.runs.stats import (
    Estimate,
    geometric_mean_interval,
    log_ratio_interval,
    loglog_fit,
    loglog_slope,
    mean_interval,
    pooled_log_sd,
    pooled_sd,
    ratio_of_means,
)

SIMULATIONS = 2000


def coverage(truth: float, estimates) -> float:
    held = [estimate.contains(truth) for estimate in estimates]
    return sum(held) / len(held)


def test_mean_interval_is_students():
    y = [1.0, 2.5, 0.5, 3.0]
    low, high = sps.t.interval(0.9, 3, loc=np.mean(y), scale=sps.sem(y))
    estimate = mean_interval(y, level=0.9)
    assert estimate.value == 1.75 and estimate.n == 4 and "df=3" in estimate.method
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_mean_interval_covers():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(SIMULATIONS, 3))
    assert 0.935 < coverage(3.0, map(mean_interval, draws)) < 0.965


def test_one_seed_has_no_interval_unless_the_sd_is_pooled():
    alone = mean_interval([0.083])
    assert not alone.has_interval and alone.n == 1 and alone.method == "mean, n=1: no interval"
    assert not alone.contains(0.083) and not alone.excludes(0.0)
    pooled = mean_interval([5.0], pooled_sd=2.0, df=10)
    assert pooled.high - 5.0 == pytest.approx(2.0 * sps.t.ppf(0.975, 10)) and "pooled" in pooled.method
    assert not mean_interval([5.0], pooled_sd=math.nan, df=0).has_interval


def test_pooled_sd_by_hand():
    # Σ(y−m)²: (1,3) → 2, (2,2,5) → 6, single → 0; df = 1 + 2 + 0
    assert pooled_sd([[1, 3], [2, 2, 5], [7]]) == (pytest.approx(math.sqrt(8 / 3)), 3)
    assert pooled_log_sd({32: [math.e, math.e**3]}) == (pytest.approx(math.sqrt(2)), 1)
    assert pooled_log_sd({32: [1.0], 64: [2.0]}).df == 0


def test_geometric_mean():
    y = [1.0, 10.0, 100.0]
    estimate = geometric_mean_interval(y)
    assert estimate.value == pytest.approx(10.0) and estimate.low * estimate.high == pytest.approx(100.0)
    assert estimate.method.startswith("geometric mean")


def test_log_ratio_with_one_seed_covers_by_the_pooled_sd():
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(SIMULATIONS):
        groups = np.exp(0.02 * rng.standard_normal((6, 3)))
        single = np.exp(0.02 * rng.standard_normal(1) - math.log(11.0))
        pooled = pooled_log_sd([*groups, single])
        assert pooled.df == 12
        estimates.append(log_ratio_interval(groups[0], single, pooled_sd=pooled.sd, df=pooled.df))
    assert 0.935 < coverage(11.0, estimates) < 0.965
    assert estimates[0].counts == (3, 1) and estimates[0].n_text == "3+1" and estimates[0].n == 4


def test_log_ratio_without_pooling_is_welch_on_logs():
    a, b = [2.0, 2.2, 1.9], [1.0, 1.3, 1.1, 0.9]
    interval = sps.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    estimate = log_ratio_interval(a, b)
    assert (estimate.low, estimate.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert not log_ratio_interval([2.0], [1.0, 1.1]).has_interval


def test_fieller_covers_and_knows_when_it_is_unbounded():
    rng = np.random.default_rng(2)
    a, b = rng.normal(6.0, 0.5, (SIMULATIONS, 3)), rng.normal(2.0, 0.5, (SIMULATIONS, 4))
    assert 0.935 < coverage(3.0, map(ratio_of_means, a, b)) < 0.965
    unbounded = ratio_of_means([1.0, 2.0], [-1.0, 1.5])
    assert (unbounded.low, unbounded.high) == (-math.inf, math.inf) and "unbounded" in unbounded.method
    assert not ratio_of_means([1.0], [2.0]).has_interval


def power_law(rng, noise: float, bend: float = 0.0, widths=(32, 64, 128, 256, 512, 1024), seeds: int = 3):
    x = np.repeat(np.array(widths, dtype=float), seeds)
    shared = np.repeat(bend * rng.standard_normal(len(widths)), seeds)
    return x, 5.0 * x**-0.5 * np.exp(shared + noise * rng.standard_normal(x.size))


def test_slope_is_linregress():
    x, y = power_law(np.random.default_rng(3), 0.05)
    expected = sps.linregress(np.log(x), np.log(y))
    estimate = loglog_slope(x, y, method="points")
    half = sps.t.ppf(0.975, x.size - 2) * expected.stderr
    assert (estimate.value, estimate.low) == pytest.approx((expected.slope, expected.slope - half))
    assert estimate.n == 18 and "df=16" in estimate.method


def test_slope_coverage_on_an_exact_law():
    rng = np.random.default_rng(4)
    data = [power_law(rng, 0.02) for _ in range(SIMULATIONS)]
    assert 0.935 < coverage(-0.5, (loglog_slope(x, y, method="points") for x, y in data)) < 0.965
    assert 0.94 < coverage(-0.5, (loglog_slope(x, y) for x, y in data)) < 0.99
    seeds = [0, 1, 2] * 6
    assert 0.935 < coverage(-0.5, (loglog_slope(x, y, clusters=seeds) for x, y in data)) < 0.965


def test_only_the_honest_slope_covers_when_the_means_leave_the_line():
    rng = np.random.default_rng(5)
    data = [power_law(rng, 0.01, bend=0.05) for _ in range(SIMULATIONS)]
    assert coverage(-0.5, (loglog_slope(x, y, method="points") for x, y in data)) < 0.80
    assert 0.935 < coverage(-0.5, (loglog_slope(x, y) for x, y in data)) < 0.965
    assert "lack-of-fit error of the 6 means (df=4)" in loglog_slope(*data[0]).method


def test_honest_error_is_the_larger_of_the_two():
    rng, picked = np.random.default_rng(8), set()
    for bend in (0.0, 0.01, 0.02, 0.02, 0.05):
        x, y = power_law(rng, 0.02, bend)
        slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
        left = (np.log(y) - intercept - slope * np.log(x)).reshape(6, 3)
        residual, lack = (left**2).sum() / 16, 3 * (left.mean(axis=1) ** 2).sum() / 4
        fit = loglog_fit(x, y)
        assert fit.sigma**2 == pytest.approx(max(residual, lack)) and fit.df == (4 if lack > residual else 16)
        picked.add((lack > residual, lack > 3 * residual))
    assert len(picked) == 3  # noise alone, a little curvature, much of it


def test_cluster_slopes():
    x = [1.0, 10.0, 1.0, 10.0]
    estimate = loglog_slope(x, [1.0, 10.0, 1.0, 1000.0], clusters=[0, 0, 1, 1])  # slopes 1 and 3
    assert estimate.value == pytest.approx(2.0) and estimate.n == 2
    assert estimate.high - 2 == pytest.approx(sps.t.ppf(0.975, 1) * 1.0)
    assert not loglog_slope([1, 2, 4], [1, 2, 4], clusters=[0, 0, 0]).has_interval


def test_line_and_band():
    fit = loglog_fit([1.0, 10.0, 100.0, 1000.0], [2.0, 21.0, 190.0, 2000.0])
    line, low, high = fit.predict([10.0, 1e6])
    assert line[0] == pytest.approx(20, rel=0.05) and (low < line).all() and (line < high).all()
    assert high[1] / low[1] > high[0] / low[0]  # the band opens beyond the data
    exact = loglog_fit([1.0, 10.0], [1.0, 0.1])
    assert exact.slope.value == pytest.approx(-1.0) and not exact.slope.has_interval
    assert np.isnan(exact.predict([2.0])[1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "mean_interval: values must be a non-empty list"),
        (lambda: mean_interval([1.0, math.nan]), "must be finite .count diverged runs"),
        (lambda: mean_interval([[1.0]]), r"got shape \[1, 1\]"),
        (lambda: mean_interval([1.0, 2.0], level=95), "level must be between 0 and 1, got 95"),
        (lambda: mean_interval([1.0], pooled_sd=1.0), "pooled_sd needs df"),
        (lambda: geometric_mean_interval([1.0, 0.0]), "values must be > 0"),
        (lambda: log_ratio_interval([1.0], [-1.0]), "log_ratio_interval: b must be > 0"),
        (lambda: ratio_of_means([1.0, 2.0], [1.0, -1.0]), "mean of b must not be 0"),
        (lambda: pooled_sd([]), "at least one group"),
        (lambda: loglog_slope([1, 1], [2, 3]), "at least two different values"),
        (lambda: loglog_slope([1, 2], [2, 3, 4]), "y must have 2 values like x, got 3"),
        (lambda: loglog_slope([1, 2], [2, 3], method="magic"), "method must be one of honest, points, clusters"),
        (lambda: loglog_slope([1, 2], [2, 3], clusters=[0]), "clusters must have 2 labels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_estimate_words():
    estimate = Estimate(0.934, 0.921, 0.947, 3, "mean")
    assert str(estimate) == "0.934 [0.921, 0.947], n=3"
    assert estimate.contains(0.93) and estimate.excludes(0.95) and not estimate.excludes(0.93)
    flipped = estimate.scaled(-100)
    assert (flipped.low, flipped.value, flipped.high) == pytest.approx((-94.7, -93.4, -92.1))
