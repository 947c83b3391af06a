# SPDX-License-Identifier: Apache-2.0
"""Measures held to the invariances that they declare, and to dense matrices."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvlab.operators.base import DenseOperator
from curvlab.operators.problem import Problem
from curvlab.sharpness import measures
from curvlab.sharpness.directions import weight_scale
from curvlab.sharpness.evaluation import parameter_row
from curvlab.sharpness.measures import MEASURES, DiagonallyScaledOperator, Gauge, measure, sharpness
from curvlab.sharpness.symmetries import SYMMETRIES, transform
from tests.sharpness.nets import F64, draw, images, network, plain_loss, problem, row_of, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def gauge_of(model: nn.Module, order: Tensor | None = None) -> Gauge:
    """Nearly converged eigenvalues and an exact trace: what is left to differ is the measure."""
    here = Problem(model, nn.CrossEntropyLoss(), images())
    return Gauge(here, order=order, num_probes=10**6, num_draws=6, batch_size=12, tol=1e-7, engine="autograd")


@lru_cache
def values(symmetry: str | None) -> dict[str, float]:
    """All measures of the trained network, as it is or transformed."""
    model = network(steps=15)
    if symmetry is None:
        return measure(gauge_of(model))
    changed = transform(model, symmetry, generator=draw(4), inputs=images()[0])  # type: ignore[arg-type]
    return measure(gauge_of(changed.model, changed.order))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_stays_where_it_says_and_moves_elsewhere(name: str, symmetry: str) -> None:
    before, after = values(None)[name], values(symmetry)[name]
    assert math.isfinite(before) and before > 0
    change = abs(after / before - 1)
    if symmetry in MEASURES[name].invariances:
        assert change < 1e-3
    else:
        assert not change < 1e-2  # NaN: the levels do not reach what is looked for; that is a move


def test_declarations_name_symmetries() -> None:
    for entry in MEASURES.values():
        assert entry.invariances <= set(SYMMETRIES)


def test_layer_scales_of_ten_move_sharpness_fifty_times_and_its_adaptive_form_not_at_all() -> None:
    """The example of Dinh et al.: one hidden layer, alpha = 10."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    trained(model, images(), steps=10, lr=0.01)
    changed = transform(model, "relu_rescaling", inputs=images()[0]).model
    plain, adaptive = [], []
    for one in (model, changed):
        here = Problem(one, nn.CrossEntropyLoss(), images())
        plain.append(sharpness(here, tol=1e-6).values[0].item())
        adaptive.append(sharpness(here, scale="element", tol=1e-6).values[0].item())
    assert plain[1] / plain[0] > 50
    assert adaptive[1] == pytest.approx(adaptive[0], rel=1e-4)


@lru_cache
def dense() -> tuple[Tensor, Tensor]:
    """Hessian by double backward on PyTorch's loss, and Gauss-Newton matrix from the Jacobian of the network."""
    model, (x, y) = network(steps=15), images()
    theta = row_of(model)
    hessian = torch.autograd.functional.hessian(lambda row: plain_loss(model, row), theta)
    params = {name: param.detach() for name, param in model.named_parameters()}
    parts = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    jacobian = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts.values()], 2)
    p = model(x).detach().softmax(1)
    b = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return hessian, torch.einsum("nci,ncd,ndj->ij", jacobian, b, jacobian) / len(y)  # type: ignore[return-value]


def test_measures_of_curvature_are_those_of_dense_matrices() -> None:
    hessian, ggn = dense()
    model, found = network(steps=15), values(None)
    theta = row_of(model)
    params = {name: param.detach() for name, param in model.named_parameters()}
    element, filters = weight_scale(params, "element"), weight_scale(params, "filter")

    def top(matrix: Tensor) -> float:
        return torch.linalg.eigvalsh(matrix)[-1].item()

    blocks, at = [], 0
    for tensor in params.values():
        here = slice(at, at + tensor.numel())
        blocks.append(top(hessian[here, here]) * tensor.square().sum().item())
        at += tensor.numel()
    loss = plain_loss(model, theta).item()
    expected = {
        "sharpness": top(hessian),
        "trace": hessian.trace().item(),
        "relative_sharpness": top(hessian) / loss,
        "norm_sharpness": top(hessian) * theta.square().sum().item(),
        "block_sharpness": max(blocks),
        "element_sharpness": top(element[:, None] * hessian * element),
        "filter_sharpness": top(filters[:, None] * hessian * filters),
        "element_trace": (element**2 * hessian.diagonal()).sum().item(),
        "fisher_rao": (theta @ ggn @ theta).item(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_sharpness_returns_eigenpairs_with_residuals() -> None:
    hessian, _ = dense()
    here = problem(steps=15)
    pairs = sharpness(here, 3, tol=1e-6, generator=draw())
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(hessian).flip(0)[:3], rtol=1e-8, atol=0)
    again = sharpness(here, 3, hessian=DenseOperator(hessian, is_symmetric=True), tol=1e-6, start=pairs.vectors)
    assert again.num_products < pairs.num_products and again.converged
    eta = (
        sharpness(here, scale="filter", eta=0.5, hessian=DenseOperator(hessian, is_symmetric=True), tol=1e-8)
        .values[0]
        .item()
    )
    d = weight_scale(here.params, "filter", eta=0.5)
    assert eta == pytest.approx(torch.linalg.eigvalsh(d[:, None] * hessian * d)[-1].item(), rel=1e-6)


def test_the_scaled_operator_is_that_of_a_dense_product() -> None:
    matrix = torch.randn(5, 5, dtype=F64, generator=draw())
    matrix, diagonal = matrix + matrix.T, torch.rand(5, dtype=F64, generator=draw(1))
    operator = DiagonallyScaledOperator(DenseOperator(matrix), diagonal)
    torch.testing.assert_close(operator.to_dense(), diagonal[:, None] * matrix * diagonal)
    assert operator.is_symmetric and not operator.is_psd
    with pytest.raises(ValueError, match=r"DiagonallyScaledOperator: diagonal must be \[5\]"):
        DiagonallyScaledOperator(DenseOperator(matrix), diagonal[:3])
    with pytest.raises(ValueError, match=r"DiagonallyScaledOperator: base must be symmetric"):
        DiagonallyScaledOperator(DenseOperator(matrix.triu()), diagonal)


def test_trace_by_probes_agrees_with_the_exact_one() -> None:
    here = problem(steps=15)
    probed = Gauge(here, num_probes=here.num_params - 1, engine="autograd")
    assert probed.trace(probed.hessian) == pytest.approx(values(None)["trace"], rel=0.2)


def test_measures_do_not_depend_on_which_others_are_taken() -> None:
    here = problem(steps=15)
    together = measure(here, ["flatness", "batch_sharpness", "sam"], seed=3, engine="autograd", batch_size=6)
    apart = measure(here, ["batch_sharpness"], seed=3, engine="autograd", batch_size=6)
    assert list(together) == ["flatness", "batch_sharpness", "sam"]
    assert apart["batch_sharpness"] == together["batch_sharpness"]


def test_new_measures_join_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MEASURES", dict(MEASURES))

    @measures.register("norm", "‖θ‖", ["permutation"])
    def norm(gauge: Gauge) -> float:
        return parameter_row(gauge.problem).norm().item()

    assert measures.measure(problem(), ["norm"]) == {"norm": pytest.approx(row_of(network()).norm().item())}
    with pytest.raises(ValueError, match=r"register: name must be new, got 'norm'"):
        measures.register("norm", "", [])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"measure: names must be among sharpness, trace, .*, got 'flat'"):
        measure(problem(), ["flat"])
    with pytest.raises(TypeError, match=r"measure: options must be given to the gauge, got \['seed'\]"):
        measure(Gauge(problem()), ["sam"], seed=1)


class _Noisy(DenseOperator):
    """Gives other products every time."""

    def _apply(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix + 0.1 * torch.randn(rows.shape, dtype=rows.dtype, generator=draw(self.num_products))


def test_eigenvalues_that_are_not_found_are_no_silent_numbers() -> None:
    noisy = _Noisy(torch.linspace(0.0, 1.0, 50, dtype=F64).diag(), is_symmetric=True)
    with pytest.warns(UserWarning, match=r"Gauge: eigenvalue .* is not found to 0.001 of it, but to a residual of"):
        Gauge(problem()).largest(noisy)
