# SPDX-License-Identifier: Apache-2.0
"""The training loop: momentum SGD on device-resident data, one learning rate an epoch, no host synchronization a step.

    v <- momentum v + g,   theta <- theta - lr_e v,   g = gradient of the batch-mean cross-entropy
    lr_e = lr/2 (1 + cos(pi e / epochs)),  e = 0 .. epochs-1      (schedule "cosine"; "constant": lr_e = lr)

Adam and SAM (``optimizers.py``) take its place where the recipe asks for them.  No dampening, no Nesterov, no weight
decay; every epoch is a fresh permutation drawn from the stream "order" of the seed, and the last partial batch is kept.
``drive`` runs epochs, rows, checkpoints and callbacks for any engine; :class:`PlainEngine` is the reference (autograd
and ``torch.optim``), ``grouped.py`` holds the fast one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.data import Dataset
from curvlab.training import seeding
from curvlab.training.callbacks import Callbacks, CallbackSource, TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.optimizers import make_step
from curvlab.training.recipe import GroupResult, Recipe, TrainResult

__all__ = ["GroupResult", "PlainEngine", "Recipe", "TrainResult", "drive", "evaluate", "train"]

Progress = Callable[[int, int], None]


class Engine(Protocol):
    """A way to run one epoch of S networks.  ``drive`` does everything around it."""

    name: str
    states: list[TrainState]

    def epoch(self, orders: Tensor, lr: float, on_step: Callable[[TrainState], None] | None) -> tuple[Tensor, Tensor]:
        """Train on ``orders [S, N]`` (indices, on the data's device); returns summed loss and correct count, [S]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimizer state by name, to be written to a checkpoint."""
        ...

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        ...

    def finish(self) -> None:
        """Leave the models as ordinary modules."""
        ...


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 2048) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (share in 0..1) of ``model`` in eval mode on ``x [N, ...]``, ``y [N]``.

    The losses of the samples have the logits' dtype, their sum is float64; one host synchronization in all.  The
    model's train/eval mode is restored.

    Raises:
        ValueError: no samples, or x and y of different length.
    """
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"evaluate: x and y must hold the same number of samples, at least 1, got {len(x)} and {len(y)}"
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    try:
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="none").double().sum()
            correct += (logits.argmax(1) == labels).sum()
    finally:
        for module, mode in modes:
            module.training = mode
    return loss.item() / len(x), correct.item() / len(x)


class PlainEngine:
    """Autograd and ``torch.optim``, one network after the other: any model, and the reference."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: Dataset,
        recipe: Recipe,
        *,
        seeds: Sequence[int],
        start_step: int = 0,
    ) -> None:
        self.name = "one-by-one"
        self.data, self.recipe = data, recipe
        self.states = [
            TrainState(model, list(model.parameters()), seed, index)
            for index, (model, seed) in enumerate(zip(models, seeds, strict=True))
        ]
        for state in self.states:
            state.step, state.epoch = start_step, start_step // recipe.steps_per_epoch(len(data.train_x))
        self.steps = [make_step(model, recipe) for model in models]

    def epoch(self, orders: Tensor, lr: float, on_step: Callable[[TrainState], None] | None) -> tuple[Tensor, Tensor]:
        """One epoch of every network; see :class:`Engine`."""
        sums = [self._epoch_of(state, order, lr, on_step) for state, order in zip(self.states, orders, strict=True)]
        return torch.stack([loss for loss, _ in sums]), torch.stack([correct for _, correct in sums])

    def _epoch_of(
        self, state: TrainState, order: Tensor, lr: float, on_step: Callable[[TrainState], None] | None
    ) -> tuple[Tensor, Tensor]:
        x, y, update = self.data.train_x, self.data.train_y, self.steps[state.index]
        loss_sum = torch.zeros((), dtype=torch.float64, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        state.model.train()
        # A network that starts within an epoch has these batches behind it; its running loss is of those that remain.
        done = state.step - state.epoch * self.recipe.steps_per_epoch(len(x))
        share = len(x) / (len(x) - done * self.recipe.batch_size)
        for rows in order.split(self.recipe.batch_size)[done:]:
            labels = y[rows]
            loss, logits = update(x[rows], labels, lr)
            with torch.no_grad():
                loss_sum += loss * len(rows)
                correct += (logits.argmax(1) == labels).sum()
            state.step += 1
            state.lr = lr
            if on_step is not None:
                on_step(state)
        return loss_sum * share, correct * share if done else correct

    def tensors(self) -> dict[str, Tensor]:
        """Model state, optimizer state, and the global random state (dropout draws from it)."""
        out: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if self.data.train_x.is_cuda:
            out["rng.cuda"] = torch.cuda.get_rng_state(self.data.train_x.device)
        for s, (state, step) in enumerate(zip(self.states, self.steps, strict=True)):
            out.update({f"{s}.model.{name}": value for name, value in state.model.state_dict().items()})
            out.update({f"{s}.optimizer.{name}": value for name, value in step.tensors().items()})
        return out

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        torch.set_rng_state(saved["rng.cpu"])
        if self.data.train_x.is_cuda and "rng.cuda" in saved:
            torch.cuda.set_rng_state(saved["rng.cuda"], self.data.train_x.device)
        for s, (state, step) in enumerate(zip(self.states, self.steps, strict=True)):
            for prefix, load in ((f"{s}.model.", state.model.load_state_dict), (f"{s}.optimizer.", step.load_tensors)):
                load({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})

    def finish(self) -> None:
        """Drop the last gradients: they would keep a second copy of the network alive."""
        for step in self.steps:
            step.optimizer.zero_grad(set_to_none=True)


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    start_step: int = 0,
    callbacks: Sequence[object] = (),
    checkpoint: CheckpointFile | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``data.train_x [N, ...]``, ``data.train_y [N]`` by the plain engine.

    Args:
        model: any module that maps a batch of inputs to logits ``[B, C]``; on the data's device.
        data: device-resident data set.
        recipe: epochs, batch size, learning rate, momentum, schedule.
        seed: names the order of the samples (stream "order"); the initial network is the caller's.
        start_step: updates that the network has behind it (a rewound one): it goes on with the batches and rates that
            follow them, its optimizer fresh.
        callbacks: objects with ``on_start``, ``on_step``, ``on_epoch``, ``on_end`` (each optional).
        checkpoint: where to save at epoch ends and resume from; a resumed run ends with the same bits.
        progress: called as ``progress(epochs_done, epochs)``.

    Raises:
        TypeError: a callback has none of the four methods; seed is not an int.
        ValueError: model without parameters or on another device than the data, empty data, a negative seed, a start
            beyond the recipe's last step, the checkpoint of another run (recipe, seed, data, or initial network).
    """
    check_inputs("train", [model], data, [seed])
    last = recipe.epochs * recipe.steps_per_epoch(len(data.train_x))
    if isinstance(start_step, bool) or not isinstance(start_step, int) or not 0 <= start_step <= last:
        raise ValueError(f"train: start_step must be an int in 0..{last}, the recipe's updates, got {start_step!r}")
    engine = PlainEngine([model], data, recipe, seeds=[seed], start_step=start_step)
    result = drive(engine, data, recipe, callbacks=callbacks, checkpoint=checkpoint, progress=progress)
    return TrainResult(result.history, result.diverged[0], "plain", result.seconds)


def check_inputs(owner: str, models: Sequence[nn.Module], data: Dataset, seeds: Sequence[int]) -> None:
    """Refuse what cannot train, before anything is changed."""
    if not models:
        raise ValueError(f"{owner}: models must hold at least one network, got none")
    if len(models) != len(seeds):
        raise ValueError(f"{owner}: seeds must be one per network ({len(models)}), got {len(seeds)}")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{owner}: seeds must differ from each other, got {list(seeds)}")
    if len({id(model) for model in models}) != len(models):
        raise ValueError(f"{owner}: models must be different objects, got the same one twice")
    if len(data.train_x) == 0:
        raise ValueError(f"{owner}: data must hold training samples, got none")
    for model in models:
        params = list(model.parameters())
        if not params:
            raise ValueError(f"{owner}: model must have parameters, got none")
        for param in params:
            if param.device != data.train_x.device:
                raise ValueError(
                    f"{owner}: model must be on the data's device {data.train_x.device}, got {param.device}"
                )
            if param.dtype != data.train_x.dtype:
                raise ValueError(f"{owner}: model must have the data's dtype {data.train_x.dtype}, got {param.dtype}")


def drive(
    engine: Engine,
    data: Dataset,
    recipe: Recipe,
    *,
    callbacks: CallbackSource = (),
    checkpoint: CheckpointFile | None = None,
    progress: Progress | None = None,
) -> GroupResult:
    """Run ``engine`` to the end of the recipe: orders, rates, rows, callbacks, checkpoints, divergence."""
    began = time.perf_counter()
    states = engine.states
    history: list[dict[str, Any]] = []
    try:
        # What may refuse stands inside: the engine holds the models' parameters, and only finish() gives them back.
        watchers = Callbacks(callbacks, states)
        generators = [seeding.generator(state.seed, "order") for state in states]
        for state, order in zip(states, generators, strict=True):
            for _ in range(state.epoch):  # the orders of the epochs before a late start
                torch.randperm(len(data.train_x), generator=order)
        # Before on_start, where a callback may change the network, and before the checkpoint replaces it.
        identity = {} if checkpoint is None else _identity(engine, data, recipe)
        for state in states:
            # Before the checkpoint is read, so that a recorder of movement sees the initial network also on resume.
            watchers.fire("on_start", state)
        run = _Run(engine, watchers, generators, identity, history)
        if checkpoint is not None:
            run.resume(checkpoint)
        _epochs(run, data, recipe, checkpoint, progress)
    finally:
        engine.finish()
    for state in states:
        watchers.fire("on_end", state)
    return GroupResult(history, tuple(state.diverged for state in states), engine.name, time.perf_counter() - began)


def _epochs(
    run: _Run, data: Dataset, recipe: Recipe, checkpoint: CheckpointFile | None, progress: Progress | None
) -> None:
    states, num = run.engine.states, len(data.train_x)
    on_step = partial(run.watchers.fire, "on_step") if run.watchers.watches_steps else None
    done = states[0].epoch
    if progress is not None:
        progress(done, recipe.epochs)
    for epoch in range(done, recipe.epochs):
        if all(state.diverged for state in states):
            break
        orders = torch.stack([torch.randperm(num, generator=g) for g in run.generators]).to(data.train_x.device)
        loss_sum, correct = run.engine.epoch(orders, recipe.learning_rate(epoch), on_step)
        # The only host synchronization of the epoch.
        for state, loss, hits in zip(states, loss_sum.tolist(), correct.tolist(), strict=True):
            _close_epoch(state, epoch + 1, loss / num, hits / num, run.history)
        for state in states:
            run.watchers.fire("on_epoch", state)
        if checkpoint is not None and checkpoint.due():
            run.save(checkpoint)
        if progress is not None:
            progress(epoch + 1, recipe.epochs)


def _close_epoch(state: TrainState, epoch: int, loss: float, accuracy: float, history: list[dict[str, Any]]) -> None:
    state.epoch = epoch
    if state.diverged:
        return
    row = {"seed": state.seed, "epoch": epoch, "step": state.step, "train_loss": loss, "train_accuracy": accuracy}
    state.history.append(row)
    history.append(row)
    state.diverged = not math.isfinite(loss)


def _identity(engine: Engine, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must agree in to be resumed: a resumed run may not silently be another run.

    Called while the networks are the initial ones.  Shapes alone would let a network in NTK parametrization, or
    another draw, go on from the checkpoint of a standard one.
    """
    models = [state.model for state in engine.states]
    late = [state.step for state in engine.states if state.step]
    return {
        **({"start_step": late} if late else {}),
        "engine": engine.name,
        "recipe": asdict(recipe),
        "seeds": [state.seed for state in engine.states],
        "shapes": [[list(param.shape) for param in state.params] for state in engine.states],
        "classes": [type(model).__name__ for model in models],
        "affine_scales": [
            [float(m.affine_scale) for m in model.modules() if hasattr(m, "affine_scale")]  # type: ignore[arg-type]
            for model in models
        ],
        "initial_network": [_digest(model) for model in models],
        "dtype": str(data.train_x.dtype),
        "data": f"{data.name} {data.fingerprint} {len(data.train_x)}",
    }


def _digest(model: nn.Module) -> str:
    """Sha256 over the modules' names and classes and the bytes of all parameters and masks, in the model's order."""
    digest = hashlib.sha256()
    for prefix, module in model.named_modules():
        digest.update(f"{prefix}:{type(module).__name__};".encode())
        tensors = list(module.named_parameters(recurse=False))
        if "indices" in module._buffers:  # where a sparse layer's values stand decides as much as what they are
            tensors += [("indices", module.get_buffer("indices"))]  # type: ignore[list-item]
        for name, param in tensors:
            digest.update(f"{name}{list(param.shape)}{param.dtype};".encode())
            # As bytes, because numpy has no bfloat16.
            digest.update(param.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


@dataclass
class _Run:
    """What a checkpoint holds beside the recipe: the engine's tensors, random states, rows, what callbacks keep."""

    engine: Engine
    watchers: Callbacks
    generators: Sequence[torch.Generator]
    identity: dict[str, Any]
    history: list[dict[str, Any]]

    def save(self, checkpoint: CheckpointFile) -> None:
        states = self.engine.states
        tensors = self.engine.tensors() | {f"order.{i}": g.get_state() for i, g in enumerate(self.generators)}
        header = {
            "identity": self.identity,
            "epoch": states[0].epoch,
            "step": [state.step for state in states],
            "diverged": [state.diverged for state in states],
            "history": self.history,
            "callbacks": self.watchers.state_dict(),
        }
        checkpoint.save(tensors, header)

    def resume(self, checkpoint: CheckpointFile) -> None:
        loaded = checkpoint.load()
        if loaded is None:
            return
        tensors, header = loaded
        for key, expected in self.identity.items():
            got = header["identity"].get(key)
            if got != expected:
                raise ValueError(
                    f"train: checkpoint {checkpoint.path} is of another run: {key} must be {expected}, got {got}; "
                    "delete the file or name another one"
                )
        for i, g in enumerate(self.generators):
            g.set_state(tensors.pop(f"order.{i}"))
        self.engine.load_tensors(tensors)
        self.watchers.load_state_dict(header["callbacks"])
        for state, step, diverged in zip(self.engine.states, header["step"], header["diverged"], strict=True):
            state.epoch, state.step, state.diverged = header["epoch"], step, diverged
            state.history.extend(row for row in header["history"] if row["seed"] == state.seed)
        self.history.extend(header["history"])
