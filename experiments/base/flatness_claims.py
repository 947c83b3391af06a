# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the sharpness study: two batch sizes compared by every measure. The rules stand here, before any run.

λ_max at equal epochs compares networks of different training loss and of different weight norms; near zero
cross-entropy it scales like the one, and before batch normalization like the inverse square of the other. The claim
survives only if the large batch is sharper with the loss taken out (experiments/base/flatness_loss.py says how) and by
adaptive sharpness too, by the rule of experiments/base/survival.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from curvlab.runs.report import Claim
from curvlab.runs.stats import Estimate, Verdict, judge, judge_tolerance
from curvlab.runs.store import Row
from experiments.base import paper
from experiments.base.flatness import INVARIANCE
from experiments.base.flatness_loss import controls_of_sharpness, loss_power_claim, slope_words
from experiments.base.flatness_rows import Flatness
from experiments.base.rows import finals
from experiments.base.settings import above, cap, gap, test_words
from experiments.base.study import Law
from experiments.base.survival import Control, survival

__all__ = ["Flatness", "flatness_claims", "flatness_laws", "flatness_notes"]

POWER = 5.0  # percent: how far the paper's power iteration may be from the eigenvalue
SIGMA = 0.005  # the noise level that the text quotes
MOVES, STAYS = 50.0, 1e-3  # symmetries: how far a measure that sees them must move; how little one that does not may

PAPERS = "(the paper: 1024 and 32, one seed)"  # whose numbers stand beside ours where the pair is another one


def flatness_claims(found: Flatness) -> list[Claim]:
    """All claims, in the order of the page."""
    claims = [
        lambda_claim(found),
        gap_claim(found),
        noise_claim(found),
        every_sigma_claim(found),
        power_claim(found),
        over_loss_claim(found),
        loss_power_claim(found),
        control(found, "filter_sharpness", "filter-adaptive λ_max (D H D, D the filters' norms)"),
        control(found, "element_sharpness", "element-adaptive λ_max (D H D, D = |θ|)"),
        control(found, "norm_sharpness", "λ_max ‖θ‖²"),
        control(found, "filter_flatness", "the increase of the loss under filter-relative noise (σ = 0.1)"),
        half_noise_claim(found),
        control(
            found,
            "sharpness",
            f"λ_max at equal loss (first epoch at or below {found.loss_mark:g})",
            claim_id="equal_loss",
            point="mark",
        ),
        *equal_updates_claims(found),
    ]
    if found.is_cifar:
        return claims
    return [
        Claim(c.id, c.text, c.paper, c.measured, Verdict.NOT_TESTABLE, c.unit, cost_seconds=c.cost_seconds)
        for c in claims
    ]  # fmt: skip


def equal_updates_claims(found: Flatness) -> list[Claim]:
    """λ_max at equal updates, and what is left of it: those networks' losses lie further apart than those as written.

    So λ_max alone would compare a network that has not fitted with one that has.
    """
    chosen = {
        "equal_updates": ("sharpness", "λ_max at equal updates"),
        "equal_updates_over_loss": ("relative_sharpness", "λ_max over the loss at equal updates"),
        "equal_updates_filter_flatness": (
            "filter_flatness",
            "the increase of the loss under filter-relative noise (σ = 0.1) at equal updates",
        ),
    }
    return [
        control(found, metric, words, claim_id=claim_id, arm="equal-updates")
        for claim_id, (metric, words) in chosen.items()
    ]


def scaled(found: Flatness) -> str:
    """What a reader must know of a scaled protocol."""
    return (
        "" if found.faithful else f"batches {found.small} and {found.large}, not the paper's protocol: direction only"
    )


def joined(*notes: str) -> str:
    """The notes that say something."""
    return "; ".join(note for note in notes if note)


def lambda_claim(found: Flatness) -> Claim:
    """The paper's headline, by Lanczos."""
    measured = found.ratio("sharpness")
    verdict = cap(judge(measured, paper.GEOMETRY_LAMBDA_RATIO, 1.0, log_scale=True), found.faithful)
    survives, told = survival(verdict, controls_of_sharpness(found))
    text = f"λ_max at batch {found.large} is many times that at batch {found.small} {PAPERS}"
    return Claim("lambda", text, paper.GEOMETRY_LAMBDA_RATIO, measured, verdict, "×", survives, told, found.seconds,
                 note=joined(found.unpaired("sharpness"), scaled(found)) if measured else "")  # fmt: skip


def gap_claim(found: Flatness) -> Claim:
    """Test accuracy over common seeds, the test images' noise included."""
    settings = [found.settings.get(("as-written", batch, "last")) for batch in (found.small, found.large)]
    one = None
    if settings[0] is not None and settings[1] is not None:
        one = gap(found.rows, settings[0], settings[1])
    published, whose = published_gap(found)
    verdict = cap(judge(one.estimate if one else None, published, 0.0), found.faithful)
    text = f"Batch {found.small} tests better than batch {found.large} {whose}"
    note = joined(test_words(one), scaled(found)) if one else ""
    return Claim("gap", text, round(published, 2), one.estimate if one else None, verdict, "points",
                 cost_seconds=found.seconds, note=note)  # fmt: skip


def published_gap(found: Flatness) -> tuple[float, str]:
    """The paper's number for this very pair, and where it is from.

    Its 1.61 points are of batches 32 and 1024. Of another pair that its batch sweep ran, the difference of that
    sweep's means is the number to compare with, as in the batch-size study; else 1.61, named as what it is.
    """
    pair = (found.small, found.large)
    if pair != (32, 1024) and set(pair) <= set(paper.BATCH_ACCURACY):
        small, large = (sum(paper.BATCH_ACCURACY[b]) / len(paper.BATCH_ACCURACY[b]) for b in pair)
        return small - large, "(the paper: means of its batch sweep, three seeds)"
    return paper.GEOMETRY_GAP, PAPERS


def noise_claim(found: Flatness) -> Claim:
    """In percent, as the paper has it, which divides by losses that differ; the controls do not."""
    published = paper.GEOMETRY_NOISE[SIGMA][1] / paper.GEOMETRY_NOISE[SIGMA][0]
    measured = found.ratio("noise_percent", sigma=SIGMA)
    verdict = cap(judge(measured, published, 1.0, log_scale=True), found.faithful)
    absolute = Control("absolute increase", found.ratio("noise_increase", sigma=SIGMA), 1.0)
    relative = Control("increase under filter-relative noise", found.ratio("filter_flatness"), 1.0)
    survives, told = survival(verdict, [absolute, relative])
    text = f"Noise of σ = {SIGMA} raises the loss (in percent) more at batch {found.large} than at {found.small}"
    note = joined(found.unpaired("noise_percent", sigma=SIGMA), scaled(found)) if measured else ""
    return Claim("noise", f"{text} {PAPERS}", round(published, 1), measured, verdict, "×", survives, told,
                 found.seconds, note=note)  # fmt: skip


def every_sigma_claim(found: Flatness) -> Claim:
    """The text says it of every magnitude; the smallest ratio decides."""
    ratios = {sigma: found.ratio("noise_percent", sigma=sigma) for sigma in found.sigmas}
    known = {sigma: one for sigma, one in ratios.items() if one is not None}
    worst = min(known, key=lambda sigma: known[sigma].value, default=None)
    measured = None if worst is None or len(known) < len(ratios) else known[worst]
    published = min(large / small for small, large in paper.GEOMETRY_NOISE.values())
    note = ""
    if worst is not None:
        unknown = [f"{sigma:g}" for sigma, one in ratios.items() if one is None]
        note = joined(
            f"smallest at σ = {worst:g}",
            found.unpaired("noise_percent", sigma=worst),
            f"no ratio (an increase below 0) at σ = {', '.join(unknown)}" if unknown else "",
        )
    text = f"The loss rises more (in percent) at batch {found.large} at every σ (smallest ratio) {PAPERS}"
    verdict = cap(above(measured, 1.0), found.faithful)
    return Claim("every_sigma", text, f"{published:.2f}× at σ = 0.05", measured, verdict, "×",
                 cost_seconds=found.seconds, note=note)  # fmt: skip


def power_claim(found: Flatness) -> Claim:
    """Audit of the paper's protocol, network by network, each once: only these networks were iterated on."""
    ends = [
        100 * (p / v - 1)
        for key in found.settings
        if key[0] == "as-written" and key[2] == "last"
        for p, v in zip(*(found.values(m, key[1]) for m in ("power_lambda", "sharpness")), strict=True)
    ]
    worst = max(ends, key=abs, default=math.nan)
    measured = _range(worst, ends) if ends else None
    judged = judge_tolerance(measured, 0.0, POWER, unit="%")
    text = (
        f"Audit: 30 power iterations are within {POWER:g} % of λ_max on every network at the last epoch, as written "
        "(worst, with the range)"
    )
    return Claim("power", text, "not checked", measured, cap(judged.verdict, found.faithful), "%",
                 cost_seconds=found.seconds, note=joined(judged.text, scaled(found)) if measured else "")  # fmt: skip


def _range(worst: float, ends: Sequence[float]) -> Estimate:
    """All that was found, which is no confidence interval and has no level."""
    return Estimate(worst, min(ends), max(ends), len(ends), "worst of all networks; range", level=math.nan)


def over_loss_claim(found: Flatness) -> Claim:
    """Half of the paper's headline is loss."""
    measured = found.ratio("relative_sharpness")
    verdict = cap(judge(measured, paper.GEOMETRY_LAMBDA_OVER_LOSS_RATIO, 1.0, log_scale=True), found.faithful)
    text = f"Control: λ_max over the loss is larger at batch {found.large} {PAPERS}"
    told = (losses(found), slope_words(found), found.unpaired("relative_sharpness"), scaled(found))
    note = joined(*told) if measured else ""
    return Claim("relative_sharpness", text, "3.0×, from its numbers", measured, verdict, "×",
                 cost_seconds=found.seconds, note=note)  # fmt: skip


def losses(found: Flatness, **where: Any) -> str:
    """The ratio of the losses that the compared networks stand at: what a curvature's ratio must be read against."""
    loss = found.ratio("hessian_loss", **where)
    return f"the losses' ratio is {loss}" if loss else ""


def control(
    found: Flatness, metric: str, words: str, *, claim_id: str = "", arm: str = "as-written", point: str = "last"
) -> Claim:
    """A measure with a right of its own: larger at the large batch?"""
    measured = found.ratio(metric, arm=arm, point=point)
    if measured is not None:
        where = {"arm": arm, "point": point}
        note = joined(losses(found, **where), found.unpaired(metric, **where), scaled(found))
    else:
        counts = [len(found.values(metric, batch, arm=arm, point=point)) for batch in (found.small, found.large)]
        note = f"measured on {counts[0]} networks of batch {found.small} and {counts[1]} of batch {found.large}"
    text = f"Control: larger at batch {found.large}: {words}"
    verdict = cap(above(measured, 1.0), found.faithful)
    return Claim(claim_id or metric, text, "not measured", measured, verdict, "×", cost_seconds=found.seconds,
                 note=note)  # fmt: skip


def half_noise_claim(found: Flatness) -> Claim:
    """Here larger is flatter: small over large."""
    measured = found.ratio("half_accuracy_noise", inverse=True)
    unpaired = found.unpaired("half_accuracy_noise", inverse=True)
    text = f"Control: batch {found.small} bears more filter-relative noise until half its accuracy is lost (σ50, ratio)"
    verdict = cap(above(measured, 1.0), found.faithful)
    return Claim("half_accuracy_noise", text, "not measured", measured, verdict, "×", cost_seconds=found.seconds,
                 note=joined(unpaired, scaled(found)) if measured else "")  # fmt: skip


def flatness_laws(rows: Sequence[Row], strength: float) -> list[Law]:
    """The same function at other parameters: λ_max moves, adaptive sharpness does not (Dinh et al. 2017)."""
    found = {
        (row["symmetry"], row["metric"].removeprefix("moved_")): row["value"]
        for metric in INVARIANCE
        for symmetry in ("relu_rescaling", "bn_scale")
        for row in finals(rows, f"moved_{metric}", symmetry=symmetry)
    }
    laws = []
    if ("relu_rescaling", "sharpness") in found and strength >= 20:  # a weaker one need not move it so far
        moved = found["relu_rescaling", "sharpness"]
        moved = max(moved, 1 / moved) if moved > 0 else math.inf
        text = f"rescaling layers by {strength:g} and 1/{strength:g} moves λ_max at least {MOVES:g}-fold: {moved:.3g}"
        laws.append(Law(text, moved >= MOVES))
    for symmetry, words in (("relu_rescaling", "rescaled layers"), ("bn_scale", "scale before batch normalization")):
        for metric in ("element_sharpness", "filter_sharpness", "block_sharpness"):
            if (symmetry, metric) in found:
                shift = abs(found[symmetry, metric] - 1)
                laws.append(Law(f"{metric} does not see {words}: moved by {shift:.1e}", shift <= STAYS))
    return laws


def flatness_notes(found: Flatness) -> list[str]:
    """Rules and limits."""
    notes = [
        "The survival rule stands in experiments/base/survival.py; the control column gives each control with its "
        "number. λ_max/loss is a control only where λ_max goes with the first power of the loss; else networks are "
        "compared at equal loss (experiments/base/flatness_loss.py).",
        "Measures that do not see the scale of weights: adaptive and filter-relative ones (curvlab.sharpness declares "
        "the invariances of each, and its tests hold them).",
        "Power iteration finds the eigenvalue of largest magnitude; λ_max is the largest, by Lanczos to a residual of "
        "10⁻³ λ.",
    ]
    missed = [
        f"{arm}, batch {batch}: {count - sum(reached):g} of {count}"
        for arm, batch, point in found.settings
        if point == "mark"
        for reached in [found.values("reached", batch, arm=arm, point=point)]
        for count in [len(reached)]
        if sum(reached) < count
    ]
    if missed:
        notes.append(
            f"Networks that never came down to the loss of {found.loss_mark:g} and are in no comparison at it: "
            f"{'; '.join(missed)}."
        )
    lost = sum(row["value"] for row in finals(found.rows, "diverged"))
    return [*notes, f"Diverged networks: {lost:g}."]
