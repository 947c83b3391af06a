# SPDX-License-Identifier: Apache-2.0
"""Sweeps over network sizes read from rows, and the verdicts on double descent. The rules stand here, before any run.

A second descent needs a peak to descend from: :func:`~experiments.base.peaks.interior_peak`, with simultaneous
intervals. Curvature near zero training loss scales with the loss (the Gauss–Newton term of cross-entropy does), so that
every statement about λ_max is asked again of λ_max over the loss at the same point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Estimate,
    Survives,
    Verdict,
    geometric_mean_interval,
    judge,
    judge_tolerance,
    log_ratio_interval,
    mean_interval,
    pooled_log_sd,
    pooled_sd,
)
from curvlab.runs.store import Row
from experiments.base import paper
from experiments.base.peaks import Peak, interior_peak, judge_no_peak, judge_peak
from experiments.base.rows import difference, groups
from experiments.base.study import Law

TEST_IMAGES = 10_000  # of MNIST and of CIFAR-10
NO_PEAK = 0.5  # points of test error: a peak surely lower than this is none
NEAR = 0.5  # points of test accuracy: within this of the paper's mean is the paper's number
PEAK_WIDTH = 0.15  # of n: how far from N = n the peak of the random features may stand

Groups = dict[float, list[float]]


@dataclass(frozen=True)
class Features:
    """The random features' rows: values by N/n."""

    rows: Sequence[Row]
    num_samples: int

    def groups(self, metric: str, labels: str) -> Groups:
        """By N/n, one value a seed; ``labels`` is clean, noisy, or both for what does not depend on them."""
        found: Groups = {}
        for line in self.by_seed(metric, labels).values():
            for ratio, value in line.items():
                found.setdefault(ratio, []).append(value)
        return dict(sorted(found.items()))

    def by_seed(self, metric: str, labels: str) -> dict[int, dict[float, float]]:
        """Seed -> N/n -> value."""
        found: dict[int, dict[float, float]] = {}
        for row in self.rows:
            if row["metric"] == f"feature_{metric}" and row.get("labels") == labels and row["features"]:
                found.setdefault(row["seed"], {})[row["features"] / self.num_samples] = row["value"]
        return dict(sorted(found.items()))

    def peaks(self, labels: str) -> list[float]:
        """N/n of the largest test error (squared), one a seed."""
        return [max(line, key=lambda ratio: line[ratio]) for line in self.by_seed("test_mse", labels).values()]

    def laws(self) -> list[Law]:
        """What theory leaves no choice about."""
        peaks = [*self.peaks("clean"), *self.peaks("noisy")]
        fits = [v for r, values in self.groups("train_mse", "noisy").items() if r >= 1 for v in values]
        if not peaks or not fits:
            return []
        listed = ", ".join(f"{peak:g}" for peak in peaks)
        return [
            Law(f"random features peak at N/n = 1 ± {PEAK_WIDTH}: {listed}",
                all(abs(peak - 1) <= PEAK_WIDTH for peak in peaks)),
            Law(f"they interpolate noisy labels from N = n on: largest training error {max(fits):.1e}",
                max(fits) < 1e-6),
        ]  # fmt: skip


@dataclass(frozen=True)
class Sweeps:
    """A study's rows as functions of the network's size.

    Attributes:
        rows: long rows.
        noise: shares of wrong labels in the control arms.
        as_written: network -> whether its arm as written follows the paper's protocol.
        num_samples: network -> training samples.
        features: the random features.
    """

    rows: Sequence[Row]
    noise: Sequence[float]
    as_written: Mapping[str, bool]
    num_samples: Mapping[str, int]
    features: Features

    @property
    def most_noise(self) -> float:
        """The arm that the verdicts on label noise are about."""
        return max(self.noise, default=0.0)

    def arms(self) -> dict[str, dict[str, object]]:
        """Label -> factor values, in the order of tables and legends."""
        found: dict[str, dict[str, object]] = {}
        for network in ("mlp", "cnn"):
            for with_bn in (False, True):
                for share in (0.0, *self.noise):
                    where = {"network": network, "batch_norm": with_bn, "label_noise": share}
                    if groups(self.rows, "collapsed", "size", **where):
                        words = [
                            network.upper(),
                            *(["BN"] if with_bn else []),
                            *([f"{100 * share:g} % noise"] * (share > 0)),
                        ]
                        found[", ".join(words) if len(words) > 1 else f"{words[0]}, as written"] = where
        return found

    def groups(self, metric: str, network: str, *, noise: float = 0.0, batch_norm: bool = False) -> Groups:
        """Last-epoch values by size, collapsed networks left out; ``test_error`` (%) and ratios are made here."""
        where = {"network": network, "label_noise": noise, "batch_norm": batch_norm}
        if metric == "test_error":
            found = groups(self.rows, "test_accuracy", "size", **where)
            return {size: [100 * (1 - value) for value in values] for size, values in found.items()}
        if metric in ("lambda_over_loss", "trace_over_loss"):
            above = groups(self.rows, "lambda_max" if metric == "lambda_over_loss" else "trace", "size", **where)
            below = groups(self.rows, "curvature_loss", "size", **where)
            return {s: [a / b for a, b in zip(above[s], below[s], strict=True)] for s in above}
        return groups(self.rows, metric, "size", **where)

    def peak(
        self, metric: str, network: str, *, log: bool = False, noise: float, batch_norm: bool = False
    ) -> Peak | None:
        """The interior peak of a metric; with ``log`` of its decimal logarithm, None where a value is not positive."""
        found = self.groups(metric, network, noise=noise, batch_norm=batch_norm)
        if log:
            if any(value <= 0 for values in found.values() for value in values):
                return None
            found = {size: [math.log10(value) for value in values] for size, values in found.items()}
        return interior_peak(found)

    def seconds(self, network: str) -> float:
        """What all arms of a network cost."""
        spent = ("train_seconds", "measure_seconds")
        return sum(row["value"] for row in self.rows if row["metric"] in spent and row.get("network") == network)


def pooled_means(found: Groups, *, geometric: bool = False) -> dict[float, Estimate]:
    """Means by size with the (geometric: relative) spread pooled over the sizes: two seeds alone say little."""
    spread = (pooled_log_sd if geometric else pooled_sd)(found) if found else None
    average = geometric_mean_interval if geometric else mean_interval
    if spread is None or spread.df == 0:
        return {size: average(values) for size, values in found.items()}
    return {size: average(values, pooled_sd=spread.sd, df=spread.df) for size, values in found.items()}


def descent_claims(sweeps: Sweeps) -> list[Claim]:
    """All claims, in the order of the page."""
    return [
        mlp_gain(sweeps),
        mlp_means(sweeps),
        mlp_no_peak(sweeps),
        noise_peak(sweeps, "mlp"),
        cnn_gain(sweeps),
        cnn_dip(sweeps),
        noise_peak(sweeps, "cnn"),
        wider_flatter(sweeps),
        curvature_peak(sweeps, "lambda_max", "lambda_over_loss", "λ_max"),
        curvature_peak(sweeps, "trace", "trace_over_loss", "the trace of the Hessian"),
        features_peak(sweeps.features),
        features_descent(sweeps.features),
        features_curvature(sweeps.features),
    ]


def gain(found: Groups, low: float, high: float) -> Estimate | None:
    """Accuracy (%) at ``high`` minus at ``low``, spread pooled over sizes, the test images' share of it included."""
    if not {low, high} <= set(found):
        return None
    errors = [sum(found[size]) / len(found[size]) for size in (low, high)]
    images = sum(p * (100 - p) for p in errors) / TEST_IMAGES
    negative = {size: [-value for value in values] for size, values in found.items()}
    return difference(negative[high], negative[low], pooled_sd(found), image_variance=images)


def mlp_gain(sweeps: Sweeps) -> Claim:
    """The rise; it is a second descent only if there is a peak that it descends from."""
    measured = gain(sweeps.groups("test_error", "mlp"), 32, 1024) if sweeps.as_written["mlp"] else None
    verdict = judge(measured, paper.DESCENT_MLP_GAIN, 0.0)
    peak = sweeps.peak("test_error", "mlp", noise=0.0)
    survives, control = Survives.NOT_TESTED, ""
    if measured is not None and peak is not None and peak.height.has_interval:
        survives = Survives.YES if peak.is_there else Survives.NO
        control = (
            "a second descent? rule: yes iff test error has an interior peak, its simultaneous interval above 0; "
            f"height {peak.height} points"
        )
    text = "MLP: test accuracy rises past width 32, up to 1024 (95.4 → 96.8 %)"
    return Claim("mlp_gain", text, paper.DESCENT_MLP_GAIN, measured, verdict, "points", survives, control,
                 sweeps.seconds("mlp"))  # fmt: skip


def mlp_means(sweeps: Sweeps) -> Claim:
    """The worst deviation from the paper's means."""
    worst, size = None, 0.0
    if sweeps.as_written["mlp"]:
        found = sweeps.groups("test_error", "mlp")
        spread = pooled_sd(found) if found else None
        for width, values in found.items():
            published = paper.DESCENT_MLP.get(int(width))
            if published is None or spread is None or not spread.df:
                continue
            shifts = [100 - value - sum(published) / len(published) for value in values]
            shift = mean_interval(shifts, pooled_sd=spread.sd, df=spread.df)
            if worst is None or abs(shift.value) > abs(worst.value):
                worst, size = shift, width
    judged = judge_tolerance(worst, 0.0, NEAR)
    note = f"width {size:g}; {judged.text} points" if worst else ""
    text = f"MLP: mean test accuracy is within {NEAR} points of the paper's at every width (worst deviation)"
    return Claim("mlp_means", text, "0", worst, judged.verdict, "points", cost_seconds=sweeps.seconds("mlp"), note=note)


def mlp_no_peak(sweeps: Sweeps) -> Claim:
    """Equivalence with a margin stated beforehand."""
    peak = sweeps.peak("test_error", "mlp", noise=0.0)
    text = f"Audit: as written the MLP sweep has no peak of test error (height surely below {NO_PEAK} points)"
    verdict, note = judge_no_peak(peak, NO_PEAK), f"highest at width {peak.size:g}" if peak else ""
    return Claim("mlp_no_peak", text, "not tested", peak.height if peak else None, verdict, "points",
                 cost_seconds=sweeps.seconds("mlp"), note=note)  # fmt: skip


def noise_peak(sweeps: Sweeps, network: str) -> Claim:
    """With wrong labels there is something to descend from."""
    noise, with_bn = sweeps.most_noise, network == "cnn"
    peak = sweeps.peak("test_error", network, noise=noise, batch_norm=with_bn) if noise else None
    fitted = sweeps.groups("fit_accuracy", network, noise=noise, batch_norm=with_bn)
    note = ""
    if peak is not None:
        share = sum(fitted[peak.size]) / len(fitted[peak.size])
        note = f"peak at size {peak.size:g}, where training accuracy is {100 * share:.1f} %"
    words = "MLP" if network == "mlp" else "CNN with batch normalization"
    text = (
        f"Control: with {100 * noise:g} % wrong labels the {words} has a peak of test error inside the sweep (height)"
    )
    return Claim(f"{network}_noise_peak", text, "not tested", peak.height if peak else None, judge_peak(peak), "points",
                 cost_seconds=sweeps.seconds(network), note=note)  # fmt: skip


def cnn_gain(sweeps: Sweeps) -> Claim:
    """Only with the whole training set and the paper's sizes."""
    measured = gain(sweeps.groups("test_error", "cnn"), 32, 96) if sweeps.as_written["cnn"] else None
    verdict = judge(measured, paper.DESCENT_CNN_GAIN, 0.0)
    text = "CNN: test accuracy rises from 32 to 96 channels (65.8 → 72.0 %)"
    note = "" if measured else "needs 50,000 images, 32 and 96 channels"
    return Claim("cnn_gain", text, paper.DESCENT_CNN_GAIN, measured, verdict, "points",
                 cost_seconds=sweeps.seconds("cnn"), note=note)  # fmt: skip


def cnn_dip(sweeps: Sweeps) -> Claim:
    """The published dip, with collapsed networks counted and not averaged; and again with batch normalization.

    Judged only on the paper's protocol: from 4 to 8 channels the sign may well turn with the number of images.
    """
    measured = gain(sweeps.groups("test_error", "cnn"), 4, 8)
    lost = groups(sweeps.rows, "collapsed", "size", network="cnn", label_noise=0.0, batch_norm=False)
    notes = []
    if lost:
        notes.append("collapsed: " + ", ".join(f"{sum(v):g} of {len(v)} at {c:g}" for c, v in lost.items()))
    kept, narrow = max(paper.DESCENT_CNN[8]), paper.DESCENT_CNN[4]
    notes.append(f"without its collapsed run the paper's own difference is {kept - sum(narrow) / len(narrow):+.2f}")
    verdict = judge(measured, paper.DESCENT_CNN_DIP, 0.0)
    if not sweeps.as_written["cnn"]:
        verdict = Verdict.NOT_TESTABLE
        notes.append(f"{sweeps.num_samples['cnn']:,} images, the paper's claim is of 50,000")
    with_bn = gain(sweeps.groups("test_error", "cnn", batch_norm=True), 4, 8)
    survives, control = Survives.NOT_TESTED, ""
    if verdict is not Verdict.NOT_TESTABLE and with_bn is not None and with_bn.has_interval:
        survives = Survives.YES if with_bn.high < 0 else Survives.NO
    if measured is not None and with_bn is not None and with_bn.has_interval:
        control = (
            "rule: on the paper's protocol, yes iff the same difference is below 0 with its interval under batch "
            f"normalization at lr 0.01; it is {with_bn}"
        )
    text = "CNN: test accuracy dips from 4 to 8 channels (32.9 → 27.6 %), read as the peak of double descent"
    return Claim("cnn_dip", text, paper.DESCENT_CNN_DIP, measured, verdict, "points", survives, control,
                 sweeps.seconds("cnn"), note="; ".join(notes) if measured else "")  # fmt: skip


def _ratio(found: Groups, low: float, high: float) -> Estimate | None:
    if not {low, high} <= set(found) or any(value <= 0 for values in found.values() for value in values):
        return None
    spread = pooled_log_sd(found)
    if spread.df == 0:
        return log_ratio_interval(found[low], found[high])
    return log_ratio_interval(found[low], found[high], pooled_sd=spread.sd, df=spread.df)


def wider_flatter(sweeps: Sweeps) -> Claim:
    """Said to explain the second descent; the loss falls with width too."""
    measured = _ratio(sweeps.groups("lambda_max", "mlp"), 32, 1024)
    control = _ratio(sweeps.groups("lambda_over_loss", "mlp"), 32, 1024)
    if measured is None:
        verdict = Verdict.NOT_TESTABLE
    elif measured.value > 1:
        verdict = Verdict.REPRODUCED if measured.excludes(1.0) else Verdict.DIRECTION_ONLY
    else:
        verdict = Verdict.NOT_REPRODUCED
    survives, words = Survives.NOT_TESTED, ""
    if control is not None and control.has_interval:
        survives = Survives.YES if control.low > 1 else Survives.NO
        words = f"rule: yes iff the ratio of λ_max/loss is above 1 with its interval; it is {control}"
    text = "Wider MLPs end in flatter minima: λ_max at width 32 over λ_max at 1024"
    return Claim("wider_flatter", text, "not measured", measured, verdict, "×", survives, words, sweeps.seconds("mlp"))


def curvature_peak(sweeps: Sweeps, metric: str, control: str, words: str) -> Claim:
    """Where test error peaks under label noise, does curvature?"""
    noise = sweeps.most_noise
    peak = sweeps.peak(metric, "mlp", noise=noise, log=True)
    other = sweeps.peak(control, "mlp", noise=noise, log=True)
    error = sweeps.peak("test_error", "mlp", noise=noise)
    place = f"; largest at width {peak.size:g}" if peak else ""
    if peak and error:
        place += f", test error at {error.size:g}"
    survives, rule = Survives.NOT_TESTED, ""
    if other is not None and other.height.has_interval:
        survives = Survives.YES if other.is_there else Survives.NO
        rule = (
            f"rule: yes iff the same quantity over the loss peaks too, with its interval; height {other.height} decades"
        )
    text = f"With {100 * noise:g} % wrong labels {words} peaks inside the MLP sweep (height in decades{place})"
    return Claim(f"{metric}_peak", text, "not measured", peak.height if peak else None, judge_peak(peak), "decades",
                 survives, rule, sweeps.seconds("mlp"))  # fmt: skip


def _feature_seconds(features: Features) -> float:
    return sum(row["value"] for row in features.rows if row["metric"] == "feature_seconds")


def features_peak(features: Features) -> Claim:
    """Theory: exactly at N = n."""
    peaks = features.peaks("clean") + features.peaks("noisy")
    measured = mean_interval(features.peaks("noisy")) if peaks else None
    judged = judge_tolerance(measured, 1.0, PEAK_WIDTH)
    note = "peaks, true then noisy labels, seed by seed: " + ", ".join(f"{p:g}" for p in peaks) if peaks else ""
    if peaks:
        grid = [ratio for ratio in features.groups("test_mse", "noisy") if abs(ratio - 1) <= 2 * PEAK_WIDTH]
        note += f"; located on a grid of N/n ({', '.join(f'{r:g}' for r in grid)} near 1): no finer than its steps"
    text = f"Random ReLU features: test error peaks at N/n = 1 (± {PEAK_WIDTH})"
    return Claim("features_peak", text, "theory: 1", measured, judged.verdict, cost_seconds=_feature_seconds(features),
                 note=note)  # fmt: skip


def features_descent(features: Features) -> Claim:
    """Is the second descent deeper than the first? Both minima of the same seed."""
    found = {}
    for labels in ("clean", "noisy"):
        ratios = []
        for line in features.by_seed("test_mse", labels).values():
            below = [value for ratio, value in line.items() if ratio < 1]
            if below and max(line) > 1:
                ratios.append(line[max(line)] / min(below))
        found[labels] = geometric_mean_interval(ratios) if ratios else None
    measured = found["clean"]
    note = f"with wrong labels in the training set it is {found['noisy']}" if found["noisy"] else ""
    if measured is None:
        verdict = Verdict.NOT_TESTABLE
    elif measured.value < 1:
        verdict = Verdict.REPRODUCED if measured.excludes(1.0) else Verdict.DIRECTION_ONLY
    else:
        verdict = Verdict.NOT_REPRODUCED
    text = (
        "Random ReLU features with true labels: the second descent ends below the first (squared test error, widest "
        "over best below n)"
    )
    return Claim("features_descent", text, "theory: < 1", measured, verdict, "×",
                 cost_seconds=_feature_seconds(features), note=note)  # fmt: skip


def features_curvature(features: Features) -> Claim:
    """At the peak λ_max is as on both sides (tolerance stated beforehand); λ_min is what vanishes."""
    largest, smallest = features.groups("lambda_max", "both"), features.groups("lambda_min", "both")
    measured, note = None, ""
    if {0.5, 1.0, 2.0} <= set(largest):
        sides = [math.sqrt(a * b) for a, b in zip(largest[0.5], largest[2.0], strict=True)]
        measured = geometric_mean_interval([at / side for at, side in zip(largest[1.0], sides, strict=True)])
        falls = [math.sqrt(a * b) / at for a, b, at in zip(smallest[0.5], smallest[2.0], smallest[1.0], strict=True)]
        fall = math.exp(sum(map(math.log, falls)) / len(falls))
        note = f"the smallest nonzero eigenvalue is {fall:,.0f} times smaller at N = n than on both sides"
    judged = judge_tolerance(measured, 1.0, 0.2)
    text = "Random ReLU features: λ_max does not see the peak (λ_max at N = n over that at n/2 and 2n is 1 ± 0.2)"
    return Claim("features_curvature", text, "theory: 1", measured, judged.verdict,
                 cost_seconds=_feature_seconds(features), note=note)  # fmt: skip
