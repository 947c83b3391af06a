# SPDX-License-Identifier: Apache-2.0
"""How λ_max goes with the loss over trained networks: whether dividing by the loss takes the loss out.

Near zero cross-entropy the Gauss–Newton part of the Hessian scales with the loss, and λ_max/loss would compare networks
at equal loss. That presumes λ_max ∝ loss, a slope β of 1 of log λ_max on log loss. Where β < 1 dividing takes out too
much, by loss^(1−β): the network of the higher loss looks flatter by it. So λ_max/loss is a control for the loss only
where the interval of β holds 1; where it does not, networks are compared at equal loss.
"""

from __future__ import annotations

from dataclasses import replace

from curvlab.runs.report import Claim
from curvlab.runs.stats import Estimate, Verdict, geometric_mean_interval, loglog_slope
from experiments.base.flatness_rows import Flatness
from experiments.base.rows import by_seed
from experiments.base.settings import Setting, cap
from experiments.base.survival import Control


def loss_slope(found: Flatness) -> Estimate | None:
    """β: least squares of log λ_max on log loss over every different network at its last epoch, one slope a seed.

    The networks of a seed share its start, so the interval is the t interval of the seeds' slopes. ``n`` counts seeds.

    Returns:
        None where no seed has networks of two different losses, or a value is not positive.
    """
    points: list[tuple[int, float, float]] = []
    seen: list[Setting] = []
    for (_, _, point), setting in found.settings.items():
        if point == "last" and setting not in seen:  # a cell that two arms share is one network
            seen.append(setting)
            tops, losses = (by_seed(found.rows, metric, **setting) for metric in ("sharpness", "hessian_loss"))
            points += [(seed, losses[seed], tops[seed]) for seed in sorted(set(tops) & set(losses))]
    if any(min(loss, top) <= 0 for _, loss, top in points):
        return None
    spread = {seed for seed, loss, _ in points if any(s == seed and other != loss for s, other, _ in points)}
    kept = [point for point in points if point[0] in spread]
    if not kept:
        return None
    seeds, losses, tops = zip(*kept, strict=True)
    slope = loglog_slope(losses, tops, clusters=seeds)
    return replace(slope, method=f"slope of log λ_max on log loss over {len(kept)} networks; {slope.method}")


def over_power(found: Flatness, power: float) -> Estimate | None:
    """Large over small batch of λ_max/loss^power, seed by seed; the power is taken as known."""
    ratios = []
    by_batch = {}
    for batch in (found.large, found.small):
        setting = found.settings.get(("as-written", batch, "last"))
        if setting is None:
            return None
        by_batch[batch] = [by_seed(found.rows, metric, **setting) for metric in ("sharpness", "hessian_loss")]
    (top, loss), (low_top, low_loss) = by_batch[found.large], by_batch[found.small]
    for seed in sorted(set(top) & set(loss) & set(low_top) & set(low_loss)):
        if min(top[seed], loss[seed], low_top[seed], low_loss[seed]) <= 0:
            return None
        ratios.append(top[seed] / low_top[seed] / (loss[seed] / low_loss[seed]) ** power)
    return geometric_mean_interval(ratios) if ratios else None


def loss_control(found: Flatness) -> Control:
    """λ_max/loss where it takes the loss out, else λ_max at equal loss; see the module's text."""
    slope = loss_slope(found)
    if slope is not None and slope.contains(1.0):
        return Control("λ_max/loss", found.ratio("relative_sharpness"), 1.0)
    return Control(f"λ_max at equal loss (≤ {found.loss_mark:g})", found.ratio("sharpness", point="mark"), 1.0)


def slope_words(found: Flatness) -> str:
    """What β means for λ_max/loss, with its number; nothing where it was not measured."""
    slope = loss_slope(found)
    if slope is None:
        return ""
    words = f"log λ_max has slope {slope} (seeds) on log loss over these networks"
    if slope.contains(1.0):
        return f"{words}: λ_max/loss takes the loss out"
    if not slope.has_interval:
        return f"{words}: whether λ_max/loss takes the loss out is not known"
    extent = "too much" if slope.value < 1 else "too little"
    adjusted = over_power(found, slope.value)
    told = "" if adjusted is None else f"; over loss^{slope.value:.2f} the ratio is {adjusted}"
    return f"{words}, and not 1: dividing by the loss takes out {extent}{told}"


def loss_power_claim(found: Flatness) -> Claim:
    """The premise of λ_max/loss as a claim of its own: the interval decides, since β = 1 is what is asked for."""
    slope = loss_slope(found)
    verdict = Verdict.NOT_TESTABLE
    if slope is not None:
        verdict = Verdict.DIRECTION_ONLY if slope.value > 0 else Verdict.NOT_REPRODUCED
        if slope.contains(1.0):
            verdict = Verdict.REPRODUCED
    text = (
        "Audit: λ_max is proportional to the loss over these networks (slope of log λ_max on log loss), which is what "
    )
    text += "λ_max/loss as a control presumes"
    return Claim("loss_power", text, "theory near 0 loss: 1", slope, cap(verdict, found.faithful),
                 cost_seconds=found.seconds, note=slope_words(found))  # fmt: skip
