# SPDX-License-Identifier: Apache-2.0
"""Are the minima of small batches flatter?

Question: Large batches end in sharper minima. Does that outlive equal training loss, and measures that do not see the
scale of the weights?

Source: arXiv 2604.07603, experiment 3 (CNN(32) with batch normalization, CIFAR-10, 80 epochs; batch 32 at lr 0.005
against batch 1024 at lr 0.08, one seed; λ_max by 30 power iterations on the first 1,000 training images, loss under
Gaussian noise on the first 5,000).

Prediction: As written λ_max is 11.8 times larger at batch 1024. But near zero cross-entropy the Gauss–Newton term
scales like the loss, and the losses differ 3.9-fold: λ_max/loss differs by 3.0. Weights before batch normalization
have no scale of their own: 32 times more updates let them grow, and λ_max falls with their square. Adaptive and
norm-relative measures do not see that.

Arms. ``as-written``: the batch size study's rates, equal epochs. ``equal-updates``: as many updates for every batch.
Points. ``last``: the last epoch. ``mark``: the first epoch whose running training loss is at most the mark (equal loss;
0.01, and 0.6 in the scaled preset, whose networks end between 0.1 and 0.57). The networks are the batch size study's:
found in the store by the hash of their training stage, trained where they are not.
"""

import sys

if __name__ == "__main__":  # run as a file: the checkout's root takes this folder's place on the path
    import runpy
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv[1:1] = ["run", Path(__file__).stem]
    runpy.run_module("experiments", run_name="__main__")

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from curvlab.data import Dataset
from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.store import Row, Run, RunStore
from curvlab.runs.tables import Table
from curvlab.training.stages import Trained, TrainStage, train_or_load
from experiments.base import Law, Tools, flatness, paper
from experiments.base.flatness_claims import Flatness, flatness_claims, flatness_laws, flatness_notes
from experiments.base.flatness_report import flatness_figures, flatness_tables
from experiments.base.image_networks import BatchGrid, Cell, Net, train_cells
from experiments.base.networks import correct, encode_hits, forecast_stage

PROTOCOL = 1
LOSS_MARK = 0.01  # Jiang et al. (2020) compare networks at this cross-entropy; also the training stages' own mark

Arm = Literal["as-written", "equal-updates"]
Point = Literal["last", "mark"]


@dataclass(frozen=True)
class Config(BatchGrid):
    """The paper's protocol on the batch size study's networks; presets and ``field=value`` change it."""

    arms: tuple[Arm, ...] = ("as-written", "equal-updates")
    points: tuple[Point, ...] = ("last", "mark")
    loss_mark: float = LOSS_MARK
    """Running training loss at which the networks of the point ``mark`` stand, to the epoch that first goes below it.
    Another one than the stages' own asks for networks trained once more, with the same bits."""
    hessian_samples: int = 1000
    """Curvature is taken on the first that many training images."""
    probes: int = 32
    """Of the trace."""
    power_iterations: int = 30
    """The paper's; 0: none."""
    noise_samples: int = 5000
    """Noise is applied to the loss of the first that many training images."""
    sigmas: tuple[float, ...] = tuple(paper.GEOMETRY_NOISE)
    draws: int = 5
    density_probes: int = 4
    density_steps: int = 60
    slice_samples: int = 1000
    """Images of the slices and of the barrier."""
    line_points: int = 51
    plane_points: int = 25
    extent: float = 1.0
    """Slices reach that far, in units of the filters' norms."""
    strength: float = 20.0
    """Factor α of the symmetries. Rescaling moves λ_max by at most about α²; at 10 it was 43-fold on the smoke network,
    too close to the bound of the law."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.hessian_samples, self.noise_samples, self.slice_samples, self.draws, self.probes)
        if min(*counts, self.density_probes, self.density_steps) < 1 or self.power_iterations < 0:
            raise ValueError(f"Config: counts must be at least 1, got {self}")
        if not self.loss_mark > 0:
            raise ValueError(f"Config: loss_mark must be positive, got {self.loss_mark}")
        if max(self.hessian_samples, self.noise_samples, self.slice_samples) > self.num_train:
            raise ValueError(f"Config: sample counts must be at most num_train = {self.num_train}, got {self}")
        if "as-written" not in self.arms or "last" not in self.points:
            raise ValueError(f"Config: arms must hold as-written and points last, got {self.arms} and {self.points}")


@dataclass(frozen=True)
class Measures(Net):
    """Every measure of one network at one point of its training."""

    point: Point = field(kw_only=True)
    hessian_samples: int = field(kw_only=True)
    probes: int = field(kw_only=True)
    power_iterations: int = field(kw_only=True)
    noise_samples: int = field(kw_only=True)
    sigmas: tuple[float, ...] = field(kw_only=True)
    draws: int = field(kw_only=True)
    loss_mark: float = field(default=LOSS_MARK, kw_only=True)

    @property
    def stage(self) -> TrainStage:
        """The batch size study's own, unless the mark is another one."""
        return replace(super().stage, loss_mark=self.loss_mark)

    def __str__(self) -> str:
        return f"measures of {super().__str__()}, {self.point}"


@dataclass(frozen=True)
class Landscape(Net):
    """Spectral density, slices, and the line to the same seed's network of another batch."""

    hessian_samples: int = field(kw_only=True)
    density_probes: int = field(kw_only=True)
    density_steps: int = field(kw_only=True)
    slice_samples: int = field(kw_only=True)
    line_points: int = field(kw_only=True)
    plane_points: int = field(kw_only=True)
    extent: float = field(kw_only=True)
    other_batch: int = field(kw_only=True)
    other_lr: float = field(kw_only=True)

    def __str__(self) -> str:
        return f"landscape of {super().__str__()}"


@dataclass(frozen=True)
class Symmetries(Net):
    """Measures of the same function at other parameters."""

    symmetry_samples: int = field(kw_only=True)
    strength: float = field(kw_only=True)

    def __str__(self) -> str:
        return f"symmetries of {super().__str__()}"


Unit = Measures | Landscape | Symmetries

PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits", num_train=1000, channels=4, batches=(16, 64, 256), lrs=(0.01, 0.02, 0.08), reference=64,
        epochs=8, seeds=2, arms=("as-written",), points=("last",), hessian_samples=200, probes=8, noise_samples=400,
        density_probes=2, density_steps=20, slice_samples=200, line_points=21, plane_points=9,
    ),
    "cpu": Config(
        num_train=5000, channels=8, batches=(32, 128, 512), lrs=(0.005, 0.01, 0.04), epochs=20, seeds=3, probes=16,
        hessian_samples=500, noise_samples=2000, slice_samples=500, density_probes=2, density_steps=40,
        plane_points=17, line_points=41, loss_mark=0.6,
    ),
    "paper": Config(),
}  # fmt: skip


def cells(config: Config) -> dict[str, dict[int, Cell]]:
    """Arm -> batch -> how it is trained."""
    return train_cells(config, [arm for arm in ("as-written", "equal-updates") if arm in config.arms])


def pair(config: Config) -> tuple[int, int]:
    """The two batches compared: the paper's where both are there, else the ends."""
    named = (32, 1024)
    return named if set(named) <= set(config.batches) else config.ends


def expand(config: Config) -> list[Unit]:
    """Symmetries, then the measures of every network (at equal updates: of the pair), then the landscapes of seed 0."""
    common: dict[str, Any] = config.common
    small, large = pair(config)
    arms = cells(config)
    whole: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("hessian_samples", "probes", "power_iterations", "noise_samples", "sigmas", "draws")
    }
    # The paper's protocol is of the last epoch, as written.
    less = whole | {"power_iterations": 0, "sigmas": ()}
    asked: dict[str, dict[str, Any]] = {"last": whole, "mark": less | {"loss_mark": config.loss_mark}}
    samples = min(32, config.num_train)
    first = {**arms["as-written"][small].where, "seed": 0, **common}
    found: list[Unit] = [Symmetries(**first, symmetry_samples=samples, strength=config.strength)]
    for seed in range(config.seeds):
        for cell in arms["as-written"].values():
            found += [Measures(**cell.where, seed=seed, **common, point=p, **asked[p]) for p in config.points]
        for batch, cell in arms.get("equal-updates", {}).items():
            if batch in (small, large) and cell.epochs != config.epochs:
                found.append(Measures(**cell.where, seed=seed, **common, point="last", **less))
    drawn = ("hessian_samples", "density_probes", "density_steps", "slice_samples", "line_points", "plane_points")
    looks: dict[str, Any] = {name: getattr(config, name) for name in (*drawn, "extent")}
    for batch, other in ((small, large), (large, small)):
        cell, there = (arms["as-written"][b] for b in (batch, other))
        looks |= {"other_batch": other, "other_lr": there.lr}
        found.append(Landscape(**cell.where, seed=0, **common, **looks))
    return found


# ------------------------------------------------------------------------------------------------ running one unit


def network(net: Net, run: Run, tools: Tools, stage: TrainStage | None = None) -> Trained:
    """The network: found in the store of ``run``, or trained into it."""
    return train_or_load(
        RunStore(run.path.parents[1]),
        stage or net.stage,
        tools.dataset(net.dataset),
        checkpoint_seconds=tools.checkpoint_seconds,
        progress=lambda done, epochs: tools.progress(done, 2 * epochs),
        environment=tools.environment(),
    )


def run(unit: Unit, run: Run, tools: Tools) -> dict[str, Any]:
    """Find or train the network, measure it, append the rows."""
    trained = network(unit, run, tools)
    data = unit.stage.samples.take(tools.dataset(unit.dataset))
    facts = {"stage": trained.run.name, "loaded": trained.loaded}
    if trained.diverged:
        run.append([{"metric": "diverged", "value": 1.0}])
        return facts
    if isinstance(unit, Symmetries):
        few = slice(0, unit.symmetry_samples)
        run.append(flatness.invariances(trained.model, data.train_x[few], data.train_y[few], unit.strength))
    elif isinstance(unit, Landscape):
        run_landscape(unit, trained.model, data, run, tools)
    else:
        model = trained.model if unit.point == "last" else trained.at_mark()
        rows = [{"metric": "diverged", "value": 0.0}, {"metric": "reached", "value": float(model is not None)}]
        if model is not None:
            rows += measure_network(unit, model, trained, data)
        run.append(rows)
    return facts


def measure_network(unit: Measures, model: nn.Module, trained: Trained, data: Dataset) -> list[dict[str, Any]]:
    """All rows of one network at one point."""
    model.eval()
    few, many = slice(0, unit.hessian_samples), slice(0, unit.noise_samples)
    hits = correct(model, data.test_x, data.test_y)
    rows: list[dict[str, Any]] = [
        {"metric": "test_accuracy", "value": hits.double().mean().item()},
        {"metric": "test_hits", "value": int(hits.sum()), "images": len(hits), "bits": encode_hits(hits)},
        {"metric": "train_seconds", "value": 0.0 if trained.loaded else trained.seconds},
    ]
    problem = flatness.problem_of(model, data.train_x[few], data.train_y[few])
    rows += flatness.measured(problem, probes=unit.probes, power_iterations=unit.power_iterations)
    if unit.sigmas:
        noisy = flatness.problem_of(model, data.train_x[many], data.train_y[many])
        rows += flatness.noise(noisy, unit.sigmas, unit.draws)
    return rows


def run_landscape(unit: Landscape, model: nn.Module, data: Dataset, run: Run, tools: Tools) -> None:
    """Density, line, plane, and the line to the other batch's network."""
    few, some = slice(0, unit.hessian_samples), slice(0, unit.slice_samples)
    problem = flatness.problem_of(model, data.train_x[few], data.train_y[few])
    run.append(flatness.spectrum(problem, probes=unit.density_probes, steps=unit.density_steps))
    here = flatness.problem_of(model, data.train_x[some], data.train_y[some])
    for rows in flatness.landscape(
        here, line_points=unit.line_points, plane_points=unit.plane_points, extent=unit.extent
    ):
        run.append(rows)
    if unit.batch_size < unit.other_batch:  # the line has two ends, and one direction is enough
        other = Net(unit.other_batch, unit.other_lr, unit.epochs, unit.seed, unit.dataset, unit.num_train,
                    unit.channels, unit.momentum)  # fmt: skip
        there = network(other, run, tools)
        ends = flatness.problem_of(there.model, data.train_x[some], data.train_y[some])
        run.append(flatness.barrier(here, ends, unit.line_points))


def cost(unit: Unit) -> float:
    """Seconds on one slow core, roughly, for a network that is in the store."""
    product = 16 * (4.75e4 * unit.channels + 3.6e4 * unit.channels**2) / 5e10  # seconds a sample
    if isinstance(unit, Symmetries):
        return 2.0 + 3000 * product * unit.symmetry_samples  # float64, three networks, every block
    if isinstance(unit, Landscape):
        points = unit.plane_points**2 + 2 * unit.line_points
        steps = unit.density_probes * unit.density_steps
        return 2.0 + product * (steps * unit.hessian_samples + points * unit.slice_samples / 8)
    products = 110 + unit.probes + unit.power_iterations
    return 1.0 + product * (products * unit.hessian_samples + unit.draws * len(unit.sigmas) * unit.noise_samples / 8)


def forecast(unit: Unit, tools: Tools) -> float:
    """Training, were it not in the store (counted where a network is measured first), and :func:`cost`."""
    trains = isinstance(unit, Measures) and (unit.point == "last" or unit.loss_mark != LOSS_MARK)
    return cost(unit) + (forecast_stage(unit.stage, tools) if trains else 0.0)


# ------------------------------------------------------------------------------------------------ verdicts and figures


def is_as_written(config: Config) -> bool:
    """Whether networks and measurements follow the paper's protocol (its seeds may differ)."""
    names = ("hessian_samples", "power_iterations", "noise_samples", "sigmas", "draws")
    measures = all(getattr(config, name) == getattr(Config(), name) for name in names)
    return config.trains_as_written and {32, 1024} <= set(config.batches) and measures


def readings(rows: Sequence[Row], config: Config) -> Flatness:
    """The rows as networks of two batches compared."""
    settings = {
        (arm, batch, point): {**cell.where, "point": point}
        for arm, found in cells(config).items()
        for batch, cell in found.items()
        for point in (config.points if arm == "as-written" else ("last",))
    }
    return Flatness(rows, settings, *pair(config), is_as_written(config), config.dataset == "cifar10", config.sigmas,
                    loss_mark=config.loss_mark)  # fmt: skip


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims, each with its control; then every measure that has a right of its own."""
    return flatness_claims(readings(rows, config))


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """Symmetries: what must move and what must not."""
    return flatness_laws(rows, config.strength)


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T2: every measure by batch; ratios."""
    return flatness_tables(readings(rows, config))


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """Ratios of all measures, noise curves, spectra (F2), slices (F3)."""
    return flatness_figures(readings(rows, config))


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    about = (
        f"Curvature: mean cross-entropy of the first {config.hessian_samples} training images, eval mode; noise: the "
        f"first {config.noise_samples}, {config.draws} draws, the same for all networks; slices: the first "
        f"{config.slice_samples}."
    )
    return [about, *flatness_notes(readings(rows, config))]
