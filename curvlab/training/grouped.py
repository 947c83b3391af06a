# SPDX-License-Identifier: Apache-2.0
"""Networks of one shape trained together, seed beside seed: the plain loop's updates in far fewer calls.

Small networks are stacked whole: at width 32 a step of three networks is 25 calls instead of three times about 70. The
smallest run on one thread: a second one saves a fifth on an idle machine, and on a busy one each of the 25 calls may
wait a time slice for it (20 s instead of 1 s for a unit of width 16). Wide ones are bound by their matrix products, and
a stack of several only spoils the cache; they run as stacks of one, where what is saved is memory traffic
(``stacked.py``). The models' parameters are views of the stack while training runs, so callbacks and ``evaluate`` see
live networks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from curvlab.data import Dataset
from curvlab.models import MLP, NTKLinear
from curvlab.training.callbacks import CallbackSource, TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.loop import Engine, GroupResult, PlainEngine, Progress, Recipe, check_inputs, drive
from curvlab.training.stacked import Stack

__all__ = ["GroupedEngine", "choose_engine", "train_group"]

# Parameters of one network above which seeds run as stacks of one (CPU).  Three seeds, one thread, against stacks of
# one: stacked is 9 % faster at width 128, 2 % at 512 (0.9 M parameters), and 12 % slower at 1024 (2.9 M).
STACK_LIMIT = 1_500_000
# Parameters of all networks together up to which one thread trains them (CPU): three seeds of width 64.
ONE_THREAD_LIMIT = 200_000


class GroupedEngine:
    """S networks of one shape in stacks of ``stack_size``; see the module's docstring.  Made by :func:`train_group`."""

    def __init__(
        self, models: Sequence[MLP], data: Dataset, recipe: Recipe, *, seeds: Sequence[int], stack_size: int
    ) -> None:
        self.name = "grouped" if stack_size > 1 or len(models) == 1 else "grouped, one network a stack"
        self.recipe, self.models = recipe, list(models)
        self.x, self.y = data.train_x.flatten(1), data.train_y
        num = len(self.x)
        full = min(recipe.batch_size, num)
        sizes = {full, num % full or full}
        self.stacks = [Stack(part, sizes, recipe.momentum) for part in _parts(self.models, stack_size)]
        self._own = [[param.data for param in model.parameters()] for model in models]
        self._views = [views for stack in self.stacks for views in map(stack.views, range(stack.count))]
        self.states = []
        for model, views, seed in zip(models, self._views, seeds, strict=True):
            for param, view in zip(model.parameters(), views, strict=True):
                param.data = view
                param.grad = None
            self.states.append(TrainState(model, list(model.parameters()), seed, len(self.states)))
        self._graphs: dict[int, _StepGraph] = {}

    @torch.no_grad()
    def epoch(self, orders: Tensor, lr: float, on_step: Callable[[TrainState], None] | None) -> tuple[Tensor, Tensor]:
        """One epoch of all networks, stack after stack; see ``loop.Engine``."""
        sums, first = [], 0
        for i, stack in enumerate(self.stacks):
            part = slice(first, first + stack.count)
            sums.append(self._epoch_of(i, orders[part], self.states[part], lr, on_step))
            first += stack.count
        return torch.cat([loss for loss, _ in sums]), torch.cat([correct for _, correct in sums])

    def _epoch_of(
        self, i: int, orders: Tensor, states: list[TrainState], lr: float, on_step: Callable[[TrainState], None] | None
    ) -> tuple[Tensor, Tensor]:
        stack, labels = self.stacks[i], self.y[orders]
        classes = torch.arange(stack.classes, device=labels.device)
        onehot = (labels[:, None] == classes[:, None]).to(self.x.dtype)  # [S, C, N]
        size = self.recipe.batch_size
        kept = []
        # The logits of all steps are kept, and loss and accuracy computed once an epoch: about 10 calls less a step.
        for rows, target in zip(orders.split(size, 1), onehot.split(size, 2), strict=True):
            logits = self.x.new_empty(target.shape)
            self._step(i, rows.reshape(-1), target, logits, lr)
            kept.append(logits)
            for state in states:
                state.step += 1
                state.lr = lr
                if on_step is not None:
                    on_step(state)
        every = torch.cat(kept, 2)
        losses = torch.logsumexp(every, 1) - every.gather(1, labels[:, None])[:, 0]
        return losses.double().sum(1), (every.argmax(1) == labels).sum(1)

    def _step(self, i: int, rows: Tensor, target: Tensor, logits: Tensor, lr: float) -> None:
        if self.x.is_cuda and logits.shape[2] == self.recipe.batch_size:
            if i not in self._graphs:
                self._graphs[i] = _StepGraph(self.stacks[i], self.x, rows, target)
            self._graphs[i].replay(rows, target, logits, lr)
        else:
            self.stacks[i].step(self.x, rows, target, logits, -lr)

    def tensors(self) -> dict[str, Tensor]:
        """The flat buffers of all stacks."""
        out = {f"theta.{i}": stack.theta for i, stack in enumerate(self.stacks)}
        return out | {f"velocity.{i}": stack.velocity for i, stack in enumerate(self.stacks)}

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])

    def finish(self) -> None:
        """Give each model its own storage back, with the trained values."""
        for model, own, views in zip(self.models, self._own, self._views, strict=True):
            for param, mine, view in zip(model.parameters(), own, views, strict=True):
                mine.copy_(view)
                param.data = mine


class _StepGraph:
    """One captured step, replayed for every full batch: one launch for the host instead of 25."""

    def __init__(self, stack: Stack, x: Tensor, rows: Tensor, target: Tensor) -> None:
        self.rows, self.target, self.logits = rows.clone(), target.contiguous().clone(), torch.empty_like(target)
        self.logits = self.logits.contiguous()
        self.minus_lr = x.new_zeros(())
        self.graph = torch.cuda.CUDAGraph()
        kept = stack.theta.clone(), stack.velocity.clone()

        def step() -> None:
            stack.step(x, self.rows, self.target, self.logits, self.minus_lr)

        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):  # libraries choose and allocate on first use, which capture forbids
            for _ in range(3):
                step()
        torch.cuda.current_stream(x.device).wait_stream(side)
        stack.theta.copy_(kept[0])
        stack.velocity.copy_(kept[1])
        with torch.cuda.graph(self.graph):
            step()

    def replay(self, rows: Tensor, target: Tensor, logits: Tensor, lr: float) -> None:
        """One step on ``rows``; its outputs are copied to ``logits``."""
        self.rows.copy_(rows)
        self.target.copy_(target)
        self.minus_lr.fill_(-lr)
        self.graph.replay()
        logits.copy_(self.logits)


@contextlib.contextmanager
def _threads_for(models: Sequence[nn.Module]) -> Iterator[None]:
    """One thread for what ``ONE_THREAD_LIMIT`` calls small; the caller's setting otherwise and afterwards."""
    before = torch.get_num_threads()
    params = [param for model in models for param in model.parameters()]
    if not params[0].is_cuda and sum(param.numel() for param in params) <= ONE_THREAD_LIMIT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(models: list[MLP], stack_size: int) -> list[list[MLP]]:
    return [models[first : first + stack_size] for first in range(0, len(models), stack_size)]


def _is_plain(layer: nn.Module) -> bool:
    """What a stack computes: weight and bias are parameters, and the layer's call is its forward."""
    called = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) in (nn.Linear, NTKLinear) and list(layer._parameters) == ["weight", "bias"] and not called


def choose_engine(models: Sequence[nn.Module]) -> tuple[int, str]:
    """How many networks a stack, and why; 0 for the plain engine.

    Networks of type MLP with plain layers of one shape and parametrization are stacked, all of them where one has up to
    ``STACK_LIMIT`` parameters or the device is a GPU, else one by one.
    """
    if not all(type(model) is MLP for model in models):
        return 0, "only MLPs can be stacked"
    mlps = cast("Sequence[MLP]", models)
    if not all(_is_plain(layer) for model in mlps for layer in model.linear_layers()):
        return 0, "some layers are sparse, pruned, parametrized or hooked"
    shapes = {
        tuple((layer.weight.shape, getattr(layer, "affine_scale", 1.0)) for layer in m.linear_layers()) for m in mlps
    }
    if len(shapes) > 1:
        return 0, "the networks differ in shape or parametrization"
    params = list(mlps[0].parameters())
    if not all(param.requires_grad for model in mlps for param in model.parameters()):
        return 0, "some parameters are frozen"
    if params[0].is_cuda or sum(param.numel() for param in params) <= STACK_LIMIT:
        return len(models), "small networks stacked"
    return 1, "wide networks, one a stack"


def train_group(
    models: Sequence[nn.Module],
    data: Dataset,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    callbacks: CallbackSource = (),
    checkpoint: CheckpointFile | None = None,
    progress: Progress | None = None,
) -> GroupResult:
    """Train ``models`` in place, one network per seed, together where that is faster.

    The updates are those of :func:`curvlab.training.loop.train` for each network and seed (same order of samples, same
    rates; they differ by rounding, and agree to 1e-10 in float64).  Bits repeat for the same group, thread count and
    processor.

    Args:
        models: networks, updated in place; each on the data's device and of its dtype.
        data: device-resident data set.
        recipe: epochs, batch size, learning rate, momentum, schedule.
        seeds: one per network, all different: names its order of samples (stream "order").
        callbacks: for one network, a sequence; for several, a function ``seed -> sequence``.
        checkpoint: where to save at epoch ends and resume from; a resumed run ends with the same bits.
        progress: called as ``progress(epochs_done, epochs)``.

    Returns:
        The rows of all networks, divergence flags, and which engine ran (``engine``).

    Raises:
        TypeError: a callback has none of the four methods; a seed is not an int.
        ValueError: models and seeds do not match or repeat, a negative seed, wrong device or dtype, empty data, one
            sequence of callbacks for several networks, the checkpoint of another run (recipe, seeds, data, or initial
            networks).  After a refusal the models are as they came, with their own storage.
    """
    check_inputs("train_group", models, data, seeds)
    stack_size = choose_engine(models)[0] if recipe.optimizer == "sgd" else 0
    engine: Engine
    if stack_size:
        mlps = cast("Sequence[MLP]", models)
        engine = GroupedEngine(mlps, data, recipe, seeds=seeds, stack_size=stack_size)
    else:
        engine = PlainEngine(models, data, recipe, seeds=seeds)
    with _threads_for(models):
        return drive(engine, data, recipe, callbacks=callbacks, checkpoint=checkpoint, progress=progress)
