# SPDX-License-Identifier: Apache-2.0
r"""The generalized Gauss-Newton matrix: the Hessian of the loss in the outputs, seen through a linearized network.

    G = (1/Z) sum_n J_n^T (d^2 l / d f^2)(f_n, y_n) J_n,   J_n = d f(x_n; theta) / d theta      [P, P]

Positive semidefinite for a loss that is convex in the outputs (cross entropy, squared error).  H = G + the curvature of
the network itself, which vanishes where the residuals do.  Source: Schraudolph 2002; Martens 2020.
"""

from __future__ import annotations

from torch import Tensor

from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import ProblemOperator

__all__ = ["GGNOperator"]


class GGNOperator(ProblemOperator):
    """``G`` ``[P, P]``; arguments, errors and use as of ``HessianOperator``."""

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            problem,
            engine=engine,
            precision=precision,
            memory_budget=memory_budget,
            product="ggn",
            is_psd=problem.loss.is_convex,
        )

    def _product(self, rows: Tensor) -> Tensor:
        return self.engine.ggn(rows)
