# SPDX-License-Identifier: Apache-2.0
r"""The neural tangent kernel as a matrix that only multiplies.

    K = J J^T      [M, M],   K[(n, c), (m, d)] = < d f_c(x_n) / d theta, d f_d(x_m) / d theta >

M, the order of the rows and the scale (no 1/N, no 1/C) are those of ``JacobianOperator`` and of ``ntk.empirical_ntk``,
which is the fast way to the dense kernel; products need neither its M^2 memory nor layers with a product form.
"""

from __future__ import annotations

from torch import Tensor

from curvlab.operators.base import LinearOperator
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.problem import Problem

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
        size = self.jacobian.shape[0]
        super().__init__((size, size), problem.dtype, problem.device, is_psd=True)

    def _apply(self, rows: Tensor) -> Tensor:
        return self.jacobian.apply_rows(self.jacobian.apply_rows_transposed(rows))
