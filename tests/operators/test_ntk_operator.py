# SPDX-License-Identifier: Apache-2.0
"""The Jacobian and the neural tangent kernel as operators, against the dense Jacobian and ``empirical_ntk``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvlab.models import CNN, MLP
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.ntk import empirical_ntk
from curvlab.operators.ntk_operator import NTKOperator
from curvlab.operators.problem import Problem
from tests.operators.dense import dense_jacobian
from tests.operators.models import CASES, labels, normal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("engine", ["linearized", "autograd"])
@pytest.mark.parametrize("name", ["act_gelu", "sequence", "bn2d_batch", "bn1d_frozen", "named", "unused", "subset"])
def test_jacobian_and_its_transpose_are_dense(name: str, engine: str) -> None:
    case = CASES[name]()
    problem = case.problem()
    operator, dense = JacobianOperator(problem, engine=engine), dense_jacobian(case)
    assert operator.shape == dense.shape
    assert not operator.is_symmetric
    scale = dense.abs().max().item()
    v, u = normal(problem.num_params, seed=5), normal(len(dense), seed=6)
    assert (operator @ v - dense @ v).abs().max().item() < 1e-9 * scale
    assert (operator.T @ u - dense.T @ u).abs().max().item() < 1e-9 * scale
    assert (operator.to_dense() - dense).abs().max().item() < 1e-9 * scale
    as_list = list(problem.rows_to_params(v.unsqueeze(0)).values())
    assert (operator @ [part[0] for part in as_list] - dense @ v).abs().max().item() < 1e-9 * scale


@pytest.mark.parametrize("kind", ["mlp", "ntk", "cnn"])
def test_dense_form_is_the_empirical_kernel(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    if kind == "cnn":
        model, x = CNN(2, image_size=8, num_classes=3, generator=generator).double().eval(), normal(4, 3, 8, 8)
    else:
        parametrization = "ntk" if kind == "ntk" else "standard"
        model = MLP(5, in_features=6, num_classes=3, parametrization=parametrization, generator=generator).double()
        x = normal(5, 6)
    y = labels(len(x), classes=3)
    problem = Problem(model, nn.CrossEntropyLoss(), [(x[:2], y[:2]), (x[2:], y[2:])])
    operator, dense = NTKOperator(problem), empirical_ntk(model, x)
    assert operator.is_psd
    assert (operator.to_dense() - dense).abs().max().item() < 1e-10 * dense.abs().max().item()
    u = normal(len(dense), 2, seed=7)
    assert (operator @ u - dense @ u).abs().max().item() < 1e-10 * dense.abs().max().item()
    assert operator.num_products == len(dense) + 2


def test_the_gram_of_the_jacobian_is_the_kernel() -> None:
    problem = CASES["act_tanh"]().problem()
    jacobian, kernel = JacobianOperator(problem), NTKOperator(problem)
    gram = jacobian @ jacobian.T
    assert gram.is_psd
    assert torch.allclose(gram.to_dense(), kernel.to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["linearized", "autograd"])
def test_wrong_sizes_are_named(engine: str) -> None:
    operator = JacobianOperator(CASES["act_tanh"]().problem(), engine=engine)
    with pytest.raises(ValueError, match=r"JacobianOperator: V must be \[P\] or \[P, K\] with P == 51"):
        _ = operator @ normal(50)
    with pytest.raises(ValueError, match=r"jacobian_transposed: outputs must be \[K, M\]"):
        operator.engine.jacobian_transposed(normal(1, operator.shape[0] + 1))
    with pytest.raises(ValueError, match=r"jacobian_transposed: outputs must be \[K, M\]"):
        operator.engine.jacobian_transposed(normal(1, operator.shape[0] - 1))


@pytest.mark.parametrize("engine", ["fused", "linearized", "autograd"])
def test_lower_precision_keeps_the_dtype_and_states_its_error(engine: str) -> None:
    problem = CASES["act_tanh"]().problem(torch.float32)
    jacobian = JacobianOperator(problem, engine=engine, precision="bf16")
    assert (jacobian @ torch.ones(jacobian.shape[1])).dtype == torch.float32
    assert (jacobian.T @ torch.ones(jacobian.shape[0])).dtype == torch.float32
    kernel = NTKOperator(problem, engine=engine, precision="bf16")
    used = kernel.engine
    assert 1e-4 < kernel.precision_error < 3e-2
    assert kernel.jacobian.engine is used
    assert NTKOperator(problem, engine=engine).precision_error == 0.0


def test_the_kernel_moves_along_with_training() -> None:
    case = CASES["act_tanh"]()
    problem = case.problem()
    kernel = NTKOperator(problem)
    before = kernel.to_dense()
    with torch.no_grad():
        for param in case.model.parameters():
            param.mul_(1.5)
    moved = kernel.at(case.model)
    assert torch.equal(kernel.to_dense(), before)
    later = NTKOperator(Problem(case.model, case.loss, case.batches)).to_dense()
    assert torch.allclose(moved.to_dense(), later, rtol=1e-12, atol=1e-14)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize("engine", ["auto", "linearized", "autograd"])
def test_parameters_that_no_output_sees_have_zero_columns(engine: str) -> None:
    data = (normal(5, 3), labels(5, classes=2))
    jacobian = JacobianOperator(Problem(Unused().double(), nn.CrossEntropyLoss(), data, params="unused"), engine=engine)
    assert torch.equal(jacobian.to_dense(), torch.zeros(10, 2, dtype=torch.float64))
    assert torch.equal(jacobian.T.to_dense(), torch.zeros(2, 10, dtype=torch.float64))
