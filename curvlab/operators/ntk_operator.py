# SPDX-License-Identifier: Apache-2.0
r"""The neural tangent kernel as a matrix that only multiplies.

    K = J J^T      [M, M],   K[(n, c), (m, d)] = < d f_c(x_n) / d theta, d f_d(x_m) / d theta >

M, the order of the rows and the scale (no 1/N, no 1/C) are those of ``JacobianOperator`` and of ``ntk.empirical_ntk``,
which is the fast way to the dense kernel; products need neither its M^2 memory nor layers with a product form.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from curvlab.operators.base import LinearOperator
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.precision import relative_error
from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import engine_like

__all__ = ["NTKOperator"]


class NTKOperator(LinearOperator):
    """``K = J J^T`` ``[M, M]``, positive semidefinite; one product is one with J^T and one with J.

    Args:
        problem: model, parameters, data; the loss does not enter.
        engine: as of ``HessianOperator``.
        precision: as of ``HessianOperator``.
        memory_budget: as of ``HessianOperator``.

    Attributes:
        jacobian: J, with its ``engine`` and ``report``.

    Raises:
        ValueError: what ``HessianOperator`` refuses.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.jacobian = JacobianOperator(problem, engine=engine, precision=precision, memory_budget=memory_budget)
        self.problem, self.engine, self.report = problem, self.jacobian.engine, self.jacobian.report
        self._precision, self._precision_error = precision, None
        size = self.jacobian.shape[0]
        super().__init__((size, size), problem.dtype, problem.device, is_psd=True)

    def at(self, model: nn.Module) -> NTKOperator:
        """The kernel at the present values of ``model``; as of ``HessianOperator``."""
        moved = copy.copy(self)
        moved.jacobian = self.jacobian.at(model)
        moved.problem, moved.engine = moved.jacobian.problem, moved.jacobian.engine
        moved.num_products, moved._precision_error = 0, None
        return moved

    @property
    def precision_error(self) -> float:
        """``||K_p u - K u|| / ||K u||`` for one Gaussian u, K in float32; 0 if no precision was asked for.

        Costs one product in float32 on first use; a collective call where there is a process group.
        """
        if self._precision is None:
            return 0.0
        if self._precision_error is None:
            generator = torch.Generator(self.device).manual_seed(0)
            row = torch.randn(1, self.shape[1], dtype=self.dtype, device=self.device, generator=generator)
            low, engine = self._apply(row), self.jacobian.engine
            self.jacobian.engine = engine_like(self.jacobian, self.problem, None)
            try:
                self._precision_error = relative_error(low, self._apply(row))
            finally:
                self.jacobian.engine = engine
        return self._precision_error

    def _apply(self, rows: Tensor) -> Tensor:
        return self.jacobian.apply_rows(self.jacobian.apply_rows_transposed(rows))
