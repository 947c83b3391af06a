# SPDX-License-Identifier: Apache-2.0
r"""Fisher matrices: the exact one of the model's own predictions, its sampled estimate, and the empirical one.

    F       = (1/Z) sum_n J_n^T E_{y ~ p(.|f_n)}[g(y) g(y)^T] J_n,   g(y) = d l(f_n, y) / d f_n        [P, P]
    F_mc    = the same with the mean of S drawn labels in place of the expectation
    F_emp   = (1/Z) sum_n J_n^T delta_n delta_n^T J_n,               delta_n = g(y_n), the labels of the data

J_n = d f(x_n; theta) / d theta, Z the problem's normalizer.  For cross entropy p is the softmax (a row of weight w
enters with w, an ignored one not at all; outputs ``[N, C, ...]`` are one distribution a position), for squared error
the Gaussian N(f, I/2), whose negative log-likelihood is |f - y|^2: in both, F is the generalized Gauss-Newton matrix,
and E[F_mc] = F with a standard deviation that falls as S^(-1/2).  F_emp is not an estimate of F: it takes the outer
products of whole samples' gradients at the labels of the data.  Source: Martens 2020, sections 5 and 11; Kunstner et
al. 2019.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from curvlab.operators.engines.protocol import draw_seed
from curvlab.operators.losses import CustomLoss
from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import ProblemOperator

__all__ = ["EmpiricalFisherOperator", "FisherOperator"]

FisherKind = Literal["exact", "monte_carlo"]


class FisherOperator(ProblemOperator):
    """``F`` or ``F_mc``, ``[P, P]``, positive semidefinite.

    Args:
        problem: model, loss, parameters, data.
        kind: ``"exact"`` or ``"monte_carlo"``. The draws are made once: all products are of one matrix.
        num_samples: S, draws a sample (a position) for ``"monte_carlo"``.
        generator: source of the draws; None: one fixed stream. Processes of a group draw apart from each other.
        engine: as of ``HessianOperator``.
        precision: as of ``HessianOperator``.
        memory_budget: as of ``HessianOperator``.

    Raises:
        ValueError: an unknown kind, num_samples below one, a loss that is a callable and has no known distribution of
            targets, and what ``HessianOperator`` refuses.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        kind: FisherKind = "exact",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if kind not in get_args(FisherKind):
            raise ValueError(f"FisherOperator: kind must be 'exact' or 'monte_carlo', got {kind!r}")
        if num_samples < 1:
            raise ValueError(f"FisherOperator: num_samples must be at least 1, got {num_samples}")
        if isinstance(problem.loss, CustomLoss):
            raise ValueError(
                "FisherOperator: problem must have cross entropy or squared error as its loss (a callable has no known "
                "distribution of targets), got a callable; EmpiricalFisherOperator takes any loss"
            )
        self.kind, seed = kind, draw_seed(generator)
        if problem.process_group is not None:
            # Generators alike in all processes must not give their batches the same draws: errors would not average.
            rank = torch.distributed.get_rank(problem.process_group)
            seed = (seed + rank * 0x632BE59BD9B4E019) % 2**62
        super().__init__(
            problem,
            engine=engine,
            precision=precision,
            memory_budget=memory_budget,
            product="ggn",
            is_psd=True,
            num_samples=num_samples,
            generator=torch.Generator().manual_seed(seed),
        )

    def _product(self, rows: Tensor) -> Tensor:
        return self.engine.ggn(rows, "loss" if self.kind == "exact" else "monte_carlo")


class EmpiricalFisherOperator(ProblemOperator):
    """``F_emp``, ``[P, P]``, positive semidefinite; arguments, errors and use as of ``HessianOperator``.

    With reduction "mean" and Z = N it is the uncentered second moment of the per-sample gradients;
    ``GradientCovarianceOperator`` is the centered one, for any Z.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            problem, engine=engine, precision=precision, memory_budget=memory_budget, product="empirical", is_psd=True
        )

    def _product(self, rows: Tensor) -> Tensor:
        return self.engine.ggn(rows, "empirical")
