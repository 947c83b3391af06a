# SPDX-License-Identifier: Apache-2.0
r"""Iterative magnitude pruning with rewinding, level by level, each a stored run that is found by its content.

    level 0            theta_0 trained for the whole recipe
    level l >= 1       m_l  = the largest |w| of level l-1's last weights, density d_l, nested in m_{l-1}
                       train m_l * theta_k from update k to the end of the recipe

theta_k are the dense network's weights and running statistics after k updates (k = 0: the initial ones); batches and
learning rates go on as they did after update k, the optimizer begins anew.  One density is one-shot pruning, a sequence
0.8, 0.64, ... the iterative kind (Frankle & Carbin 2019; rewinding: Frankle, Dziugaite, Roy & Carbin 2020).

A level's folder is ``root/levels/<slug>-<hash>/``; its densities name all levels below it, so that two studies with one
beginning share it.  Killed anywhere, the same call goes on from the last checkpoint with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from curvlab.data import Dataset
from curvlab.runs.store import Run, RunStore
from curvlab.sparse import Mask, global_magnitude, layerwise_magnitude, random_mask, shuffle_layerwise, sparsify
from curvlab.sparse.crossover import Kernels
from curvlab.training.callbacks import TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.loop import evaluate, train
from curvlab.training.recipe import Recipe
from curvlab.training.seeding import generator, stream_seed
from curvlab.training.stages import (
    Network,
    Samples,
    TrainStage,
    digest_of,
    history_of,
    history_rows,
    load_weights,
    train_or_load,
)

__all__ = ["LEVELS", "PROTOCOL", "PruneLevel", "TrainedLevel", "open_level", "prune_or_load", "starting_network"]

PROTOCOL = 1  # raising it retires every stored level
LEVELS, REWIND_POINTS = "levels", "rewind_points"  # folders in the store

Criterion = Literal["global_magnitude", "layerwise_magnitude"]
Control = Literal["ticket", "reinit", "shuffle", "random"]
_CRITERIA: dict[str, Callable[..., Mask]] = {
    "global_magnitude": global_magnitude,
    "layerwise_magnitude": layerwise_magnitude,
}


@dataclass(frozen=True)
class PruneLevel:
    """One level of pruning: what its stored weights are a function of.

    Attributes:
        network: :class:`Network`, or any frozen dataclass with ``build(data, seed) -> nn.Module``.
        samples: the training data.
        recipe: of the whole dense training; a ticket trains the part of it after ``rewind_step``.
        seed: streams "init", "order", and those of the controls.
        densities: kept shares of all prunable weights, level by level; () is the dense network.
        rewind_step: k, in updates.
        criterion: what is pruned at each level.
        control: what this level trains, the levels below it being tickets all the same: "ticket" (m * theta_k),
            "reinit" (the mask, another initial draw, the whole recipe), "shuffle" (the mask permuted within each layer)
            or "random" (a mask of the same global density).
        held_out: that many training images behind the samples' own are evaluated after each epoch.
        kernels: see :func:`curvlab.sparse.sparsify`.

    Raises:
        ValueError: densities that do not fall within (0, 1]; a control of the dense network; a negative count; held-out
            images without ``samples.num_train``; an unknown name.
        TypeError: a network that is no frozen dataclass with ``build``.
    """

    network: Any
    samples: Samples
    recipe: Recipe
    seed: int
    densities: tuple[float, ...] = ()
    rewind_step: int = 0
    criterion: Criterion = "global_magnitude"
    control: Control = "ticket"
    held_out: int = 0
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        if not is_dataclass(self.network) or not callable(getattr(self.network, "build", None)):
            got = type(self.network).__name__
            raise TypeError(f"PruneLevel: network must be a frozen dataclass with build(data, seed), got {got}")
        steps = [1.0, *self.densities]
        if any(not 0 < after <= before for before, after in pairwise(steps)):
            raise ValueError(f"PruneLevel: densities must fall within (0, 1], got {self.densities}")
        for name, allowed in (("criterion", Criterion), ("control", Control), ("kernels", Kernels)):
            if getattr(self, name) not in get_args(allowed):
                got = getattr(self, name)
                raise ValueError(f"PruneLevel: {name} must be one of {', '.join(get_args(allowed))}, got {got!r}")
        if self.control != "ticket" and not self.densities:
            raise ValueError(f"PruneLevel: control must be 'ticket' for the dense network, got {self.control!r}")
        for name in ("rewind_step", "held_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"PruneLevel: {name} must be an int of at least 0, got {value!r}")
        if self.held_out and self.samples.num_train is None:
            raise ValueError("PruneLevel: samples must have num_train where images are held out, got None")

    @property
    def parent(self) -> PruneLevel:
        """The level whose last weights decide this one's mask."""
        # The dense network is one for all rewind steps, criteria and kernels.
        if len(self.densities) == 1:
            return PruneLevel(self.network, self.samples, self.recipe, self.seed, held_out=self.held_out)
        return replace(self, densities=self.densities[:-1], control="ticket")

    @property
    def start_step(self) -> int:
        """Updates that this level's network has behind it when its training begins."""
        return self.rewind_step if self.densities and self.control != "reinit" else 0

    def __str__(self) -> str:
        share = f"{self.densities[-1]:.3g} kept ({self.control})" if self.densities else "dense"
        return f"level {len(self.densities)}, {share}, seed {self.seed}"


@dataclass(frozen=True)
class TrainedLevel:
    """A level's trained network and how it came to be.

    Attributes:
        model: at the last epoch, in eval mode, on the data's device; sparse layers where the level has a mask.
        mask: what survives; all weights at level 0.
        history: rows ``{seed, epoch, step, train_loss, train_accuracy}``, with ``held_loss`` (nats) and
            ``held_accuracy`` where images are held out.
        diverged: an epoch's loss was not finite.
        seconds: training time of this level over all sessions, the smaller of wall and processor time.
        loaded: nothing was trained now.
        run: the folder.
    """

    model: nn.Module
    mask: Mask
    history: list[dict[str, Any]]
    diverged: bool
    seconds: float
    loaded: bool
    run: Run


@dataclass(frozen=True)
class RewindPoint:
    """theta_k of a dense network: weights and running statistics after ``step`` updates."""

    network: Any
    samples: Samples
    recipe: Recipe
    seed: int
    step: int


def open_level(store: RunStore, level: PruneLevel, data: Dataset) -> Run:
    """The level's folder in ``store`` (made if it is not there); ``.name``, ``.finished``.

    Raises:
        ValueError: ``data`` is not what the level asks for.
        RunStoreError: see :meth:`RunStore.open`.
    """
    context = _context(level, data)
    if level.held_out:
        _held_out(level, data)
        context["held_out"] = data.fingerprint
    return store.open(LEVELS, level, context=context)


def prune_or_load(
    store: RunStore,
    level: PruneLevel,
    data: Dataset,
    *,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> TrainedLevel:
    """The level's network: loaded if ``store`` has it, else trained, after all levels that it rests on.

    A dense CNN or MLP of :class:`Network` without held-out images is the :class:`TrainStage` of other studies.

    Args:
        store: where levels and stages are kept.
        level: what to train.
        data: the whole data set (samples are taken here), on the device to train on.
        checkpoint_seconds: an epoch end after this time saves the state.
        progress: called as ``progress(epochs_done, epochs)``, level by level.
        environment: facts to store beside the result, not part of the name.

    Raises:
        ValueError: ``data`` is not what the level asks for; rewind_step beyond the recipe; a level below diverged.
        RunStoreError: a folder is unusable, its files were damaged, or another process trains this level.
    """
    options: Any = {"checkpoint_seconds": checkpoint_seconds, "progress": progress, "environment": environment}
    _check_rewind(level, data)
    if not level.densities and not level.held_out and isinstance(level.network, Network):
        stage = TrainStage(level.network, level.samples, level.recipe, level.seed)
        dense = train_or_load(store, stage, data, **options)
        mask = Mask.dense(dense.model)
        return TrainedLevel(dense.model, mask, dense.history, dense.diverged, dense.seconds, dense.loaded, dense.run)
    run = open_level(store, level, data)
    loaded = run.finished
    if not loaded:
        model, mask = starting_network(store, level, data, **options)
        with run.lock():
            if not run.finished:
                _train(run, level, data, model, mask, options)
    return _load(run, level, data, loaded=loaded)


def starting_network(store: RunStore, level: PruneLevel, data: Dataset, **options: Any) -> tuple[nn.Module, Mask]:
    """The network that this level's training begins with, and its mask; trains what it rests on where needed.

    ``options`` are those of :func:`prune_or_load`.
    """
    _check_rewind(level, data)
    taken = level.samples.take(data)
    if not level.densities:
        model = level.network.build(taken, level.seed)
        return model, Mask.dense(model)
    parent = prune_or_load(store, level.parent, data, **options)
    if parent.diverged:
        raise ValueError(f"prune_or_load: level must rest on trained ones, got {level.parent}, which diverged")
    mask = _CRITERIA[level.criterion](parent.model, level.densities[-1], mask=parent.mask)
    seed = stream_seed(level.seed, "reinit") if level.control == "reinit" else level.seed
    model = level.network.build(taken, seed)
    if level.start_step:
        _load_rewind_point(store, level, data, model)
    if level.control == "shuffle":
        mask = shuffle_layerwise(mask, generator(level.seed, "shuffle"))
    elif level.control == "random":
        mask = random_mask(model, level.densities[-1], generator=generator(level.seed, "random mask"))
    return sparsify(model, mask, kernels=level.kernels), mask


def _train(
    run: Run, level: PruneLevel, data: Dataset, model: nn.Module, mask: Mask, options: Mapping[str, Any]
) -> None:
    checkpoint = CheckpointFile(run.checkpoint_path, every_seconds=options["checkpoint_seconds"])
    callbacks = [_HeldOut(*_held_out(level, data))] if level.held_out else []
    result = train(
        model,
        level.samples.take(data),
        level.recipe,
        seed=level.seed,
        start_step=level.start_step,
        callbacks=callbacks,
        checkpoint=checkpoint,
        progress=options["progress"],
    )
    mask.save(run.path / "mask.safetensors")
    CheckpointFile(run.path / "weights.safetensors").save(model.state_dict(), {"level": run.name})
    run.append(history_rows(result.history))
    summary = {
        "diverged": result.diverged,
        "num_kept": mask.num_kept,
        "weights_sha256": digest_of(run.path / "weights.safetensors"),
        "mask_sha256": digest_of(run.path / "mask.safetensors"),
    }
    run.finish(summary, environment=options["environment"])


def _load(run: Run, level: PruneLevel, data: Dataset, *, loaded: bool) -> TrainedLevel:
    done = run.done
    path: Path = run.path / "mask.safetensors"
    digest_of(path, done["summary"]["mask_sha256"])
    mask = Mask.load(path).to(data.train_x.device)
    model: nn.Module = level.network.build(level.samples.take(data), level.seed)
    if level.densities:
        model = sparsify(model, mask, kernels=level.kernels)
    load_weights(model, run.path / "weights.safetensors", done["summary"]["weights_sha256"])
    seconds = min(done["wall_seconds"], done["cpu_seconds"])
    history = history_of(run, level.seed)
    return TrainedLevel(model, mask, history, done["summary"]["diverged"], seconds, loaded, run)


class _Reached(Exception):
    """The update that was asked for is done."""


class _Capture:
    """Callback: stops the training at update ``step``, its state saved."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_step(self, state: TrainState) -> None:
        if state.step == self.step:
            CheckpointFile(self.path).save(state.model.state_dict(), {"step": state.step})
            raise _Reached


def _load_rewind_point(store: RunStore, level: PruneLevel, data: Dataset, model: nn.Module) -> None:
    """Bring ``model`` (at theta_0) to theta_k: trained once for k updates, then loaded."""
    point = RewindPoint(level.network, level.samples, level.recipe, level.seed, level.rewind_step)
    run = store.open(REWIND_POINTS, point, context=_context(level, data))
    path = run.path / "weights.safetensors"
    if not run.finished:
        with run.lock():
            if not run.finished:
                taken = level.samples.take(data)
                moving = level.network.build(taken, level.seed)
                try:
                    train(moving, taken, level.recipe, seed=level.seed, callbacks=[_Capture(level.rewind_step, path)])
                except _Reached:
                    run.finish({"weights_sha256": digest_of(path)})
                else:
                    raise ValueError(f"prune_or_load: rewind_step must be reached before divergence, got {level}")
    load_weights(model, path, run.summary["weights_sha256"])


class _HeldOut:
    """Callback: loss and accuracy on images that were not trained on, into the epoch's row."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def on_epoch(self, state: TrainState) -> None:
        if state.history and state.history[-1]["epoch"] == state.epoch:
            loss, accuracy = evaluate(state.model, self.x, self.y)
            state.history[-1].update(held_loss=loss, held_accuracy=accuracy)


def _held_out(level: PruneLevel, data: Dataset) -> tuple[Tensor, Tensor]:
    first = level.samples.num_train
    assert first is not None  # PruneLevel refuses
    last = first + level.held_out
    if last > len(data.train_x):
        raise ValueError(
            f"prune_or_load: data must hold {last} training images ({level.held_out} of them held out), got "
            f"{len(data.train_x)}"
        )
    return data.train_x[first:last], data.train_y[first:last]


def _check_rewind(level: PruneLevel, data: Dataset) -> None:
    samples = level.samples.num_train or len(data.train_x)
    last = level.recipe.epochs * level.recipe.steps_per_epoch(samples)
    if level.rewind_step >= last:
        raise ValueError(
            f"prune_or_load: rewind_step must be below the recipe's {last} updates, got {level.rewind_step}"
        )


def _context(level: PruneLevel, data: Dataset) -> dict[str, str]:
    taken = level.samples.take(data)
    # Two kinds of network may have fields of the same names and values.
    return {"data": taken.fingerprint, "protocol": str(PROTOCOL), "network": type(level.network).__name__}
