# SPDX-License-Identifier: Apache-2.0
"""Ticket Hessians: every engine against the dense Hessian restricted to the surviving weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlab.models import CNN
from curvlab.operators import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    Problem,
    UnsupportedModel,
    empirical_ntk,
    make_engine,
)
from curvlab.operators.engines.fused import FusedEngine
from curvlab.sparse import BatchNormReLU, Mask, fuse, layerwise_magnitude, sparsify
from curvlab.spectra import top_eigenpairs
from tests.sparse.samples import F64, batch, mask_of, masked, network, normal, seeded

ENGINES = ["fused", "linearized", "autograd"]
LOSS = nn.CrossEntropyLoss()


def _cnn() -> nn.Module:
    """Pooling, ReLU, a normalization that is folded into the layer before it."""
    model = CNN(2, image_size=8, in_channels=2, generator=seeded()).to(F64).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=seeded(1)).mul_(0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0, generator=seeded(2))  # type: ignore[union-attr]
                module.weight.normal_(generator=seeded(3))
    return model


def _pairs(name: str, kernels: Any, **options: Any) -> tuple[Problem, Problem, Mask]:
    """The ticket's problem and the dense one at the same function."""
    if name == "residual":
        model, data = network().eval(), batch()
        mask = mask_of(model, 0.4)
    else:
        model, data = _cnn(), (normal(6, 2, 8, 8), torch.arange(6))
        mask = layerwise_magnitude(model, 0.3)
    dense = masked(model, mask)
    return (
        Problem(sparsify(dense, mask, kernels=kernels), LOSS, data, **options),
        Problem(dense, LOSS, data, **options),
        mask,
    )


def _independent(problem: Problem, data: tuple[Tensor, Tensor]) -> Tensor:
    """The dense Hessian of the dense model by ``torch.func`` alone, ``[P, P]``."""
    names, theta = list(problem.params), list(problem.params.values())
    sizes = [p.numel() for p in theta]
    x, y = data

    def loss(vector: Tensor) -> Tensor:
        parts = [piece.view(p.shape) for piece, p in zip(vector.split(sizes), theta, strict=True)]
        values = {**problem.fixed, **problem.buffers, **dict(zip(names, parts, strict=True))}
        return nn.functional.cross_entropy(functional_call(problem.model, values, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([p.flatten() for p in theta]))


def _close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_ticket_hessian_is_the_dense_one_restricted(engine: str, kernels: Any) -> None:
    ticket, dense, mask = _pairs("residual", kernels)
    restricted = HessianOperator(dense).restrict(mask)
    whole = _independent(dense, batch())
    expected = whole[restricted.indices][:, restricted.indices]  # type: ignore[attr-defined]
    assert float(expected.abs().max()) > 1e-3 and len(expected) == ticket.num_params < dense.num_params
    operator = HessianOperator(ticket, engine=engine)
    _close(operator.to_dense(), expected)
    _close(restricted.to_dense(), expected)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
@pytest.mark.parametrize("engine", ENGINES)
def test_products_with_normalization_folded_fixed_or_batched(engine: str, mode: Any, kernels: Any) -> None:
    ticket, dense, mask = _pairs("cnn", kernels, batch_norm=mode)
    rows = normal(3, ticket.num_params, seed=4)
    pairs = [
        (HessianOperator(ticket, engine=engine), HessianOperator(dense, engine="autograd")),
        (GGNOperator(ticket, engine=engine), GGNOperator(dense, engine="autograd")),
    ]
    for got, reference in pairs:
        _close(got.apply_rows(rows), reference.restrict(mask).apply_rows(rows), 1e-9)


def test_the_fused_engine_takes_tickets_by_itself() -> None:
    ticket, dense, mask = _pairs("cnn", "auto")
    engine, report = make_engine(ticket)
    assert isinstance(engine, FusedEngine) and report.check_error < 1e-12 and not report.declined
    reference = FusedEngine(dense)
    kept = HessianOperator(dense).restrict(mask).indices  # type: ignore[attr-defined]
    _close(engine.gradient(), reference.gradient()[kept])
    assert engine.loss() == pytest.approx(reference.loss(), rel=1e-12)
    rows = normal(2, ticket.num_params)
    whole = torch.zeros(2, dense.num_params, dtype=F64)
    whole[:, kept] = rows
    _close(engine.jacobian(rows), reference.jacobian(whole))
    outputs = normal(2, 60, seed=3)
    _close(engine.jacobian_transposed(outputs), reference.jacobian_transposed(outputs)[:, kept])


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_fused_groups_are_the_layers_that_they_were(mode: Any) -> None:
    ticket, _, _ = _pairs("cnn", "auto", batch_norm=mode)
    data = (normal(6, 2, 8, 8), torch.arange(6))
    grouped = Problem(fuse(ticket.model), LOSS, data, batch_norm=mode)
    assert sum(isinstance(module, BatchNormReLU) for module in grouped.model.modules()) == 6
    engine, report = make_engine(grouped)
    assert isinstance(engine, FusedEngine) and report.check_error < 1e-12
    rows = normal(3, ticket.num_params, seed=4)
    expected = HessianOperator(ticket, engine="autograd").apply_rows(rows)
    for name in ENGINES:
        _close(HessianOperator(grouped, engine=name).apply_rows(rows), expected, 1e-9)
    _close(GGNOperator(grouped).apply_rows(rows), GGNOperator(ticket, engine="autograd").apply_rows(rows), 1e-9)


def _engines_agree(problem: Problem) -> None:
    rows = normal(3, problem.num_params)
    fused, judge = (HessianOperator(problem, engine=engine) for engine in ("fused", "autograd"))
    _close(fused.apply_rows(rows), judge.apply_rows(rows))


def test_chosen_parameters_tied_layers_and_float32() -> None:
    """Only some of a ticket's parameters; a layer that is run twice; single precision."""
    model, data = network().eval(), batch()
    mask = mask_of(model, 0.4)
    sparse = sparsify(masked(model, mask), mask)
    for params in (["stem.values"], ["wide.bias", "head.1.values"], ["norm.weight", "body.*"]):
        problem = Problem(sparse, LOSS, data, params=params)
        _engines_agree(problem)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.one(torch.tanh(self.one(x)))))

    torch.manual_seed(0)
    twice = Twice().to(F64)
    problem = Problem(sparsify(twice, mask_of(twice, 0.6)), LOSS, (normal(5, 4), torch.arange(5) % 3))
    _engines_agree(problem)

    ticket, _, _ = _pairs("cnn", "auto")
    rows = normal(3, ticket.num_params)
    single = HessianOperator(ticket.to(torch.float32), engine="fused").apply_rows(rows.float())
    _close(single.double(), HessianOperator(ticket, engine="autograd").apply_rows(rows), 2e-5)


def test_chunks_and_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.operators.engines import chunks

    model = _cnn()
    mask = layerwise_magnitude(model, 0.3)
    x, y = normal(9, 2, 8, 8), torch.arange(9)
    sparse = sparsify(masked(model, mask), mask)
    whole = Problem(sparse, LOSS, (x, y))
    rows = normal(3, whole.num_params)
    expected = FusedEngine(whole).hessian(rows)
    monkeypatch.setattr(chunks, "_TARGET_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "_FEW_SAMPLES", 2)
    for problem in (whole, Problem(sparse, LOSS, [(x[:4], y[:4]), (x[4:], y[4:])])):
        _close(FusedEngine(problem).hessian(rows), expected)


def test_spectra_and_kernels_of_tickets() -> None:
    ticket, dense, mask = _pairs("residual", "auto")
    top = top_eigenpairs(HessianOperator(ticket), k=2, generator=seeded())
    exact = torch.linalg.eigvalsh(HessianOperator(dense).restrict(mask).to_dense())
    assert torch.allclose(top.values.max(), exact[-1], rtol=1e-6)
    x = batch()[0]
    jacobian = JacobianOperator(ticket).to_dense()
    kernel = empirical_ntk(ticket.model, x)
    _close(kernel.reshape(jacobian.shape[0], -1), jacobian @ jacobian.T, 1e-8)


def test_paddings_without_a_rule_go_to_another_engine() -> None:
    circular = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(circular, nn.Tanh(), nn.Flatten(), nn.Linear(75, 3))
    mask = mask_of(model.to(F64), 0.4)
    ticket = Problem(sparsify(masked(model, mask), mask, kernels="sparse"), LOSS, batch())
    with pytest.raises(UnsupportedModel, match=r"padding=\(1, 1\) with padding_mode='circular' at .*MaskedConv2d 0"):
        FusedEngine(ticket)
    _, report = make_engine(ticket)
    assert report.engine == "linearized"
    rows = normal(2, ticket.num_params)
    expected = HessianOperator(Problem(model, LOSS, batch()), engine="autograd").restrict(mask).apply_rows(rows)
    _close(HessianOperator(ticket).apply_rows(rows), expected)
