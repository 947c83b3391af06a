# SPDX-License-Identifier: Apache-2.0
"""The linearized engine against dense matrices, its memory budget, and what must not break it."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.linearized import LinearizedEngine
from curvlab.operators.engines.protocol import Engine, UnsupportedModel
from curvlab.operators.problem import Problem
from tests.operators.dense import (
    dense_ggn,
    dense_gradient,
    dense_hessian,
    dense_jacobian,
    dense_loss,
)
from tests.operators.models import CASES, F64, labels, normal

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


def small_problem(n: int = 24, batches: int = 1, **options: object) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = normal(n, 6), labels(n, classes=3)
    size = n // batches
    data = list(zip(x.split(size), y.split(size), strict=True))
    return Problem(model, nn.CrossEntropyLoss(), data, **options)  # type: ignore[arg-type]


def test_a_block_of_directions_equals_single_ones() -> None:
    """Nineteen rows: two blocks of eight in one call each, three alone."""
    problem = small_problem()
    engine, rows = LinearizedEngine(problem), rows_of(problem, 19)
    block = engine.hessian(rows)
    assert next(iter(engine._schedules["hessian"].products(1)))._block is not None
    assert_close(block, torch.cat([engine.hessian(row.unsqueeze(0)) for row in rows]))
    assert_close(engine.ggn(rows), AutogradEngine(problem).ggn(rows))


@pytest.mark.parametrize("name", ["layer_norm", "bn1d_batch", "bn2d_batch"])
def test_blocks_of_normalization_layers_are_right(name: str) -> None:
    """PyTorch 2.14 batches their second derivative wrong, without an error: such a block must not be used."""
    case = CASES[name]()
    problem = case.problem()
    rows = rows_of(problem, 8)
    assert_close(LinearizedEngine(problem).hessian(rows), rows @ dense_hessian(case))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_any_budget_gives_the_same_product(kind: str) -> None:
    problem = small_problem(48, batches=2)
    rows = rows_of(problem)
    free = LinearizedEngine(problem)
    expected = getattr(free, kind)(rows)
    schedule = next(iter(free._schedules.values()))
    least, whole = schedule._memory.peak(1), schedule._memory.peak(24)
    parts = set()
    for budget in (2 * least, whole, 3 * whole):
        engine = LinearizedEngine(problem, memory_budget=budget)
        for _ in range(2):
            assert_close(getattr(engine, kind)(rows), expected)
        used = next(iter(engine._schedules.values()))
        assert used.kept_bytes <= budget
        parts.add((used._part_size, used.is_complete))
    assert len(parts) == 3, parts
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes for one sample, got 100"):
        getattr(LinearizedEngine(problem, memory_budget=100), kind)(rows)


def test_a_batch_that_cannot_be_split_says_what_would_fit() -> None:
    problem = CASES["bn1d_batch"]().problem()
    free = LinearizedEngine(problem)
    free.hessian(rows_of(problem))
    need = free._schedules["hessian"]._memory.peak(4)
    with pytest.raises(ValueError, match="which cannot be taken in parts"):
        LinearizedEngine(problem, memory_budget=need // 2).hessian(rows_of(problem))


def test_maps_of_one_kind_make_room_for_another() -> None:
    problem = small_problem()
    rows = rows_of(problem)
    free = LinearizedEngine(problem)
    hessian, ggn = free.hessian(rows), free.ggn(rows)
    budget = max(s._memory.peak(24) for s in free._schedules.values())
    engine = LinearizedEngine(problem, memory_budget=budget)
    for _ in range(2):
        assert_close(engine.hessian(rows), hessian)
        assert_close(engine.ggn(rows), ggn)
        assert sum(s.kept_bytes for s in engine._schedules.values()) <= budget


def test_a_map_that_found_room_later_keeps_its_place() -> None:
    """Batches of unequal size: the large one in the middle is not kept until another map made room."""
    x, y = normal(13, 4), labels(13, classes=2)
    model = nn.Linear(4, 2).double()
    problem = Problem(model, nn.CrossEntropyLoss(), [(x[:2], y[:2]), (x[2:11], y[2:11]), (x[11:], y[11:])])
    rows = rows_of(problem)
    engine = LinearizedEngine(problem)
    expected = engine.jacobian(rows)
    schedule = engine._schedules["jacobian"]
    middle = schedule._kept.pop(1)
    schedule._kept[1] = middle
    assert list(schedule._kept) == [0, 2, 1]
    assert_close(engine.jacobian(rows), expected)


def test_kept_maps_go_with_the_engine_and_do_not_wait_for_the_collector() -> None:
    problem = small_problem()
    gc.collect()
    gc.disable()
    try:
        engine = LinearizedEngine(problem)
        engine.hessian(rows_of(problem))
        engine.ggn(rows_of(problem))
        kept = [p.apply for schedule in engine._schedules.values() for p in schedule._kept.values()]
        constants = [weakref.ref(c) for program in kept for c in program.constants]
        assert len(constants) > 10
        del engine, kept
        alive = [ref for ref in constants if ref() is not None]
        assert len(alive) < len(constants) // 4  # those of other owners: the problem's parameters
    finally:
        gc.enable()


def test_nothing_outside_can_break_or_move_a_kept_map() -> None:
    """Training steps, statistics that move, data overwritten in place: the products are those of the snapshot."""
    case = CASES["bn2d_eval"]()
    batches = [(x.clone(), y.clone()) for x, y in case.batches]
    problem = Problem(case.model, case.loss, batches)
    engine, rows = LinearizedEngine(problem), rows_of(problem)
    before = engine.hessian(rows), engine.jacobian(rows)
    with torch.no_grad():
        for tensor in [*case.model.parameters(), *case.model.buffers()]:
            tensor.zero_()
        for x, y in batches:
            x.normal_()
            y.zero_()
    case.model.train()
    rows.requires_grad_()
    with torch.inference_mode():
        again = engine.hessian(rows.detach())
    assert torch.equal(again, before[0])
    assert torch.equal(engine.jacobian(rows.detach()), before[1])


def test_results_do_not_depend_on_how_often_one_asks() -> None:
    problem = small_problem()
    engine, rows = LinearizedEngine(problem), rows_of(problem)
    first = engine.hessian(rows)
    engine.ggn(rows)
    assert torch.equal(engine.hessian(rows), first)
    assert torch.equal(engine.hessian(2.0 * rows), 2.0 * first)
    assert not engine.hessian(torch.zeros_like(rows)).any()


class BackwardOnly(torch.autograd.Function):
    """x^3 with a double backward and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * g


class Wrapped(nn.Module):
    """One layer, and what a case puts behind it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 3), nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def branch(h: Tensor) -> Tensor:
    """A Python branch on values: torch.fx and torch.compile give up, a linear map at theta has no branch."""
    return torch.tanh(h) if float(h.detach().sum()) > -1e9 else h


def loop(h: Tensor) -> Tensor:
    state = torch.zeros_like(h)
    for column in h.detach().abs().sum(0).argsort().tolist():
        state = torch.tanh(state + h * (column + 1))
    return state


def in_place(h: Tensor) -> Tensor:
    """Parts of a buffer written by autograd-aware in-place operations."""
    out = torch.zeros(h.shape[0], 3, dtype=h.dtype)
    out[:, :2] = torch.sigmoid(h[:, 1:])
    out[:, 2:] += h[:, :1] * h[:, 1:2]
    return out.mul_(torch.tanh(out.clone()))


def checkpointed(h: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.tanh(t).square(), h, use_reentrant=False)  # type: ignore[return-value]


def lstm_like(h: Tensor) -> Tensor:
    gate, value, rest = h.unbind(1)
    first, second = torch.cumsum(h, 1).split([1, 2], 1)  # operations that return lists
    return torch.stack([torch.sigmoid(gate) * value, first[:, 0], rest.exp() * second[:, 1]], 1)


@pytest.mark.parametrize("function", [BackwardOnly.apply, branch, loop, in_place, checkpointed, lstm_like])
def test_whatever_autograd_differentiates_twice(function: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wrapped(function).double()
    problem = Problem(model, nn.CrossEntropyLoss(), (normal(6, 4), labels(6, classes=2)))
    engine, judge, rows = LinearizedEngine(problem), AutogradEngine(problem), rows_of(problem, 9)
    assert_close(engine.hessian(rows), judge.hessian(rows))
    assert_close(engine.ggn(rows), judge.ggn(rows))
    pushed = judge.jacobian(rows)
    assert_close(engine.jacobian(rows), pushed)
    assert_close(engine.jacobian_transposed(pushed), judge.jacobian_transposed(pushed))


def test_the_route_says_what_was_given_up_and_why() -> None:
    model = Wrapped(BackwardOnly.apply).double()
    problem = Problem(model, nn.CrossEntropyLoss(), (normal(6, 4), labels(6, classes=2)))
    engine = LinearizedEngine(problem)
    engine.hessian(rows_of(problem))
    assert engine.routes["hessian"].startswith("hessian, recorded; not forward over reverse, recorded: ")
    assert "jvp" in engine.routes["hessian"]


class Once(torch.autograd.Function):
    """x^3 whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3.0 * ctx.saved_tensors[0] ** 2 * g


def test_no_second_derivative_is_an_error_and_not_a_number() -> None:
    problem = Problem(Wrapped(Once.apply).double(), nn.CrossEntropyLoss(), (normal(6, 4), labels(6, classes=2)))
    # PyTorch's own double backward leaves the function's part out, silently
    for kind in ("hessian", "ggn", "jacobian"):
        with pytest.raises(UnsupportedModel, match="once_differentiable"):
            getattr(LinearizedEngine(problem), kind)(rows_of(problem))


def test_lower_precision_is_close_and_refused_where_it_cannot_be() -> None:
    problem = small_problem().to(torch.float32)
    rows = rows_of(problem).float()
    exact = LinearizedEngine(problem).hessian(rows)
    low = LinearizedEngine(problem, precision="bf16").hessian(rows)
    assert low.dtype == torch.float32
    assert 1e-4 < ((low - exact).norm() / exact.norm()).item() < 1e-2
    with pytest.raises(ValueError, match="LinearizedEngine: precision must be None for a problem in"):
        LinearizedEngine(small_problem(), precision="bf16")
    with pytest.raises(ValueError, match="got 'tf32'"):
        LinearizedEngine(problem, precision="tf32")


def test_float32_on_a_trained_network() -> None:
    """Loss 1e-6, softmax saturated: the engine's own error is that of rounding, not of 1 - p."""
    problem = small_problem()
    sharp = {name: value * 8.0 for name, value in problem.params.items()}
    inputs, _ = next(problem.batches())
    outputs = problem.outputs(sharp, inputs).detach()
    keep = outputs.topk(2, 1).values.diff(dim=1).abs().squeeze(1) > 12.0
    assert keep.sum() >= 4
    data = inputs[keep], outputs.argmax(1)[keep]
    trained = Problem(problem.model, nn.CrossEntropyLoss(), data).with_params(sharp)
    rows = rows_of(trained)
    exact = AutogradEngine(trained).hessian(rows)
    assert LinearizedEngine(trained).loss() < 1e-5
    got = LinearizedEngine(trained.to(torch.float32)).hessian(rows.float()).double()
    assert ((got - exact).norm() / exact.norm()).item() < 2e-5


def test_bad_arguments_are_named() -> None:
    problem = small_problem()
    with pytest.raises(ValueError, match=r"LinearizedEngine: memory_budget must be positive \(bytes\), got 0"):
        LinearizedEngine(problem, memory_budget=0)
    with pytest.raises(ValueError, match="LinearizedEngine: num_samples must be at least 1, got 0"):
        LinearizedEngine(problem, num_samples=0)
