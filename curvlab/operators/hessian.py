# SPDX-License-Identifier: Apache-2.0
r"""The Hessian of a problem's loss.

    H = d^2 L / d theta^2,   L(theta) = (1/Z) sum_n l(f(x_n; theta), y_n)      [P, P], symmetric

Z is the problem's normalizer.  A parameter that the loss does not see has a zero row and column.  Source: Pearlmutter,
Fast exact multiplication by the Hessian, 1994.
"""

from __future__ import annotations

from torch import Tensor

from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import ProblemOperator

__all__ = ["HessianOperator"]


class HessianOperator(ProblemOperator):
    """``H`` ``[P, P]``; ``H @ V`` for ``[P]``, ``[P, K]`` and lists, ``apply_rows`` for ``[K, P]``.

    Args:
        problem: model, loss, parameters, data.
        engine: ``"auto"`` picks the fastest that takes the model, checks its first product and says so in ``report``.
        precision: None, ``"bf16"`` or ``"tf32"`` (its error: ``precision_error``).
        memory_budget: bytes for the engine's factors and temporaries.

    Raises:
        ValueError: a model that is not deterministic, a budget that holds nothing, an unknown engine or precision.
        UnsupportedModel: the engine asked for by name cannot take the model.
        RuntimeError: the engine's product is not that of float64 autograd.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(problem, engine=engine, precision=precision, memory_budget=memory_budget)

    def _product(self, rows: Tensor) -> Tensor:
        return self.engine.hessian(rows)
