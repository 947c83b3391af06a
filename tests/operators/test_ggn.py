# SPDX-License-Identifier: Apache-2.0
"""The Gauss-Newton operator: dense, positive semidefinite, and the Hessian of a network that is linear."""

from __future__ import annotations

import pytest
import torch

from curvlab.operators.ggn import GGNOperator
from curvlab.operators.hessian import HessianOperator
from tests.operators import dense
from tests.operators.models import CASES, normal

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = ["act_relu", "models_cnn", "bn1d_batch", "residual", "tied", "unused", "pair", "sequence", "mse", "smoothed"]


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_dense_matrix_and_positive_semidefinite(name):
    case = CASES[name]()
    operator = GGNOperator(case.problem(), engine="autograd")
    assert operator.is_psd
    matrix = operator.to_dense()
    expected = dense.dense_ggn(case)
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-13 * expected.abs().max().item() + 1e-13)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12 * matrix.abs().max()


@pytest.mark.parametrize("name", ["linear", "mse"])
def test_it_is_the_hessian_of_a_linear_network_alone(name):
    problem = CASES[name]().problem(**({"params": "2.*"} if name == "mse" else {}))
    rows = normal(2, problem.num_params)
    ggn, hessian = GGNOperator(problem, engine="autograd"), HessianOperator(problem, engine="autograd")
    torch.testing.assert_close(ggn.apply_rows(rows), hessian.apply_rows(rows), rtol=1e-11, atol=1e-14)
    whole = CASES["mse"]().problem()
    rows = normal(2, whole.num_params)
    ggn, hessian = GGNOperator(whole, engine="autograd"), HessianOperator(whole, engine="autograd")
    assert (ggn.apply_rows(rows) - hessian.apply_rows(rows)).norm() > 0.1 * hessian.apply_rows(rows).norm()


def test_a_loss_of_unknown_shape_is_not_declared_convex():
    operator = GGNOperator(CASES["custom_loss"]().problem(), engine="autograd")
    assert operator.is_symmetric and not operator.is_psd


def test_it_sees_a_restricted_problem_as_a_submatrix():
    case = CASES["act_tanh"]()
    part = GGNOperator(case.problem(params=["0.*", "4.bias"]), engine="autograd")
    whole = GGNOperator(case.problem(), engine="autograd").restrict(["0.*", "4.bias"])
    torch.testing.assert_close(part.to_dense(), whole.to_dense(), rtol=1e-11, atol=1e-14)
