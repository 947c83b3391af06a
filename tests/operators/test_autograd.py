# SPDX-License-Identifier: Apache-2.0
"""The judge against dense matrices by forward over reverse on every layer kind: nobody judges it but this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.protocol import Engine, UnsupportedModel
from curvlab.operators.problem import Problem
from tests.operators import dense
from tests.operators.models import CASES, F64, labels, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrices(name):
    case = CASES[name]()
    problem = case.problem()
    engine = AutogradEngine(problem)
    assert isinstance(engine, Engine)
    rows = normal(3, problem.num_params, seed=7)
    jacobian = dense.dense_jacobian(case)
    assert engine.loss() == pytest.approx(dense.dense_loss(case).item(), rel=1e-12)
    close(engine.gradient(), dense.dense_gradient(case))
    close(engine.hessian(rows), rows @ dense.dense_hessian(case))
    close(engine.ggn(rows), rows @ dense.dense_ggn(case))
    close(engine.ggn(rows, "empirical"), rows @ dense.dense_empirical_fisher(case))
    close(engine.jacobian(rows), rows @ jacobian.T)
    u = normal(2, len(jacobian), seed=8)
    close(engine.jacobian_transposed(u), u @ jacobian)


def test_an_unused_parameter_has_a_zero_row():
    problem = CASES["unused"]().problem()
    hessian = AutogradEngine(problem).hessian(torch.eye(problem.num_params, dtype=F64))
    idle = problem.params_to_rows(
        {name: torch.full_like(p, float("idle" in name)) for name, p in problem.params.items()}, batched=False
    ).bool()
    assert idle.sum() == 6
    assert not hessian[idle].any() and not hessian[:, idle].any()
    assert hessian[~idle].abs().amax(1).min() > 0


@pytest.mark.parametrize("name", ["act_tanh", "named", "pair", "sequence", "conv_groups"])
def test_a_budget_cuts_batches_without_changing_a_product(name):
    problem = CASES[name]().problem()
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        AutogradEngine(problem, memory_budget=1)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    tight = AutogradEngine(problem, memory_budget=least)
    assert tight._piece == 1
    rows = normal(2, problem.num_params, seed=7)
    free = AutogradEngine(problem)
    close(tight.hessian(rows), free.hessian(rows))
    close(tight.ggn(rows), free.ggn(rows))
    close(tight.jacobian(rows), free.jacobian(rows))
    close(tight.gradient(), free.gradient())


def test_a_budget_does_not_cut_what_batch_norm_looks_at():
    problem = CASES["bn1d_batch"]().problem()
    with pytest.raises(ValueError, match=r"for 4 sample\(s\)") as caught:
        AutogradEngine(problem, memory_budget=1)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    rows = normal(2, problem.num_params, seed=7)
    close(AutogradEngine(problem, memory_budget=least).hessian(rows), AutogradEngine(problem).hessian(rows))


def test_sampled_draws_are_made_once_and_follow_the_generator():
    problem = CASES["act_tanh"]().problem()
    rows = normal(2, problem.num_params, seed=7)

    def product(seed: int | None, num_samples: int = 1) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        engine = AutogradEngine(problem, num_samples=num_samples, generator=generator)
        first = engine.ggn(rows, "monte_carlo")
        assert torch.equal(first, engine.ggn(rows, "monte_carlo"))
        return first

    assert torch.equal(product(1), product(1))
    assert not torch.allclose(product(1), product(2))
    state = torch.get_rng_state()
    assert torch.equal(product(None), product(None))
    assert torch.equal(state, torch.get_rng_state())
    exact = AutogradEngine(problem).ggn(rows)
    assert (product(3, 4000) - exact).norm() / exact.norm() < 0.06


def test_float32_and_bfloat16_follow_float64():
    case = CASES["conv_stride_padding"]()
    problem = case.problem()
    rows = normal(2, problem.num_params, seed=7)
    exact = AutogradEngine(problem).hessian(rows)
    for precision, low, high in ((None, 1e-9, 1e-5), ("bf16", 1e-4, 5e-2)):
        got = AutogradEngine(case.problem(torch.float32), precision=precision).hessian(rows.float())
        assert got.dtype == torch.float32
        assert low < (got.double() - exact).norm() / exact.norm() < high


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Once.apply(x)  # type: ignore[return-value]


def test_a_function_without_a_second_derivative_is_refused_not_left_out():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Sine(), nn.Linear(4, 2)))
    engine = AutogradEngine(Problem(model, nn.CrossEntropyLoss(), (normal(5, 3), labels(5, classes=2))))
    rows = normal(1, 26)
    assert engine.gradient().isfinite().all()
    for product in (engine.hessian, engine.ggn, engine.jacobian):
        with pytest.raises(UnsupportedModel, match="once_differentiable"):
            product(rows)


@pytest.mark.parametrize("size", [1, 20, 22, 40])
def test_outputs_of_a_wrong_size_are_refused(size):
    engine = AutogradEngine(CASES["act_relu"]().problem())
    with pytest.raises(ValueError, match=rf"outputs must be \[K, M\].*got \[2, {size}\]"):
        engine.jacobian_transposed(torch.zeros(2, size, dtype=F64))
