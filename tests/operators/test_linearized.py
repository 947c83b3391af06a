# SPDX-License-Identifier: Apache-2.0
"""The linearized engine against dense matrices, its memory budget, and what must not break it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.operators.engines.linearized import LinearizedEngine
from curvlab.operators.engines.protocol import Engine
from curvlab.operators.problem import Problem
from tests.operators.dense import (
    dense_empirical_fisher,
    dense_ggn,
    dense_gradient,
    dense_hessian,
    dense_jacobian,
    dense_loss,
)
from tests.operators.models import CASES, F64, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(problem: Problem, k: int = 3, seed: int = 3) -> Tensor:
    return normal(k, problem.num_params, seed=seed)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    scale = expected.abs().max().item() + 1e-12
    assert (got - expected).abs().max().item() <= 1e-9 * scale


@pytest.mark.parametrize("name", CASES)
def test_products_equal_dense_matrices(name: str) -> None:
    case = CASES[name]()
    problem = case.problem()
    rows = rows_of(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = LinearizedEngine(problem)
        hessian, ggn, pushed = engine.hessian(rows), engine.ggn(rows), engine.jacobian(rows)
        outputs = normal(2, pushed.shape[1], seed=4)
        pulled = engine.jacobian_transposed(outputs)
    jacobian = dense_jacobian(case)
    assert_close(hessian, rows @ dense_hessian(case))
    assert_close(ggn, rows @ dense_ggn(case))
    assert_close(pushed, rows @ jacobian.T)
    assert_close(pulled, outputs @ jacobian)
    assert_close(torch.tensor(engine.loss(), dtype=F64), dense_loss(case))
    assert_close(engine.gradient(), dense_gradient(case))
    assert all("recorded" in route for route in engine.routes.values()), engine.routes
    assert isinstance(engine, Engine)
