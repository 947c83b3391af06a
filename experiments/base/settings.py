# SPDX-License-Identifier: Apache-2.0
"""Ways to train, compared: what a setting's rows say, what a difference of two settings is worth, tables and a panel.

A *setting* is given by the factor values that pick its rows, for example ``{"batch_size": 32, "lr": 0.005}``. Intervals
of accuracy differences hold the noise of seeds *and* of test images, from the bits that ``networks.py`` stored.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from curvlab.runs.stats import (
    Comparison,
    Estimate,
    Verdict,
    equivalence,
    geometric_mean_interval,
    hierarchical_bootstrap,
    holm,
    mean_interval,
    non_inferiority,
    paired,
    welch,
)
from curvlab.runs.store import Row
from curvlab.runs.tables import Table
from experiments.base.networks import decode_hits
from experiments.base.rows import by_seed, finals, paired_ratio, within_one
from experiments.base.survival import SHARE, Control, kept_words

Setting = Mapping[str, Any]

RESULTS = ["test %", "SD", "train %", "train loss", "‖θ‖", "‖θ_conv‖", "‖θ−θ_0‖", "diverged", "time s"]
RESULTS_CAPTION = (
    "Last epoch; means over seeds with 95 % t intervals, SD of the sample. Train %: the running accuracy of the last "
    "epoch; train loss: eval mode on the training images, geometric mean. Time: training and measuring, all seeds; of "
    "wall and processor time the smaller."
)


# ------------------------------------------------------------------------------------------------ one setting


def values(rows: Sequence[Row], metric: str, setting: Setting) -> list[float]:
    """Last-epoch values, one a seed in the order of seeds; a diverged network has none but that it diverged."""
    found = finals(rows, metric, **setting)
    return [row["value"] for row in sorted(found, key=lambda row: row["seed"]) if math.isfinite(row["value"])]


def mean(rows: Sequence[Row], metric: str, setting: Setting, *, factor: float = 1.0) -> Estimate | None:
    """Over seeds, with its t interval; a share's does not reach beyond 1."""
    found = values(rows, metric, setting)
    if not found:
        return None
    whole = mean_interval(found)
    return (within_one(whole) if metric.endswith("_accuracy") else whole).scaled(factor)


def geometric(rows: Sequence[Row], metric: str, setting: Setting) -> Estimate | None:
    """Geometric mean over seeds; None where a value is not positive."""
    found = values(rows, metric, setting)
    return geometric_mean_interval(found) if found and min(found) > 0 else None


def ratio(rows: Sequence[Row], metric: str, one: Setting | None, other: Setting | None) -> Estimate | None:
    """Geometric mean of ``one`` over that of ``other``, seed by seed; None where they share no seed."""
    if one is None or other is None:
        return None
    return paired_ratio(by_seed(rows, metric, **one), by_seed(rows, metric, **other))


def seconds(rows: Sequence[Row], settings: Iterable[Setting]) -> float:
    """What these settings cost, all seeds."""
    metrics = ("train_seconds", "measure_seconds")
    return sum(sum(values(rows, metric, setting)) for setting in settings for metric in metrics)


def results(rows: Sequence[Row], setting: Setting) -> list[Any]:
    """The cells below :data:`RESULTS`."""
    tested = values(rows, "test_accuracy", setting)
    return [
        mean(rows, "test_accuracy", setting, factor=100),
        100 * statistics.stdev(tested) if len(tested) > 1 else None,
        mean(rows, "train_accuracy", setting, factor=100),
        geometric(rows, "fit_loss", setting),
        mean(rows, "norm", setting),
        mean(rows, "conv_norm", setting),
        mean(rows, "distance", setting),
        int(sum(values(rows, "diverged", setting))),
        round(seconds(rows, [setting]), 1),
    ]


# ------------------------------------------------------------------------------------------------ two settings


@dataclass(frozen=True)
class Gap:
    """Test accuracy of one setting minus another's, in points, over common seeds.

    Attributes:
        estimate: with the noise of seeds and of test images; without interval where they share one seed only.
        paired: t test over common seeds alone.
        welch: the same without pairing.
        settings: the two that were compared.
    """

    estimate: Estimate
    paired: Comparison
    welch: Comparison
    settings: tuple[Setting, Setting]

    @property
    def pair(self) -> frozenset[tuple[tuple[str, Any], ...]]:
        """The same for both orders: the gap back is no second test."""
        return frozenset(tuple(sorted(setting.items())) for setting in self.settings)


def gap(rows: Sequence[Row], one: Setting, other: Setting) -> Gap | None:
    """Setting ``one`` minus setting ``other`` (factor values that pick each); None where they share no seed."""
    found = _combined(rows, {1.0: one, -1.0: other})
    if found is None:
        return None
    estimate, arms = found
    means = [100 * arm.mean(axis=1) for arm in arms]
    return Gap(estimate, paired(*means), welch(*means), (one, other))


def gap_controls(
    rows: Sequence[Row], written: tuple[Setting, Setting], controls: Mapping[str, tuple[Setting, Setting] | None]
) -> list[Control]:
    """What a gap above 0 must hold under: in every control the gap itself, and the half of it that must be kept.

    The second is the interaction of experiments/base/survival.py, seed by seed and image by image: all four networks
    of a seed are tested on the same images.
    """
    found = []
    for name, pair in controls.items():
        kept = None
        if pair is not None:
            kept = _combined(rows, {1.0: pair[0], -1.0: pair[1], -SHARE: written[0], SHARE: written[1]})
        found.append(Control(name, interval(gap(rows, *pair)) if pair is not None else None))
        found.append(Control(kept_words(name), kept[0] if kept is not None else None))
    return found


def _combined(rows: Sequence[Row], parts: Mapping[float, Setting]) -> tuple[Estimate, list[np.ndarray]] | None:
    """Σ weight · accuracy in points over common seeds, with the noise of seeds and images; the hits of each part."""
    hits = [_hits(rows, setting) for setting in parts.values()]
    seeds = sorted(set.intersection(*map(set, hits)))
    if not seeds:
        return None
    arms = [np.stack([arm[seed] for seed in seeds]) for arm in hits]
    whole = sum(weight * arm for weight, arm in zip(parts, arms, strict=True))
    # The generator is asked only from eight seeds on, where the interval is a bootstrap's.
    found = hierarchical_bootstrap(whole, rng=np.random.default_rng(0)).scaled(100)
    if len(seeds) == 1:
        found = replace(found, low=math.nan, high=math.nan, method="difference of one seed: no interval")
    return found, arms


def _hits(rows: Sequence[Row], setting: Setting) -> dict[int, np.ndarray]:
    return {
        row["seed"]: decode_hits(row["bits"], int(row["images"])).astype(float)
        for row in finals(rows, "test_hits", **setting)
    }


def interval(found: Gap | None) -> Estimate | None:
    """Its estimate, if it was measured."""
    return None if found is None else found.estimate


def cap(verdict: Verdict, faithful: bool) -> Verdict:
    """A scaled protocol can show a direction, never the paper's number."""
    return Verdict.DIRECTION_ONLY if verdict is Verdict.REPRODUCED and not faithful else verdict


def scaled_note(faithful: bool, config: Any) -> str:
    """What keeps a verdict below *Reproduced*; nothing where the protocol is the paper's."""
    protocol = f"CNN({config.channels}), {config.num_train:,} images, {config.epochs} epochs"
    return "" if faithful else f"scaled protocol ({protocol}): at best Direction only"


def above(estimate: Estimate | None, bound: float) -> Verdict:
    """For what is predicted to exceed ``bound``: the whole interval (*Reproduced*), the value alone, or neither."""
    if estimate is None or math.isnan(estimate.value):
        return Verdict.NOT_TESTABLE
    if estimate.has_interval and estimate.low > bound:
        return Verdict.REPRODUCED
    return Verdict.DIRECTION_ONLY if estimate.value > bound else Verdict.NOT_REPRODUCED


def test_words(found: Gap | None) -> str:
    """Paired test with Welch's beside it."""
    tests = () if found is None else (found.paired, found.welch)
    return ", ".join(f"{test.name} p = {test.p_value:.2g}" for test in tests if not math.isnan(test.p_value))


def no_worse(
    rows: Sequence[Row], one: Setting, other: Setting, margin: float, *, two_sided: bool
) -> tuple[Verdict, str]:
    """Equivalence (TOST) or non-inferiority within ``margin`` points, over common seeds, by test and not by a large p.

    *Reproduced* where the test claims it, *Direction only* where the value alone is within. The text names the test.
    """
    found = gap(rows, one, other)
    if found is None:
        return Verdict.NOT_TESTABLE, ""
    within = found.estimate.value >= -margin and (found.estimate.value <= margin or not two_sided)
    a, b = (by_seed(rows, "test_accuracy", **setting) for setting in (one, other))
    seeds = sorted(set(a) & set(b))
    if len(seeds) < 2:
        return (Verdict.DIRECTION_ONLY if within else Verdict.NOT_REPRODUCED), "no test: it needs two common seeds"
    ones, others = ([100 * arm[seed] for seed in seeds] for arm in (a, b))
    test = (equivalence if two_sided else non_inferiority)(ones, others, margin, use_pairs=True)
    verdict = Verdict.REPRODUCED if within and test.p_value <= 0.05 else Verdict.DIRECTION_ONLY
    return (verdict if within else Verdict.NOT_REPRODUCED), f"{test.name}: p = {test.p_value:.2g}"


def trained_words(rows: Sequence[Row], arms: Mapping[str, Setting]) -> str:
    """Training accuracy (running, last epoch): unlike fits are part of what a gap compares."""
    found = {name: mean(rows, "train_accuracy", setting, factor=100) for name, setting in arms.items()}
    words = [f"{one.value:.1f} % ({name})" for name, one in found.items() if one is not None]
    return f"training accuracy: {', '.join(words)}" if len(words) == len(found) else ""


def gap_table(found: Mapping[tuple[str, ...], Gap], columns: Sequence[str], title: str) -> Table:
    """One row a gap, under its key; Holm's correction over the table's different pairs of settings.

    A pair that stands under two keys (a cell that two arms share) is one test and counts once.
    """
    pairs = {one.pair: one.paired.p_value for one in found.values() if not math.isnan(one.paired.p_value)}
    adjusted = holm(pairs) if pairs else {}
    lines = [
        [*key, one.estimate, one.paired.p_value, one.welch.p_value, adjusted.get(one.pair)]
        for key, one in found.items()
    ]
    repeated = len([one for one in found.values() if one.pair in pairs]) - len(pairs)
    caption = (
        "Differences over common seeds; intervals hold the noise of seeds and of test images (crossed), the tests that "
        f"of seeds alone. Holm: over the paired p of {len(pairs)} different comparisons"
        + (f" ({repeated} of the rows repeat one: cells that two arms share)." if repeated else ".")
    )
    return Table(title, [*columns, "points of test accuracy", "paired p", "Welch p", "Holm p"], lines, caption)
