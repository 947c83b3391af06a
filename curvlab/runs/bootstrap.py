# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals: BCa over seeds (n ≥ 8, else use t), and seeds × test images together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as sps

from curvlab.runs.estimates import Array, Estimate, check_level, check_values, t_interval

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

    All seeds and both arms share the test images, so seeds and images are crossed. Per arm a let s_a² be the variance
    of its seeds' means and e_a the residual mean square; let s_d² be the variance over images of the (difference of)
    image means. The mean varies by

        seeds:   se_S² = Σ_a s_a²/S_a                                (holds the residual's share e_a/(S_a N) already),
        images:  se_I² = max(0, s_d²/N − Σ_a e_a/(S_a N))            (without that share, not to count it twice),

    of which the first is known to S − 1 degrees of freedom only (two arms: Welch's), the second to N − 1. Their
    intervals are joined by square-and-add:

        half = √((t(df_S) se_S)² + (t(N−1) se_I)²),

    never narrower than that of seeds alone. Source: Newcombe, Stat. Med. 17 (1998), for independent parts. (One t of
    the summed variance is narrower where images matter: Satterthwaite's df then nears N − 1, and its quantile of 2 is
    given to the spread of three seeds too, which needs 4.3.)

    With S ≥ 8 seeds the ends are those of ``draws`` resamples of seeds and of images (the same images for all seeds),
    stretched to that width: plain resampling of crossed factors counts the residual up to three times (the pigeonhole
    bootstrap; Owen, Ann. Appl. Stat. 1 (2007)). They keep the draws' skewness, and the width of seeds alone as the
    least. With S = 1 the seeds' noise is unknown: the interval covers the images' alone, and the method says so.

    Args:
        scores: per seed and test image, for example 0/1 correctness, ``[S, N]``, N ≥ 2.
        other: second arm, ``[S', N]`` on the same images; the estimate is then ``scores − other``.
        rng: source of the resamples.
        draws: number of resamples.
        level: of the interval.
        common_seeds: the arms share their seeds, in order: differences are taken seed by seed.
    """
    check_level(level, "hierarchical_bootstrap")
    arms = [_matrix(arm, name) for arm, name in ((scores, "scores"), (other, "other")) if arm is not None]
    images, seeds = arms[0].shape[1], [arm.shape[0] for arm in arms]
    if any(arm.shape[1] != images for arm in arms) or (common_seeds and len(set(seeds)) > 1):
        raise ValueError(
            f"hierarchical_bootstrap: other must match scores {list(arms[0].shape)}, got {list(arms[-1].shape)}"
        )
    if common_seeds and len(arms) > 1:
        arms, seeds = [arms[0] - arms[1]], seeds[:1]
    value = float(arms[0].mean()) - (float(arms[1].mean()) if len(arms) > 1 else 0.0)
    seed_error, df, image_error = _crossed_errors(arms)
    alone = t_interval(0.0, seed_error, df, level)[1] if min(seeds) > 1 else 0.0
    half = math.hypot(alone, t_interval(0.0, image_error, images - 1, level)[1])
    low, high = value - half, value + half
    how = f"crossed seeds and images, square-and-add of t intervals (df={df:.3g} of seeds)"
    if min(seeds) >= 8:
        block = max(1, _BLOCK // images)
        drawn = np.concatenate([_draw(arms, rng, min(block, draws - at)) for at in range(0, draws, block)])
        spread = float(drawn.std(ddof=1)) * float(sps.norm.ppf(0.5 + level / 2))
        ends = (drawn - drawn.mean()) * (half / spread if spread > 0 else 0.0)
        below, above = (float(q) for q in np.quantile(ends, [0.5 - level / 2, 0.5 + level / 2]))
        low, high = value + min(below, -alone), value + max(above, alone)
        how = f"{draws:,} draws of seeds and images"
    elif min(seeds) == 1:
        how = "one seed: the images' noise only"
    counts = tuple(seeds) if len(seeds) > 1 else ()
    return Estimate(value, low, high, sum(seeds), f"mean score, {how}, {images:,} images", level, counts)


def _resample(y: Array, statistic: Callable[..., Any], rng: np.random.Generator, draws: int) -> Array:
    block = max(1, _BLOCK // y.size)
    parts = []
    for start in range(0, draws, block):
        index = rng.integers(0, y.size, size=(min(block, draws - start), y.size))
        parts.append(np.asarray(statistic(y[index], axis=-1), dtype=np.float64))
    return np.concatenate(parts)


def _matrix(scores: ArrayLike, name: str) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2 or not np.isfinite(array).all():
        raise ValueError(f"hierarchical_bootstrap: {name} must be finite [seeds, images], got {list(array.shape)}")
    return array


def _crossed_errors(arms: list[Array]) -> tuple[float, float, float]:
    """se_S with its df and se_I of :func:`hierarchical_bootstrap`; an arm of one seed adds nothing to the first."""
    images = arms[0].shape[1]
    contrast = arms[0].mean(axis=0) - (arms[1].mean(axis=0) if len(arms) > 1 else 0.0)
    parts, residual = [], 0.0
    for arm in arms:
        count = arm.shape[0]
        if count == 1:
            continue
        seed_means = arm.mean(axis=1, keepdims=True)
        left = arm - seed_means - arm.mean(axis=0, keepdims=True) + arm.mean()
        residual += float((left**2).sum()) / ((count - 1) * (images - 1)) / (count * images)
        parts.append((float(seed_means.var(ddof=1)) / count, count - 1))
    seed_part = sum(part for part, _ in parts)
    weight = sum(part**2 / df for part, df in parts)
    df = seed_part**2 / weight if weight > 0 else float(sum(df for _, df in parts))
    image_part = max(0.0, float(contrast.var(ddof=1)) / images - residual)
    return math.sqrt(seed_part), df, math.sqrt(image_part)


def _draw(arms: list[Array], rng: np.random.Generator, count: int) -> Array:
    image_weights = _weights(rng, count, arms[0].shape[1])
    total = np.zeros(count)
    for sign, arm in zip((1.0, -1.0), arms, strict=False):
        total += sign * ((image_weights @ arm.T) * _weights(rng, count, arm.shape[0])).sum(axis=1)
    return total


def _weights(rng: np.random.Generator, count: int, size: int) -> Array:
    """``[count, size]``: how often each of ``size`` items is among ``size`` draws with replacement, over ``size``."""
    return rng.multinomial(size, np.full(size, 1 / size), size=count) / size
