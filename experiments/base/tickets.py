# SPDX-License-Identifier: Apache-2.0
"""Pruned networks as units: which mask, which initial weights, how trained; what a unit measures.

A ticket is a mask and the weights that it starts from. ``tickets_claims.py`` judges the rows, ``tickets_report.py``
draws them.
"""

from __future__ import annotations

import base64
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.data import Dataset
from curvlab.runs.store import Run, RunStore
from curvlab.sparse import Mask, densify, fuse
from curvlab.training.iterative_pruning import PruneLevel, prune_or_load
from curvlab.training.loop import evaluate
from curvlab.training.optimizers import make_step
from curvlab.training.recipe import Recipe
from curvlab.training.seeding import stream_seed
from curvlab.training.stages import Network, Samples
from experiments.base.networks import correct, encode_hits, forecast_stage
from experiments.base.study import Tools

Pruning = Literal["none", "one-shot", "iterative"]
Control = Literal["ticket", "rewind", "reinit", "shuffle", "random"]

ROUND = 0.8  # kept share a round of iterative pruning
TIMING_ROUNDS = 7
TIMED = ("sparse", "fused", "masked dense", "dense")
WORDS = {
    "ticket": "ticket",
    "rewind": "late rewinding",
    "reinit": "re-initialized",
    "shuffle": "layers shuffled",
    "random": "random mask",
}  # of the controls


def kept_after(rounds: int) -> float:
    """Kept share after that many rounds, to four digits: how cells of the study are named."""
    return round(ROUND**rounds, 4)


@dataclass(frozen=True)
class LeNet:
    """Fully connected ReLU network of hidden widths 300 and 100 (LeCun et al. 1998; Frankle & Carbin 2019)."""

    hidden: tuple[int, ...] = (300, 100)

    def build(self, data: Dataset, seed: int) -> nn.Module:
        """θ_0 of ``seed`` (stream "init"): PyTorch's initialization, the same bits wherever it is drawn."""
        widths = [data.train_x[0].numel(), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(seed, "init"))
            for fan_in, fan_out in zip(widths, self.hidden, strict=False):
                layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            layers.append(nn.Linear(widths[-1], data.num_classes))
        return nn.Sequential(*layers).to(device=data.train_x.device, dtype=data.train_x.dtype)


@dataclass(frozen=True)
class Cell:
    """One way to make a pruned network: the factor values that pick its rows."""

    network: Literal["lenet", "cnn"]
    pruning: Pruning
    control: Control
    kept: float

    def __post_init__(self) -> None:
        known = self.pruning in get_args(Pruning) and self.control in get_args(Control)
        if not known or not 0 < self.kept <= 1 or (self.pruning == "none") != (self.kept == 1):
            raise ValueError(f"Cell: kept must be in (0, 1], 1 where nothing is pruned, of a known arm, got {self}")

    @property
    def where(self) -> dict[str, Any]:
        """For ``groups(rows, ..., **where)``."""
        return {"network": self.network, "pruning": self.pruning, "control": self.control, "kept": self.kept}

    @property
    def arm(self) -> str:
        """How tables and legends call it."""
        return "dense" if self.pruning == "none" else f"{self.pruning}, {WORDS[self.control]}"


def dense(network: str) -> Cell:
    """The network that nothing is pruned of."""
    return Cell(cast("Any", network), "none", "ticket", 1.0)


@dataclass(frozen=True)
class Ticket:
    """One pruned (or dense) network; the fields that are no defaults are part of a run's name."""

    network: Literal["lenet", "cnn"]
    pruning: Pruning
    control: Control
    kept: float
    seed: int
    rounds: int
    """Of iterative pruning, that lead to ``kept``; 0 for others."""
    rewind_step: int
    """Updates after which the weights are kept that a ticket starts from; 0: the initial ones."""
    dataset: str
    num_train: int
    held_out: int
    """Training images behind the first ``num_train``, whose loss finds the early-stop step."""
    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adam"]
    schedule: Literal["cosine", "constant"]
    channels: int = 0
    """Of the CNN."""

    @property
    def level(self) -> PruneLevel:
        """The stage of the store that trains it; those before it are trained or found on the way."""
        rounds = tuple(kept_after(done) for done in range(1, self.rounds + 1))
        densities = {"none": (), "one-shot": (self.kept,), "iterative": rounds}[self.pruning]
        control = "ticket" if self.control == "rewind" else self.control
        network = LeNet() if self.network == "lenet" else Network("cnn", self.channels)
        recipe = Recipe(self.epochs, self.batch_size, self.lr, schedule=self.schedule, optimizer=self.optimizer)
        return PruneLevel(
            network=network, samples=Samples(self.dataset, self.num_train), recipe=recipe, seed=self.seed,
            densities=densities, rewind_step=self.rewind_step, control=control, held_out=self.held_out,
        )  # fmt: skip

    def __str__(self) -> str:
        cell = Cell(self.network, self.pruning, self.control, self.kept)
        name = "LeNet" if self.network == "lenet" else f"CNN({self.channels})"
        return f"{name}, {cell.arm}, {100 * self.kept:.3g} % kept, seed {self.seed}"


# ------------------------------------------------------------------------------------------------ running one unit


def run_ticket(unit: Ticket, run: Run, tools: Tools) -> dict[str, Any]:
    """Train (or find) the network, append its rows, return facts for the summary."""
    whole = tools.dataset(unit.dataset)
    level = unit.level
    trained = prune_or_load(
        RunStore(run.path.parents[1]),
        level,
        whole,
        checkpoint_seconds=tools.checkpoint_seconds,
        progress=lambda done, epochs: tools.progress(done, epochs + 1),
        environment=tools.environment(),
    )
    names = ("train_loss", "train_accuracy", "held_loss", "held_accuracy")
    rows = [
        {"epoch": line["epoch"], "step": line["step"], "metric": metric, "value": line[metric]}
        for line in trained.history
        for metric in names
        if metric in line
    ]
    final: dict[str, float] = {
        "diverged": float(trained.diverged),
        "updates": float(trained.history[-1]["step"]),
        "train_seconds": trained.seconds,
    }
    if not trained.diverged:
        found, more = measure(unit, trained, level.samples.take(whole))
        final |= found
        rows += [{"epoch": unit.epochs} | row for row in more]
    rows += [{"epoch": unit.epochs, "metric": metric, "value": value} for metric, value in final.items()]
    run.append([{"seed": unit.seed} | row for row in rows])
    return {"stage": trained.run.name, "loaded": trained.loaded, "diverged": int(trained.diverged)}


def measure(unit: Ticket, trained: Any, data: Dataset) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Accuracies, early stop, masks and times of a trained network: single values, and rows of their own."""
    began = time.perf_counter(), time.process_time()
    model, mask = trained.model, trained.mask
    names = ("fit_loss", "fit_accuracy", "test_loss", "test_accuracy")
    losses = (*evaluate(model, data.train_x, data.train_y), *evaluate(model, data.test_x, data.test_y))
    final = dict(zip(names, losses, strict=True))
    final |= {"kept_weights": float(mask.num_kept), "weights": float(mask.num_total)}
    final["pruned_nonzero"] = float(sum(pruned_nonzero(densify(model), mask)))
    if (stop := early_stop(trained.history)) is not None:
        final["early_stop_step"] = float(stop)
    hits = correct(model, data.test_x, data.test_y)
    rows: list[dict[str, Any]] = [
        {"metric": "test_hits", "value": int(hits.sum()), "images": len(hits), "bits": encode_hits(hits)}
    ]
    shares, sizes = mask.layer_densities(), mask.sizes
    rows += [{"metric": "layer_kept", "layer": n, "weights": sizes[n], "value": shares[n]} for n in shares]
    if unit.network == "lenet" and unit.control == "ticket" and unit.pruning != "none":
        first = next(iter(mask.values()))
        rows.append({"metric": "pixel_kept", "value": int(first.sum()), "counts": encode_counts(first.sum(0))})
    for engine, seconds in step_seconds(model, mask, unit.level.recipe, data).items():
        rows.append({"metric": "step_seconds", "engine": engine, "value": seconds})
    # As training's: of wall and processor time the smaller, since others may be using the machine.
    final["measure_seconds"] = min(time.perf_counter() - began[0], time.process_time() - began[1])
    return final, rows


def early_stop(history: Sequence[Mapping[str, Any]]) -> int | None:
    """Updates made at the first epoch end of least held-out loss; None where no images were held out."""
    lines = [line for line in history if "held_loss" in line]
    return min(lines, key=lambda line: line["held_loss"])["step"] if lines else None


def pruned_nonzero(model: nn.Module, mask: Mask) -> list[int]:
    """How many pruned weights of a dense model are not exactly zero, tensor by tensor."""
    weights = dict(model.named_parameters())
    return [int((weights[name].detach()[~keep.to(weights[name].device)] != 0).sum()) for name, keep in mask.items()]


def encode_counts(counts: Tensor) -> str:
    """Numbers of 0..65535 as base64 text, two little-endian bytes each."""
    return base64.b64encode(counts.cpu().numpy().astype("<u2").tobytes()).decode()


def decode_counts(text: str) -> np.ndarray:
    """Back from :func:`encode_counts`."""
    return np.frombuffer(base64.b64decode(text), "<u2")


# ------------------------------------------------------------------------------------------------ time


def step_seconds(model: nn.Module, mask: Mask, recipe: Recipe, data: Dataset) -> dict[str, float]:
    """Seconds of one training step (forward, backward, update) by engine: medians, engines alternating.

    ``sparse``: the layers that the network was trained with, path by path as :func:`curvlab.sparse.sparsify` chose.
    ``fused``: the same, the layers between convolutions as one (:func:`curvlab.sparse.fuse`), where there are any.
    ``masked dense``: the usual way, dense weights whose gradients are multiplied by the mask. ``dense``: without it.
    Dense convolutions run channels-last, the faster layout. With one thread: processor time.
    """
    x, y = data.train_x[: recipe.batch_size], data.train_y[: recipe.batch_size]
    sparse = make_step(copy.deepcopy(model).train(), recipe)
    engines: dict[str, Callable[[], object]] = {"sparse": lambda: sparse(x, y, 0.0)}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        fused = make_step(fuse(model).train(), recipe)
        engines["fused"] = lambda: fused(x, y, 0.0)
    for name, keeps in (("masked dense", mask), ("dense", None)):
        twin = densify(model).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        engines[name] = dense_step(twin, recipe, x, y, keeps)
    clock = time.process_time if x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in engines}

    def seconds(engine: Callable[[], object], calls: int) -> float:
        _synchronize(x)
        start = clock()
        for _ in range(calls):
            engine()
        _synchronize(x)
        return (clock() - start) / calls

    once = [min(seconds(engine, 1) for _ in range(2)) for engine in engines.values()]  # builds plans, fills caches
    calls = max(1, round(0.006 / max(min(once), 1e-4)))
    for _ in range(TIMING_ROUNDS):
        for name, engine in engines.items():
            spent[name].append(seconds(engine, calls))
    return {name: statistics.median(values) for name, values in spent.items()}


def dense_step(model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor, mask: Mask | None) -> Callable[[], object]:
    """A training step of a dense model; with a mask, of the author's way: gradients multiplied before the update."""
    step = make_step(model, recipe)
    params = dict(model.named_parameters())
    keeps = [] if mask is None else [(params[name], keep.to(x)) for name, keep in mask.items()]

    def call() -> None:
        step.backward(x, y)
        if keeps:
            torch._foreach_mul_([cast("Tensor", param.grad) for param, _ in keeps], [keep for _, keep in keeps])
        step.update(0.0)

    return call


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def forecast_ticket(unit: Ticket, tools: Tools) -> float:
    """Seconds of the unit's own training, from a few steps of the dense network."""
    return forecast_stage(cast("Any", unit.level), tools)
