# SPDX-License-Identifier: Apache-2.0
r"""Worst-case sharpness: how high the loss rises within a ball or a box around the parameters.

With D a scale of :mod:`curvlab.sharpness.directions` (1 where it is "absolute") and g = grad L(theta):

    SAM        eps = rho g / ||g||                           (Foret et al. 2021)
    ASAM       eps = rho D^2 g / ||D g||                     (Kwon et al. 2021: the ball is ||eps / D|| <= rho)
    worst case max L(theta + eps) - L(theta) over that ball  (L2, or L-infinity: |eps_i| <= rho D_i)
    box        100 (max L(theta + A z) - L(theta)) / (1 + L(theta)),  |z_i| <= epsilon (|(A^+ theta)_i| + 1)
               (Keskar et al. 2017: A = I, or P x p with standard normal entries; 10 steps of L-BFGS-B)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvlab.operators.problem import Problem
from curvlab.sharpness.directions import Scale, draw_normal, weight_scale
from curvlab.sharpness.evaluation import LossEvaluator, loss_and_gradient, parameter_row

__all__ = ["Ascent", "box_sharpness", "sam_ascent", "worst_case_sharpness"]


@dataclass(frozen=True)
class Ascent:
    """Where an ascent ended.

    Attributes:
        increase: L(theta + eps) - L(theta) at the highest point found.
        base_loss: L(theta).
        perturbation: eps ``[P]``.
        losses: the loss after each step, in order; the first entry is the base.
        num_gradients: sweeps over the data with a gradient.
    """

    increase: float
    base_loss: float
    perturbation: Tensor
    losses: tuple[float, ...]
    num_gradients: int

    @property
    def relative_increase(self) -> float:
        """Increase / (1 + L(theta)): Keskar's normalization, without his factor 100."""
        return self.increase / (1.0 + self.base_loss)

    def __repr__(self) -> str:
        steps = f"{len(self.losses) - 1} step{'' if len(self.losses) == 2 else 's'}, {self.num_gradients} gradients"
        length = self.perturbation.norm().item()
        return f"loss {self.base_loss:.6g}, {self.increase:.6g} more at a distance of {length:.4g} ({steps})"


def _check_radius(function: str, radius: float) -> None:
    if not (radius > 0 and radius < float("inf")):
        raise ValueError(f"{function}: radius must be positive and finite, got {radius!r}")


def _longest_step(gradient: Tensor, lengths: Tensor, radius: float, norm: str) -> Tensor:
    """The eps of the ball's surface with the largest inner product with the gradient; zero for a zero gradient."""
    scaled = lengths * gradient
    if norm == "linf":
        return radius * lengths * gradient.sign()
    size = torch.linalg.vector_norm(scaled)
    # A gradient of 1e-30 is a direction too: divided by its largest entry first, its square does not vanish.
    peak = scaled.abs().amax()
    if peak == 0 or not bool(torch.isfinite(size)):
        return torch.zeros_like(scaled)
    unit = scaled / peak
    return radius * lengths * (unit / torch.linalg.vector_norm(unit))


def sam_ascent(problem: Problem, radius: float = 0.05, *, scale: Scale = "absolute", eta: float = 0.0) -> Ascent:
    """The one step that SAM (``scale="absolute"``) or ASAM (``"element"``, ``"filter"``) takes, and what it gains.

    Args:
        problem: network, loss and data; full-batch: SAM's training takes it per mini-batch.
        radius: rho.
        scale: D.
        eta: added to D (0.01 in ASAM's code; with 0 the measure is exactly invariant to rescaling).

    Raises:
        ValueError: radius not positive and finite; what ``weight_scale`` raises.
    """
    _check_radius("sam_ascent", radius)
    theta = parameter_row(problem)
    _, gradient = loss_and_gradient(problem, theta)
    eps = _longest_step(gradient, weight_scale(problem.params, scale, eta=eta), radius, "l2")
    # Both by one route: at a loss of 1e-5 the rounding of two routes is a part of a small difference.
    base, top = LossEvaluator(problem)(torch.stack([theta, theta + eps])).losses.tolist()
    return Ascent(top - base, base, eps, (base, top), 1)


def worst_case_sharpness(
    problem: Problem,
    radius: float = 0.05,
    *,
    norm: Literal["l2", "linf"] = "l2",
    scale: Scale = "absolute",
    eta: float = 0.0,
    num_steps: int = 20,
    tol: float = 1e-4,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Ascent:
    r"""Highest loss within the ball ||eps / D|| <= radius, by linear maximization of L over it, again and again.

    eps <- argmax over the ball of <grad L(theta + eps), .>: for a convex loss each step goes up (a maximum of a convex
    function lies on the boundary), without a step size. Where a step goes down - the loss is not convex there - the
    next candidate is half way back. A lower bound of the maximum, as every local search gives; no less than
    ``sam_ascent`` for the same ball.

    Args:
        problem: network, loss and data.
        radius: of the ball, in units of D.
        norm: of the ball.
        scale: D.
        eta: added to D.
        num_steps: gradients to take at most.
        tol: stop when a step gains less than this share of the increase so far.
        start: eps ``[P]`` to begin at; where it and the gradient at theta are zero, a random direction begins.
        generator: source of that direction.

    Raises:
        ValueError: radius not positive and finite, num_steps below one, an unknown norm, start of another shape.
    """
    _check_radius("worst_case_sharpness", radius)
    if num_steps < 1:
        raise ValueError(f"worst_case_sharpness: num_steps must be at least 1, got {num_steps}")
    if norm not in ("l2", "linf"):
        raise ValueError(f"worst_case_sharpness: norm must be 'l2' or 'linf', got {norm!r}")
    if start is not None and start.shape != (problem.num_params,):
        raise ValueError(
            f"worst_case_sharpness: start must be [P] with P == {problem.num_params} (from problem), "
            f"got {list(start.shape)}"
        )
    theta, lengths = parameter_row(problem), weight_scale(problem.params, scale, eta=eta)
    base, gradient = loss_and_gradient(problem, theta)
    best, best_eps = base, torch.zeros_like(theta)
    losses, candidate = [base], start
    if candidate is None:
        candidate = _longest_step(gradient, lengths, radius, norm)
        if not bool(candidate.any()):
            candidate = _longest_step(draw_normal(1, len(theta), problem, generator)[0], lengths, radius, norm)
    taken = 1
    while taken < num_steps + 1:
        loss, gradient = loss_and_gradient(problem, theta + candidate)
        taken += 1
        losses.append(loss)
        if loss > best:
            settled = loss - best <= tol * (loss - base)
            best, best_eps = loss, candidate
            if settled:
                break
            candidate = _longest_step(gradient, lengths, radius, norm)
            continue
        candidate = 0.5 * (best_eps + candidate)
        if torch.linalg.vector_norm(candidate - best_eps) <= tol * torch.linalg.vector_norm(candidate):
            break
    return Ascent(best - base, base, best_eps, tuple(losses), taken)


def box_sharpness(
    problem: Problem,
    epsilon: float = 1e-3,
    *,
    num_steps: int = 10,
    subspace: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Keskar's sharpness, in percent (see the module), by L-BFGS-B as in the paper (SciPy's).

    Args:
        problem: network, loss and data.
        epsilon: half-width of the box: 1e-3 and 5e-4 in the paper.
        num_steps: iterations of L-BFGS-B; 10 in the paper, which does not wait for the maximum.
        subspace: None: the full space; p: the box lies in the column space of a random ``[P, p]`` matrix (100 there).
        generator: source of the matrix.

    Raises:
        ValueError: epsilon not positive and finite, num_steps or subspace below one.
        ImportError: SciPy is not installed.
    """
    if not (epsilon > 0 and epsilon < float("inf")):
        raise ValueError(f"box_sharpness: epsilon must be positive and finite, got {epsilon!r}")
    if num_steps < 1:
        raise ValueError(f"box_sharpness: num_steps must be at least 1, got {num_steps}")
    if subspace is not None and not 1 <= subspace <= problem.num_params:
        raise ValueError(f"box_sharpness: subspace must be in 1..{problem.num_params} (P), got {subspace}")
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise ImportError("box_sharpness: needs SciPy (pip install 'curvlab[study]')") from error
    theta = parameter_row(problem)
    basis = None if subspace is None else draw_normal(subspace, len(theta), problem, generator).double()
    center = theta.double() if basis is None else torch.linalg.lstsq(basis.T, theta.double()[:, None]).solution[:, 0]
    half = epsilon * (center.abs() + 1.0).cpu().numpy()

    def negative(z: Any) -> tuple[float, Any]:
        step = torch.as_tensor(z, dtype=torch.float64, device=theta.device)
        step = step if basis is None else basis.T @ step
        loss, gradient = loss_and_gradient(problem, (theta.double() + step).to(theta.dtype))
        down = gradient.double() if basis is None else basis @ gradient.double()
        return -loss, -down.cpu().numpy()

    base, _ = negative(0.0 * half)
    bounds: Any = Bounds(-half, half)  # type: ignore[arg-type]
    found = minimize(negative, 0.0 * half, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": num_steps})
    return 100.0 * (base - min(float(found.fun), base)) / (1.0 - base)
