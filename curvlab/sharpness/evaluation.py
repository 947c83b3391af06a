# SPDX-License-Identifier: Apache-2.0
r"""Losses at many points of parameter space in one sweep over the data.

A point is a row theta ``[P]`` in the order of ``problem.params``; the loss is the problem's,

    L(theta) = (1/Z) sum_n l(f(x_n; theta), y_n),

taken in float64 from the network's outputs: on a trained network L is 1e-5, a float32 log-sum-exp of logits around 20
carries an absolute error of 1e-6, and a relative increase of a few percent would drown in it. (The logits themselves
are the network's: where their rounding matters too, take ``problem.to(torch.float64)``.)

Two ways, the same numbers to rounding. *Stacked*: ``torch.func.vmap`` over the parameters, one call per layer for all
points. *Loop*: one point after the other, convolutions channels-last. Measured on one core, ms a point: stacked wins
where call overhead counts (MLP(32), 16 samples: 0.044 against 0.094), the loop where arithmetic does (CNN(8), 256
samples: 23 against 114, since a convolution with K weights becomes a grouped one). ``way="auto"`` decides by the
largest intermediate of one point, never by a clock: a repeated run takes the same way. A network that ``vmap`` does
not take goes by the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from curvlab.operators.losses import CustomLoss, SoftmaxCrossEntropy
from curvlab.operators.problem import Problem

__all__ = ["Evaluation", "LossEvaluator", "check_row", "loss_and_gradient", "parameter_row"]

Way = Literal["auto", "stacked", "loop"]

DEFAULT_BUDGET = 1 << 30
# Crossing of the two ways on one core lies between 32 k (CNN(2), 16 samples) and 131 k elements (CNN(8), 16 samples).
STACKED_UP_TO = 1 << 15
# A pass of 2 M elements at its widest layer: CNN(8) takes 89 us a sample at 256 samples, 99 at 64, and 5,000 at once
# would touch fresh pages throughout.
PASS_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Evaluation:
    """What :class:`LossEvaluator` gives for K points.

    Attributes:
        losses: float64 ``[K]`` on the CPU; NaN or infinite where the network overflows.
        accuracies: share of samples whose largest output is their label, float64 ``[K]``, or None where that has no
            meaning (not cross-entropy with class indices).
    """

    losses: Tensor
    accuracies: Tensor | None


def parameter_row(problem: Problem) -> Tensor:
    """The problem's own parameters as a row ``[P]`` (a copy)."""
    return problem.params_to_rows(problem.params, batched=False)


class _Widest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes; views of ``known`` do not count."""

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.elements = 1
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._known:
                self.elements = max(self.elements, leaf.numel())
        return out


class LossEvaluator:
    """Evaluates a problem's loss (and accuracy) at rows of parameters.

    Args:
        problem: network, loss and data; its own parameters say shapes and order only.
        way: ``"stacked"``, ``"loop"`` or ``"auto"`` (see the module).
        memory_budget: bytes for the points of one sweep and their activations; at least one point is always taken.

    Raises:
        ValueError: an unknown way; a budget below one.
    """

    def __init__(self, problem: Problem, *, way: Way = "auto", memory_budget: int = DEFAULT_BUDGET) -> None:
        if way not in ("auto", "stacked", "loop"):
            raise ValueError(f"LossEvaluator: way must be 'auto', 'stacked' or 'loop', got {way!r}")
        if memory_budget < 1:
            raise ValueError(f"LossEvaluator: memory_budget must be at least 1 byte, got {memory_budget}")
        self.problem = problem
        self._budget = memory_budget
        self._size = problem.num_params
        # Per-sample splitting changes nothing only where samples do not see each other.
        self._splits = problem.batch_norm == "eval"
        self._widest, self._samples = self._measure()
        if way == "auto":
            stacked = problem.device.type == "cuda" or self._widest <= STACKED_UP_TO
            way = "stacked" if self._of_all(int(stacked and self._stacks()), least=True) else "loop"
        self.way: Way = way
        self._channels_last = way == "loop" and problem.dtype in (torch.float32, torch.bfloat16)

    def _measure(self) -> tuple[int, int]:
        """Elements of the largest intermediate of one pass, and the samples that a pass takes."""
        inputs, targets = next(iter(self.problem.batches()), (torch.empty(1), None))
        count = _num_samples(inputs)
        part = _narrow(inputs, 0, min(4, count)) if self._splits else inputs
        with torch.no_grad(), _Widest(self.problem.params) as probe:
            if targets is not None:  # None: a process without data
                self.problem.outputs(self.problem.params, part)
        a_sample = -(-probe.elements // _num_samples(part))
        samples = max(1, min(count, PASS_ELEMENTS // a_sample)) if self._splits else count
        return self._of_all(a_sample * samples, least=False), samples

    def _of_all(self, value: int, *, least: bool) -> int:
        """The least or largest over the processes: all take the same way in the same sweeps, or wait forever."""
        if self.problem.process_group is None:
            return value
        held = torch.tensor(value, device=self.problem.device)
        op = torch.distributed.ReduceOp.MIN if least else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(held, op, group=self.problem.process_group)
        return int(held)

    def _stacks(self) -> bool:
        """Whether ``vmap`` takes the network (it refuses, among others, branches on values that weights decide)."""
        inputs, _ = next(iter(self.problem.batches()), (None, None))
        if inputs is None:
            return True
        part = _narrow(inputs, 0, 1) if self._splits else inputs
        twice = {name: torch.stack([tensor, tensor]) for name, tensor in self.problem.params.items()}
        try:
            with torch.no_grad():
                torch.func.vmap(lambda point: self.problem.outputs(point, part))(twice)
        except (RuntimeError, NotImplementedError, ValueError):
            return False
        return True

    @property
    def points_at_once(self) -> int:
        """Points of one sweep within the budget: two copies of the row each, and when stacked three layers each."""
        activations = 3 * self._widest if self.way == "stacked" else 0
        return max(1, self._budget // (self.problem.dtype.itemsize * (2 * self._size + activations)))

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Evaluation:
        """Losses at ``rows [K, P]`` (or ``[P]``: K = 1), in sweeps of :attr:`points_at_once`.

        Raises:
            ValueError: rows of another shape.
        """
        rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.shape[1] != self._size:
            raise ValueError(
                f"LossEvaluator: rows must be [K, P] with P == {self._size} (from problem), got {list(rows.shape)}"
            )
        rows = rows.to(self.problem.device, self.problem.dtype)
        parts = [self._sweep(part) for part in rows.split(self.points_at_once)] if len(rows) else []
        totals = torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.float64)
        losses, correct, counted = totals.unbind(1)
        has_accuracy = bool(len(totals)) and bool((counted > 0).all())
        return Evaluation(losses, correct / counted if has_accuracy else None)

    def base(self) -> Evaluation:
        """Loss and accuracy at the problem's own parameters."""
        return self(parameter_row(self.problem))

    def _sweep(self, rows: Tensor) -> Tensor:
        """``[K, 3]``: loss, right predictions, predictions that count; all processes of the group together."""
        problem = self.problem
        totals = torch.zeros(len(rows), 3, dtype=torch.float64, device=problem.device)
        points = problem.rows_to_params(rows)
        singles = [self._point(points, k) for k in range(len(rows))] if self.way == "loop" else []
        for inputs, targets in self._passes():
            statistics = problem.statistics(inputs)
            if self.way == "stacked":
                outputs = torch.func.vmap(lambda p, x=inputs, s=statistics: problem.outputs(p, x, statistics=s))(points)
                totals[:, 0] += self._stacked_totals(outputs, targets)
                totals[:, 1:] += _right(problem.loss, outputs, targets)
                continue
            for k, point in enumerate(singles):
                outputs = problem.outputs(point, inputs, statistics=statistics)
                totals[k, 0] += problem.loss.total(*_wide(problem.loss, outputs, targets))
                totals[k, 1:] += _right(problem.loss, outputs.unsqueeze(0), targets)[0]
        if problem.process_group is not None:
            torch.distributed.all_reduce(totals, group=problem.process_group)
        totals[:, 0] /= problem.normalizer
        return totals.cpu()

    def _stacked_totals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[K]`` losses of outputs ``[K, N, ...]``; a user's callable is not asked to batch."""
        loss = self.problem.loss
        wide, targets = _wide(loss, outputs, targets)
        if isinstance(loss, CustomLoss):
            return torch.stack([loss.total(one, targets).double() for one in wide])
        return torch.func.vmap(lambda one: loss.total(one, targets))(wide)

    def _point(self, points: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        theta = {name: stacked[k] for name, stacked in points.items()}
        if self._channels_last:
            theta = {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in theta.items()}
        return theta

    def _passes(self) -> Iterator[tuple[Any, Tensor]]:
        """The batches, cut to the samples of a pass; images channels-last for the loop."""
        for inputs, targets in self.problem.batches():
            count = _num_samples(inputs)
            step = self._samples if self._splits and len(targets) == count else count
            for start in range(0, count, step):
                size = min(step, count - start)
                whole = size == count
                part = inputs if whole else _narrow(inputs, start, size)
                if self._channels_last and isinstance(part, Tensor) and part.ndim == 4:
                    part = part.contiguous(memory_format=torch.channels_last)
                yield part, targets if whole else targets.narrow(0, start, size)


def _num_samples(inputs: Any) -> int:
    return next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim)


def _narrow(inputs: Any, start: int, size: int) -> Any:
    count = _num_samples(inputs)

    def cut(leaf: Any) -> Any:
        whole = not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != count
        return leaf if whole else leaf.narrow(0, start, size)

    return tree_map(cut, inputs)


def _wide(loss: Any, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets in float64 where the loss is ours; a user's callable gets the network's dtype."""
    if isinstance(loss, CustomLoss):
        return outputs, targets
    return outputs.double(), targets.double() if targets.is_floating_point() else targets


def _right(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """``[K, 2]``: how many predictions of outputs ``[K, N, C, ...]`` are right and how many count; 0, 0: no meaning."""
    found = torch.zeros(len(outputs), 2, dtype=torch.float64, device=outputs.device)
    if isinstance(loss, SoftmaxCrossEntropy) and not targets.is_floating_point():
        counted = targets != loss.ignore_index
        found[:, 0] = ((outputs.argmax(2) == targets) & counted).flatten(1).sum(1)
        found[:, 1] = counted.sum()
    return found


def loss_and_gradient(problem: Problem, theta: Tensor) -> tuple[float, Tensor]:
    """The loss (in float64 from the outputs on) and its gradient ``[P]`` at the row ``theta [P]``, in theta's dtype."""
    row = theta.detach().clone().requires_grad_()
    gradient = torch.zeros_like(theta)
    total = torch.zeros((), dtype=torch.float64, device=theta.device)
    for inputs, targets in problem.batches():
        outputs = problem.outputs(problem.rows_to_params(row), inputs)
        part = problem.loss.total(*_wide(problem.loss, outputs, targets))
        gradient += torch.autograd.grad(part, row)[0]
        total += part.detach()
    if problem.process_group is not None:
        for tensor in (gradient, total):
            torch.distributed.all_reduce(tensor, group=problem.process_group)
    return float(total / problem.normalizer), gradient / problem.normalizer


def check_row(function: str, argument: str, rows: Tensor, problem: Problem, leads: Sequence[int] = (1, 2)) -> None:
    """Raises ValueError unless ``rows`` is ``[P]`` or ``[K, P]`` (``leads`` says which) with the problem's P."""
    if rows.ndim not in leads or rows.shape[-1] != problem.num_params:
        shapes = " or ".join("[P]" if n == 1 else "[K, P]" for n in leads)
        raise ValueError(
            f"{function}: {argument} must be {shapes} with P == {problem.num_params} (from problem), "
            f"got {list(rows.shape)}"
        )
