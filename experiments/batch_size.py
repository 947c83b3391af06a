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
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Comparison,
    Estimate,
    Survives,
    Verdict,
    judge,
    judge_tolerance,
    mean_interval,
    page_trend,
)
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from curvlab.training.stages import Network, Samples, TrainStage
from experiments.base import Law, Tools, finals, paper
from experiments.base.networks import forecast_stage, run_stage
from experiments.base.settings import (
    RESULTS,
    RESULTS_CAPTION,
    Gap,
    above,
    accuracy_panel,
    cap,
    gap,
    gap_table,
    interval,
    mean,
    ratio,
    results,
    scaled_note,
    seconds,
    survival,
    test_words,
    values,
)

PROTOCOL = 1
REFERENCE = 128  # the batch whose ratio and whose number of updates the controls give to all

Arm = Literal["as-written", "equal-ratio", "equal-updates"]
ARMS: tuple[Arm, ...] = ("as-written", "equal-ratio", "equal-updates")


@dataclass(frozen=True)
class Config:
    """The paper's protocol; presets and ``field=value`` change it."""

    dataset: Literal["cifar10", "digits"] = "cifar10"
    num_train: int = 50_000
    """The first that many training images, in the order of the file."""
    channels: int = 32
    batches: tuple[int, ...] = tuple(paper.BATCH_LR)
    lrs: tuple[float, ...] = tuple(paper.BATCH_LR.values())
    """As written, one a batch."""
    reference: int = REFERENCE
    """The batch of ``batches`` whose lr/batch and updates the control arms take."""
    epochs: int = 80
    seeds: int = 10
    """Seeds 0 .. seeds-1; each draws its own network and its own orders."""
    arms: tuple[Arm, ...] = ARMS
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if len(self.batches) < 2 or len(set(self.batches)) != len(self.batches) or len(self.lrs) != len(self.batches):
            raise ValueError(
                f"Config: batches must be two or more, different, with one lr each, got {self.batches} and {self.lrs}"
            )
        if self.reference not in self.batches:
            raise ValueError(f"Config: reference must be one of batches {self.batches}, got {self.reference}")
        if min(self.seeds, self.num_train, self.channels) < 1:
            raise ValueError(f"Config: seeds, num_train and channels must be at least 1, got {self}")
        if "as-written" not in self.arms or not set(self.arms) <= set(ARMS) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"Config: arms must be as-written and some of {', '.join(ARMS)}, got {self.arms}")
        for batch, lr in zip(self.batches, self.lrs, strict=True):
            Recipe(self.epochs, batch, lr, self.momentum)


@dataclass(frozen=True)
class Unit:
    """One network: what a run's name covers."""

    batch_size: int
    lr: float
    epochs: int
    seed: int
    dataset: str = "cifar10"
    num_train: int = 50_000
    channels: int = 32
    momentum: float = 0.9

    @property
    def stage(self) -> TrainStage:
        """The training stage, under whose name other studies find the network."""
        recipe = Recipe(self.epochs, self.batch_size, self.lr, self.momentum)
        return TrainStage(Network("cnn", self.channels), Samples(self.dataset, self.num_train), recipe, self.seed)

    def __str__(self) -> str:
        return f"batch {self.batch_size}, lr {self.lr:g}, {self.epochs} epochs, seed {self.seed}"


COMMON = ("dataset", "num_train", "channels", "momentum")
SMALL = {"batches": (32, 128, 512), "lrs": (0.005, 0.01, 0.04)}

PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits", num_train=1000, channels=4, batches=(16, 64, 256), lrs=(0.01, 0.02, 0.08), reference=64,
        epochs=8, seeds=2,
    ),
    "cpu": Config(num_train=5000, channels=8, epochs=20, seeds=3, **SMALL),
    "paper": Config(),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way to train: the factor values that pick its rows."""

    batch_size: int
    lr: float
    epochs: int

    @property
    def where(self) -> dict[str, Any]:
        """For ``groups(rows, ..., **where)``."""
        return {"batch_size": self.batch_size, "lr": self.lr, "epochs": self.epochs}


def steps_per_epoch(config: Config, batch: int) -> int:
    """Updates an epoch."""
    return -(-config.num_train // batch)


def cells(config: Config) -> dict[str, dict[int, Cell]]:
    """Every arm's way to train each batch size."""
    lrs = dict(zip(config.batches, config.lrs, strict=True))
    target = config.epochs * steps_per_epoch(config, config.reference)
    found: dict[str, dict[int, Cell]] = {}
    for arm in config.arms:
        found[arm] = {}
        for batch in sorted(config.batches):
            lr, epochs = lrs[batch], config.epochs
            if arm == "equal-ratio":
                lr = float(f"{lrs[config.reference] * batch / config.reference:.12g}")
            if arm == "equal-updates":
                epochs = max(1, round(target / steps_per_epoch(config, batch)))
            found[arm][batch] = Cell(batch, lr, epochs)
    return found


def expand(config: Config) -> list[Unit]:
    """One unit for every seed and every different cell, seed after seed."""
    different = dict.fromkeys(cell for arm in cells(config).values() for cell in arm.values())
    common = {name: getattr(config, name) for name in COMMON}
    return [
        Unit(cell.batch_size, cell.lr, cell.epochs, seed, **common)
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


def is_as_written(config: Config) -> bool:
    """Whether the first arm follows the paper's protocol (its batches and seeds may be fewer)."""
    return has_papers_rates(config) and all(
        getattr(config, name) == getattr(Config(), name) for name in (*COMMON, "epochs")
    )


def has_papers_rates(config: Config) -> bool:
    """Whether data, batches and rates are the paper's, so that a direction can be compared with its own."""
    rates = zip(config.batches, config.lrs, strict=True)
    return config.dataset == "cifar10" and all(paper.BATCH_LR.get(batch) == lr for batch, lr in rates)


def published(batch: int) -> float:
    """Mean of the paper's three seeds."""
    return statistics.mean(paper.BATCH_ACCURACY[batch])


def published_gap(small: int, large: int) -> float | None:
    """The paper's for this pair."""
    return published(small) - published(large) if {small, large} <= set(paper.BATCH_ACCURACY) else None


def arm_gap(rows: Sequence[Row], config: Config, arm: str, small: int, large: int) -> Gap | None:
    """Accuracy at batch ``small`` minus that at ``large``."""
    found = cells(config).get(arm, {})
    return gap(rows, found[small].where, found[large].where) if {small, large} <= set(found) else None


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims with their controls; then the controls as claims of their own, and the audit."""
    small, large = min(config.batches), max(config.batches)
    words = {"equal-ratio": "lr/batch", "equal-updates": "number of updates"}
    headline = Claim("ends", "Batch 32 tests better than batch 2048", 2.25, None, Verdict.NOT_TESTABLE, "points")
    if is_as_written(config) and {32, 2048} <= set(config.batches):
        headline = gap_claim(rows, config, "ends", 32, 2048)
    found = [headline, gap_claim(rows, config, "gap", small, large), trend_claim(rows, config), fit_claim(rows, config)]
    found += [control_claim(rows, config, arm, words[arm], small, large) for arm in config.arms[1:]]
    found += [loss_claim(rows, config, small, large), norm_claim(rows, config, small, large)]
    if has_papers_rates(config):
        return found
    return [replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, note="") for claim in found]


def gap_claim(rows: Sequence[Row], config: Config, claim_id: str, small: int, large: int) -> Claim:
    """Small batch against large, as written; the control column holds both control arms."""
    written = arm_gap(rows, config, "as-written", small, large)
    controls = {arm: arm_gap(rows, config, arm, small, large) for arm in ARMS[1:]}
    survives, control = survival(interval(written), {arm: interval(found) for arm, found in controls.items()})
    claim = judged_gap(config, claim_id, written, small, large, seconds(rows, arm_settings(config, "as-written")))
    return replace(claim, survives=survives, control=control)


def control_claim(rows: Sequence[Row], config: Config, arm: str, words: str, small: int, large: int) -> Claim:
    """A control arm's gap, judged like the paper's own."""
    found = arm_gap(rows, config, arm, small, large)
    claim = judged_gap(config, arm.replace("-", "_"), found, small, large, seconds(rows, arm_settings(config, arm)))
    note = "; ".join(filter(None, (claim.note, trained_words(rows, config, arm, small, large))))
    return replace(claim, text=f"Control, equal {words}: {claim.text}", paper="not run", note=note)


def trained(rows: Sequence[Row], config: Config, arm: str, batch: int) -> float | None:
    """Training accuracy in %, running over the last epoch."""
    cell = cells(config).get(arm, {}).get(batch)
    found = None if cell is None else mean(rows, "train_accuracy", cell.where, factor=100)
    return None if found is None else found.value


def trained_words(rows: Sequence[Row], config: Config, arm: str, small: int, large: int) -> str:
    """How well the networks of a pair have fitted: a gap between unlike fits is not one of batches alone."""
    a, b = (trained(rows, config, arm, batch) for batch in (small, large))
    if a is None or b is None:
        return ""
    return f"batch {small} ends at {a:.1f} % and batch {large} at {b:.1f} % training accuracy"


def judged_gap(config: Config, claim_id: str, found: Gap | None, small: int, large: int, cost: float) -> Claim:
    """The verdict on one pair of batches in one arm."""
    about, measured = published_gap(small, large), interval(found)
    verdict = above(measured, 0.0) if about is None else judge(measured, about, 0.0)
    note = "; ".join(part for part in (test_words(found), scaled_note(is_as_written(config), config)) if part)
    shown = None if about is None else round(about, 2)
    return Claim(claim_id, f"Batch {small} tests better than batch {large}", shown, measured,
                 cap(verdict, is_as_written(config)), "points", cost_seconds=cost, note=note)  # fmt: skip


def arm_settings(config: Config, arm: str) -> list[dict[str, Any]]:
    """All cells of an arm."""
    return [cell.where for cell in cells(config)[arm].values()]


def slopes(rows: Sequence[Row], config: Config, arm: str) -> tuple[Estimate, Comparison | None] | None:
    """Points of accuracy a doubling of the batch: the mean of one slope a seed; Page's test of falling."""
    table: dict[int, list[float]] = {}
    for setting in arm_settings(config, arm):
        for row in finals(rows, "test_accuracy", **setting):
            table.setdefault(row["seed"], []).append(100 * row["value"])
    whole = [table[seed] for seed in sorted(table) if len(table[seed]) == len(config.batches)]
    if not whole or len(config.batches) < 3:
        return None
    x = np.log2(sorted(config.batches))
    trend = page_trend([line[::-1] for line in whole]) if len(whole) > 1 else None
    return mean_interval([float(np.polyfit(x, line, 1)[0]) for line in whole]), trend


def trend_claim(rows: Sequence[Row], config: Config) -> Claim:
    """*Reproduced* asks for the slope and for a trend test."""
    measured, trend = slopes(rows, config, "as-written") or (None, None)
    known = [batch for batch in sorted(config.batches) if batch in paper.BATCH_ACCURACY]
    about = -0.35  # over all seven rows
    if len(known) > 2:
        about = float(np.polyfit(np.log2(known), [published(batch) for batch in known], 1)[0])
    verdict, parts = judge(measured, about, 0.0), [scaled_note(is_as_written(config), config)]
    if trend is not None:
        parts.insert(0, f"{trend.name} over {len(config.batches)} batches: p = {trend.p_value:.2g}, n = {trend.n}")
        if verdict is Verdict.REPRODUCED and not trend.p_value < 0.05:
            verdict = Verdict.DIRECTION_ONLY
    falls = {arm: None if (s := slopes(rows, config, arm)) is None else s[0].scaled(-1) for arm in config.arms[1:]}
    survives, control = survival(None if measured is None else measured.scaled(-1), falls)
    return Claim("trend", "Test accuracy falls on average per doubling of the batch", round(about, 2), measured,
                 cap(verdict, is_as_written(config)), "points", survives, f"falls (slopes times −1): {control}",
                 seconds(rows, arm_settings(config, "as-written")), note="; ".join(filter(None, parts)))  # fmt: skip


def fit_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The lowest batch's mean: a network that has not fitted yet is not compared at its minimum."""
    found = {batch: cell.where for batch, cell in cells(config)["as-written"].items()}
    means = {batch: m for batch, where in found.items() if (m := mean(rows, "train_accuracy", where, factor=100))}
    worst = min(means, key=lambda batch: means[batch].value, default=None)
    measured = None if worst is None else means[worst]
    verdict = judge_tolerance(measured, 100.0, 0.1).verdict if is_as_written(config) else Verdict.NOT_TESTABLE
    note = "" if worst is None else f"lowest of {len(means)} batches: {worst}; running accuracy of the last epoch"
    return Claim("fit", "Every batch size reaches 100 % training accuracy (lowest)", 100.0, measured, verdict, "%",
                 cost_seconds=seconds(rows, found.values()), note=note)  # fmt: skip


def loss_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """What is compared differs in training loss too (the paper's 3.86: batches 32 and 1024, one seed)."""
    text = f"Audit: batch {large} ends at a higher training loss than batch {small}"
    claim = audit_claim(rows, config, "fit_loss", large, small)
    note = "eval mode, all training images; geometric means"
    return replace(claim, id="loss", text=text, paper="3.86 (32, 1024)", note=note)


def norm_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """More updates let scale-free weights grow, and curvature falls with their square at the same function."""
    text = f"Audit: weights before batch normalization end larger at batch {small} than at {large}"
    return replace(audit_claim(rows, config, "conv_norm", small, large), id="norms", text=text, paper="not stored")


def audit_claim(rows: Sequence[Row], config: Config, metric: str, one: int, other: int) -> Claim:
    """A ratio between two batches as written, predicted to exceed 1, and the same at equal updates."""
    found = cells(config)
    pairs = {arm: (by_batch[one].where, by_batch[other].where) for arm, by_batch in found.items()}
    measured = ratio(rows, metric, *pairs["as-written"])
    equal = ratio(rows, metric, *pairs["equal-updates"]) if "equal-updates" in pairs else None
    control = "" if equal is None else f"at equal updates the ratio is {equal}"
    return Claim(metric, metric, None, measured, above(measured, 1.0), "×", Survives.NOT_TESTED, control,
                 seconds(rows, arm_settings(config, "as-written")))  # fmt: skip


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """Bookkeeping that must hold anywhere; on digits also the direction and the identity behind the audit of norms."""
    found, by_arm = [], cells(config)
    if "equal-updates" in config.arms:
        target = config.epochs * steps_per_epoch(config, config.reference)
        off = [
            abs(update - target) - steps_per_epoch(config, batch) / 2
            for batch, cell in by_arm["equal-updates"].items()
            for update in values(rows, "updates", cell.where)
        ]
        text = f"equal updates are {target:,} to half an epoch at every batch size"
        found.append(Law(text, bool(off) and max(off) <= 0))
    if config != replace(PRESETS["smoke"], seeds=config.seeds):
        return found
    radial = max((row["value"] for row in finals(rows, "radial_cosine")), default=math.nan)
    small, large = min(config.batches), max(config.batches)
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
    lines = []
    for arm, found in cells(config).items():
        for batch, cell in found.items():
            updates = cell.epochs * steps_per_epoch(config, batch)
            known = arm == "as-written" and has_papers_rates(config)
            about = round(published(batch), 2) if known else None
            start = [arm, batch, cell.lr, cell.epochs, updates, round(1e5 * cell.lr / batch, 2), about]
            lines.append(start + results(rows, cell.where))
    columns = ["arm", "batch", "lr", "epochs", "updates", "lr/batch ×1e5", "paper %", *RESULTS]
    caption = (
        f"{RESULTS_CAPTION} Cells that two arms share were trained once. The paper's numbers: CNN(32), 50,000 images, "
        "80 epochs."
    )
    pairs = {
        (arm, str(batch)): found
        for arm, by_batch in cells(config).items()
        for batch in by_batch
        if batch != config.reference and (found := arm_gap(rows, config, arm, batch, config.reference))
    }
    title = f"Gaps to batch {config.reference}"
    return [Table("Accuracy by batch size", columns, lines, caption), gap_table(pairs, ["arm", "batch"], title)]


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F1: accuracy against batch, lr/batch and updates; then loss and norms against the batch."""
    figure, panels = draw.new_figure(1, 3, size=(12.6, 4.0))
    axes_of: dict[str, Callable[[Cell], float]] = {
        "batch size": lambda cell: cell.batch_size,
        "learning rate / batch × 1e5": lambda cell: 1e5 * cell.lr / cell.batch_size,
        "updates": lambda cell: cell.epochs * steps_per_epoch(config, cell.batch_size),
    }
    for axes, (label, x_of) in zip(panels, axes_of.items(), strict=True):
        arms = {
            arm: {str(batch): (x_of(cell), cell.where) for batch, cell in by_batch.items()}
            for arm, by_batch in cells(config).items()
        }
        ticks = accuracy_panel(axes, rows, arms, lines=label == "batch size")
        if is_as_written(config):
            written = cells(config)["as-written"]
            draw.plot_published(axes, list(map(x_of, written.values())), list(map(published, written)), label="paper")
        draw.set_axes(axes, xlabel=label, ylabel="test accuracy (%)", log_x=True, x_ticks=ticks)
        axes.margins(x=0.1)
        draw.add_legend(axes)
    more, panels = draw.new_figure(1, 2)
    measures = {"fit_loss": "training loss (nats)", "conv_norm": "norm of the convolutions' weights"}
    for axes, (metric, label) in zip(panels, measures.items(), strict=True):
        for series, (arm, found) in enumerate(cells(config).items()):
            shown = {float(batch): values(rows, metric, cell.where) for batch, cell in found.items()}
            shown = {batch: group for batch, group in shown.items() if group and min(group) > 0}
            if shown:
                draw.plot_groups(axes, shown, series=series, label=arm, geometric=True)
        ticks, is_loss = sorted(config.batches), metric == "fit_loss"
        draw.set_axes(axes, xlabel="batch size", ylabel=label, log_x=True, log_y=is_loss, x_ticks=ticks)
        axes.margins(x=0.1)
        draw.add_legend(axes)
    caption = "Dots: seeds; markers: means with 95 % intervals over seeds. "
    together = (
        "The same networks against three things that change together as written; numbers: batch sizes, each cell in "
        "the color of its first arm."
    )
    return [
        draw.Figure("accuracy", "Test accuracy against batch, lr/batch and updates", caption + together, figure),
        draw.Figure("confounds", "What else the batch size changes", caption + "Geometric means.", more),
    ]


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
    small, large = min(config.batches), max(config.batches)
    turned = trained_words(rows, config, "equal-updates", small, large)
    if not turned:
        return f"{words}."
    ends = [trained(rows, config, "equal-updates", batch) for batch in (small, large)]
    if min(end for end in ends if end is not None) < 99.5:
        words += (
            f", which equal updates turn round: there {turned}; neither arm compares fitted networks at this preset"
        )
    else:
        words += f"; at equal updates {turned}"
    return f"{words}."
