# SPDX-License-Identifier: Apache-2.0
"""The fused engine against dense matrices by an independent route, for every layer kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from curvlab.operators.engines import chunks
from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.fused import FusedEngine
from curvlab.operators.engines.protocol import Engine, UnsupportedModel
from curvlab.operators.problem import Problem
from tests.operators.dense import dense_ggn, dense_gradient, dense_hessian, dense_jacobian, dense_loss
from tests.operators.models import CASES, F64, Case, classified, labels, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = {"attention": "sdp|scaled_dot|chunk"}


def rows_of(problem: Problem, k: int = 3) -> Tensor:
    return normal(k, problem.num_params, seed=3).to(problem.dtype)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance * (expected.abs().max().item() + 1e-12)


class PreActivation(nn.Module):
    """Normalizations that no layer precedes, a value with three readers, a pool after an activation with two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x - 0.5)
        a = torch.relu(self.norm(h))
        side = F.max_pool2d(a, 2)
        h = h + self.conv(a) + a * h
        h = F.max_pool2d(torch.relu(h), 2) / 2.0 + side
        return 1.0 - self.last(h.mean((2, 3)))


class Gated(nn.Module):
    """Products of two activations, and of one with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x) * torch.sigmoid(self.two(x)) + 2.0 * self.one(x)
        return self.last(F.softplus(h * h) + F.leaky_relu(h, 0.3))


def _bn_chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=True), nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3), nn.LeakyReLU(0.1),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3),
    )  # fmt: skip


OWN = {
    "pre_activation": classified(PreActivation, 2, 4, 4, classes=3),
    "pre_activation_frozen": classified(PreActivation, 2, 4, 4, classes=3, batch_norm="frozen"),
    "gated": classified(Gated, 3, classes=3),
    "bn_chain": classified(_bn_chain, 2, 6, 6, classes=3),
    "bn_chain_frozen_once": classified(_bn_chain, 2, 6, 6, classes=3, sizes=(7,), batch_norm="frozen"),
    "bn_gains_alone": classified(_bn_chain, 2, 6, 6, classes=3, params=["1.weight", "3.bias", "8.*"]),
    "bn_no_gains": classified(_bn_chain, 2, 6, 6, classes=3, params=["0.*", "7.weight"]),
    "conv_dilated_stride": classified(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", dilation=2), nn.Tanh(), nn.Conv2d(4, 2, (3, 2), (2, 1), (1, 0)),
            nn.Tanh(), nn.Flatten(), nn.Linear(24, 3),
        ),
        2, 5, 5, classes=3,
    ),
    "segmentation": lambda: Case(
        seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1))),
        nn.CrossEntropyLoss(),
        [(normal(3, 2, 3, 3), labels(3, 3, 3, classes=4))],
    ),
}  # fmt: skip
ALL = {**CASES, **OWN}


@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_products_equal_dense_matrices(name: str) -> None:
    case = ALL[name]()
    problem = case.problem()
    rows = rows_of(problem)
    engine = FusedEngine(problem)
    assert isinstance(engine, Engine)
    jacobian = dense_jacobian(case)
    outputs = normal(2, len(jacobian), seed=4)
    assert_close(engine.jacobian(rows), rows @ jacobian.T)
    assert_close(engine.jacobian_transposed(outputs), outputs @ jacobian)
    assert_close(engine.ggn(rows), rows @ dense_ggn(case))
    assert_close(engine.hessian(rows), rows @ dense_hessian(case))
    assert_close(engine.ggn(rows), rows @ dense_ggn(case))  # also with second-order factors kept
    assert_close(torch.tensor(engine.loss(), dtype=F64), dense_loss(case))
    assert_close(engine.gradient(), dense_gradient(case))


@pytest.mark.parametrize("name", ["act_gelu", "conv_groups", "residual", "bn2d_batch", "pre_activation", "models_mlp"])
def test_float32_and_blocks(name: str) -> None:
    """float32 kernels to 2e-6, and each row the same whatever stands beside it."""
    problem = ALL[name]().problem()
    expected, single = AutogradEngine(problem), problem.to(torch.float32)
    rows = rows_of(problem, 5)
    engine = FusedEngine(single)
    got = engine.hessian(rows.float())
    reference = expected.hessian(rows.float().double())
    assert_close(got.double(), reference, 2e-5)
    alone = torch.cat([engine.hessian(row.unsqueeze(0).float()) for row in rows])
    assert_close(got, alone, 2e-6)


@pytest.mark.parametrize("kind", ["monte_carlo", "empirical"])
@pytest.mark.parametrize("name", ["act_tanh", "weighted", "mse", "sequence", "segmentation"])
def test_kinds_of_curvature_equal_those_of_autograd(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ALL[name]().problem()
    rows = rows_of(problem)
    expected = AutogradEngine(problem, num_samples=2, generator=torch.Generator().manual_seed(5)).ggn(rows, kind)
    monkeypatch.setattr(chunks, "_TARGET_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "_FEW_SAMPLES", 2)
    engine = FusedEngine(problem, num_samples=2, generator=torch.Generator().manual_seed(5))
    assert engine.plan.samples == 2
    assert_close(engine.ggn(rows, kind), expected)


@pytest.mark.parametrize("name", ["functional", "residual", "pool_max_overlapping", "bn2d_frozen", "ntk_scale"])
def test_chunks_and_batches_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ALL[name]().problem()
    rows = rows_of(problem, 4)
    whole = FusedEngine(problem)
    expected = [whole.hessian(rows), whole.gradient(), whole.jacobian(rows)]
    monkeypatch.setattr(chunks, "_TARGET_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "_FEW_SAMPLES", 2)
    cut = FusedEngine(problem)
    assert cut.plan.samples == 2
    for got, one in zip([cut.hessian(rows), cut.gradient(), cut.jacobian(rows)], expected, strict=True):
        assert_close(got, one)


def test_several_threads_give_the_result_of_one() -> None:
    problem = ALL["residual"]().problem()
    rows = rows_of(problem)
    expected = FusedEngine(problem).hessian(rows)
    torch.set_num_threads(2)
    try:
        assert_close(FusedEngine(problem).hessian(rows), expected)
    finally:
        torch.set_num_threads(1)


def _double(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layer.register_forward_hook(_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Branching(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if bool(input.sum() > 0) else input


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h.relu_() + h


class AcrossSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), r"node '_1' \(Softmax 1\)"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), r"\(PReLU 1\)"),
        (Hooked, r"hooks.*\(Linear layer\)"),
        (lambda: Branching(4, 4), "traceable"),
        (Overwriting, "in-place change of 'layer'"),
        (AcrossSamples, r"node 'mean' \(mean\)"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).requires_grad_(False), nn.ELU()), r"\(ELU 2\)"),
    ],
)
def test_what_has_no_rule_is_named(build: type[nn.Module], what: str) -> None:
    problem = Problem(seeded(build), nn.CrossEntropyLoss(), (normal(5, 4), labels(5, classes=3)))
    with pytest.raises(UnsupportedModel, match=what):
        FusedEngine(problem)


def _forward(body: Callable[[Any, Any], Tensor]) -> Callable[[], nn.Module]:
    """A network of two layers and one that stands aside, with this forward pass."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.aside = nn.Linear(4, 5), nn.Linear(5, 3), nn.Conv1d(5, 2, 1)

        def forward(self, input: Tensor) -> Tensor:
            return body(self, input)

    return Network


def _relu_in_passing(net: Any, x: Tensor) -> Tensor:
    h = net.one(x)
    torch.relu_(h)
    return net.two(h)


def _relu_through_a_view(net: Any, x: Tensor) -> Tensor:
    h = net.one(x)
    h.view(-1, 5).relu_()
    return net.two(h)


def _added_under_another_name(net: Any, x: Tensor) -> Tensor:
    h = other = net.one(x)
    h += torch.tanh(net.one(x))
    return net.two(torch.tanh(other) + h)


def _size_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.two(torch.tanh(net.one(x)) / x.shape[0])


def _without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(net.one(x))
    return net.two(h)


class OwnWeight(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.forward = lambda input: F.linear(input, -self.weight, self.bias)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (_forward(_relu_in_passing), "what torch.fx traces"),
        (_forward(_relu_through_a_view), "what torch.fx traces"),
        (_forward(_added_under_another_name), "what torch.fx traces"),
        (_forward(_size_of_the_batch), "what torch.fx traces"),
        (OwnWeight, "what torch.fx traces"),
        (_forward(_without_gradient), "under torch.no_grad"),
        (lambda: nn.Sequential(weight_norm(nn.Linear(4, 3))), "KeyError"),
        (_forward(lambda net, x: net.two(torch.flatten(input=net.one(x), start_dim=1))), "flatten"),
    ],
)
def test_what_a_graph_does_not_show_is_refused(build: Callable[[], nn.Module], what: str) -> None:
    problem = Problem(seeded(build), nn.CrossEntropyLoss(), (normal(5, 4), labels(5, classes=3)))
    with pytest.raises(UnsupportedModel, match=what):
        FusedEngine(problem)


def _dead_branch(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.one(x))
    F.linear(h, net.two.weight)
    return net.two(h)


class DeadConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.aside, self.two = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x.view(x.size(dim=0), 1, 2, 2)))
        self.aside(h)
        return self.two(h.flatten(1))


class Bytes(nn.Module):
    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.net = scale, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scale(x))


_BYTES = torch.arange(20, dtype=torch.uint8).reshape(5, 4)


@pytest.mark.parametrize(
    ("build", "inputs", "tolerance"),
    [
        (_forward(_dead_branch), normal(5, 4), 1e-10),
        (DeadConvolution, normal(5, 4), 1e-10),
        (_forward(lambda net, x: net.two(torch.tanh(net.one(x)))), {"input": normal(5, 4)}, 1e-10),
        (lambda: Bytes(lambda x: x / 255), _BYTES, 1e-5),
        (lambda: Bytes(lambda x: x.float() / 255), _BYTES, 1e-5),
    ],
)
def test_unread_values_names_and_bytes(build: Callable[[], nn.Module], inputs: Any, tolerance: float) -> None:
    model = seeded(build)
    model = model.float() if tolerance > 1e-6 else model
    problem = Problem(model, nn.CrossEntropyLoss(), (inputs, labels(5, classes=3)))
    rows, engine = rows_of(problem), FusedEngine(problem)
    assert_close(engine.hessian(rows), AutogradEngine(problem).hessian(rows), tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_known_refusals(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        FusedEngine(ALL[name]().problem())


def test_rows_are_checked() -> None:
    engine = FusedEngine(ALL["linear"]().problem())
    with pytest.raises(ValueError, match=r"hessian: rows must be \[K, 15\], got \[2, 14\]"):
        engine.hessian(torch.zeros(2, 14, dtype=F64))
    with pytest.raises(ValueError, match=r"jacobian: rows must have dtype torch\.float64, got torch\.float32"):
        engine.jacobian(torch.zeros(2, 15))
    assert engine.hessian(torch.zeros(0, 15, dtype=F64)).shape == (0, 15)


def test_results_belong_to_the_caller() -> None:
    """They take part in autograd, and rows that require gradients are read only."""
    engine = FusedEngine(ALL["act_tanh"]().problem())
    rows = rows_of(engine.problem).requires_grad_()
    product = engine.hessian(rows)
    assert not product.requires_grad
    assert not product.is_inference()
    assert not engine.jacobian(rows).is_inference()
    (product * rows).sum().backward()
    assert rows.grad is not None
