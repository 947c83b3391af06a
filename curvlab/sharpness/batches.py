# SPDX-License-Identifier: Apache-2.0
r"""Batch sharpness: the curvature that mini-batch training feels.

    E_B [ g_B^T H_B g_B / ||g_B||^2 ],   g_B, H_B gradient and Hessian of the mean loss over a random mini-batch B

the expected curvature of mini-batch Hessians along their own gradients. In mini-batch training this, not lambda_max of
the full loss, settles at 2/eta. Source: Andreyev & Beneventano 2024, arXiv 2412.20553.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from curvlab.operators.engines.derivatives import check_twice_differentiable
from curvlab.operators.problem import Problem
from curvlab.sharpness.evaluation import parameter_row

__all__ = ["BatchSharpness", "batch_sharpness"]


@dataclass(frozen=True)
class BatchSharpness:
    """Curvature along mini-batch gradients.

    Attributes:
        curvatures: g^T H g / ||g||^2 a batch, float64 ``[B]``; NaN where the gradient is zero.
        squared_gradients: ||g||^2 a batch, float64 ``[B]``.
        batch_size: samples a batch.
    """

    curvatures: Tensor
    squared_gradients: Tensor
    batch_size: int

    @property
    def value(self) -> float:
        """The mean over the batches."""
        return self.curvatures.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean, batches taken as independent; NaN for one batch."""
        count = len(self.curvatures)
        return self.curvatures.std(correction=1).item() / math.sqrt(count) if count > 1 else math.nan

    @property
    def ratio_of_means(self) -> float:
        """E [g^T H g] / E [||g||^2]: batches with large gradients count more, those with none nothing."""
        weights = self.squared_gradients / self.squared_gradients.sum()
        return torch.where(weights == 0, 0.0, self.curvatures * weights).sum().item()

    def __repr__(self) -> str:
        return (
            f"batch sharpness {self.value:.6g}, standard error {self.standard_error:.2g}, over {len(self.curvatures)} "
            f"batches of {self.batch_size}"
        )


def batch_sharpness(
    problem: Problem, batch_size: int, *, num_batches: int = 32, generator: torch.Generator | None = None
) -> BatchSharpness:
    """Batch sharpness over random mini-batches, each drawn without replacement, in the problem's dtype.

    In BatchNorm mode "batch" a mini-batch sees its own statistics, as in training. With a process group each process
    draws ``num_batches`` from its share of the data, and all are returned everywhere.

    Args:
        problem: network, loss and data (all batches of this process are held in memory together).
        batch_size: samples a mini-batch, up to the N of this process (then every batch is the full loss).
        num_batches: how many.
        generator: source of the draws.

    Raises:
        ValueError: batch_size outside 1..N, num_batches below one, a network that cannot be differentiated twice.
    """
    samples, targets = _gathered(problem)
    count = len(targets)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_sharpness: batch_size must be in 1..{count} (N), got {batch_size}")
    if num_batches < 1:
        raise ValueError(f"batch_sharpness: num_batches must be at least 1, got {num_batches}")
    where = generator.device if generator is not None else torch.device("cpu")
    theta = parameter_row(problem)
    pairs = []
    for _ in range(num_batches):
        chosen = torch.randperm(count, generator=generator, device=where)[:batch_size].to(targets.device)
        pairs.append(_curvature_along_gradient(problem, theta, _pick(samples, chosen, count), targets[chosen]))
    if problem.process_group is not None:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(problem.process_group)
        torch.distributed.all_gather_object(gathered, pairs, group=problem.process_group)
        pairs = [pair for part in gathered for pair in part]
    curvatures, squares = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return BatchSharpness(curvatures, squares, batch_size)


def _curvature_along_gradient(problem: Problem, theta: Tensor, inputs: Any, targets: Tensor) -> tuple[float, float]:
    row = theta.clone().requires_grad_()
    loss = problem.loss
    total = loss.total(problem.outputs(problem.rows_to_params(row), inputs), targets)
    weight = loss.weight(None, targets) if problem.reduction == "mean" else 1.0
    (gradient,) = torch.autograd.grad(total / weight, row, create_graph=True)
    check_twice_differentiable([gradient])
    fixed, product = gradient.detach(), torch.zeros_like(row)
    if gradient.requires_grad:  # a loss that is linear in the parameters has none
        (product,) = torch.autograd.grad(gradient, row, fixed, materialize_grads=True)
    square = fixed.double().square().sum().item()
    along = (fixed.double() * product.double()).sum().item()
    return (along / square if square > 0 else math.nan), square


def _gathered(problem: Problem) -> tuple[Any, Tensor]:
    parts = list(problem.batches())
    if len(parts) == 1:
        return parts[0]
    inputs = tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0],
                      *[part for part, _ in parts])  # fmt: skip
    return inputs, torch.cat([targets for _, targets in parts])


def _pick(inputs: Any, chosen: Tensor, count: int) -> Any:
    def take(leaf: Any) -> Any:
        has_samples = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count
        return leaf[chosen] if has_samples else leaf

    return tree_map(take, inputs)
