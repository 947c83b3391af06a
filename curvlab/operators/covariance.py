# SPDX-License-Identifier: Apache-2.0
r"""The covariance of per-sample gradients: the noise of stochastic gradient descent.

    C = (1/N) sum_n (g_n - g)(g_n - g)^T,   g = (1/N) sum_n g_n = dL/dtheta      [P, P]

g_n = (N/Z) d l(f(x_n; theta), y_n) / d theta is sample n's gradient in the scale of the problem's loss, so that the
mean of the g_n is its gradient: a batch of B samples drawn with replacement gives the gradient a covariance of C/B.
(Z = N for plain cross entropy; Z = number of output elements for squared error; Z = 1 for reduction "sum".)  In terms
of the empirical Fisher matrix, C = (N/Z) F_emp - g g^T; what is taken off is of rank one and exact up to the rounding
of F_emp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.operators.engines.protocol import Engine
from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import ProblemOperator

__all__ = ["GradientCovarianceOperator"]


class GradientCovarianceOperator(ProblemOperator):
    """``C`` ``[P, P]``, positive semidefinite.

    Args:
        problem: model, loss, parameters, data; the samples must not interact (BatchNorm "eval" or "frozen").
        centered: False leaves the mean in: ``(1/N) sum_n g_n g_n^T``.
        engine: as of ``HessianOperator``.
        precision: as of ``HessianOperator``.
        memory_budget: as of ``HessianOperator``.

    Raises:
        ValueError: BatchNorm in mode "batch", where a sample has no gradient of its own; and what ``HessianOperator``
            refuses.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        centered: bool = True,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        has_layers = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in problem.model.modules())
        if problem.batch_norm == "batch" and has_layers:
            raise ValueError(
                "GradientCovarianceOperator: problem must have batch_norm 'eval' or 'frozen' (with batch statistics a "
                "sample has no gradient of its own), got 'batch'"
            )
        super().__init__(
            problem, engine=engine, precision=precision, memory_budget=memory_budget, product="empirical", is_psd=True
        )
        self.centered = centered
        self._mean: tuple[Engine, Tensor] | None = None

    def _forget(self) -> None:
        super()._forget()
        self._mean = None

    @property
    def mean(self) -> Tensor:
        """The mean g ``[P]``, of all processes; a collective call on first use where there is a process group."""
        if self._mean is None or self._mean[0] is not self.engine:  # another precision has another mean
            self._mean = self.engine, self._reduced(self.engine.gradient())
        return self._mean[1]

    def _apply(self, rows: Tensor) -> Tensor:
        moment = self._reduced(self.engine.ggn(rows, "empirical"))
        moment *= self.problem.num_samples / self.problem.normalizer
        if self.centered:
            moment.addr_(rows @ self.mean, self.mean, alpha=-1.0)
        return moment
