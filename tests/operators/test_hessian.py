# SPDX-License-Identifier: Apache-2.0
"""The Hessian operator: dense on every layer kind, linear and symmetric, its precision mode, its sum over processes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from curvlab.operators import problem_operator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.precision import check_precision, relative_error
from curvlab.operators.problem import Problem
from tests.operators import dense
from tests.operators.models import CASES, F64, Case, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = ["act_gelu", "models_cnn", "bn2d_frozen", "residual", "tied", "unused", "named", "sequence", "mse", "weighted"]


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_dense_hessian_and_symmetric(name):
    case = CASES[name]()
    operator = HessianOperator(case.problem(), engine="autograd")
    assert operator.is_symmetric and not operator.is_psd
    matrix = operator.to_dense()
    expected = dense.dense_hessian(case)
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-13 * expected.abs().max().item() + 1e-13)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-13)
    assert operator.num_products == operator.shape[0]


@pytest.mark.parametrize("name", ["act_silu", "attention"])
def test_it_is_linear(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that attention takes its math path
        operator = HessianOperator(CASES[name]().problem(), engine="autograd")
    rows = normal(2, operator.shape[1], seed=3)
    combined = operator.apply_rows((2.0 * rows[:1] - 0.5 * rows[1:]).contiguous())
    product = operator.apply_rows(rows)
    torch.testing.assert_close(combined, 2.0 * product[:1] - 0.5 * product[1:], rtol=1e-11, atol=1e-13)


def test_sum_is_z_times_mean():
    case = CASES["weighted"]()
    mean = HessianOperator(case.problem(), engine="autograd")
    total = HessianOperator(Problem(case.model, case.loss, case.batches, reduction="sum"), engine="autograd")
    rows = normal(2, mean.shape[1])
    assert mean.problem.normalizer == pytest.approx(3.7)
    torch.testing.assert_close(total.apply_rows(rows), 3.7 * mean.apply_rows(rows), rtol=1e-12, atol=1e-14)


def trained() -> Case:
    """Fitted to a loss below 1e-5 in float64: every softmax saturated."""
    case = CASES["act_tanh"]()
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(4000):
        optimizer.zero_grad()
        loss = sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in case.batches) / 7
        if loss.item() < 8e-6:  # type: ignore[union-attr]
            break
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    assert loss.item() < 1e-5  # type: ignore[union-attr]
    return Case(model, nn.CrossEntropyLoss(), case.batches)


def test_float32_keeps_its_digits_on_a_trained_network():
    case = trained()
    exact = HessianOperator(case.problem(), engine="autograd")
    rows = normal(2, exact.shape[1])
    expected = exact.apply_rows(rows)
    single = HessianOperator(case.problem(torch.float32), engine="autograd").apply_rows(rows.float())
    # The loss itself is stable; what is left is the rounding of float32 logits, 1e-6 of 10, that exp() multiplies.
    assert relative_error(single, expected) < 2e-5
    naive = torch.func.linearize(
        torch.func.grad(
            lambda t: sum(
                nn.functional.cross_entropy(torch.func.functional_call(case.model, t, (x.float(),)), y, reduction="sum")
                for x, y in case.batches
            )
        ),
        {name: param.detach().float() for name, param in case.model.named_parameters()},
    )[1]({name: piece[0] for name, piece in exact.problem.rows_to_params(rows.float()).items()})
    flat = torch.cat([piece.reshape(-1) for piece in naive.values()]) / 7
    assert relative_error(flat, expected[0]) > 1e-3


def test_bfloat16_states_its_error():
    case = CASES["act_tanh"]()
    full = HessianOperator(case.problem(torch.float32), engine="autograd")
    low = HessianOperator(case.problem(torch.float32), engine="autograd", precision="bf16")
    assert full.precision_error == 0.0
    rows = normal(4, full.shape[1], seed=11).float()
    actual = relative_error(low.apply_rows(rows), full.apply_rows(rows))
    engine = low.engine
    assert 1e-4 < low.precision_error < 3e-2
    assert actual / 4 < low.precision_error < actual * 4
    assert low.engine is engine


@pytest.mark.parametrize(
    ("dtype", "precision", "match"),
    [
        (torch.float32, "fp8", "'bf16' or 'tf32', got 'fp8'"),
        (F64, "bf16", "None for a problem in torch.float64"),
        (torch.float32, "tf32", "None or 'bf16' on cpu"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(dtype, precision, match):
    with pytest.raises(ValueError, match=match):
        check_precision(precision, dtype, torch.device("cpu"), "Judge")
    with pytest.raises(ValueError, match=match):
        HessianOperator(CASES["linear"]().problem(dtype), precision=precision)


def test_relative_error_of_what_is_not_finite():
    nan, one = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0])
    assert relative_error(one, one) == relative_error(0 * one, 0 * one) == relative_error(one, nan) == 0.0
    assert relative_error(nan, one) == relative_error(one, 0 * one) == float("inf")
    assert relative_error(1.5 * one, one) == pytest.approx(0.5)


def test_products_are_summed_over_the_processes_of_the_group(monkeypatch):
    """Two equal processes, played: what is summed, and once a product; the real thing is in test_distributed."""
    calls = []

    def double(tensor: torch.Tensor, group: object) -> None:
        calls.append((tuple(tensor.shape), group))
        tensor.mul_(2.0)

    monkeypatch.setattr(torch.distributed, "all_reduce", double)
    case, group = CASES["weighted"](), object()
    alone = HessianOperator(case.problem(), engine="autograd")
    pair = HessianOperator(case.problem(process_group=group), engine="autograd")
    assert calls == [((3,), group)]
    assert (pair.problem.num_samples, pair.problem.normalizer) == (14, pytest.approx(7.4))
    rows = normal(3, alone.shape[1])
    torch.testing.assert_close(pair.apply_rows(rows), alone.apply_rows(rows), rtol=1e-13, atol=1e-15)
    assert calls[1:] == [((3, alone.shape[1]), group)]


def test_randomness_and_wrong_types_are_refused_at_construction():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x + 1e-3 * torch.randn_like(x))

    case = CASES["act_relu"]()
    with pytest.raises(ValueError, match="HessianOperator: model must be deterministic"):
        HessianOperator(Problem(Noisy().double(), case.loss, case.batches))
    with pytest.raises(TypeError, match="problem must be a Problem, got Linear"):
        HessianOperator(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="ProblemOperator has no product"):
        problem_operator.ProblemOperator(case.problem(), engine="autograd").apply_rows(normal(1, 51))
