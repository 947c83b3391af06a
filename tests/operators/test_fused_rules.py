# SPDX-License-Identifier: Apache-2.0
"""A layer from elsewhere registers its rule; the rewrites happen where they may, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.operators.engines import rules
from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.chunks import split
from curvlab.operators.engines.fused import FusedEngine
from curvlab.operators.engines.layer_rules.exact_conv import exact_conv2d
from curvlab.operators.engines.layer_rules.first_conv import FirstConvStep
from curvlab.operators.engines.layer_rules.skip_conv import SkipConvStep
from curvlab.operators.engines.protocol import UnsupportedModel
from curvlab.operators.engines.steps import Kept, Product, Run, Step
from curvlab.operators.problem import Problem
from tests.operators.models import labels, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


class Stretch(nn.Module):
    """``y = w x``, one weight a feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class StretchStep(Step):
    """``Ry = w Rx + v x``, ``Rδx = w Rδ + v δ``, ``(H v)_w = sum of x Rδ + δ Rx``."""

    def primal(self, values: Any, theta: Any) -> Tensor:
        self.weight = theta[self.names["weight"]]
        return values[0] * self.weight

    def deltas(self) -> set[int]:
        return {self.output}

    def keep(self, kept: Kept, second: bool) -> Any:
        return kept.value(self.inputs[0]), kept.delta(self.output) if second else None, self.weight.to(kept.dtype)

    def bind(self, product: Product) -> Any:
        target = product.target(self.names["weight"])
        if target is not None:
            target.zero_()
        return product.direction(self.names["weight"]), target

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        x, _, weight = kept
        t, v = run.t[self.inputs[0]], bound[0][run.lo : run.hi].unsqueeze(1)
        run.t[self.output] = v * x if t is None else weight * t + v * x

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        x, delta, weight = kept
        signal, t = run.take(self.output), run.t[self.inputs[0]]
        assert signal is not None
        assert t is not None
        bound[1][run.lo : run.hi] += (x * signal).sum(1)
        below = weight * signal
        if run.second:
            bound[1][run.lo : run.hi] += (delta * t).sum(1)
            below = below + bound[0][run.lo : run.hi].unsqueeze(1) * delta
        run.give(self.inputs[0], below)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "_MODULES", dict(rules._MODULES))

    @rules.register_module(Stretch)
    def rule(builder: rules.Builder, node: Any, module: Any) -> None:
        (x,) = builder.slots_of(node, 1)
        names = {"weight": builder.parameter(node, "weight")}
        builder.add(node, StretchStep(builder.label(node), (x,), builder.new_slot(), names))

    yield


def problem_of(model: nn.Module, *shape: int, n: int = 6, classes: int = 3) -> Problem:
    return Problem(seeded(lambda: model), nn.CrossEntropyLoss(), (normal(n, *shape), labels(n, classes=classes)))


@pytest.mark.usefixtures("registered")
def test_a_registered_layer_is_used() -> None:
    problem = problem_of(nn.Sequential(nn.Linear(4, 5), Stretch(5), nn.Tanh(), nn.Linear(5, 3)), 4)
    engine, judge = FusedEngine(problem), AutogradEngine(problem)
    assert any(isinstance(step, StretchStep) for step in engine.steps)
    rows = normal(3, problem.num_params)
    torch.testing.assert_close(engine.hessian(rows), judge.hessian(rows))
    torch.testing.assert_close(engine.ggn(rows), judge.ggn(rows))


def test_without_a_rule_it_is_traced_into_and_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"the parameter 1\.weight as an operand at node 'mul'"):
        FusedEngine(problem_of(nn.Sequential(nn.Linear(4, 5), Stretch(5), nn.Linear(5, 3)), 4))


class TwoReaders(nn.Module):
    """Its normalization, activation and sum each have a second reader: nothing may be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        a = torch.relu(self.norm(h) + h)
        pooled = F.max_pool2d(a, 2)
        return pooled.mean((2, 3)) + a.mean((2, 3))


def kinds(problem: Problem) -> list[str]:
    return [type(step).__name__ for step in FusedEngine(problem).steps]


def test_rewrites() -> None:
    merged = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    assert kinds(problem_of(nn.Sequential(*merged, nn.Linear(12, 3)), 2, 4, 4)) == [
        "ConvStep",
        "MaxPoolStep",
        "ActivationStep",
        "ReshapeStep",
        "LinearStep",
    ]
    apart = kinds(problem_of(TwoReaders(), 2, 4, 4))
    assert apart == ["ConvStep", "FixedNormStep", "ActivationStep", "MaxPoolStep", "MeanStep", "MeanStep", "AddStep"]
    smooth = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3))
    assert kinds(problem_of(smooth, 2, 4, 4))[1:3] == ["ActivationStep", "MaxPoolStep"]


def _first_convolution(pool: nn.Module | None, tail: str) -> nn.Module:
    after = {"relu": [nn.ReLU()], "tanh": [nn.Tanh()], "norm": [nn.BatchNorm2d(5), nn.ReLU()], "none": []}[tail]
    conv = nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(1, 2))
    front = nn.Sequential(conv, *after, *([] if pool is None else [pool]), nn.Flatten())
    features = front.eval()(torch.zeros(1, 3, 9, 11)).shape[1]
    return nn.Sequential(*front, nn.Linear(features, 4))


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)])
@pytest.mark.parametrize("tail", ["relu", "tanh", "norm", "none"])
def test_convolution_of_inputs(pool: nn.Module | None, tail: str) -> None:
    """The own kernel in float32: with its pool if windows are pairs; folded norms, chosen parts, two chunks."""
    model = seeded(lambda: _first_convolution(pool, tail)).eval()
    x, y = normal(6, 3, 9, 11), labels(6, classes=4)
    for chosen in (None, ["0.weight"], ["0.bias"]):
        problem = Problem(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])], params=chosen)
        engine = FusedEngine(problem.to(torch.float32))
        steps = [step for step in engine.program.steps if isinstance(step, FirstConvStep)]
        assert len(steps) == 1
        halves = isinstance(pool, nn.MaxPool2d) and pool.kernel_size == 2 and not pool.ceil_mode and tail != "tanh"
        assert (steps[0].pool is not None) == halves
        rows, judge = normal(3, problem.num_params, seed=5), AutogradEngine(problem)
        for product in ("hessian", "ggn"):
            got, expected = getattr(engine, product)(rows.float()), getattr(judge, product)(rows)
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
        torch.testing.assert_close(engine.gradient().double(), judge.gradient(), rtol=0, atol=1e-6)


def test_chunks_are_nearly_equal() -> None:
    assert split(10, 4) == [4, 3, 3]
    assert split(8, 8) == [8]
    assert split(1, 100) == [1]
    assert sum(split(1001, 17)) == 1001


def test_exact_convolution_is_the_librarys() -> None:
    x = normal(5, 6, 40, 40).requires_grad_()
    weight, bias = normal(4, 3, 3, 3, seed=2), normal(4, seed=3)
    options = ([2, 1], [1, 0], [1, 2], 2)
    got, expected = exact_conv2d(x, weight, bias, *options), F.conv2d(x, weight, bias, *options)
    torch.testing.assert_close(got, expected)
    assert type(got.grad_fn).__name__ == "_FewAtATimeBackward"
    signal = normal(*got.shape, seed=4)
    grads = [torch.autograd.grad(y, x, signal)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("stride", "bias"), [((2, 2), True), ((1, 2), False), ((3, 2), True)])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_strided_convolutions_of_one_position_skip_the_others(
    stride: tuple[int, int], bias: bool, precision: str | None
) -> None:
    """As a shortcut beside another reader of the same map, with several directions and chunks, GGN and Hessian."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(5)
            self.skip, self.wide = nn.Conv2d(6, 5, 1, stride, bias=bias), nn.Conv2d(6, 5, 3, stride, 1)
            self.last = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return self.last(torch.tanh(self.norm(self.skip(x)) + self.wide(x)).mean((2, 3)))

    model = seeded(Two).to(torch.float64 if precision is None else torch.float32)
    x = torch.randn(7, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(model, nn.CrossEntropyLoss(), (x.to(next(model.parameters()).dtype), torch.arange(7) % 3))
    engine = FusedEngine(problem, precision=precision)
    assert sum(isinstance(step, SkipConvStep) for step in engine.steps) == 1
    rows = torch.randn(3, problem.num_params, dtype=problem.dtype, generator=torch.Generator().manual_seed(1))
    judge = AutogradEngine(problem.to(torch.float64))
    for product in ("hessian", "ggn"):
        expected = getattr(judge, product)(rows.double())
        got = getattr(engine, product)(rows)
        assert (got - expected).norm() <= (1e-10 if precision is None else 2e-2) * expected.norm()
