# SPDX-License-Identifier: Apache-2.0
"""Verdicts on double descent. The rules stand here, before any run; what survives, in ``survival.py``.

A second descent needs a peak to descend from: :func:`~experiments.base.peaks.interior_peak`, with simultaneous
intervals. Curvature near zero training loss scales with the loss (the Gauss–Newton term of cross-entropy does), so that
every statement about λ_max is asked again of λ_max over the loss at the same point; that is a control only where the
networks of the sweep do scale so (the slope of log λ_max on log loss holds 1).
"""

from __future__ import annotations

import math
from dataclasses import replace

from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Estimate,
    Verdict,
    geometric_mean_interval,
    judge,
    judge_tolerance,
    log_ratio_interval,
    mean_interval,
    pooled_log_sd,
    pooled_sd,
)
from experiments.base import paper
from experiments.base.descent_rows import PEAK_WIDTH, Features, Groups, Sweeps
from experiments.base.flatness_loss import power_words
from experiments.base.peaks import judge_no_peak, judge_peak
from experiments.base.rows import difference, groups
from experiments.base.settings import above, cap
from experiments.base.survival import Control, interaction, kept_words, survival

TEST_IMAGES = 10_000  # of MNIST and of CIFAR-10
NO_PEAK = 0.5  # points of test error: a peak surely lower than this is none
NEAR = 0.5  # points of test accuracy: within this of the paper's mean is the paper's number


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
    survives, control = survival(
        verdict, [Control("a peak to descend from: its height", peak.height if peak else None)]
    )
    text = "MLP: test accuracy rises past width 32, up to 1024 (95.4 → 96.8 %)"
    return Claim("mlp_gain", text, paper.DESCENT_MLP_GAIN, measured, verdict, "points", survives, control,
                 sweeps.seconds("mlp"))  # fmt: skip


def mlp_means(sweeps: Sweeps) -> Claim:
    """The worst deviation from the paper's means."""
    worst, size, middles = None, 0.0, []
    if sweeps.as_written["mlp"]:
        found = sweeps.groups("test_error", "mlp")
        spread = pooled_sd(found) if found else None
        for width, values in found.items():
            published = paper.DESCENT_MLP.get(int(width))
            if published is None or spread is None or not spread.df:
                continue
            shifts = [100 - value - sum(published) / len(published) for value in values]
            shift = mean_interval(shifts, pooled_sd=spread.sd, df=spread.df)
            middles.append(shift.value)
            if worst is None or abs(shift.value) > abs(worst.value):
                worst, size = shift, width
    judged = judge_tolerance(worst, 0.0, NEAR, unit="points")
    note = ""
    if worst is not None:
        # Where all widths are off to one side it is the data or the protocol, not the seeds of one width.
        note = f"width {size:g}, worst of {len(middles)}; {judged.text}; mean shift over the widths "
        note += f"{replace(mean_interval(middles), grouped_by='widths')}"
    text = f"MLP: mean test accuracy is within {NEAR} points of the paper's at every width (worst deviation)"
    return Claim("mlp_means", text, "0", worst, judged.verdict, "points", cost_seconds=sweeps.seconds("mlp"), note=note)


def mlp_no_peak(sweeps: Sweeps) -> Claim:
    """Equivalence with a margin stated beforehand."""
    peak = sweeps.peak("test_error", "mlp", noise=0.0)
    text = f"Audit: as written the MLP sweep has no peak of test error (height surely below {NO_PEAK} points)"
    verdict = cap(judge_no_peak(peak, NO_PEAK), sweeps.as_written["mlp"])
    note = f"highest at width {peak.size:g}{scaled_words(sweeps, 'mlp')}" if peak else ""
    return Claim("mlp_no_peak", text, "not tested", peak.height if peak else None, verdict, "points",
                 cost_seconds=sweeps.seconds("mlp"), note=note)  # fmt: skip


def scaled_words(sweeps: Sweeps, network: str) -> str:
    """What keeps a verdict below *Reproduced*; nothing where the arm as written follows the paper's protocol."""
    if sweeps.as_written[network]:
        return ""
    return f"; scaled protocol ({sweeps.num_samples[network]:,} images): at best Direction only"


def noise_peak(sweeps: Sweeps, network: str) -> Claim:
    """With wrong labels there is something to descend from."""
    noise, with_bn = sweeps.most_noise, network == "cnn"
    peak = sweeps.peak("test_error", network, noise=noise, batch_norm=with_bn) if noise else None
    fitted = sweeps.groups("fit_accuracy", network, noise=noise, batch_norm=with_bn)
    note = ""
    if peak is not None:
        share = sum(fitted[peak.size]) / len(fitted[peak.size])
        note = f"peak at size {peak.size:g}, where training accuracy is {100 * share:.1f} %"
        note += scaled_words(sweeps, network)
    words = "MLP" if network == "mlp" else "CNN with batch normalization"
    text = (
        f"Control: with {100 * noise:g} % wrong labels the {words} has a peak of test error inside the sweep (height)"
    )
    verdict = cap(judge_peak(peak), sweeps.as_written[network])
    return Claim(f"{network}_noise_peak", text, "not tested", peak.height if peak else None, verdict, "points",
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
    name = "with batch normalization at lr 0.01"
    with_bn = gain(sweeps.groups("test_error", "cnn", batch_norm=True), 4, 8)
    kept = interaction(*(_dip_by_seed(sweeps, batch_norm=with_bn) for with_bn in (True, False)))
    controls = [Control(name, with_bn, side="below"), Control(kept_words(name), kept, side="below")]
    survives, control = survival(verdict, controls if measured is not None else [])
    text = "CNN: test accuracy dips from 4 to 8 channels (32.9 → 27.6 %), read as the peak of double descent"
    return Claim("cnn_dip", text, paper.DESCENT_CNN_DIP, measured, verdict, "points", survives, control,
                 sweeps.seconds("cnn"), note="; ".join(notes) if measured else "")  # fmt: skip


def _dip_by_seed(sweeps: Sweeps, *, batch_norm: bool) -> dict[int, float]:
    """Test accuracy (%) at 8 channels minus at 4, by seed; seeds that collapsed at either are left out."""
    low, high = (sweeps.by_seed("test_accuracy", "cnn", size, batch_norm=batch_norm) for size in (4, 8))
    return {seed: 100 * (high[seed] - low[seed]) for seed in sorted(set(low) & set(high))}


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
    verdict = cap(above(measured, 1.0), sweeps.as_written["mlp"])
    doubt = power_words(sweeps.loss_slope("lambda_max", "mlp"), "λ_max")
    over_loss = _ratio(sweeps.groups("lambda_over_loss", "mlp"), 32, 1024)
    survives, control = survival(verdict, [Control("the ratio of λ_max/loss", over_loss, 1.0, doubt=doubt)])
    text = "Wider MLPs end in flatter minima: λ_max at width 32 over λ_max at 1024"
    return Claim("wider_flatter", text, "not measured", measured, verdict, "×", survives, control,
                 sweeps.seconds("mlp"))  # fmt: skip


def curvature_peak(sweeps: Sweeps, metric: str, control: str, words: str) -> Claim:
    """Where test error peaks under label noise, does curvature?"""
    noise = sweeps.most_noise
    peak = sweeps.peak(metric, "mlp", noise=noise, log=True)
    other = sweeps.peak(control, "mlp", noise=noise, log=True)
    error = sweeps.peak("test_error", "mlp", noise=noise)
    place = f"; largest at width {peak.size:g}" if peak else ""
    if peak and error:
        place += f", test error at {error.size:g}"
    verdict = cap(judge_peak(peak), sweeps.as_written["mlp"])
    doubt = power_words(sweeps.loss_slope(metric, "mlp", noise=noise), words)
    over_loss = Control(f"{words} over the loss, height in decades", other.height if other else None, doubt=doubt)
    survives, told = survival(verdict, [over_loss])
    text = f"With {100 * noise:g} % wrong labels {words} peaks inside the MLP sweep (height in decades{place})"
    return Claim(f"{metric}_peak", text, "not measured", peak.height if peak else None, verdict, "decades", survives,
                 told, sweeps.seconds("mlp"))  # fmt: skip


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
        note = (
            f"the smallest nonzero eigenvalue is {float(f'{fall:.2g}'):,.0f} times smaller at N = n than on both sides"
        )
    judged = judge_tolerance(measured, 1.0, 0.2)
    text = "Random ReLU features: λ_max does not see the peak (λ_max at N = n over that at n/2 and 2n is 1 ± 0.2)"
    return Claim("features_curvature", text, "theory: 1", measured, judged.verdict,
                 cost_seconds=_feature_seconds(features), note=note)  # fmt: skip
