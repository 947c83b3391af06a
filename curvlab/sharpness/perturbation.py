# SPDX-License-Identifier: Apache-2.0
r"""Average flatness: the loss under Gaussian noise on the parameters.

    L(sigma) = E_xi L(theta + sigma D * xi),   xi ~ N(0, I_P),   increase(sigma) = L(sigma) - L(theta)

D is a scale of :mod:`curvlab.sharpness.directions` (``rms``: sigma is the relative size of a filter's or layer's noise)
or 1. To second order the increase is sigma^2 / 2 tr(D H D). Every draw is used at every sigma (common random numbers):
curves are smooth, and V draws at S levels cost V draws. Source: the noise protocol of Neyshabur et al. 2017; relative
noise is what leaves the measure alone when weights are rescaled without changing the function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.operators.problem import Problem
from curvlab.sharpness.directions import Scale, draw_normal, weight_scale
from curvlab.sharpness.evaluation import DEFAULT_BUDGET, LossEvaluator, Way, check_row, parameter_row

__all__ = ["Flatness", "average_flatness"]


@dataclass(frozen=True)
class Flatness:
    r"""Losses under noise.

    Attributes:
        stds: sigma, float64 ``[S]``.
        losses: float64 ``[S, V]``, draw by draw (the same V draws in every row).
        base_loss: L(theta).
        accuracies: shares in 0..1, float64 ``[S, V]``; None where the loss is not cross-entropy with class indices.
        base_accuracy: accuracy at theta, or None.
        num_classes: C of the outputs, the accuracy by chance is 1/C.
        scale: the name of D.
        paired: draws 2i and 2i + 1 are xi and -xi.
    """

    stds: Tensor
    losses: Tensor
    base_loss: float
    accuracies: Tensor | None
    base_accuracy: float | None
    num_classes: int
    scale: str
    paired: bool = False

    def __repr__(self) -> str:
        lines = [f"loss {self.base_loss:.6g}; mean of {self.losses.shape[1]} draws of {self.scale} noise:"]
        for std, loss, error in zip(
            self.stds.tolist(), self.losses.mean(1).tolist(), self.standard_error.tolist(), strict=True
        ):
            lines.append(f"  sigma {std:g}: {loss:.6g} (standard error {error:.1e})")
        return "\n".join(lines)

    @property
    def increases(self) -> Tensor:
        """L(theta + eps) - L(theta), float64 ``[S, V]``."""
        return self.losses - self.base_loss

    @property
    def increase(self) -> Tensor:
        """Mean increase over the draws, float64 ``[S]``."""
        return self.increases.mean(1)

    @property
    def relative_increase(self) -> Tensor:
        """Mean increase over L(theta), float64 ``[S]``: what the tables of percents hold, blind to the loss's scale."""
        return self.increase / self.base_loss

    @property
    def standard_error(self) -> Tensor:
        """Standard error of :attr:`increase`, float64 ``[S]``: over the draws, or over the means of antithetic pairs.

        The two of a pair are alike to second order in sigma: taken as independent, their error would come out
        1 / sqrt(2) of what it is. NaN for a single draw or pair.
        """
        samples = self.losses.unflatten(1, (-1, 2)).mean(2) if self.paired else self.losses
        if samples.shape[1] < 2:
            return torch.full_like(self.stds, math.nan)
        return samples.std(1, correction=1) / math.sqrt(samples.shape[1])

    @property
    def half_accuracy_std(self) -> float:
        """The sigma at which the mean accuracy has fallen half way from its base to chance (1/C).

        Linear in log sigma between the levels around the first crossing; NaN where the levels do not reach it (or the
        lowest is beyond it), or where there is no accuracy.
        """
        if self.accuracies is None or self.base_accuracy is None:
            return math.nan
        half = 0.5 * (self.base_accuracy + 1.0 / self.num_classes)
        order = self.stds.argsort()
        stds, means = self.stds[order].tolist(), self.accuracies.mean(1)[order].tolist()
        for i in range(1, len(stds)):
            if means[i - 1] >= half > means[i] and stds[i - 1] > 0:
                share = (means[i - 1] - half) / (means[i - 1] - means[i])
                return math.exp(math.log(stds[i - 1]) + share * math.log(stds[i] / stds[i - 1]))
        return math.nan


def average_flatness(
    problem: Problem,
    std: float | Sequence[float],
    *,
    num_draws: int = 5,
    scale: Scale = "absolute",
    antithetic: bool = False,
    draws: Tensor | None = None,
    generator: torch.Generator | None = None,
    way: Way = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> Flatness:
    """Losses at V draws times S noise levels, many points in one sweep over the data, in float64.

    Args:
        problem: network, loss and data, at theta.
        std: sigma, or several.
        num_draws: V.
        scale: D: ``"absolute"`` (1), ``"element"`` (|w|), ``"filter"``, ``"layer"`` (root mean square of the weights).
        antithetic: draws come in pairs xi, -xi, which removes the gradient's part of the variance; V must be even.
        draws: xi ``[V, P]`` in place of random ones (``num_draws`` and ``generator`` are not looked at).
        generator: source of the draws; the numbers do not depend on the memory budget.
        way: see :mod:`curvlab.sharpness.evaluation`.
        memory_budget: bytes for the points of one sweep.

    Raises:
        ValueError: a sigma that is negative or not finite, no draws, an odd number of antithetic ones, draws of another
            shape.
    """
    stds = torch.tensor([std] if isinstance(std, (int, float)) else list(std), dtype=torch.float64)
    if len(stds) == 0 or not bool((stds.isfinite() & (stds >= 0)).all()):
        raise ValueError(f"average_flatness: std must be finite and 0 or more, got {std!r}")
    if draws is not None:
        check_row("average_flatness", "draws", draws, problem, leads=(2,))
        num_draws = len(draws)
    if num_draws < 1 or (antithetic and num_draws % 2):
        kind = "even" if antithetic else "at least 1"
        raise ValueError(f"average_flatness: num_draws must be {kind}, got {num_draws}")
    evaluator = LossEvaluator(problem, way=way, memory_budget=memory_budget)
    theta = parameter_row(problem)
    lengths = weight_scale(problem.params, scale, rms=True)
    base = evaluator.base()
    losses = torch.empty(len(stds), num_draws, dtype=torch.float64)
    accuracies = torch.full_like(losses, math.nan)
    # Draws of one block stay in memory while all levels use them; pairs stay together.
    block = max(2, evaluator.points_at_once // (2 * len(stds)) * 2)
    for start in range(0, num_draws, block):
        count = min(block, num_draws - start)
        noise = _noise(problem, start, count, antithetic, draws, generator).mul_(lengths)
        points = [(s, v) for s in range(len(stds)) for v in range(count)]
        for first in range(0, len(points), evaluator.points_at_once):
            here = points[first : first + evaluator.points_at_once]
            rows = torch.stack([torch.add(theta, noise[v], alpha=stds[s].item()) for s, v in here])
            found = evaluator(rows)
            for i, (s, v) in enumerate(here):
                losses[s, start + v] = found.losses[i]
                if found.accuracies is not None:
                    accuracies[s, start + v] = found.accuracies[i]
    has_accuracy = base.accuracies is not None
    return Flatness(
        stds,
        losses,
        base.losses.item(),
        accuracies if has_accuracy else None,
        base.accuracies.item() if base.accuracies is not None else None,
        _num_classes(problem),
        scale,
        antithetic and draws is None,
    )


def _noise(
    problem: Problem, start: int, count: int, antithetic: bool, draws: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Rows ``[count, P]`` that may be written over."""
    if draws is not None:
        return draws[start : start + count].to(problem.device, problem.dtype, copy=True)
    if not antithetic:
        return draw_normal(count, problem.num_params, problem, generator)
    half = draw_normal(count // 2, problem.num_params, problem, generator)
    return torch.stack([half, -half], 1).reshape(count, -1)


@torch.no_grad()
def _num_classes(problem: Problem) -> int:
    inputs, _ = next(iter(problem.batches()))
    return problem.outputs(problem.params, inputs).shape[1:2].numel()
