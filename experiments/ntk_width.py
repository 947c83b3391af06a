# SPDX-License-Identifier: Apache-2.0
"""Are wider networks lazier?

Question: Relative weight movement falls with width. Do wide networks train lazily, or does only ‖θ_0‖ grow?

Source: arXiv 2604.07603, experiment 5 (MLP 784-w-w-w-10 in PyTorch's default parametrization, first 5,000 MNIST images,
30 epochs, batch 128, SGD lr 0.01, momentum 0.9, cosine schedule). Its two seeds are not ours.

Prediction: As written, Δ = ‖θ_T − θ_0‖/‖θ_0‖ falls by 11.3 from width 32 to 4096 with slope −0.50; but
‖θ_0‖ ≈ √(w + 4), so that 11.3 = √(4096/32) and the absolute movement is constant. Laziness is a matter of the kernel
drift ‖K_T − K_0‖/‖K_0‖ and of the linearization error ‖f_T − f_lin‖/‖f_T − f_0‖, which are measured as the control.

Arms. ``standard``: as written. ``ntk``: the same initial function in NTK parametrization (Jacot et al. 2018), whose
kernel has a limit as the width grows. PyTorch's default gain 1/√3 is far below the critical √2 and lets signal and
kernel vanish with depth, a start that no network can leave lazily; ``ntk-he``: NTK parametrization with all parameters
scaled by √6, that is gain √2 (He et al. 2015): the textbook's lazy network, the measurement's positive control.
"""

import sys

if __name__ == "__main__":  # run as a file: the checkout's root takes this folder's place on the path
    import runpy
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv[1:1] = ["run", Path(__file__).stem]
    runpy.run_module("experiments", run_name="__main__")

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from curvlab.data import Dataset
from curvlab.models import MLP
from curvlab.norms import NormRecorder
from curvlab.operators.ntk import empirical_ntk
from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.stats import Survives, Verdict
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.grouped import train_group
from curvlab.training.loop import Recipe, evaluate
from curvlab.training.seeding import generator
from experiments.base import Law, Tools
from experiments.base.laziness import MEASURES, Stopwatch, measure, movement_rows
from experiments.base.laziness_claims import PUBLISHED, deviations, laziness_claims
from experiments.base.laziness_report import laziness_figures, laziness_tables
from experiments.base.scaling import Scaling, slope_table

PROTOCOL = 1

Arm = Literal["standard", "ntk", "ntk-he"]
ARMS: tuple[Arm, ...] = ("standard", "ntk", "ntk-he")


@dataclass(frozen=True)
class Config:
    """The paper's protocol; presets and ``field=value`` change it."""

    dataset: Literal["mnist", "digits"] = "mnist"
    num_train: int = 5000
    """The first that many training images, in the order of the file."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    seeds: int = 5
    """Seeds 0 .. seeds-1; each draws its own network and its own orders."""
    one_seed_from: int = 0
    """From this width on only seed 0 (0: never)."""
    arms: tuple[Arm, ...] = ARMS
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.01
    lr_ntk: float = 10.0
    """Of the NTK arms, whose gradients carry 1/sqrt(3 fan_in). Of 3, 10, 20 and 30 (one seed, widths 32, 128, 512) the
    largest at which ``ntk-he``'s linearization error stays near one at width 32 (1.08; 1.47 at 20); the test accuracies
    there are those of the standard arm within half a point."""
    momentum: float = 0.9
    kernel_samples: int = 500
    """The kernel is taken on the first that many training images."""
    function_samples: int = 1000
    """The linearization error is taken on the first that many test images."""

    def __post_init__(self) -> None:
        counts = (self.seeds, *self.widths, self.kernel_samples, self.function_samples)
        if not self.widths or min(counts) < 1 or len(set(self.widths)) != len(self.widths):
            raise ValueError(
                f"Config: seeds, sample counts and widths must be at least 1, widths different, got {self}"
            )
        if self.one_seed_from < 0:
            raise ValueError(f"Config: one_seed_from must be at least 0 (0: never), got {self.one_seed_from}")
        if not self.arms or not set(self.arms) <= set(ARMS) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"Config: arms must be some of {', '.join(ARMS)}, each once, got {self.arms}")
        if self.kernel_samples > self.num_train:
            raise ValueError(f"Config: kernel_samples must be at most num_train = {self.num_train}, got {self}")
        for lr in (self.lr, self.lr_ntk):
            Recipe(self.epochs, self.batch_size, lr, self.momentum)


@dataclass(frozen=True)
class Unit:
    """All seeds of one width in one arm, trained together: what a run's name covers."""

    width: int
    parametrization: Arm
    seeds: tuple[int, ...]
    lr: float = 0.01
    dataset: str = "mnist"
    num_train: int = 5000
    epochs: int = 30
    batch_size: int = 128
    momentum: float = 0.9
    kernel_samples: int = 500
    function_samples: int = 1000

    @property
    def recipe(self) -> Recipe:
        """How to train."""
        return Recipe(self.epochs, self.batch_size, self.lr, self.momentum)

    def __str__(self) -> str:
        count = "1 seed" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        return f"{self.parametrization}, width {self.width}, {count}"


COMMON = ("dataset", "num_train", "epochs", "batch_size", "momentum", "kernel_samples", "function_samples")

PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits",
        num_train=1000,
        epochs=150,  # 1,200 updates, as many as 30 epochs on 5,000 images: movement is flat once the loss is small
        widths=(16, 32, 64, 128, 256),
        seeds=2,
        arms=("standard", "ntk-he"),
        kernel_samples=100,
        function_samples=300,
    ),
    "cpu": Config(seeds=3, one_seed_from=2048),
    "paper": Config(),
}


def expand(config: Config) -> list[Unit]:
    """One unit for every width and arm, the standard arm first, narrow before wide."""
    common = {name: getattr(config, name) for name in COMMON}
    units = []
    for arm in config.arms:
        for width in sorted(config.widths):
            count = 1 if config.one_seed_from and width >= config.one_seed_from else config.seeds
            lr = config.lr if arm == "standard" else config.lr_ntk
            units.append(Unit(width, arm, tuple(range(count)), lr, **common))
    return units


# ------------------------------------------------------------------------------------------------ running one unit


def initial_model(unit: Unit, seed: int, data: Dataset) -> MLP:
    """θ_0 of a seed: a function of unit and seed alone, so it is drawn again wherever it is needed."""
    model = MLP(
        unit.width,
        in_features=data.train_x[0].numel(),
        num_classes=data.num_classes,
        parametrization="standard" if unit.parametrization == "standard" else "ntk",
        generator=generator(seed, "init"),
    )
    if unit.parametrization == "ntk-he":
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(math.sqrt(6.0))  # variance 1/3 -> 2 of the effective weights, times 1/fan_in
    return model.to(data.train_x.device)


def run(unit: Unit, run: Run, tools: Tools) -> dict[str, Any]:
    """Train all seeds of the unit, measure each, append its rows."""
    data = tools.dataset(unit.dataset, unit.num_train)
    models = [initial_model(unit, seed, data) for seed in unit.seeds]
    steps = unit.recipe.steps_per_epoch(unit.num_train)
    recorders = {seed: NormRecorder(reference="start", every=steps) for seed in unit.seeds}
    clocks = {seed: Stopwatch() for seed in unit.seeds}
    result = train_group(
        models,
        data,
        unit.recipe,
        seeds=unit.seeds,
        callbacks=lambda seed: [recorders[seed], clocks[seed]],
        checkpoint=CheckpointFile(run.checkpoint_path, every_seconds=tools.checkpoint_seconds),
        progress=lambda done, epochs: tools.progress(done, epochs + 1),  # the measurement counts as one epoch
    )
    spent = max(clock.seconds for clock in clocks.values())
    for seed, model, diverged in zip(unit.seeds, models, result.diverged, strict=True):
        rows = [
            {"epoch": line["epoch"], "metric": metric, "value": line[metric]}
            for line in result.history
            if line["seed"] == seed
            for metric in ("train_loss", "train_accuracy")
        ]
        final = {"diverged": float(diverged)} | ({} if diverged else final_values(unit, seed, model, data))
        final["train_seconds"] = spent / len(unit.seeds)
        rows += movement_rows(recorders[seed], steps)
        rows += [{"epoch": unit.epochs, "metric": key, "value": value} for key, value in final.items()]
        factors = {"width": unit.width, "parametrization": unit.parametrization, "seed": seed}
        run.append([factors | row for row in rows])
    return {"engine": result.engine, "diverged": sum(result.diverged)}


def final_values(unit: Unit, seed: int, model: MLP, data: Dataset) -> dict[str, float]:
    """Test accuracy and laziness of a trained network.

    Raises:
        ValueError: more function_samples than the data set has test images.
    """
    if unit.function_samples > len(data.test_x):
        raise ValueError(
            f"function_samples must be at most {len(data.test_x)} ({data.name}), got {unit.function_samples}"
        )
    inputs, held_out = data.train_x[: unit.kernel_samples], data.test_x[: unit.function_samples]
    test_loss, test_accuracy = evaluate(model, data.test_x, data.test_y)
    found = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    return found | measure(model, initial_model(unit, seed, data), inputs, held_out)


def cost(unit: Unit) -> float:
    """Seconds on two slow cores, roughly: 6 FLOP a parameter and sample, 0.4 ms a step, two kernels."""
    params = 784 * unit.width + 2 * unit.width**2
    steps = unit.recipe.epochs * unit.recipe.steps_per_epoch(unit.num_train)
    train = steps * (4e-4 + 6 * params * unit.recipe.batch_size / 6e10)
    kernels = (10 * unit.kernel_samples) ** 2 * (1e-7 + 8 * unit.width / 6e10)
    return 0.5 + len(unit.seeds) * (train + kernels + 0.1)


def forecast(unit: Unit, tools: Tools) -> float:
    """The best of three timings of three training steps, and one kernel, scaled up."""
    data = tools.dataset(unit.dataset, unit.num_train)
    models = [initial_model(unit, seed, data) for seed in unit.seeds]
    recipe = replace(unit.recipe, epochs=1)
    total = recipe.steps_per_epoch(unit.num_train)
    steps = min(3, total)
    few = data.subset(min(unit.num_train, steps * recipe.batch_size))
    step = min(train_group(models, few, recipe, seeds=unit.seeds).seconds for _ in range(3)) / steps
    began = time.perf_counter()
    empirical_ntk(models[0], data.train_x[: unit.kernel_samples])
    return step * unit.epochs * total + 2 * len(unit.seeds) * (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------ verdicts from rows


def arms_of(rows: Sequence[Row], config: Config) -> dict[str, Scaling]:
    """Each arm as functions of the width; the standard arm is always there, perhaps empty."""
    names = dict.fromkeys(("standard", *config.arms))
    return {name: Scaling(rows, "width", {"parametrization": name}) for name in names}


def is_as_written(config: Config) -> bool:
    """Whether the standard arm follows the paper's protocol (its widths and seeds may be fewer)."""
    return all(getattr(config, name) == getattr(Config(), name) for name in ("lr", *COMMON[:5]))


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims, each with its control; then the audit and the control arms."""
    found = laziness_claims(arms_of(rows, config))
    if is_as_written(config):
        return found
    # Laws are worth showing on other data and settings too; a comparison with the paper's own numbers is not.
    shown = [replace(claim, measured=None) if claim.id in ("means", "accuracy") else claim for claim in found]
    return [replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, note="") for claim in shown]


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """What must hold where the protocol is a preset's own: on digits the law, on MNIST the paper's numbers."""
    arm = arms_of(rows, config)["standard"]
    slope, absolute = arm.slope("relative_movement"), arm.means("absolute_movement")
    smoke = PRESETS["smoke"]
    is_smoke = config == replace(smoke, seeds=config.seeds, arms=config.arms)
    if slope is None or not (is_smoke or is_as_written(config)):
        return []
    width = 0.1 if is_smoke else 0.03
    found = [Law(f"slope of Δ is −0.50 ± {width}: {slope}", abs(slope.value + 0.5) <= width)]
    if is_smoke:
        middle = sum(mean.value for mean in absolute.values()) / len(absolute)
        worst = max(abs(mean.value / middle - 1) for mean in absolute.values())
        return [*found, Law(f"absolute movement is flat within 15 %: worst {100 * worst:.1f} %", worst <= 0.15)]
    shifts = {width: shift.value for width, shift in deviations(arm, PUBLISHED).items()}
    listed = ", ".join(f"{width}: {shift:+.1f} %" for width, shift in shifts.items())
    text = f"mean Δ is within 5 % of the paper's at {len(shifts)} widths: {listed}"
    return [*found, Law(text, all(abs(shift) <= 5 for shift in shifts.values()))]


# ------------------------------------------------------------------------------------------------ tables and figures


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T5: everything by arm and width; then the slopes."""
    arms = arms_of(rows, config)
    about = f"Kernel on the first {config.kernel_samples} training images, linearization error on the first "
    published = PUBLISHED if is_as_written(config) else {}
    return [
        *laziness_tables(arms, published, note=f"{about}{config.function_samples} test images."),
        slope_table(
            arms,
            MEASURES,
            title="Log–log slopes against width",
            caption="Least squares over all seeds; intervals from the larger of residual and lack-of-fit error.",
        ),
    ]


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F7: four laziness curves; and accuracy against width."""
    widths = sorted(config.widths)
    return laziness_figures(arms_of(rows, config), widths, PUBLISHED if is_as_written(config) else {})


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    arm = arms_of(rows, config)["standard"]
    growth = arm.means("kernel_growth")
    found = [
        "The survival rule stands in experiments/base/survival.py, what is asked in laziness_claims.py; the control "
        "column gives each control with its number.",
        "Groups of one seed have intervals under the assumption that all widths share one relative spread.",
        f"NTK arms: lr {config.lr_ntk:g} (the parametrization divides gradients by √(3 fan_in)), all else as written.",
    ]
    ends = []
    for name, scaling in arms_of(rows, config).items():
        losses = [scaling.geometric_mean("train_loss", width) for width in scaling.groups("train_loss")]
        if len(losses) > 1 and losses[0] and losses[-1]:
            ends.append(f"{name} {losses[0].value:.2g} → {losses[-1].value:.2g}")
    if ends:
        found.append(
            f"Last training loss, narrowest → widest: {', '.join(ends)}. At one learning rate networks of different "
            "width train differently far, and what they drift is confounded with that."
        )
    if growth:
        first, last = min(growth), max(growth)
        found.append(
            f"Under PyTorch's default gain the kernel's norm grows {growth[first].value:.0f}-fold at width {first} and "
            f"{growth[last].value:.0f}-fold at width {last} in training: the initial kernel is not the one that learns."
        )
    return found
