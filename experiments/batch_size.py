# SPDX-License-Identifier: Apache-2.0
"""Does the batch size decide how well a network generalizes?

Question: Smaller batches test better. Is it the batch, the ratio of learning rate to batch, or the number of updates?

Source: arXiv 2604.07603, experiment 2 (CNN(32) with batch normalization, CIFAR-10, 80 epochs, momentum 0.9, cosine
schedule, no augmentation; batches 32 to 2048 at learning rates 0.005 to 0.10). Its three seeds are not ours.

Prediction: As written, batch 32 beats 2048 by 2.25 points and accuracy falls by 0.35 points a doubling. But equal
epochs give the large batch fewer updates (2,000 against 125,040), and the learning rates are not linear at either end
(batch 32 at twice the rule, 2048 at 0.62 of it): batch, lr/batch and updates move together. At equal updates the gap
should shrink or turn (Hoffer et al. 2017); at equal lr/batch it should shrink if the noise scale is what counts
(Jastrzębski et al. 2017).

Arms. ``as-written``: the paper's rates, equal epochs. ``equal-ratio``: the rate of batch 128 times B/128, equal epochs.
``equal-updates``: the paper's rates, and as many updates as batch 128 makes (to the nearest epoch). Cells that coincide
are trained once.
"""

import sys

if __name__ == "__main__":  # run as a file: the checkout's root takes this folder's place on the path
    import runpy
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv[1:1] = ["run", Path(__file__).stem]
    runpy.run_module("experiments", run_name="__main__")

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Survives,
    Verdict,
    judge,
    judge_tolerance,
    mean_interval,
    page_trend,
)
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from experiments.base import Law, Tools, finals, paper
from experiments.base.batch_report import Cells, batch_figures, batch_tables
from experiments.base.image_networks import BatchGrid, Net, published, published_gap, train_cells
from experiments.base.networks import forecast_stage, run_stage
from experiments.base.rows import by_seed
from experiments.base.settings import (
    Gap,
    Setting,
    above,
    cap,
    gap,
    gap_controls,
    interval,
    mean,
    ratio,
    scaled_note,
    seconds,
    test_words,
    trained_words,
    values,
)
from experiments.base.survival import effect_controls, survival

PROTOCOL = 1

Arm = Literal["as-written", "equal-ratio", "equal-updates"]
ARMS: tuple[Arm, ...] = ("as-written", "equal-ratio", "equal-updates")


@dataclass(frozen=True)
class Config(BatchGrid):
    """The paper's protocol; presets and ``field=value`` change it."""

    arms: tuple[Arm, ...] = ARMS

    def __post_init__(self) -> None:
        super().__post_init__()
        if "as-written" not in self.arms or not set(self.arms) <= set(ARMS) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"Config: arms must be as-written and some of {', '.join(ARMS)}, got {self.arms}")


@dataclass(frozen=True)
class Unit(Net):
    """One network: what a run's name covers."""


SMALL = {"batches": (32, 128, 512), "lrs": (0.005, 0.01, 0.04)}

PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits", num_train=1000, channels=4, batches=(16, 64, 256), lrs=(0.01, 0.02, 0.08), reference=64,
        epochs=8, seeds=2,
    ),
    "cpu": Config(num_train=5000, channels=8, epochs=20, seeds=3, **SMALL),
    "paper": Config(),
}  # fmt: skip


def cells(config: Config) -> Cells:
    """Every arm's way to train each batch size."""
    return train_cells(config, config.arms)


def expand(config: Config) -> list[Unit]:
    """One unit for every seed and every different cell, seed after seed."""
    different = dict.fromkeys(cell for arm in cells(config).values() for cell in arm.values())
    return [
        Unit(cell.batch_size, cell.lr, cell.epochs, seed, **config.common)
        for seed in range(config.seeds)
        for cell in different
    ]


def run(unit: Unit, run: Run, tools: Tools) -> dict[str, Any]:
    """Train the network (or find it) and append its rows."""
    return run_stage(unit.stage, run, tools)


def cost(unit: Unit) -> float:
    """Seconds on one slow core, roughly: 35 ms a hundred images at 8 channels."""
    return 3.0 + unit.epochs * unit.num_train * 3.5e-4 * (unit.channels / 8) ** 1.5


def forecast(unit: Unit, tools: Tools) -> float:
    """From a few timed steps."""
    return forecast_stage(unit.stage, tools)


# ------------------------------------------------------------------------------------------------ verdicts from rows


def pair_of(config: Config, arm: str, small: int, large: int) -> tuple[Setting, Setting] | None:
    """The settings of two batches in one arm; None where the arm or a batch is not run."""
    found = cells(config).get(arm, {})
    return (found[small].where, found[large].where) if {small, large} <= set(found) else None


def arm_gap(rows: Sequence[Row], config: Config, arm: str, small: int, large: int) -> Gap | None:
    """Accuracy at batch ``small`` minus that at ``large``."""
    pair = pair_of(config, arm, small, large)
    return None if pair is None else gap(rows, *pair)


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims with their controls; then the controls as claims of their own, and the audit."""
    small, large = config.ends
    words = {"equal-ratio": "lr/batch", "equal-updates": "number of updates"}
    headline = Claim("ends", "Batch 32 tests better than batch 2048", 2.25, None, Verdict.NOT_TESTABLE, "points")
    if config.trains_as_written and {32, 2048} <= set(config.batches):
        headline = gap_claim(rows, config, "ends", 32, 2048)
    found = [headline, gap_claim(rows, config, "gap", small, large), trend_claim(rows, config), fit_claim(rows, config)]
    found += [control_claim(rows, config, arm, words[arm], small, large) for arm in config.arms[1:]]
    found += [loss_claim(rows, config, small, large), norm_claim(rows, config, small, large)]
    if config.has_papers_rates:
        return found
    return [replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, note="") for claim in found]


def gap_claim(rows: Sequence[Row], config: Config, claim_id: str, small: int, large: int) -> Claim:
    """Small batch against large, as written; the control column holds both control arms."""
    written = pair_of(config, "as-written", small, large)
    found = None if written is None else gap(rows, *written)
    claim = judged_gap(config, claim_id, found, small, large, seconds(rows, arm_settings(config, "as-written")))
    controls = {arm: pair_of(config, arm, small, large) for arm in ARMS[1:]}
    told = [] if written is None else gap_controls(rows, written, controls)
    survives, control = survival(claim.verdict, told)
    return replace(claim, survives=survives, control=control)


def control_claim(rows: Sequence[Row], config: Config, arm: str, words: str, small: int, large: int) -> Claim:
    """A control arm's gap, judged like the paper's own: a small part of it that is left is not the gap."""
    found = arm_gap(rows, config, arm, small, large)
    claim = judged_gap(config, arm.replace("-", "_"), found, small, large, seconds(rows, arm_settings(config, arm)))
    asked = "" if claim.paper is None or found is None else f"asked: half of the paper's gap of {claim.paper:g} or more"
    note = "; ".join(filter(None, (claim.note, asked, pair_words(rows, config, arm, small, large))))
    return replace(claim, text=f"Control, equal {words}: {claim.text}", paper="not run", note=note)


def trained(rows: Sequence[Row], config: Config, arm: str, batch: int) -> float | None:
    """Training accuracy in %, running over the last epoch."""
    cell = cells(config).get(arm, {}).get(batch)
    found = None if cell is None else mean(rows, "train_accuracy", cell.where, factor=100)
    return None if found is None else found.value


def pair_words(rows: Sequence[Row], config: Config, arm: str, small: int, large: int) -> str:
    """How well the networks of a pair have fitted."""
    found = cells(config).get(arm, {})
    named = {f"batch {batch}": found[batch].where for batch in (small, large) if batch in found}
    return trained_words(rows, named) if named else ""


def judged_gap(config: Config, claim_id: str, found: Gap | None, small: int, large: int, cost: float) -> Claim:
    """The verdict on one pair of batches in one arm."""
    about, measured = published_gap(small, large), interval(found)
    verdict = above(measured, 0.0) if about is None else judge(measured, about, 0.0)
    note = "; ".join(part for part in (test_words(found), scaled_note(config.trains_as_written, config)) if part)
    shown = None if about is None else round(about, 2)
    return Claim(claim_id, f"Batch {small} tests better than batch {large}", shown, measured,
                 cap(verdict, config.trains_as_written), "points", cost_seconds=cost, note=note)  # fmt: skip


def arm_settings(config: Config, arm: str) -> list[dict[str, Any]]:
    """All cells of an arm."""
    return [cell.where for cell in cells(config)[arm].values()]


def seed_lines(rows: Sequence[Row], config: Config, arm: str) -> dict[int, list[float]]:
    """Seed -> accuracies in %, batches ascending, of the seeds that have them all; three batches at least."""
    if arm not in config.arms or len(config.batches) < 3:
        return {}
    found = [by_seed(rows, "test_accuracy", **setting) for setting in arm_settings(config, arm)]
    return {seed: [100 * line[seed] for line in found] for seed in found[0] if all(seed in line for line in found)}


def slopes(rows: Sequence[Row], config: Config, arm: str) -> dict[int, float]:
    """Seed -> points of accuracy a doubling of the batch."""
    x = np.log2(sorted(config.batches))
    return {seed: float(np.polyfit(x, line, 1)[0]) for seed, line in seed_lines(rows, config, arm).items()}


def trend_claim(rows: Sequence[Row], config: Config) -> Claim:
    """*Reproduced* asks for the slope and for Page's test of falling."""
    by_arm = {arm: slopes(rows, config, arm) for arm in ARMS}
    measured = mean_interval(list(by_arm["as-written"].values())) if by_arm["as-written"] else None
    known = [batch for batch in sorted(config.batches) if batch in paper.BATCH_ACCURACY]
    about = -0.35  # over all seven rows
    if len(known) > 2:
        about = float(np.polyfit(np.log2(known), [published(batch) for batch in known], 1)[0])
    verdict, parts = judge(measured, about, 0.0), [scaled_note(config.trains_as_written, config)]
    lines = [line[::-1] for line in seed_lines(rows, config, "as-written").values()]
    if len(lines) > 1:
        trend = page_trend(lines)
        parts.insert(0, f"{trend.name} over {len(config.batches)} batches: p = {trend.p_value:.2g}, n = {trend.n}")
        if verdict is Verdict.REPRODUCED and not trend.p_value < 0.05:
            verdict = Verdict.DIRECTION_ONLY
    verdict = cap(verdict, config.trains_as_written)
    controls = effect_controls(by_arm["as-written"], {arm: by_arm[arm] for arm in ARMS[1:]}, "below")
    survives, control = survival(verdict, controls)
    return Claim("trend", "Test accuracy falls on average per doubling of the batch", round(about, 2), measured,
                 verdict, "points", survives, control, seconds(rows, arm_settings(config, "as-written")),
                 note="; ".join(filter(None, parts)))  # fmt: skip


def fit_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The lowest batch's mean: a network that has not fitted yet is not compared at its minimum."""
    found = {batch: cell.where for batch, cell in cells(config)["as-written"].items()}
    means = {batch: m for batch, where in found.items() if (m := mean(rows, "train_accuracy", where, factor=100))}
    worst = min(means, key=lambda batch: means[batch].value, default=None)
    measured = None if worst is None else means[worst]
    verdict = judge_tolerance(measured, 100.0, 0.1).verdict if config.trains_as_written else Verdict.NOT_TESTABLE
    note = "" if worst is None else f"lowest of {len(means)} batches: {worst}; running accuracy of the last epoch"
    return Claim("fit", "Every batch size reaches 100 % training accuracy (lowest)", 100.0, measured, verdict, "%",
                 cost_seconds=seconds(rows, found.values()), note=note)  # fmt: skip


def loss_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """What is compared differs in training loss too (the paper's 3.86: batches 32 and 1024, one seed)."""
    text = f"Audit: batch {large} ends at a higher training loss than batch {small}"
    claim = audit_claim(rows, config, "fit_loss", large, small)
    note = "; ".join(filter(None, ("eval mode, all training images; geometric means", claim.note)))
    return replace(claim, id="loss", text=text, paper="3.86× (32, 1024)", note=note)


def norm_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """More updates let scale-free weights grow, and curvature falls with their square at the same function."""
    text = f"Audit: weights before batch normalization end larger at batch {small} than at {large}"
    return replace(audit_claim(rows, config, "conv_norm", small, large), id="norms", text=text, paper="not stored")


def audit_claim(rows: Sequence[Row], config: Config, metric: str, one: int, other: int) -> Claim:
    """A ratio between two batches as written, predicted to exceed 1, and the same at equal updates."""
    pairs = {arm: pair_of(config, arm, one, other) or (None, None) for arm in ("as-written", "equal-updates")}
    measured, equal = (ratio(rows, metric, *pair) for pair in pairs.values())
    control = "" if equal is None else f"at equal updates the ratio is {equal}"
    verdict = cap(above(measured, 1.0), config.trains_as_written)
    return Claim(metric, metric, None, measured, verdict, "×", Survives.NOT_TESTED, control,
                 seconds(rows, arm_settings(config, "as-written")),
                 note=scaled_note(config.trains_as_written, config))  # fmt: skip


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """Bookkeeping that must hold anywhere; on digits also the direction and the identity behind the audit of norms."""
    found, by_arm = [], cells(config)
    if "equal-updates" in config.arms:
        target = config.epochs * config.steps_per_epoch(config.reference)
        off = [
            abs(update - target) - config.steps_per_epoch(batch) / 2
            for batch, cell in by_arm["equal-updates"].items()
            for update in values(rows, "updates", cell.where)
        ]
        text = f"equal updates are {target:,} to half an epoch at every batch size"
        found.append(Law(text, bool(off) and max(off) <= 0))
    if config != replace(PRESETS["smoke"], seeds=config.seeds):
        return found
    radial = max((row["value"] for row in finals(rows, "radial_cosine")), default=math.nan)
    small, large = config.ends
    pairs = [(by_arm[arm][large].where, by_arm[arm][small].where) for arm in ("as-written", "equal-updates")]
    ratios = [ratio(rows, "fit_loss", *pair) for pair in pairs]
    written, equal = [math.nan if one is None else one.value for one in ratios]
    words = f"equal epochs leave batch {large} at {written:.2f} × the training loss of {small} (> 1)"
    return [
        *found,
        Law(f"gradients are orthogonal to scale-free weights: largest cosine {radial:.1e} ≤ 1e-3", radial <= 1e-3),
        Law(f"{words}, equal updates at a lower multiple, {equal:.2g} ×", written > 1.0 and written > equal),
    ]


# ------------------------------------------------------------------------------------------------ tables and figures


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T1: every arm by batch; then the gaps with their tests."""
    return batch_tables(rows, config, cells(config))


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F1: accuracy against batch, lr/batch and updates; then loss and norms against the batch."""
    return batch_figures(rows, config, cells(config))


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    found = [
        "The paper calls its learning rates linear in the batch; at 32 and 64 they are 2 and 1.5 times the rule, at "
        "2048 0.62 of it. Cells where the as-written rate obeys the rule serve both arms.",
        "Test accuracies are those of the last epoch; nothing was chosen by them.",
    ]
    lowest = fit_claim(rows, config).measured
    if lowest is not None and lowest.value < 99.5:
        found.append(fit_words(rows, config, lowest.value))
    return found


def fit_words(rows: Sequence[Row], config: Config, lowest: float) -> str:
    """Which networks are compared unfitted: equal updates move the confound to the other end, where epochs are few."""
    words = (
        f"At this preset the slowest batch size ends at {lowest:.1f} % training accuracy: as written, large batches "
        "are compared before they have fitted"
    )
    small, large = config.ends
    turned = pair_words(rows, config, "equal-updates", small, large)
    if not turned:
        return f"{words}."
    ends = [trained(rows, config, "equal-updates", batch) for batch in (small, large)]
    if min(end for end in ends if end is not None) < 99.5:
        words += f", which equal updates turn round ({turned}); neither arm compares fitted networks at this preset"
    else:
        words += f"; at equal updates not ({turned})"
    return f"{words}."
