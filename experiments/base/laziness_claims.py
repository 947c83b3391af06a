# SPDX-License-Identifier: Apache-2.0
"""Verdicts on movement and on laziness. The rules stand here, before any run; what survives, in ``survival.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Estimate,
    Survives,
    Verdict,
    jonckheere,
    judge,
    judge_tolerance,
    log_ratio_interval,
    pooled_log_sd,
    pooled_sd,
)
from experiments.base import paper
from experiments.base.rows import difference
from experiments.base.scaling import Scaling
from experiments.base.survival import Control, survival

LAZY = 0.5  # a linearization error below one half: the linear model explains at least 75 % of the squared change
TEST_IMAGES = 10_000  # of MNIST, the only data set whose accuracies are compared with the paper's
PUBLISHED = {width: sum(pair) / 2 for width, pair in paper.NTK_MOVEMENT.items()}  # mean Δ of the paper's two seeds


def laziness_claims(arms: Mapping[str, Scaling]) -> list[Claim]:
    """All claims, in the order of the page: of the arm ``standard``, then wider is lazier in each of the others."""
    standard = arms["standard"]
    found = [
        ratio_claim(standard),
        slope_claim(standard),
        means_claim(standard),
        accuracy_claim(standard),
        lazier_claim("lazier", "Wider networks are lazier: the kernel moves less", "Δ ∝ w^−0.50", standard),
        regime_claim(standard),
        absolute_claim(standard),
        initial_norm_claim(standard),
    ]
    words = {"ntk": "NTK parametrization, same initial function", "ntk-he": "NTK parametrization, He gain"}
    for name, arm in arms.items():
        if name != "standard":
            text = f"Control: wider is lazier under {words[name]}"
            found.append(lazier_claim(f"lazier_{name.replace('-', '_')}", text, "theory: < 0", arm))
    return found


def ratio_claim(arm: Scaling) -> Claim:
    """Δ at width 32 over Δ at width 4096; the single seed at 4096 gets its interval from the pooled relative spread."""
    found, measured = arm.groups("relative_movement"), None
    if {32, 4096} <= set(found):
        spread, df = pooled_log_sd(found)
        measured = log_ratio_interval(found[32], found[4096], pooled_sd=spread, df=df)
    verdict = judge(measured, paper.NTK_RATIO, 1.0, log_scale=True)
    near = judge_tolerance(measured, paper.NTK_RATIO, 1.0)
    if verdict is Verdict.REPRODUCED and near.verdict is not Verdict.REPRODUCED:
        verdict = Verdict.DIRECTION_ONLY  # half of a ratio is a weak test of a law: the number itself is asked for
    survives, control = absolute_control(verdict, arm)
    text = "Relative movement Δ falls 11.3-fold (± 1) from width 32 to 4096"
    note = near.text if measured else ""
    return Claim("ratio", text, paper.NTK_RATIO, measured, verdict, "×", survives, control, seconds(arm), note=note)


def slope_claim(arm: Scaling) -> Claim:
    """Δ ∝ w^slope over all widths that were run."""
    measured = arm.slope("relative_movement")
    judged = judge_tolerance(measured, paper.NTK_SLOPE, 0.03, null_value=0.0)
    survives, control = absolute_control(judged.verdict, arm)
    text = "Log–log slope of Δ against width is −0.50 (± 0.03)"
    return Claim("slope", text, paper.NTK_SLOPE, measured, judged.verdict, "", survives, control, seconds(arm),
                 note=judged.text)  # fmt: skip


def means_claim(arm: Scaling) -> Claim:
    """The worst of the deviations; within 5 % is the issue for every width at once."""
    shifts = deviations(arm, PUBLISHED)
    worst = max(shifts, key=lambda width: abs(shifts[width].value), default=None)
    measured = None if worst is None else shifts[worst]
    judged = judge_tolerance(measured, 0.0, 5.0, unit="%")
    note = f"worst of {len(shifts)} widths: {worst}; {judged.text}" if measured else ""
    text = "Mean Δ is within 5 % of the paper's at every width (worst deviation)"
    return Claim("means", text, "0", measured, judged.verdict, "%", cost_seconds=seconds(arm), note=note)


def accuracy_claim(arm: Scaling) -> Claim:
    """Difference of the ends, and a trend test over all widths: *Reproduced* asks for both.

    Both networks are tested on the same images, so the sum of their binomial variances bounds the images' share.
    """
    found = {width: [100 * value for value in values] for width, values in arm.groups("test_accuracy").items()}
    measured, note = None, ""
    if {32, 4096} <= set(found):
        ends = [sum(found[width]) / len(found[width]) for width in (32, 4096)]
        images = sum(p * (100 - p) for p in ends) / TEST_IMAGES
        measured = difference(found[4096], found[32], pooled_sd(found), image_variance=images)
    verdict = judge(measured, paper.NTK_GAIN, 0.0)
    if measured is not None and len(found) < 3:
        note = "no trend test: it needs three widths"
        verdict = Verdict.DIRECTION_ONLY if verdict is Verdict.REPRODUCED else verdict
    elif measured is not None:
        trend = jonckheere(list(found.values()))
        note = f"{trend.name} over {len(found)} widths: p = {trend.p_value:.2g}, n = {trend.n}"
        if verdict is Verdict.REPRODUCED and not trend.p_value < 0.05:
            verdict = Verdict.DIRECTION_ONLY
    text = "Test accuracy rises from width 32 to 4096 (91.6 → 93.9 %)"
    return Claim("accuracy", text, paper.NTK_GAIN, measured, verdict, "points", cost_seconds=seconds(arm), note=note)


def below(estimate: Estimate | None, bound: float) -> bool:
    """Whether the whole interval lies below ``bound``."""
    return estimate is not None and estimate.has_interval and estimate.high < bound


def seconds(arm: Scaling) -> float:
    """What the arm cost, all widths and seeds."""
    found = [*arm.groups("train_seconds").values(), *arm.groups("measure_seconds").values()]
    return sum(map(sum, found))


def absolute_control(verdict: Verdict, arm: Scaling) -> tuple[Survives, str]:
    """Do the weights move less, or is only the denominator larger? Half of the slope that is argued with is asked."""
    slope = arm.slope("absolute_movement")
    return survival(verdict, [Control("slope of the absolute movement", slope, paper.NTK_SLOPE / 2, "below")])


def lazier_claim(claim_id: str, text: str, published: str, arm: Scaling) -> Claim:
    """Two measures that no norm of θ_0 enters; the effect must be half of the slope that the paper argues with."""
    drift, error = arm.slope("kernel_drift"), arm.slope("linearization_error")
    verdict = judge(drift, paper.NTK_SLOPE, 0.0)
    controls = {"slope of the kernel drift": drift, "slope of the linearization error": error}
    survives, control = survival(verdict, [Control(name, slope, side="below") for name, slope in controls.items()])
    note = "log–log slope of the kernel drift" if drift is not None else ""
    return Claim(claim_id, text, published, drift, verdict, "", survives, control, seconds(arm), note=note)


def regime_claim(arm: Scaling) -> Claim:
    """Falling is not yet small: in the kernel regime the linear model accounts for the change of the function."""
    widest = max(arm.groups("linearization_error"), default=None)
    measured = None if widest is None else arm.geometric_mean("linearization_error", widest)
    slope = arm.slope("linearization_error")
    if measured is None or slope is None:
        verdict = Verdict.NOT_TESTABLE
    elif below(measured, LAZY):
        verdict = Verdict.REPRODUCED
    else:
        verdict = Verdict.DIRECTION_ONLY if below(slope, 0.0) else Verdict.NOT_REPRODUCED
    survives, rule = survival(verdict, [Control(f"linearization error at width {widest}", measured, LAZY, "below")])
    note = ""
    if widest is not None:
        note = f"linearization error at width {widest}: below {LAZY:g} the linear model explains three quarters of the "
        note += "squared change; direction only iff its slope is below 0"
    return Claim("regime", "Wide networks train in the kernel (NTK) regime", "not measured", measured, verdict, "",
                 survives, rule, seconds(arm), note=note)  # fmt: skip


def absolute_claim(arm: Scaling) -> Claim:
    """Equivalence: a margin stated beforehand, a tenth of the slope that it is compared with."""
    measured = arm.slope("absolute_movement")
    judged = judge_tolerance(measured, 0.0, 0.05)
    verdict = judged.verdict
    if verdict is Verdict.REPRODUCED and not judged.interval_within:
        verdict = Verdict.DIRECTION_ONLY
    text = "Audit: the absolute movement does not depend on width (slope within ± 0.05)"
    return Claim(
        "absolute", text, "5.3–5.7 at all widths", measured, verdict, cost_seconds=seconds(arm), note=judged.text
    )


def initial_norm_claim(arm: Scaling) -> Claim:
    """‖θ_0‖² = (w + 4 + O(1/w)): each layer of fan-in n holds w n weights of variance 1/(3n)."""
    measured = arm.slope("initial_norm")
    judged = judge_tolerance(measured, 0.5, 0.03)
    text = "Audit: ‖θ_0‖ grows as √width, which makes the ratio √(4096/32) = 11.31"
    return Claim("initial_norm", text, "√(w+4)", measured, judged.verdict, cost_seconds=seconds(arm), note=judged.text)


def deviations(arm: Scaling, published: Mapping[int, float]) -> dict[float, Estimate]:
    """Mean Δ against the published mean, in percent, at every width that both have."""
    shifts = {}
    for width, mean in arm.means("relative_movement").items():
        if width in published:
            scaled = mean.scaled(100 / published[int(width)])
            shifts[width] = replace(scaled, value=scaled.value - 100, low=scaled.low - 100, high=scaled.high - 100)
    return shifts
