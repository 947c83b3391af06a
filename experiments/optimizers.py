# SPDX-License-Identifier: Apache-2.0
"""Which optimizers generalize, and is stochasticity needed?

Question: Adam is said to match small-batch SGD, and full-batch descent to fail. Is it the noise, or the training?

Source: arXiv 2604.07603, experiment 2 (CNN(32) with batch normalization, CIFAR-10, 80 epochs): SGD with momentum 0.9,
Adam (batch 128, lr 0.001), and full-batch gradient descent on 5,000 images (80 steps at lr 0.001, and the paper's
common momentum). Its three seeds are not ours.

Prediction: Adam is within 0.75 points of small-batch SGD. Full-batch descent ends at 32.7 % as written, and at 36.7 %
on its own training images: it was stopped long before it had fitted, and says nothing about noise. Where both are
tuned, and make equally many updates on the same images, it should be at most a point below SGD (Geiping et al. 2022).

Arms. As written: ``sgd-32`` and ``sgd-128`` (momentum), ``adam``, ``full-batch``. Controls: ``plain-sgd`` (no momentum,
at the equal effective rate lr/(1 − β)), ``sam`` (ρ = 0.05, momentum beneath, the same epochs at twice the gradients);
and a pair on the same few images with the same number of updates, ``full-batch-tuned`` and ``sgd-few``, each at the
best of the same rates by training loss (``tune-…`` are the networks that chose).
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
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.stats import (
    Estimate,
    Survives,
    Verdict,
    judge,
    judge_tolerance,
)
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from curvlab.training.stages import Network, Samples, TrainStage
from experiments.base import Law, Tools, paper, tuning
from experiments.base.image_networks import published
from experiments.base.networks import forecast_stage, run_stage
from experiments.base.optimizer_report import optimizer_figure, optimizer_tables, where
from experiments.base.settings import (
    above,
    cap,
    gap,
    gap_controls,
    geometric,
    interval,
    mean,
    no_worse,
    ratio,
    scaled_note,
    seconds,
    test_words,
    trained_words,
    values,
)
from experiments.base.survival import survival
from experiments.base.tuning import Grid

PROTOCOL = 1
MARGIN = 0.75  # points: within which Adam is to match small-batch SGD, and plain SGD momentum
TUNED_MARGIN = 1.0  # points: what tuned full-batch descent may lose to SGD

Arm = Literal["sgd-32", "sgd-128", "plain-sgd", "adam", "sam", "full-batch", "full-batch-tuned", "sgd-few"]
PAIR: tuple[Arm, Arm] = ("full-batch-tuned", "sgd-few")
ARMS: tuple[Arm, ...] = (
    "sgd-32", "sgd-128", "plain-sgd", "adam", "sam", "full-batch", "full-batch-tuned", "sgd-few",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The paper's protocol; presets and ``field=value`` change it."""

    dataset: Literal["cifar10", "digits"] = "cifar10"
    num_train: int = 50_000
    """The first that many training images, in the order of the file."""
    channels: int = 32
    epochs: int = 80
    """Of every arm but the full-batch ones and ``sgd-few``."""
    full_batch_images: int = 5000
    """As written: the first that many for full-batch descent."""
    full_batch_steps: int = 80
    """As written: one an epoch of the paper's. No scaling of ``epochs`` shortens them, for their number is the
    claim."""
    few_images: int = 5000
    """Of the pair ``full-batch-tuned`` and ``sgd-few``."""
    few_epochs: int = 80
    """Of ``sgd-few``; ``full-batch-tuned`` makes as many updates."""
    small_batch: int = 32
    batch: int = 128
    lr_small: float = 0.005
    lr: float = 0.01
    """At ``batch``; also that of ``sam``."""
    lr_adam: float = 0.001
    lr_full: float = 0.001
    lr_tuned: float = 0.1
    """Of ``full-batch-tuned``: of ``tuning`` the rate with the lowest training loss, which a law checks."""
    lr_few: float = 0.1
    """Of ``sgd-few``, chosen in the same way."""
    tuning: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Rates that both arms of the pair are tuned on; none: no tuning."""
    rho: float = 0.05
    momentum: float = 0.9
    seeds: int = 5
    """Seeds 0 .. seeds-1; each draws its own network and its own orders."""
    arms: tuple[Arm, ...] = ARMS

    def __post_init__(self) -> None:
        counts = (self.seeds, self.num_train, self.channels, self.full_batch_images, self.few_images, self.few_epochs)
        if min(counts) < 1:
            raise ValueError(f"Config: seeds, channels, images and epochs must be at least 1, got {self}")
        if max(self.full_batch_images, self.few_images) > self.num_train:
            raise ValueError(f"Config: full_batch_images and few_images must be at most num_train, got {self}")
        if min(self.tuning, default=1.0) <= 0 or len(set(self.tuning)) != len(self.tuning):
            raise ValueError(f"Config: tuning must be different positive rates, got {self.tuning}")
        if not self.arms or not set(self.arms) <= set(ARMS) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"Config: arms must be some of {', '.join(ARMS)}, each once, got {self.arms}")
        for arm in self.arms:
            recipe_of(self, arm)


def recipe_of(config: Config, arm: Arm) -> tuple[Recipe, int]:
    """How an arm trains, and on how many images."""
    c = config
    few_updates = c.few_epochs * -(-c.few_images // c.batch)
    made: dict[Arm, tuple[Recipe, int]] = {
        "sgd-32": (Recipe(c.epochs, c.small_batch, c.lr_small, c.momentum), c.num_train),
        "sgd-128": (Recipe(c.epochs, c.batch, c.lr, c.momentum), c.num_train),
        "plain-sgd": (Recipe(c.epochs, c.batch, float(f"{c.lr / (1 - c.momentum):.12g}"), 0.0), c.num_train),
        "adam": (Recipe(c.epochs, c.batch, c.lr_adam, c.momentum, optimizer="adam"), c.num_train),
        "sam": (Recipe(c.epochs, c.batch, c.lr, c.momentum, optimizer="sam", rho=c.rho), c.num_train),
        "full-batch": (Recipe(c.full_batch_steps, c.full_batch_images, c.lr_full, c.momentum), c.full_batch_images),
        "full-batch-tuned": (Recipe(few_updates, c.few_images, c.lr_tuned, c.momentum), c.few_images),
        "sgd-few": (Recipe(c.few_epochs, c.batch, c.lr_few, c.momentum), c.few_images),
    }
    return made[arm]


def recipes(config: Config) -> dict[str, tuple[Recipe, int]]:
    """Every arm of the configuration."""
    return {arm: recipe_of(config, arm) for arm in config.arms}


def grid(config: Config) -> Grid | None:
    """How the rates of the pair were chosen; None where one of the two is not run, or nothing is tuned."""
    if not config.tuning or not set(PAIR) <= set(config.arms):
        return None
    images = min(config.few_images, tuning.IMAGES)
    batches, chosen = (images, config.batch), (config.lr_tuned, config.lr_few)
    return Grid(config.tuning, images, dict(zip(PAIR, batches, strict=True)), dict(zip(PAIR, chosen, strict=True)),
                config.momentum)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One network: what a run's name covers."""

    arm: str
    """One of :data:`ARMS`, or the name of its tuning."""
    recipe: Recipe
    num_train: int
    seed: int
    dataset: str = "cifar10"
    channels: int = 32

    @property
    def stage(self) -> TrainStage:
        """The training stage; ``sgd-32`` and ``sgd-128`` are those that ``batch_size`` trains at the same preset."""
        return TrainStage(Network("cnn", self.channels), Samples(self.dataset, self.num_train), self.recipe, self.seed)

    def __str__(self) -> str:
        return f"{self.arm}, lr {self.recipe.lr:g}, {self.recipe.epochs} epochs of {self.num_train}, seed {self.seed}"


PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits", num_train=1000, channels=4, epochs=8, full_batch_images=500, full_batch_steps=8,
        few_images=200, few_epochs=20, small_batch=16, batch=64, lr_small=0.01, lr=0.02, tuning=(0.01, 0.1), seeds=2,
    ),
    "cpu": Config(num_train=5000, channels=8, epochs=20, few_images=1000, few_epochs=25, seeds=3),
    "paper": Config(),
}  # fmt: skip


def expand(config: Config) -> list[Unit]:
    """One unit for every rate of the grid, then for every seed and arm, seed after seed."""
    tuned, channels = grid(config), min(config.channels, tuning.CHANNELS)
    rates = {} if tuned is None else tuned.recipes()
    images = 0 if tuned is None else tuned.images
    return [
        *(
            Unit(tuning.tuning_arm(arm), recipe, images, tuning.SEED, config.dataset, channels)
            for (arm, _), recipe in rates.items()
        ),
        *(
            Unit(arm, *recipe_of(config, arm), seed, config.dataset, config.channels)
            for seed in range(config.seeds)
            for arm in config.arms
        ),
    ]


def run(unit: Unit, run: Run, tools: Tools) -> dict[str, Any]:
    """Train the network (or find it) and append its rows."""
    return run_stage(unit.stage, run, tools)


def cost(unit: Unit) -> float:
    """Seconds on one slow core, roughly: 35 ms a hundred images at 8 channels, twice that for two gradients."""
    gradients = 2 if unit.recipe.optimizer == "sam" else 1
    return 3.0 + gradients * unit.recipe.epochs * unit.num_train * 3.5e-4 * (unit.channels / 8) ** 1.5


def forecast(unit: Unit, tools: Tools) -> float:
    """From a few timed steps."""
    return forecast_stage(unit.stage, tools)


# ------------------------------------------------------------------------------------------------ verdicts from rows


def is_as_written(config: Config) -> bool:
    """Whether the arms of the paper follow its protocol (seeds and arms may be fewer)."""
    free = {"seeds", "arms", "few_images", "few_epochs", "lr_tuned", "lr_few", "tuning", "rho"}
    names = [field.name for field in fields(Config) if field.name not in free]
    return all(getattr(config, name) == getattr(Config(), name) for name in names)


def has_papers_rates(config: Config) -> bool:
    """Whether data, batches and rates are the paper's, so that a direction can be compared with its own."""
    names = ("dataset", "small_batch", "batch", "lr_small", "lr", "lr_adam", "lr_full", "momentum")
    return all(getattr(config, name) == getattr(Config(), name) for name in names)


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims with their controls; then the controls as claims of their own, and the audit."""
    found = [
        adam_claim(rows, config),
        adam_batch_claim(rows, config),
        full_batch_claim(rows, config),
        undertrained_claim(rows, config),
        tuned_claim(rows, config),
        momentum_claim(rows, config),
        sam_claim(rows, config),
    ]
    if has_papers_rates(config):
        return found
    return [replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, note="") for claim in found]


def gap_of(rows: Sequence[Row], config: Config, one: str, other: str) -> tuple[Estimate | None, float, str]:
    """The gap's interval, what the two arms cost, and the words below the verdict: tests, fits, scale."""
    found = gap(rows, where(one), where(other))
    fits = trained_words(rows, {arm: where(arm) for arm in (one, other)})
    words = (test_words(found), fits, scaled_note(is_as_written(config), config))
    return interval(found), seconds(rows, [where(one), where(other)]), "; ".join(filter(None, words))


def adam_claim(rows: Sequence[Row], config: Config) -> Claim:
    """An equivalence, by TOST and not by a large p."""
    measured, cost, note = gap_of(rows, config, "adam", "sgd-32")
    verdict, test = no_worse(rows, where("adam"), where("sgd-32"), MARGIN, two_sided=True)
    about = statistics.mean(paper.ADAM_ACCURACY) - published(32)
    text = f"Adam is within {MARGIN} points of small-batch SGD"
    return Claim("adam", text, round(about, 2), measured, cap(verdict, is_as_written(config)), "points",
                 cost_seconds=cost, note="; ".join(filter(None, (test, note))))  # fmt: skip


def adam_batch_claim(rows: Sequence[Row], config: Config) -> Claim:
    """Adam against momentum SGD of its own batch size."""
    measured, cost, note = gap_of(rows, config, "adam", "sgd-128")
    about = statistics.mean(paper.ADAM_ACCURACY) - published(128)
    verdict = cap(judge(measured, about, 0.0), is_as_written(config))
    text = f"Adam tests better than SGD at the same batch of {config.batch}"
    return Claim("adam_batch", text, round(about, 2), measured, verdict, "points", cost_seconds=cost, note=note)


def full_batch_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The paper's argument that noise is necessary; it survives if the tuned pair keeps the gap, and half of it."""
    measured, cost, note = gap_of(rows, config, "sgd-128", "full-batch")
    about = published(128) - statistics.mean(paper.FULL_BATCH_ACCURACY)
    verdict = cap(judge(measured, about, 0.0), is_as_written(config))
    tuned, few = where(PAIR[0]), where(PAIR[1])
    name = "both tuned, the same images and updates"
    controls = gap_controls(rows, (where("sgd-128"), where("full-batch")), {name: (few, tuned)})
    survives, told = survival(verdict, controls)
    return Claim("full_batch", "Stochasticity is necessary: full-batch descent tests far below SGD", round(about, 2),
                 measured, verdict, "points", survives, told, cost, note=note)  # fmt: skip


def undertrained_claim(rows: Sequence[Row], config: Config) -> Claim:
    """The paper's own number for why: 36.7 % on its training images."""
    measured = mean(rows, "train_accuracy", where("full-batch"), factor=100)
    about = statistics.mean(paper.FULL_BATCH_TRAIN_ACCURACY)
    verdict = cap(judge_tolerance(measured, about, 5.0, null_value=100.0).verdict, is_as_written(config))
    tuned = mean(rows, "train_accuracy", where("full-batch-tuned"), factor=100)
    control = "" if tuned is None else f"tuned it ends at {tuned} on its training images"
    note = scaled_note(is_as_written(config), config)
    return Claim("undertrained", "Audit: full-batch descent as written has not fitted its training images (100 %)",
                 round(about, 1), measured, verdict, "%", Survives.NOT_TESTED, control,
                 seconds(rows, [where("full-batch")]), note=note)  # fmt: skip


def tuned_claim(rows: Sequence[Row], config: Config) -> Claim:
    """Noise is not needed if full-batch descent is no worse, once both are tuned alike."""
    measured, cost, note = gap_of(rows, config, *PAIR)
    verdict, test = no_worse(rows, where(PAIR[0]), where(PAIR[1]), TUNED_MARGIN, two_sided=False)
    updates, tuned = recipe_of(config, PAIR[0])[0].epochs, grid(config)
    losses = [geometric(rows, "fit_loss", where(arm)) for arm in PAIR]
    shown = [f"{loss.value:.2g}" for loss in losses if loss is not None]
    fits = f" (training loss {shown[0]} against {shown[1]})" if len(shown) == 2 else ""
    text = f"Control: full-batch descent is at most {TUNED_MARGIN:g} point below SGD, both tuned{fits}"
    about = f"the same first {config.few_images:,} images, {updates:,} updates each"
    cost += 0.0 if tuned is None else tuned.seconds(rows)
    return Claim("full_batch_tuned", text, "not run", measured, cap(verdict, is_as_written(config)), "points",
                 cost_seconds=cost, note="; ".join(filter(None, (test, about, note))))  # fmt: skip


def momentum_claim(rows: Sequence[Row], config: Config) -> Claim:
    """At small rates momentum is a rescaled rate: a positive control of the comparison."""
    measured, cost, note = gap_of(rows, config, "plain-sgd", "sgd-128")
    verdict, test = no_worse(rows, where("plain-sgd"), where("sgd-128"), MARGIN, two_sided=True)
    text = f"Control: plain SGD at lr/(1 − β) is within {MARGIN} points of momentum SGD"
    return Claim("momentum", text, "theory: 0", measured, cap(verdict, is_as_written(config)), "points",
                 cost_seconds=cost, note="; ".join(filter(None, (test, note))))  # fmt: skip


def sam_claim(rows: Sequence[Row], config: Config) -> Claim:
    """Sharpness-aware minimization, at twice the gradients."""
    measured, cost, note = gap_of(rows, config, "sam", "sgd-128")
    text = f"Control: SAM tests better than SGD at the same batch of {config.batch}"
    verdict = cap(above(measured, 0.0), is_as_written(config))
    return Claim("sam", text, "theory: > 0", measured, verdict, "points", cost_seconds=cost,
                 note="; ".join(filter(None, ("twice the gradients an update", note))))  # fmt: skip


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """The tuned pair makes equally many updates at rates that tuning chose; on digits also what fitting must do."""
    found: list[Law] = []
    if set(PAIR) <= set(config.arms):
        counts = {count for arm in PAIR for count in values(rows, "updates", where(arm))}
        shown = ", ".join(f"{count:g}" for count in sorted(counts))
        found.append(Law(f"{PAIR[0]} and {PAIR[1]} make equally many updates: {shown}", len(counts) == 1))
    if (tuned := grid(config)) is not None:
        found += tuned.laws(rows)
    if config != replace(PRESETS["smoke"], seeds=config.seeds):
        return found
    slow = ratio(rows, "fit_loss", where("full-batch"), where("sgd-128"))
    tuned = ratio(rows, "fit_loss", where("full-batch-tuned"), where("full-batch"))
    high, low = (math.nan if one is None else one.value for one in (slow, tuned))
    worst = min(
        (value for arm in ("sgd-32", "sgd-128", "plain-sgd", "adam", "sam")
         for value in values(rows, "test_accuracy", where(arm))), default=math.nan,
    )  # fmt: skip
    return [
        *found,
        Law(f"full-batch descent as written ends at a higher training loss than SGD: {high:.1f} × > 1", high > 1),
        Law(f"tuning lowers its training loss: {low:.2g} × < 1", low < 1),
        Law(
            f"every stochastic optimizer learns the digits: lowest test accuracy {100 * worst:.1f} % ≥ 80", worst >= 0.8
        ),
    ]


# ------------------------------------------------------------------------------------------------ tables and figures


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T6: every arm; then the gaps with their tests, and how the pair was tuned."""
    found = optimizer_tables(rows, recipes(config), show_paper=has_papers_rates(config))
    tuned = grid(config)
    return found if tuned is None else [*found, tuned.table(rows)]


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F8: test accuracy by arm; training loss through the epochs."""
    return [optimizer_figure(rows, recipes(config), show_paper=is_as_written(config))]


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    found = [
        "The paper states no momentum for full-batch descent; its common 0.9 is taken.",
        "Rates of all arms but the tuned pair are the paper's, or follow from them, and are not tuned: a difference "
        "between optimizers is one between these settings.",
        "Full-batch steps still normalize by the batch, which is here all images.",
    ]
    if (tuned := grid(config)) is not None:
        found.insert(1, tuned.words(config.channels, config.few_images, recipe_of(config, PAIR[0])[0].epochs))
    return found
