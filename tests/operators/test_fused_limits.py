# SPDX-License-Identifier: Apache-2.0
"""The fused engine where it is hard: trained networks in float32, memory budgets, bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.fused import FusedEngine
from curvlab.operators.engines.linearized import LinearizedEngine
from curvlab.operators.problem import Problem
from tests.operators.models import F64, labels, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@functools.cache
def trained(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    """By Adam until the loss is 1e-5: saturated, with activations beside their kinks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
    x, y = normal(48, *shape).float(), labels(48, classes=10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if loss.item() < 1e-5:
            return model, x, y
    raise AssertionError(f"the network did not fit: {loss.item()}")


@pytest.mark.parametrize(
    ("build", "shape", "mode"),
    [(_mlp, (192,), "eval"), (_cnn, (3, 8, 8), "eval"), (_cnn, (3, 8, 8), "frozen"), (_cnn, (3, 8, 8), "batch")],
)
def test_float32_on_trained_networks_agrees_with_float64_autograd(
    build: Callable[[], nn.Module], shape: tuple[int, ...], mode: str
) -> None:
    model, x, y = trained(build, shape)
    problem = Problem(model, nn.CrossEntropyLoss(), (x, y), batch_norm=mode)  # type: ignore[arg-type]
    rows = normal(2, problem.num_params, seed=3).float()
    judge, engine = AutogradEngine(problem.to(F64)), FusedEngine(problem)
    pairs = [
        (engine.hessian(rows), judge.hessian(rows.double())),
        (engine.ggn(rows), judge.ggn(rows.double())),
        (engine.gradient().unsqueeze(0), judge.gradient().unsqueeze(0)),
    ]
    for got, expected in pairs:
        errors = (got.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.max().item() <= 1e-5
    assert abs(engine.loss() - judge.loss()) <= 1e-9 * judge.loss()


def budget_problem(n: int = 64) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _cnn().double()
    return Problem(model, nn.CrossEntropyLoss(), (normal(n, 3, 8, 8), labels(n, classes=10)))


def test_a_budget_is_kept_and_changes_no_result() -> None:
    problem = budget_problem()
    rows = normal(6, problem.num_params, seed=3)
    free = FusedEngine(problem)
    expected = free.hessian(rows)
    wanted = free.plan.bytes(6, problem.num_params, 8)
    budget = free.plan.kept + (wanted - free.plan.kept) // 3
    tight = FusedEngine(problem, memory_budget=budget)
    assert tight.plan.samples < free.plan.samples
    assert tight.plan.bytes(1, problem.num_params, 8) <= budget
    assert torch.allclose(tight.hessian(rows), expected, rtol=1e-10, atol=1e-14)


def test_what_is_kept_is_what_was_estimated() -> None:
    engine = FusedEngine(budget_problem(16))
    engine.hessian(normal(1, engine.problem.num_params))

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list)) else []

    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(engine._chunks[0].kept)}
    assert sum(kept.values()) == engine.plan.kept


def test_a_budget_that_holds_too_little_says_what_would_fit() -> None:
    problem = budget_problem()
    with pytest.raises(ValueError, match=r"memory_budget must be at least (\d+) bytes for 64 samples") as caught:
        FusedEngine(problem, memory_budget=600_000)
    needed, fitting = (int(str(caught.value).split(mark)[1].split()[0]) for mark in ("at least", "which holds"))
    assert 0 < fitting < 64
    FusedEngine(problem, memory_budget=needed)
    FusedEngine(budget_problem(fitting), memory_budget=600_000)
    with pytest.raises(ValueError, match="memory_budget"):
        FusedEngine(problem, memory_budget=needed - 1)


@pytest.mark.parametrize(("build", "shape"), [(_mlp, (192,)), (_cnn, (3, 8, 8))])
def test_bfloat16_is_within_a_percent(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """And is no float32 in disguise; results are float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    problem = Problem(model, nn.CrossEntropyLoss(), (normal(64, *shape).float(), labels(64, classes=10)))
    rows = normal(4, problem.num_params, seed=3).float()
    expected, low = FusedEngine(problem).hessian(rows), FusedEngine(problem, precision="bf16").hessian(rows)
    assert low.dtype == torch.float32
    error = ((low - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 1e-2
    pushed, low = FusedEngine(problem).jacobian(rows), FusedEngine(problem, precision="bf16").jacobian(rows)
    assert (low - pushed).norm() < 1e-2 * pushed.norm()


def test_linearized_agrees() -> None:
    problem = budget_problem(12)
    rows = normal(3, problem.num_params, seed=3)
    assert torch.allclose(FusedEngine(problem).hessian(rows), LinearizedEngine(problem).hessian(rows), atol=1e-12)


def test_precision_is_checked() -> None:
    with pytest.raises(ValueError, match="precision must be None, 'bf16' or"):
        FusedEngine(budget_problem(2), precision="tf32")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batches", [(32, 32), (40, 17, 5)])
def test_packed_weights_change_no_product(batches: tuple[int, ...], bias: bool) -> None:
    """Wide layers multiply one direction by weights that were packed for the rows of a chunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(20, 300, bias=bias), nn.Tanh(), nn.Linear(300, 257, bias=bias), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(257, 10))
    n = sum(batches)
    x, y = normal(n, 20).float(), labels(n, classes=10)
    data = list(zip(x.split(batches), y.split(batches), strict=True))
    engine = FusedEngine(Problem(model, nn.CrossEntropyLoss(), data))
    judge = AutogradEngine(Problem(model, nn.CrossEntropyLoss(), data).to(F64))
    rows = normal(2, engine.problem.num_params)
    for name in ("hessian", "ggn"):
        exact = getattr(judge, name)(rows)
        for k in (1, 2):
            found = getattr(engine, name)(rows[:k].float())
            assert float((found - exact[:k]).norm() / exact[:k].norm()) < 2e-6, (name, k)
