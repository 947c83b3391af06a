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

import statistics
from collections.abc import Sequence
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
    geometric_mean_interval,
    holm,
    judge,
    judge_tolerance,
    log_ratio_interval,
    mean_interval,
    page_trend,
)
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from curvlab.training.stages import Network, Samples, TrainStage
from experiments.base import Law, Tools, finals, groups, paper
from experiments.base.networks import Gap, above, cap, forecast_stage, gap, run_stage, survival

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
    same = all(getattr(config, name) == getattr(Config(), name) for name in (*COMMON, "epochs"))
    return same and all(paper.BATCH_LR.get(b) == lr for b, lr in zip(config.batches, config.lrs, strict=True))


def has_papers_pairs(config: Config) -> bool:
    """Whether batches and rates are the paper's, so that a direction can be compared with its own."""
    return config.dataset == "cifar10" and all(
        paper.BATCH_LR.get(b) == lr for b, lr in zip(config.batches, config.lrs, strict=True)
    )


def published(batch: int) -> float:
    """Mean of the paper's three seeds."""
    return statistics.mean(paper.BATCH_ACCURACY[batch])


def arm_gap(rows: Sequence[Row], config: Config, arm: str, small: int, large: int) -> Gap | None:
    """Accuracy at batch ``small`` minus that at ``large``."""
    found = cells(config).get(arm, {})
    return gap(rows, found[small].where, found[large].where) if {small, large} <= set(found) else None


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims with their controls; then the controls as claims of their own, and the audit."""
    small, large = min(config.batches), max(config.batches)
    found = [ends_claim(rows, config), gap_claim(rows, config, small, large), trend_claim(rows, config)]
    found.append(fit_claim(rows, config))
    words = {"equal-ratio": "lr/batch", "equal-updates": "number of updates"}
    for arm in config.arms[1:]:
        found.append(control_claim(rows, config, arm, words[arm], small, large))
    found += [loss_claim(rows, config, small, large), norm_claim(rows, config, small, large)]
    if has_papers_pairs(config):
        return found
    return [replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, note="") for claim in found]


def gap_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """Small batch against large, as written; the control column holds both control arms."""
    written = arm_gap(rows, config, "as-written", small, large)
    measured = None if written is None else written.estimate
    controls = {arm: arm_gap(rows, config, arm, small, large) for arm in ARMS[1:]}
    survives, control = survival(measured, {arm: None if g is None else g.estimate for arm, g in controls.items()})
    about = pair_value(small, large)
    verdict = judge(measured, about, 0.0) if about else above(measured, 0.0)
    note = scaled_note(config)
    if written is not None:
        note = f"{test_words(written)}; {note}".rstrip("; ")
    return Claim(
        "gap", f"Batch {small} tests better than batch {large}", None if not about else round(about, 2), measured,
        cap(verdict, is_as_written(config)), "points", survives, control, seconds(rows, config, "as-written"),
        note=note,
    )  # fmt: skip


def ends_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The paper's headline, between its own ends."""
    text, found = "Batch 32 tests better than batch 2048", None
    if is_as_written(config):
        found = arm_gap(rows, config, "as-written", 32, 2048)
    measured = None if found is None else found.estimate
    controls = {arm: arm_gap(rows, config, arm, 32, 2048) for arm in ARMS[1:]} if measured else {}
    survives, control = survival(measured, {arm: None if g is None else g.estimate for arm, g in controls.items()})
    about = published(32) - published(2048)
    note = "" if found is None else test_words(found)
    return Claim("ends", text, round(about, 2), measured, judge(measured, about, 0.0), "points",
                 survives, control if measured else "", seconds(rows, config, "as-written"), note=note)  # fmt: skip


def pair_value(small: int, large: int) -> float:
    """What the paper has for this pair; 0 where it has not run them."""
    known = {small, large} <= set(paper.BATCH_ACCURACY)
    return published(small) - published(large) if known else 0.0


def test_words(found: Gap) -> str:
    """Paired test with Welch's beside it."""
    p = [f"{test.name} p = {test.p_value:.2g}" for test in (found.paired, found.welch) if test.p_value == test.p_value]
    return ", ".join(p)


def scaled_note(config: Config) -> str:
    """What keeps a verdict below *Reproduced*."""
    if is_as_written(config):
        return ""
    return (
        f"scaled protocol (CNN({config.channels}), {config.num_train:,} images, {config.epochs} epochs): "
        "at best Direction only"
    )


def slopes(rows: Sequence[Row], config: Config, arm: str) -> tuple[Estimate, Comparison | None] | None:
    """Points of accuracy a doubling of the batch: the mean of one slope a seed; Page's test of falling."""
    table: dict[int, list[float]] = {}
    for cell in cells(config)[arm].values():
        for row in finals(rows, "test_accuracy", **cell.where):
            table.setdefault(row["seed"], []).append(100 * row["value"])
    whole = {seed: values for seed, values in table.items() if len(values) == len(config.batches)}
    if not whole or len(config.batches) < 3:
        return None
    x = np.log2(sorted(config.batches))
    per_seed = [float(np.polyfit(x, whole[seed], 1)[0]) for seed in sorted(whole)]
    trend = page_trend([whole[seed][::-1] for seed in sorted(whole)]) if len(whole) > 1 else None
    return mean_interval(per_seed), trend


def trend_claim(rows: Sequence[Row], config: Config) -> Claim:
    """*Reproduced* asks for the slope and for a trend test."""
    found = slopes(rows, config, "as-written")
    measured, trend = found if found else (None, None)
    known = [b for b in sorted(config.batches) if b in paper.BATCH_ACCURACY]
    about = float(np.polyfit(np.log2(known), [published(b) for b in known], 1)[0]) if len(known) > 2 else -0.35
    verdict = judge(measured, about, 0.0)
    note = scaled_note(config)
    if trend is not None:
        note = f"{trend.name} over {len(config.batches)} batches: p = {trend.p_value:.2g}, n = {trend.n}; {note}"
        if verdict is Verdict.REPRODUCED and not trend.p_value < 0.05:
            verdict = Verdict.DIRECTION_ONLY
    controls = {arm: slopes(rows, config, arm) for arm in config.arms[1:]}
    falls = {arm: None if found is None else found[0].scaled(-1) for arm, found in controls.items()}
    survives, control = survival(None if measured is None else measured.scaled(-1), falls)
    control = control.replace("every control's interval", "every control's fall (minus the slope)")
    return Claim("trend", "Test accuracy falls with every doubling of the batch", round(about, 2), measured,
                 cap(verdict, is_as_written(config)), "points", survives, control,
                 seconds(rows, config, "as-written"), note=note.rstrip("; "))  # fmt: skip


def fit_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The lowest batch's mean; a network that has not fitted yet is not compared at its minimum."""
    means = {}
    for batch, cell in cells(config)["as-written"].items():
        values = finite(rows, "train_accuracy", cell)
        if values:
            means[batch] = mean_interval([100 * value for value in values])
    worst = min(means, key=lambda batch: means[batch].value, default=None)
    measured = None if worst is None else means[worst]
    judged = judge_tolerance(measured, 100.0, 0.1)
    faithful = is_as_written(config)
    note = "" if worst is None else f"lowest of {len(means)} batches: {worst}; running accuracy of the last epoch"
    return Claim("fit", "Every batch size reaches 100 % training accuracy (lowest)", 100.0, measured,
                 judged.verdict if faithful else Verdict.NOT_TESTABLE, "%", note=note,
                 cost_seconds=seconds(rows, config, "as-written"))  # fmt: skip


def control_claim(rows: Sequence[Row], config: Config, arm: str, words: str, small: int, large: int) -> Claim:
    """A control arm's gap, judged like the paper's own."""
    found = arm_gap(rows, config, arm, small, large)
    measured = None if found is None else found.estimate
    about = pair_value(small, large)
    verdict = judge(measured, about, 0.0) if about else above(measured, 0.0)
    note = "" if found is None else f"{test_words(found)}; {scaled_note(config)}".rstrip("; ")
    text = f"Control: batch {small} tests better than batch {large} at equal {words}"
    return Claim(arm.replace("-", "_"), text, "not run", measured, cap(verdict, is_as_written(config)), "points",
                 cost_seconds=seconds(rows, config, arm), note=note)  # fmt: skip


def loss_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """What is compared differs in training loss too (the paper's 3.86: batches 32 and 1024, one seed)."""
    measured = ratio(rows, config, "fit_loss", large, small)
    survives, control = Survives.NOT_TESTED, ""
    if (equal := ratio(rows, config, "fit_loss", large, small, "equal-updates")) is not None:
        control = f"at equal updates the ratio is {equal}"
    return Claim("loss", f"Audit: batch {large} ends at a higher training loss than batch {small}", "3.86 (32, 1024)",
                 measured, above(measured, 1.0), "×", survives, control, seconds(rows, config, "as-written"),
                 note="eval mode, all training images; geometric means")  # fmt: skip


def norm_claim(rows: Sequence[Row], config: Config, small: int, large: int) -> Claim:
    """More updates let scale-free weights grow, and curvature falls with their square at the same function."""
    measured = ratio(rows, config, "conv_norm", small, large)
    control = ""
    if (equal := ratio(rows, config, "conv_norm", small, large, "equal-updates")) is not None:
        control = f"at equal updates the ratio is {equal}"
    return Claim("norms", f"Audit: weights before batch normalization end larger at batch {small} than at {large}",
                 "not stored", measured, above(measured, 1.0), "×", Survives.NOT_TESTED, control,
                 seconds(rows, config, "as-written"))  # fmt: skip


def finite(rows: Sequence[Row], metric: str, cell: Cell) -> list[float]:
    """Last-epoch values of a cell, one a seed, diverged ones left out."""
    return groups(rows, metric, "batch_size", **cell.where).get(cell.batch_size, [])


def ratio(
    rows: Sequence[Row], config: Config, metric: str, above_: int, below: int, arm: str = "as-written"
) -> Estimate | None:
    """Geometric mean at batch ``above_`` over that at ``below``."""
    found = cells(config).get(arm)
    if found is None:
        return None
    a, b = (finite(rows, metric, found[batch]) for batch in (above_, below))
    return log_ratio_interval(a, b) if a and b and min(*a, *b) > 0 else None


def seconds(rows: Sequence[Row], config: Config, arm: str) -> float:
    """What the arm cost, all batches and seeds."""
    metrics = ("train_seconds", "measure_seconds")
    return sum(sum(finite(rows, metric, cell)) for cell in cells(config)[arm].values() for metric in metrics)


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """Bookkeeping that must hold anywhere; on digits also the direction and the identity behind the audit of norms."""
    found = []
    if "equal-updates" in config.arms:
        target = config.epochs * steps_per_epoch(config, config.reference)
        off = {
            cell.batch_size: abs(values[0] - target) - steps_per_epoch(config, cell.batch_size) / 2
            for cell in cells(config)["equal-updates"].values()
            if (values := finite(rows, "updates", cell))
        }
        text = f"equal updates are {target:,} to half an epoch at every batch size"
        found.append(Law(text, bool(off) and max(off.values()) <= 0))
    smoke = PRESETS["smoke"]
    if config != replace(smoke, seeds=config.seeds):
        return found
    radial = max((row["value"] for row in finals(rows, "radial_cosine")), default=float("nan"))
    small, large = min(config.batches), max(config.batches)
    written, equal = (ratio(rows, config, "fit_loss", large, small, arm) for arm in ("as-written", "equal-updates"))
    grown = [estimate.value if estimate is not None else float("nan") for estimate in (written, equal)]
    return [
        *found,
        Law(f"gradients are orthogonal to scale-free weights: largest cosine {radial:.1e} ≤ 1e-3", radial <= 1e-3),
        Law(
            f"equal epochs leave batch {large} at a higher training loss than {small} ({grown[0]:.2f} × > 1), and "
            f"equal updates at a lower multiple ({grown[1]:.2g} ×)",
            grown[0] > max(1.0, grown[1]),
        ),
    ]


# ------------------------------------------------------------------------------------------------ tables and figures


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T1: every arm by batch; then the gaps with their tests."""
    columns = ["arm", "batch", "lr", "epochs", "updates", "lr/batch ×1e5", "test %", "SD", "paper %", "train %",
               "train loss", "‖θ‖", "‖θ_conv‖", "‖θ−θ_0‖", "diverged", "time s"]  # fmt: skip
    lines = [table_line(rows, config, arm, cell) for arm, found in cells(config).items() for cell in found.values()]
    caption = (
        "Last epoch; means over seeds with 95 % t intervals, SD of the sample. Train %: the running accuracy of the "
        "last epoch; train loss: eval mode on all training images, geometric mean. Cells that two arms share were "
        "trained once. The paper's numbers: CNN(32), 50,000 images, 80 epochs."
    )
    return [Table("Accuracy by batch size", columns, lines, caption), gap_table(rows, config)]


def table_line(rows: Sequence[Row], config: Config, arm: str, cell: Cell) -> list[Any]:
    """One cell."""

    def mean(metric: str, factor: float = 1.0, average: Any = mean_interval) -> Estimate | None:
        values = finite(rows, metric, cell)
        return average(values).scaled(factor) if values and (average is mean_interval or min(values) > 0) else None

    tested = [100 * value for value in finite(rows, "test_accuracy", cell)]
    known = has_papers_pairs(config) and arm == "as-written"
    return [
        arm,
        cell.batch_size,
        cell.lr,
        cell.epochs,
        cell.epochs * steps_per_epoch(config, cell.batch_size),
        round(1e5 * cell.lr / cell.batch_size, 2),
        mean("test_accuracy", 100),
        statistics.stdev(tested) if len(tested) > 1 else None,
        round(published(cell.batch_size), 2) if known else None,
        mean("train_accuracy", 100),
        mean("fit_loss", average=geometric_mean_interval),
        mean("norm"),
        mean("conv_norm"),
        mean("distance"),
        int(sum(finite(rows, "diverged", cell))),
        round(sum(finite(rows, "train_seconds", cell) + finite(rows, "measure_seconds", cell)), 1),
    ]


def gap_table(rows: Sequence[Row], config: Config) -> Table:
    """Every batch against the reference, arm by arm, with Holm's correction over the whole table."""
    found: dict[tuple[str, int], Gap] = {}
    for arm, by_batch in cells(config).items():
        for batch in by_batch:
            one = None if batch == config.reference else arm_gap(rows, config, arm, batch, config.reference)
            if one is not None:
                found[arm, batch] = one
    p_values = {key: one.paired.p_value for key, one in found.items() if one.paired.p_value == one.paired.p_value}
    adjusted = holm(p_values) if p_values else {}
    lines = [
        [arm, batch, one.estimate, one.paired.p_value, one.welch.p_value, adjusted.get((arm, batch))]
        for (arm, batch), one in found.items()
    ]
    reference = config.reference
    columns = ["arm", "batch", f"test points against batch {reference}", "paired p", "Welch p", "Holm p"]
    caption = (
        "Intervals hold the noise of seeds and of test images (crossed); the tests that of seeds alone, Holm's "
        f"correction over the paired p of all {len(p_values)} rows."
    )
    return Table(f"Gaps to batch {reference}", columns, lines, caption)


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F1: accuracy against batch, lr/batch and updates; then loss and norms against the batch."""
    figure, panels = draw.new_figure(1, 3, size=(12.6, 4.0))
    axes_of = {
        "batch size": lambda cell: cell.batch_size,
        "learning rate / batch × 1e5": lambda cell: 1e5 * cell.lr / cell.batch_size,
        "updates": lambda cell: cell.epochs * steps_per_epoch(config, cell.batch_size),
    }
    for axes, (label, x_of) in zip(panels, axes_of.items(), strict=True):
        accuracy_panel(axes, rows, config, label, x_of)
    more, panels = draw.new_figure(1, 2)
    for axes, (metric, label) in zip(
        panels,
        {"fit_loss": "training loss (nats)", "conv_norm": "norm of the convolutions' weights"}.items(),
        strict=True,
    ):
        for series, (arm, found) in enumerate(cells(config).items()):
            values = {float(batch): finite(rows, metric, cell) for batch, cell in found.items()}
            values = {batch: group for batch, group in values.items() if group and min(group) > 0}
            if values:
                draw.plot_groups(axes, values, series=series, label=arm, geometric=True)
        draw.set_axes(axes, xlabel="batch size", ylabel=label, log_x=True, log_y=True, x_ticks=sorted(config.batches))
        draw.add_legend(axes)
    caption = "Dots: seeds; markers: means with 95 % intervals over seeds. "
    paired = "One set of networks against three things that change together as written."
    return [
        draw.Figure("accuracy", "Test accuracy against batch, lr/batch and updates", caption + paired, figure),
        draw.Figure("confounds", "What else the batch size changes", caption + "Geometric means.", more),
    ]


def accuracy_panel(axes: Any, rows: Sequence[Row], config: Config, label: str, x_of: Any) -> None:
    """One panel of F1; the paper's means where the protocol is its own."""
    ticks: set[float] = set()
    for series, (arm, found) in enumerate(cells(config).items()):
        values: dict[float, list[float]] = {}
        for cell in found.values():
            values.setdefault(float(f"{x_of(cell):.4g}"), []).extend(
                100 * value for value in finite(rows, "test_accuracy", cell)
            )
        values = {x: group for x, group in values.items() if group}
        ticks |= set(values)
        if values:
            draw.plot_groups(axes, values, series=series, label=arm, connect=len(values) == len(found))
    if is_as_written(config):
        x = [x_of(cell) for cell in cells(config)["as-written"].values()]
        draw.plot_published(axes, x, [published(b) for b in cells(config)["as-written"]], label="paper")
    draw.set_axes(axes, xlabel=label, ylabel="test accuracy (%)", log_x=True, x_ticks=spaced(ticks))
    draw.add_legend(axes)


def spaced(ticks: set[float]) -> list[float]:
    """Ticks at least a factor 1.6 apart: labels of nearer ones would touch."""
    kept: list[float] = []
    for tick in sorted(ticks):
        if not kept or tick >= 1.6 * kept[-1]:
            kept.append(tick)
    return kept


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    found = [
        "The paper calls its learning rates linear in the batch; at 32 and 64 they are 2 and 1.5 times the rule, at "
        "2048 0.62 of it. Cells where the as-written rate obeys the rule serve both arms.",
        "A gap is a mean difference over common seeds; its interval holds the noise of seeds and of test images.",
        "Test accuracies are those of the last epoch; nothing was chosen by them.",
    ]
    lowest = fit_claim(rows, config).measured
    if lowest is not None and lowest.value < 99.5:
        found.append(
            f"At this preset the slowest batch size ends at {lowest.value:.1f} % training accuracy: as written, large "
            "batches are compared before they have fitted, which is the confound that equal updates remove."
        )
    return found
