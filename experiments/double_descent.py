# SPDX-License-Identifier: Apache-2.0
"""Is there a second descent, and does curvature follow it?

Question: Wider networks generalize better past interpolation. Is that a second descent, with a peak before it, and do
λ_max and trace of the Hessian follow?

Source: arXiv 2604.07603, experiment 1 (MLP 784-w-w-w-10 on 10,000 MNIST images, lr 0.05; CNN without batch
normalization on CIFAR-10, lr 0.1; 60 epochs, batch 128, SGD momentum 0.9, cosine schedule, two seeds). Its curvature
was never measured along the sweep, and its CNN "peak" at c = 8 averages in one diverged run.

Prediction: As written test error falls all along the MLP sweep, so there is no peak to descend from. With 20 % wrong
training labels it peaks near interpolation. Random ReLU features with minimum-norm least squares peak exactly at N = n,
where it is the smallest eigenvalue that vanishes and not the largest that grows.

Arms. As written: no label noise, the CNN without batch normalization at lr 0.1. Control: wrong labels in part of the
training set (fixed for all seeds), the CNN with batch normalization at lr 0.01. A network whose training accuracy ends
below 1.5 times chance, or whose loss is not finite, has collapsed: it is counted and shown, never averaged in.
"""

import sys

if __name__ == "__main__":  # run as a file: the checkout's root takes this folder's place on the path
    import runpy
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv[1:1] = ["run", Path(__file__).stem]
    runpy.run_module("experiments", run_name="__main__")

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from curvlab.data import Dataset
from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.stats import Survives, Verdict
from curvlab.runs.store import Row, Run, RunStore
from curvlab.runs.tables import Table
from curvlab.training.loop import Recipe, evaluate, train
from curvlab.training.stages import Network, Samples, Trained, TrainStage, train_or_load
from experiments.base import Law, Tools, random_features
from experiments.base.curvature import curvature_of
from experiments.base.descent import descent_claims
from experiments.base.descent_report import descent_figures, descent_notes, descent_tables
from experiments.base.descent_rows import Features, Sweeps

PROTOCOL = 1
COLLAPSED = 1.5  # times chance: a training accuracy below this is no trained network


@dataclass(frozen=True)
class Config:
    """The paper's protocol and the controls; presets and ``field=value`` change it."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """Of the MLPs and of the random features."""
    image_dataset: Literal["cifar10", "digits"] = "cifar10"
    """Of the CNNs."""
    seeds: int = 5
    batch_size: int = 128
    momentum: float = 0.9
    noise: tuple[float, ...] = (0.1, 0.2)
    """Shares of wrong training labels in the control arms; the last one is the CNNs' as well."""
    num_train: int = 10_000
    widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    noise_widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    epochs: int = 60
    lr: float = 0.05
    num_images: int = 50_000
    """Training images of the CNNs."""
    channels: tuple[int, ...] = (4, 8, 16, 32, 64, 96)
    noise_channels: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 96)
    """Of the CNNs with batch normalization and wrong labels."""
    image_epochs: int = 60
    image_lr: float = 0.1
    image_lr_controlled: float = 0.01
    """Of the CNNs with batch normalization."""
    curvature_samples: int = 1000
    """λ_max and trace are taken on the first that many training images."""
    trace_probes: int = 32
    feature_samples: int = 1000
    """n of the random features."""
    feature_seeds: int = 5
    feature_ratios: tuple[float, ...] = (
        0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 8.0,
    )  # fmt: skip
    """N/n."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """All data sets."""
        return (self.dataset, self.image_dataset)

    def __post_init__(self) -> None:
        sizes = (self.widths, self.noise_widths, self.channels, self.noise_channels)
        numbers = (
            self.seeds,
            self.feature_seeds,
            self.curvature_samples,
            self.trace_probes,
            *(s for x in sizes for s in x),
        )
        if min(numbers) < 1 or any(len(set(each)) != len(each) for each in sizes):
            raise ValueError(f"Config: seeds, sample counts and sizes must be at least 1, sizes different, got {self}")
        if not all(0 < share < 1 for share in self.noise) or len(set(self.noise)) != len(self.noise):
            raise ValueError(f"Config: noise must be different shares within (0, 1), got {self.noise}")
        if self.curvature_samples > min(self.num_train, self.num_images):
            raise ValueError(f"Config: curvature_samples must be at most num_train and num_images, got {self}")
        if not self.feature_ratios or min(self.feature_ratios) * self.feature_samples < 1:
            raise ValueError(f"Config: feature_ratios must give at least one feature, got {self.feature_ratios}")
        for epochs, lr in ((self.epochs, self.lr), (self.image_epochs, self.image_lr), (1, self.image_lr_controlled)):
            Recipe(epochs, self.batch_size, lr, self.momentum)


@dataclass(frozen=True)
class Training:
    """All seeds of one network in one arm."""

    network: Literal["mlp", "cnn"]
    size: int
    seeds: tuple[int, ...]
    label_noise: float = 0.0
    batch_norm: bool = False
    dataset: str = "mnist"
    num_train: int = 10_000
    epochs: int = 60
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9

    def stage(self, seed: int) -> TrainStage:
        """What trains the seed's network; other studies that ask for the same find it."""
        network = Network(self.network, self.size, **({"batch_norm": self.batch_norm} if self.network == "cnn" else {}))
        recipe = Recipe(self.epochs, self.batch_size, self.lr, self.momentum)
        return TrainStage(network, Samples(self.dataset, self.num_train, self.label_noise), recipe, seed, loss_mark=0.0)

    def __str__(self) -> str:
        arm = f"{self.network.upper()}({self.size}){' + BN' if self.batch_norm else ''}"
        noise = f", {100 * self.label_noise:g} % noise" if self.label_noise else ""
        return f"{arm}{noise}, {len(self.seeds)} seeds"


@dataclass(frozen=True)
class Curvature(Training):
    """λ_max and trace of the networks of a :class:`Training`."""

    curvature_samples: int = field(kw_only=True)
    trace_probes: int = field(kw_only=True)

    def __str__(self) -> str:
        return f"curvature of {super().__str__()}"


@dataclass(frozen=True)
class FeatureSweep:
    """All sizes of one draw of random features."""

    seed: int
    size: int  # n
    counts: tuple[int, ...]
    label_noise: float
    dataset: str = "mnist"

    def __str__(self) -> str:
        return f"random features, n = {self.size}, seed {self.seed}"


Unit = Training | Curvature | FeatureSweep

PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits",
        image_dataset="digits",
        seeds=2,
        noise=(0.2,),
        num_train=1000,
        widths=(4, 8, 16, 32, 64),
        noise_widths=(4, 8, 16, 32, 64),
        num_images=400,
        channels=(2, 4),
        noise_channels=(1, 2, 4),
        image_epochs=20,
        curvature_samples=200,
        trace_probes=8,
        feature_samples=200,
        feature_seeds=2,
    ),
    "cpu": Config(
        seeds=2,
        noise_widths=(8, 16, 32, 64, 128, 256),
        num_images=2000,
        channels=(4, 8, 16),
        noise_channels=(2, 4, 8, 16),
        image_epochs=32,
        feature_seeds=3,
    ),
    "paper": Config(),
}


def expand(config: Config) -> list[Unit]:
    """Random features first (they take seconds), then every network's training, then every network's curvature."""
    counts = tuple(sorted({max(1, round(ratio * config.feature_samples)) for ratio in config.feature_ratios}))
    noise = max(config.noise, default=0.2)
    found: list[Unit] = [
        FeatureSweep(seed, config.feature_samples, counts, noise, config.dataset)
        for seed in range(config.feature_seeds)
    ]
    seeds = tuple(range(config.seeds))
    common: dict[str, Any] = {"batch_size": config.batch_size, "momentum": config.momentum}
    mlp = common | {"dataset": config.dataset, "num_train": config.num_train, "epochs": config.epochs, "lr": config.lr}
    cnn = common | {"dataset": config.image_dataset, "num_train": config.num_images, "epochs": config.image_epochs}
    trained: list[Training] = [Training("mlp", width, seeds, **mlp) for width in sorted(config.widths)]
    for share in config.noise:
        trained += [Training("mlp", width, seeds, share, **mlp) for width in sorted(config.noise_widths)]
    trained += [Training("cnn", c, seeds, lr=config.image_lr, **cnn) for c in sorted(config.channels)]
    with_bn = {"batch_norm": True, "lr": config.image_lr_controlled, **cnn}
    trained += [Training("cnn", c, seeds, **with_bn) for c in sorted(config.channels)]
    if config.noise:
        trained += [Training("cnn", c, seeds, noise, **with_bn) for c in sorted(config.noise_channels)]
    measured: dict[str, Any] = {"curvature_samples": config.curvature_samples, "trace_probes": config.trace_probes}
    found += trained
    for one in trained:
        found.append(Curvature(**{f.name: getattr(one, f.name) for f in fields(one)}, **measured))
    return found


# ------------------------------------------------------------------------------------------------ running one unit


def run(unit: Unit, run: Run, tools: Tools) -> dict[str, Any]:
    """Train, measure, or solve; append the unit's rows."""
    if isinstance(unit, FeatureSweep):
        return run_features(unit, run, tools)
    data, store = tools.dataset(unit.dataset), RunStore(run.path.parents[1])
    collapsed = 0
    for index, seed in enumerate(unit.seeds):

        def progress(done: int, epochs: int, index: int = index) -> None:
            tools.progress(index * epochs + done, len(unit.seeds) * epochs + 1)

        trained = train_or_load(
            store,
            unit.stage(seed),
            data,
            checkpoint_seconds=tools.checkpoint_seconds,
            progress=progress,
            environment=tools.environment(),
        )
        lost = has_collapsed(trained, data.num_classes)
        collapsed += lost
        if isinstance(unit, Curvature):
            found = {} if lost else measure(unit, trained.model, data)
            rows = []
        else:
            found = final_values(trained, unit.stage(seed).samples.take(data), lost)
            rows = [
                {"epoch": line["epoch"], "metric": metric, "value": line[metric]}
                for line in trained.history
                for metric in ("train_loss", "train_accuracy")
            ]
        rows += [{"epoch": unit.epochs, "metric": metric, "value": value} for metric, value in found.items()]
        run.append([{"seed": seed, **row} for row in rows])
    return {"collapsed": collapsed}


def has_collapsed(trained: Trained, num_classes: int) -> bool:
    """Whether the network is no trained network; see the module's text."""
    return trained.diverged or trained.history[-1]["train_accuracy"] < COLLAPSED / num_classes


def final_values(trained: Trained, data: Dataset, collapsed: bool) -> dict[str, float]:
    """Accuracies and losses in eval mode; a collapsed network's stand under names of their own."""
    test_loss, test_accuracy = evaluate(trained.model, data.test_x, data.test_y)
    fit_loss, fit_accuracy = evaluate(trained.model, data.train_x, data.train_y)
    found = {"test_loss": test_loss, "test_accuracy": test_accuracy, "fit_loss": fit_loss, "fit_accuracy": fit_accuracy}
    if collapsed:
        found = {f"collapsed_{name}": value for name, value in found.items()}
    params = float(sum(param.numel() for param in trained.model.parameters()))
    return found | {"collapsed": float(collapsed), "parameters": params, "train_seconds": trained.seconds}


def measure(unit: Curvature, model: nn.Module, data: Dataset) -> dict[str, float]:
    """λ_max and trace on the first training images, with the labels that the network was trained on."""
    taken = unit.stage(0).samples.take(data).subset(unit.curvature_samples)
    return curvature_of(model, taken.train_x, taken.train_y, probes=unit.trace_probes)


def run_features(unit: FeatureSweep, run: Run, tools: Tools) -> dict[str, Any]:
    """Every number of features, with the true and with the noisy labels."""
    data = tools.dataset(unit.dataset).subset(unit.size)
    noisy = Samples(unit.dataset, unit.size, unit.label_noise).take(data).train_y
    began = time.perf_counter(), time.process_time()
    for done, (count, curvature, clean, wrong) in enumerate(
        random_features.sweep(data, noisy, unit.counts, unit.seed), start=1
    ):
        rows = [{"labels": "both", "metric": f"feature_{name}", "value": value} for name, value in curvature.items()]
        for labels, found in (("clean", clean), ("noisy", wrong)):
            rows += [{"labels": labels, "metric": f"feature_{name}", "value": value} for name, value in found.items()]
        run.append([{"features": count, "seed": unit.seed, **row} for row in rows])
        tools.progress(done, len(unit.counts))
    spent = {"features": 0, "labels": "both", "seed": unit.seed, "metric": "feature_seconds"}
    run.append([{**spent, "value": min(time.perf_counter() - began[0], time.process_time() - began[1])}])
    return {}


def cost(unit: Unit) -> float:
    """Seconds on one slow core, roughly."""
    if isinstance(unit, FeatureSweep):
        return sum(2e-9 * unit.size * count * min(unit.size, count) for count in unit.counts)  # a decomposition each
    c = unit.size
    forward = 784 * c + 2 * c * c if unit.network == "mlp" else 4.75e4 * c + 3.6e4 * c * c  # multiply-adds a sample
    if isinstance(unit, Curvature):
        return len(unit.seeds) * (0.5 + (40 + unit.trace_probes) * 16 * forward * unit.curvature_samples / 8e10)
    steps = unit.epochs * -(-unit.num_train // unit.batch_size)
    overhead = 4e-4 if unit.network == "mlp" else 1e-2
    return len(unit.seeds) * steps * (overhead + 6 * forward * unit.batch_size / 8e10)


def forecast(unit: Unit, tools: Tools) -> float:
    """Three training steps scaled up; what is no training by :func:`cost`."""
    if isinstance(unit, (FeatureSweep, Curvature)):
        return cost(unit)
    stage, data = unit.stage(0), tools.dataset(unit.dataset)
    few = data.subset(min(unit.num_train, 3 * unit.batch_size))
    steps = -(-len(few.train_x) // unit.batch_size)
    model, recipe = stage.network.build(few, 0), replace(stage.recipe, epochs=1)
    step = min(train(model, few, recipe, seed=0).seconds for _ in range(2)) / steps
    return step * len(unit.seeds) * unit.epochs * -(-unit.num_train // unit.batch_size)


# ------------------------------------------------------------------------------------------------ verdicts and figures


def is_as_written(config: Config, network: str) -> bool:
    """Whether the arm as written follows the paper's protocol (its sizes and seeds may be fewer)."""
    shared = ("batch_size", "momentum")
    own = {
        "mlp": ("dataset", "num_train", "epochs", "lr"),
        "cnn": ("image_dataset", "num_images", "image_epochs", "image_lr"),
    }
    return all(getattr(config, name) == getattr(Config(), name) for name in (*shared, *own[network]))


def sweeps(rows: Sequence[Row], config: Config) -> Sweeps:
    """The rows as sweeps over sizes; the arm with the most wrong labels is the one judged."""
    return Sweeps(
        rows,
        noise=config.noise,
        as_written={network: is_as_written(config, network) for network in ("mlp", "cnn")},
        num_samples={"mlp": config.num_train, "cnn": config.num_images},
        features=Features(rows, config.feature_samples),
    )


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims, each with its control; then the controls and the exactly solvable case."""
    images, other = config.image_dataset, config.dataset
    found = [
        replace(claim, dataset=images if claim.id.startswith("cnn") else other)
        for claim in descent_claims(sweeps(rows, config))
    ]
    if config.dataset == "mnist":
        return found
    # On generated or tiny data the laws are worth showing; the paper's statements are not tested by them.
    return [
        claim if claim.id.startswith("features") else
        replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, control="", note="")
        for claim in found
    ]  # fmt: skip


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """The exact peak."""
    return sweeps(rows, config).features.laws()


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T3: every network; the random features."""
    return descent_tables(sweeps(rows, config))


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F4: error and curvature against size; the map of width and noise; the random features."""
    return descent_figures(sweeps(rows, config))


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    about = (
        f"λ_max (Lanczos, residual ≤ 10⁻³ λ) and trace ({config.trace_probes} Rademacher probes) are of the mean "
        f"cross-entropy of the first {config.curvature_samples} training images, eval mode, with the labels trained on."
    )
    return [about, *descent_notes(sweeps(rows, config))]
