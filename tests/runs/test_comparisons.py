# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as sps

from curvlab.runs.bootstrap import _crossed_errors
from curvlab.runs.comparisons import jonckheere_moments
from curvlab.runs.stats import (
    bca_bootstrap,
    equivalence,
    hierarchical_bootstrap,
    holm,
    jonckheere,
    non_inferiority,
    page_trend,
    paired,
    welch,
)

# The paper's batch-size experiment, test accuracy by seed at batch 32 and 2048.
BATCH_32, BATCH_2048 = [85.55, 85.19, 85.82], [83.41, 83.66, 82.73]


def test_welch_is_scipys():
    result = welch(BATCH_32, BATCH_2048)
    expected = sps.ttest_ind(BATCH_32, BATCH_2048, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert result.p_value == pytest.approx(expected.pvalue) and result.statistic == pytest.approx(expected.statistic)
    assert (result.effect.low, result.effect.high) == pytest.approx((interval.low, interval.high))
    assert str(result.effect) == "2.25 [1.27, 3.24], n=3+3"  # as the audit of the paper found
    assert math.isnan(welch([1.0], [2.0, 3.0]).p_value)


def test_paired_is_scipys():
    a, b = [84.91, 84.69, 85.00], [83.95, 83.34, 83.87]
    result, expected = paired(a, b), sps.ttest_rel(a, b)
    assert result.p_value == pytest.approx(expected.pvalue) == pytest.approx(0.010, abs=5e-4)
    assert result.effect.value == pytest.approx(1.15, abs=0.01) and result.n == 3
    assert paired([1.0, 2.0], [0.0, 1.0]).p_value == 0.0  # no spread at all
    with pytest.raises(ValueError, match="paired: b must have 2 values like a"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand():
    # sorted .01 .03 .04 → 3·.01, max(.03, 2·.03), max(.06, 1·.04)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    with pytest.raises(ValueError, match=r"within \[0, 1\], got 1.5 for x"):
        holm({"x": 1.5})


def test_tost_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    a, b, margin = rng.normal(0.1, 1, 20), rng.normal(0, 1, 25), 0.8
    above = sps.ttest_ind(a + margin, b, equal_var=False, alternative="greater").pvalue
    below = sps.ttest_ind(a - margin, b, equal_var=False, alternative="less").pvalue
    result = equivalence(a, b, margin)
    assert result.p_value == pytest.approx(max(above, below))
    assert non_inferiority(a, b, margin).p_value == pytest.approx(above)
    assert result.effect.level == 0.9
    inside = -margin < result.effect.low and result.effect.high < margin
    assert inside == (result.p_value < 0.05)
    pairs = sps.ttest_rel(a + margin, b[:20], alternative="greater").pvalue
    assert non_inferiority(a, b[:20], margin, use_pairs=True).p_value == pytest.approx(pairs)


def test_equal_means_with_much_noise_are_not_equivalent():
    assert equivalence([1.0, 5.0, 9.0], [1.0, 5.0, 9.0], 1.0).p_value > 0.3
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="margin must be > 0"):
            equivalence([1.0, 2.0], [1.0, 2.0], bad)
    with pytest.raises(ValueError, match="at least 2 seeds, got n=3"):
        non_inferiority([1.0], [1.0, 2.0], 0.5)


def test_page_trend():
    perfect = page_trend([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert perfect.statistic == 28 and perfect.p_value == pytest.approx(1 / 36)  # one of (3!)² orders
    assert page_trend([[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]).p_value == 1.0
    table = np.random.default_rng(1).normal(size=(5, 4)) + np.arange(4) * 0.5
    assert page_trend(table).p_value == pytest.approx(sps.page_trend_test(table).pvalue)
    with pytest.raises(ValueError, match=r"page_trend: table must be finite .* got \[1, 3\]"):
        page_trend([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6], [1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 2]])
def test_jonckheere_moments_by_enumeration(values):
    def statistic(order):
        groups = (order[:2], order[2:3], order[3:])
        return sum((x < y) + 0.5 * (x == y) for a, b in itertools.combinations(groups, 2) for x in a for y in b)

    every = [statistic(order) for order in itertools.permutations(values)]
    arrays = [np.array(part, dtype=float) for part in (values[:2], values[2:3], values[3:])]
    assert jonckheere_moments(arrays) == pytest.approx((np.mean(every), np.var(every)))
    assert jonckheere(arrays).statistic == statistic(values)


def test_jonckheere_finds_a_rise_and_not_a_fall():
    rising = [[1.0, 2.0, 1.5, 1.2], [2.0, 3.0, 2.4, 2.2], [4.0, 5.0, 3.9, 4.4]]
    assert jonckheere(rising).p_value < 0.001 and jonckheere(rising[::-1]).p_value > 0.99
    assert jonckheere([[1.0], [1.0], [1.0]]).p_value == 1.0
    with pytest.raises(ValueError, match="at least 3"):
        jonckheere(rising[:2])


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
def test_bca_is_scipys(statistic):
    y = np.random.default_rng(2).exponential(size=25)
    ours = bca_bootstrap(y, statistic, rng=np.random.default_rng(3), draws=40_000)
    theirs = sps.bootstrap((y,), statistic, n_resamples=40_000, rng=np.random.default_rng(4), method="BCa")
    spread = theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * spread)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * spread)
    assert ours.n == 25 and "40,000 draws" in ours.method


def test_bca_edges():
    same = bca_bootstrap([2.0] * 9, rng=np.random.default_rng(0))
    assert (same.low, same.value, same.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match=">= 2 values"):
        bca_bootstrap([1.0], rng=np.random.default_rng(0))


def simulated_accuracy(rng, seeds: int, images: int, spread: float = 0.25) -> np.ndarray:
    """Logits with a seed effect, an image effect and noise; expected accuracy about 0.8."""
    logits = 1.5 + spread * rng.standard_normal((seeds, 1)) + 1.0 * rng.standard_normal((1, images))
    return (rng.random((seeds, images)) < 1 / (1 + np.exp(-logits))).astype(float)


@pytest.mark.parametrize(
    ("seeds", "images", "arms"),
    [(2, 200, 1), (3, 200, 1), (3, 2000, 2), (4, 40, 1), (5, 500, 2), (10, 200, 1), (10, 200, 2)],
)
def test_hierarchical_bootstrap_covers(seeds, images, arms):
    rng = np.random.default_rng(5)
    truth = float(simulated_accuracy(rng, 2000, 2000).mean()) if arms == 1 else 0.0
    estimates = []
    for _ in range(400):
        scores = simulated_accuracy(rng, arms * seeds, images)
        other = scores[seeds:] if arms == 2 else None
        estimates.append(hierarchical_bootstrap(scores[:seeds], other, rng=rng, draws=200))
    held = np.mean([e.contains(truth) for e in estimates])
    assert 0.92 <= held <= 0.985, held  # 400 simulations: 0.95 ± 2.3 SE; squares added cover a little more


@pytest.mark.parametrize("seeds", [2, 3, 5, 9])
@pytest.mark.parametrize("arms", [1, 2])
def test_images_never_make_an_interval_narrower_than_seeds_alone(seeds, arms):
    rng = np.random.default_rng(11)
    for _ in range(60):
        # A seed effect from none to large: where it is small, one t of the summed variance was the narrower one.
        scores = simulated_accuracy(rng, 2 * seeds, 300, spread=rng.choice([0.0, 0.1, 0.5]))
        a, b = scores[:seeds], scores[seeds:]
        found = hierarchical_bootstrap(a, b if arms == 2 else None, rng=rng, draws=200, common_seeds=True)
        means = a.mean(axis=1) - (b.mean(axis=1) if arms == 2 else 0.0)
        half = sps.t.ppf(0.975, seeds - 1) * sps.sem(means)
        assert found.low <= found.value - half + 1e-12 and found.high >= found.value + half - 1e-12


@pytest.mark.parametrize("arms", [1, 2])
def test_crossed_variance_is_unbiased(arms):
    # Mostly residual (0/1 scores): counted twice, as plain resampling does at best, the ratio would be 1.28.
    rng = np.random.default_rng(8)
    means, variances = [], []
    for _ in range(2000):
        scores = simulated_accuracy(rng, 8 * arms, 100)
        groups = [scores[:8], scores[8:]][:arms]
        means.append(groups[0].mean() - (groups[1].mean() if arms == 2 else 0))
        seed_error, _, image_error = _crossed_errors(groups)
        variances.append(seed_error**2 + image_error**2)
    assert 0.9 < np.mean(variances) / np.var(means) < 1.1  # 2,000 simulations: ± 3 SE


def test_hierarchical_bootstrap_holds_more_than_the_seeds():
    rng = np.random.default_rng(7)
    scores = simulated_accuracy(rng, 10, 100)
    estimate = hierarchical_bootstrap(scores, rng=rng)
    assert (estimate.high - estimate.low) / 2 / 1.96 > 1.1 * sps.sem(scores.mean(axis=1))
    assert estimate.n == 10 and "10,000 draws of seeds and images, 100 images" in estimate.method


def test_hierarchical_bootstrap_arms():
    rng = np.random.default_rng(6)
    a = simulated_accuracy(rng, 4, 500)
    same = hierarchical_bootstrap(a, a, rng=rng, draws=500, common_seeds=True)
    assert (same.low, same.value, same.high, same.n) == (0, 0, 0, 4)
    apart = hierarchical_bootstrap(a, a, rng=rng, draws=500)
    assert apart.high > 0.005 and apart.counts == (4, 4)
    one = hierarchical_bootstrap(a[:1], rng=rng, draws=500)
    p = a[0].mean()
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 500), rel=0.01)
    assert "one seed: the images' noise only" in one.method and one.n == 1
    with pytest.raises(ValueError, match=r"other must match scores \[4, 500\], got \[4, 400\]"):
        hierarchical_bootstrap(a, a[:, :400], rng=rng)
    with pytest.raises(ValueError, match=r"must be finite \[seeds, images\], got \[500\]"):
        hierarchical_bootstrap(a[0], rng=rng)
