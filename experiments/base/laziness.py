# SPDX-License-Identifier: Apache-2.0
"""What lazy means, how it is measured, and the rules by which a claim about it survives.

A network trains lazily when it stays the linear model of its start: small kernel drift ‖K_T − K_0‖_F/‖K_0‖_F and small
linearization error ‖f_T − f_lin‖/‖f_T − f_0‖ (Chizat, Oyallon, Bach 2019; Lee et al. 2019). Movement ‖θ_T − θ_0‖, with
or without the denominator ‖θ_0‖, is neither. The rules stand here, before any run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from curvlab.norms import NormRecorder
from curvlab.operators.ntk import empirical_ntk, kernel_drift, linearization_error
from curvlab.runs.report import Claim
from curvlab.runs.stats import Estimate, Survives, Verdict, judge, judge_tolerance
from curvlab.runs.tables import Table
from curvlab.training.callbacks import TrainState
from experiments.base import paper
from experiments.base.scaling import Scaling

MEASURES = {
    "relative_movement": "relative movement ‖θ_T−θ_0‖/‖θ_0‖",
    "absolute_movement": "absolute movement ‖θ_T−θ_0‖",
    "initial_norm": "initial norm ‖θ_0‖",
    "kernel_drift": "kernel drift ‖K_T−K_0‖/‖K_0‖",
    "linearization_error": "linearization error ‖f_T−f_lin‖/‖f_T−f_0‖",
}
LAZY = 0.5  # a linearization error below one half: the linear model explains at least 75 % of the squared change


class Stopwatch:
    """Training seconds of a unit, over all sessions that worked on it: the checkpoint holds what is in its epochs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def on_start(self, state: TrainState) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_epoch(self, state: TrainState) -> None:
        """Add an epoch."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        """From the checkpoint."""
        self.seconds, self._since = float(saved["seconds"]), time.perf_counter()


def movement_rows(recorder: NormRecorder, steps_per_epoch: int) -> list[dict[str, Any]]:
    """Rows of a recorder with ``reference="start"``, one an epoch and measure; epoch 0 is the start."""
    names = {"relative_movement": "relative_movement", "distance": "absolute_movement", "reference_l2": "initial_norm"}
    return [
        {"epoch": row["step"] // steps_per_epoch, "metric": metric, "value": row[column]}
        for row in recorder.rows()
        for column, metric in names.items()
    ]


def measure(model: nn.Module, start: nn.Module, inputs: Tensor, held_out: Tensor) -> dict[str, float]:
    """Kernel drift on ``inputs`` and linearization error on ``held_out`` of a trained network against its own start."""
    began = time.perf_counter()
    before, after = empirical_ntk(start, inputs), empirical_ntk(model, inputs)
    norms = before.double().norm().item(), after.double().norm().item()
    return {
        "kernel_drift": kernel_drift(after, before),
        "kernel_growth": norms[1] / norms[0],
        "kernel_alignment": (before.double() * after.double()).sum().item() / (norms[0] * norms[1]),
        "linearization_error": linearization_error(model, list(start.parameters()), held_out),
        "measure_seconds": time.perf_counter() - began,
    }


def below(estimate: Estimate | None, bound: float) -> bool:
    """Whether the whole interval lies below ``bound``."""
    return estimate is not None and estimate.has_interval and estimate.high < bound


def seconds(arm: Scaling) -> float:
    """What the arm cost, all widths and seeds."""
    found = [*arm.groups("train_seconds").values(), *arm.groups("measure_seconds").values()]
    return sum(map(sum, found))


def absolute_control(arm: Scaling) -> tuple[Survives, str]:
    """Do the weights move less, or is only the denominator larger?"""
    rule = "rule: yes iff the slope of the absolute movement is below 0 and at least half of −0.50"
    slope = arm.slope("absolute_movement")
    if slope is None or not slope.has_interval:
        return Survives.NOT_TESTED, rule
    survives = below(slope, 0.0) and slope.value <= paper.NTK_SLOPE / 2
    return (Survives.YES if survives else Survives.NO), f"{rule}; it is {slope}"


def lazier_claim(claim_id: str, text: str, published: str, arm: Scaling) -> Claim:
    """Two measures that no norm of θ_0 enters; the effect must be half of the slope that the paper argues with."""
    drift, error = arm.slope("kernel_drift"), arm.slope("linearization_error")
    survives, control = Survives.NOT_TESTED, ""
    if drift is not None and error is not None and drift.has_interval and error.has_interval:
        survives = Survives.YES if below(drift, 0.0) and below(error, 0.0) else Survives.NO
        control = (
            "rule: yes iff the slopes of kernel drift and of linearization error both have their intervals below 0; "
            f"kernel drift {drift}, linearization error {error}"
        )
    verdict = judge(drift, paper.NTK_SLOPE, 0.0)
    note = "log–log slope of the kernel drift" if drift is not None else ""
    return Claim(claim_id, text, published, drift, verdict, "", survives, control, seconds(arm), note=note)


def regime_claim(arm: Scaling) -> Claim:
    """Falling is not yet small: in the kernel regime the linear model accounts for the change of the function."""
    widest = max(arm.groups("linearization_error"), default=None)
    measured = None if widest is None else arm.geometric_mean("linearization_error", widest)
    slope = arm.slope("linearization_error")
    if measured is None or slope is None:
        verdict, survives = Verdict.NOT_TESTABLE, Survives.NOT_TESTED
    elif below(measured, LAZY):
        verdict, survives = Verdict.REPRODUCED, Survives.YES
    else:
        verdict = Verdict.DIRECTION_ONLY if below(slope, 0.0) else Verdict.NOT_REPRODUCED
        survives = Survives.NO
    rule = (
        "rule: yes iff the linearization error of the widest network is below 0.5 with its interval (the linear model "
        "explains three quarters of the squared change); direction only iff its slope is below 0"
    )
    note = "" if widest is None else f"linearization error at width {widest}"
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


def laziness_tables(arms: Mapping[str, Scaling], published: Mapping[int, float], *, note: str) -> list[Table]:
    """Movement, and what laziness is, by arm and width; published numbers stand beside the arm named ``standard``."""
    places = [(name, arm, width) for name, arm in arms.items() for width in arm.groups("diverged")]
    moved = ["parametrization", "width", "Δ", "SD", "paper's Δ", "deviation %", "‖θ_T−θ_0‖", "‖θ_0‖"]
    lines = [_movement_line(name, arm, width, published if name == "standard" else {}) for name, arm, width in places]
    caption = (
        "Means over seeds with 95 % t intervals, relative spread pooled over widths (so one seed has an interval too); "
        "SD is the sample's."
    )
    lazy = ["parametrization", "width", "kernel drift", "kernel alignment", "linearization error", "train loss",
            "test %", "diverged", "time s"]  # fmt: skip
    about = (
        f"{note} Alignment: cosine of K_T and K_0. Train loss: the last epoch's running one, geometric mean. "
        "Time: training and measuring, all seeds."
    )
    return [
        Table("Movement by width", moved, lines, caption),
        Table("Kernel, linearization and accuracy by width", lazy, [_lazy_line(*place) for place in places], about),
    ]


def _movement_line(name: str, arm: Scaling, width: float, published: Mapping[int, float]) -> list[Any]:
    moved = arm.groups("relative_movement").get(width, [])
    return [
        name,
        width,
        arm.means("relative_movement").get(width),
        statistics.stdev(moved) if len(moved) > 1 else None,
        published.get(int(width)),
        deviations(arm, published).get(width),
        arm.means("absolute_movement").get(width),
        arm.means("initial_norm").get(width),
    ]


def _lazy_line(name: str, arm: Scaling, width: float) -> list[Any]:
    accuracy = arm.means("test_accuracy").get(width)
    spent = [sum(arm.groups(metric).get(width, [])) for metric in ("train_seconds", "measure_seconds")]
    return [
        name,
        width,
        arm.means("kernel_drift").get(width),
        arm.means("kernel_alignment").get(width),
        arm.means("linearization_error").get(width),
        arm.geometric_mean("train_loss", width),
        None if accuracy is None else accuracy.scaled(100),
        int(sum(arm.groups("diverged")[width])),
        round(sum(spent), 1),
    ]
