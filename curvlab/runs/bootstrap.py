# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals: BCa over seeds (n ≥ 8, else use t), and seeds × test images together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

from curvlab.runs.estimates import Array, Estimate, check_level, check_values

# Draws are made in blocks of about this many numbers, so that 10,000 draws of 10,000 images need no gigabytes.
_BLOCK = 4_000_000


def bca_bootstrap(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    rng: np.random.Generator,
    draws: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """Bias-corrected and accelerated interval of ``statistic(values, axis=-1)``.

    With z0 = Φ⁻¹(share of draws below the estimate, ties by half) and a = Σd³ / (6 (Σd²)^{3/2}), d the centered
    jackknife values, the ends are the draws' quantiles at Φ(z0 + (z0 + z_α)/(1 − a (z0 + z_α))).
    Source: Efron, JASA 82 (1987). Below n = 8 it is too narrow: use :func:`~curvlab.runs.stats.mean_interval`.

    Args:
        values: one number a seed, ``[n]``, n ≥ 2.
        statistic: vectorized like ``numpy.mean``: takes ``axis``.
        rng: source of the resamples.
        draws: number of resamples.
        level: of the interval.
    """
    check_level(level, "bca_bootstrap")
    y = check_values(values, "bca_bootstrap")
    if y.size < 2 or draws < 100:
        raise ValueError(f"bca_bootstrap: needs >= 2 values and >= 100 draws, got {y.size} and {draws}")
    value = float(statistic(y, axis=-1))
    resampled = np.sort(_resample(y, statistic, rng, draws))
    method = f"BCa bootstrap over {y.size} seeds, {draws:,} draws"
    if resampled[0] == resampled[-1]:
        return Estimate(value, value, value, y.size, method + " (all equal)", level)
    below = ((resampled < value).sum() + (resampled <= value).sum()) / (2 * draws)
    z0 = float(sps.norm.ppf(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)))
    jackknife = np.array([float(statistic(np.delete(y, i), axis=-1)) for i in range(y.size)])
    d = jackknife.mean() - jackknife
    scale = float((d**2).sum()) ** 1.5
    acceleration = float((d**3).sum()) / (6 * scale) if scale > 0 else 0.0
    z = z0 + np.asarray(sps.norm.ppf([0.5 - level / 2, 0.5 + level / 2]))
    low, high = np.quantile(resampled, sps.norm.cdf(z0 + z / (1 - acceleration * z)))
    return Estimate(value, float(low), float(high), y.size, method, level)


def hierarchical_bootstrap(
    scores: ArrayLike,
    other: ArrayLike | None = None,
    *,
    rng: np.random.Generator,
    draws: int = 10_000,
    level: float = 0.95,
    common_seeds: bool = False,
) -> Estimate:
    """Mean score (or difference of two arms) with the noise of seeds *and* of test images in its interval.

    Every draw takes S − 1 of S seeds with replacement (S − 1 and not S gives a mean the variance s²/S that it has;
    Rao & Wu, JASA 83 (1988)) and N of N images, the same images for all seeds and both arms, since they share one test
    set (the pigeonhole bootstrap; Owen, Ann. Appl. Stat. 1 (2007): never too narrow for crossed factors). Interval: the
    draws' quantiles where S ≥ 8, else mean ± t(S − 1) · SD of the draws. With S = 1 only images are drawn, and the
    method says so.

    Args:
        scores: per seed and test image, for example 0/1 correctness, ``[S, N]``.
        other: second arm, ``[S', N]`` on the same images; the estimate is then ``scores − other``.
        rng: source of the resamples.
        draws: number of resamples.
        level: of the interval.
        common_seeds: the arms share their seeds, in order: both draw the same.
    """
    check_level(level, "hierarchical_bootstrap")
    arms = [_matrix(arm, name) for arm, name in ((scores, "scores"), (other, "other")) if arm is not None]
    images, seeds = arms[0].shape[1], [arm.shape[0] for arm in arms]
    if any(arm.shape[1] != images for arm in arms) or (common_seeds and len(set(seeds)) > 1):
        raise ValueError(f"hierarchical_bootstrap: other must match scores {list(arms[0].shape)}, got {list(arms[-1].shape)}")
    means = [float(arm.mean()) for arm in arms]
    value = means[0] - means[1] if len(means) > 1 else means[0]
    block = max(1, _BLOCK // images)
    parts = [_draw(arms, rng, min(block, draws - start), common_seeds) for start in range(0, draws, block)]
    drawn = np.concatenate(parts)
    fewest = min(seeds)
    if fewest == 1:
        quantile, how = float(sps.norm.ppf(0.5 + level / 2)), "one seed: image sampling only, normal interval"
    elif fewest < 8:
        quantile, how = float(sps.t.ppf(0.5 + level / 2, fewest - 1)), f"seeds × images, t interval (df={fewest - 1})"
    else:
        quantile, how = math.nan, "seeds × images, percentile interval"
    low, high = value - quantile * float(drawn.std(ddof=1)), value + quantile * float(drawn.std(ddof=1))
    if math.isnan(quantile):
        low, high = (float(q) for q in np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2]))
    counts = tuple(seeds) if len(seeds) > 1 and not common_seeds else ()
    method = f"hierarchical bootstrap, {how}, {images:,} images, {draws:,} draws"
    return Estimate(value, low, high, sum(counts) or seeds[0], method, level, counts)


def _resample(y: Array, statistic: Callable[..., Any], rng: np.random.Generator, draws: int) -> Array:
    block = max(1, _BLOCK // y.size)
    parts = []
    for start in range(0, draws, block):
        index = rng.integers(0, y.size, size=(min(block, draws - start), y.size))
        parts.append(np.asarray(statistic(y[index], axis=-1), dtype=np.float64))
    return np.concatenate(parts)


def _matrix(scores: ArrayLike, name: str) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"hierarchical_bootstrap: {name} must be finite [seeds, images], got {list(array.shape)}")
    return array


def _draw(arms: list[Array], rng: np.random.Generator, count: int, common_seeds: bool) -> Array:
    images = arms[0].shape[1]
    image_weights = _weights(rng, count, images, images)
    seed_weights: NDArray[np.float64] | None = None
    total = np.zeros(count)
    for sign, arm in zip((1.0, -1.0), arms, strict=False):
        if seed_weights is None or not common_seeds:
            seed_weights = _weights(rng, count, arm.shape[0], max(1, arm.shape[0] - 1))
        total += sign * ((image_weights @ arm.T) * seed_weights).sum(axis=1)
    return total


def _weights(rng: np.random.Generator, count: int, size: int, taken: int) -> Array:
    """``[count, size]``: how often each of ``size`` items is among ``taken`` draws with replacement, over ``taken``."""
    return rng.multinomial(taken, np.full(size, 1 / size), size=count) / taken
