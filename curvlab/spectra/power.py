# SPDX-License-Identifier: Apache-2.0
"""Power iteration as published studies run it: a protocol to repeat, not a solver.

It converges to the eigenvalue of largest *magnitude*, by a factor |lambda_2 / lambda_1| a step, and stops after a fixed
number of steps whatever was reached. For an eigenvalue take :func:`curvlab.spectra.top_eigenpairs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.spectra import vectors as vec

__all__ = ["PowerIteration", "power_iteration"]


@dataclass(frozen=True)
class PowerIteration:
    """Where it came to.

    Attributes:
        value: Rayleigh quotient v^T A v of the last vector multiplied, in units of A.
        vector: that vector ``[P]``, of norm 1.
        residual: ||A v - value v||: what the protocol does not look at.
        history: float64 ``[num_iterations]``, the Rayleigh quotients.
        num_products: products A v spent.
    """

    value: float
    vector: Tensor
    residual: float
    history: Tensor
    num_products: int

    def __repr__(self) -> str:
        return f"Rayleigh quotient {self.value:.6g} after {self.num_products} products, residual {self.residual:.1e}"


@torch.no_grad()
def power_iteration(
    A: vec.Operator, num_iterations: int = 30, *, generator: torch.Generator | None = None
) -> PowerIteration:
    """``num_iterations`` times v <- A v / ||A v|| from a random v; the estimate is the last Rayleigh quotient.

    Args:
        A: symmetric operator ``[P, P]``.
        num_iterations: products, all of them used.
        generator: of the first vector.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: num_iterations below 1; products not finite.
    """
    vec.check_operator("power_iteration", A, symmetric=True)
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ValueError(f"power_iteration: num_iterations must be an integer of at least 1, got {num_iterations!r}")
    rows = vec.draw_normal(A, 1, generator)
    rows.mul_(1 / math.sqrt(vec.inner_products(rows, rows).item()))
    history, residual = [], 0.0
    for i in range(num_iterations):
        products = A.apply_rows(rows)
        value, square = vec.inner_products(rows, products).item(), vec.inner_products(products, products).item()
        if not math.isfinite(square):
            raise ValueError("power_iteration: A must give finite products, got an infinity or NaN")
        history.append(value)
        if i == num_iterations - 1:
            off = products - value * rows
            residual = math.sqrt(vec.inner_products(off, off).item())
        elif square > 0:
            rows = products * (1 / math.sqrt(square))
    return PowerIteration(history[-1], rows[0], residual, torch.tensor(history, dtype=torch.float64), num_iterations)
