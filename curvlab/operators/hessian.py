# SPDX-License-Identifier: Apache-2.0
r"""The Hessian of a problem's loss.

    H = d^2 L / d theta^2,   L(theta) = (1/Z) sum_n l(f(x_n; theta), y_n)      [P, P], symmetric

Z is the problem's normalizer.  A parameter that the loss does not see has a zero row and column.  Source: Pearlmutter,
Fast exact multiplication by the Hessian, 1994.
"""

from __future__ import annotations

import copy

from torch import Tensor
from typing_extensions import Self

from curvlab.operators.modes import own_dtypes
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

    def rounded(self) -> Self | None:
        """The same matrix by bfloat16 products that share this one's primal pass, where they are much faster; or None.

        For solvers that put right what rounding did (:func:`curvlab.spectra.top_eigenpairs`): relative error 3e-3 to
        1e-2. None unless the fused engine multiplies in float32, without a memory budget, in one process, on a CPU with
        tile products, and keeps more factors of the samples than there are parameters.
        """
        # The fused engine is loaded where it is picked, not with the operators.
        from curvlab.operators.engines.rounded import pays, rounded_twin

        if self.problem.process_group is not None or not pays(self.engine):
            return None
        low = copy.copy(self)
        with own_dtypes(self.device):
            low.engine = rounded_twin(self.engine, second=True)  # type: ignore[arg-type]
        low._precision, low.num_products = "bf16", 0
        low._forget()
        return low
