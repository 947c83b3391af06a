# SPDX-License-Identifier: Apache-2.0
"""Searches that grow by products of lower precision: what they return is of the operator itself, and says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvlab.operators import HessianOperator, Problem
from curvlab.operators.base import DenseOperator
from curvlab.operators.engines import rounded
from curvlab.spectra import top_eigenpairs
from tests.spectra.known import generator, hessian_like, symmetric


class Twinned(DenseOperator):
    """A float32 matrix with a twin that is off by a fixed, not symmetric error and by one of every product."""

    def __init__(self, matrix: Tensor, error: float) -> None:
        super().__init__(matrix.float(), is_symmetric=True)
        noise = torch.randn(matrix.shape, generator=generator(7)) / len(matrix) ** 0.5
        self.low = _Low(self.matrix + error * self.matrix @ noise, error)

    def rounded(self) -> DenseOperator:
        return self.low


class _Low(DenseOperator):
    def __init__(self, matrix: Tensor, error: float) -> None:
        super().__init__(matrix, is_symmetric=True)
        self.error = error

    def _apply(self, rows: Tensor) -> Tensor:
        product = rows @ self.matrix.T
        noise = torch.randn(rows.shape, generator=generator(int(self.num_products))) / rows.shape[1] ** 0.5
        return product + self.error * product.norm(dim=1, keepdim=True) * noise


def true_residuals(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    v = vectors.double()
    return (v @ matrix - values[:, None] * v).norm(dim=1)


VALUES = hessian_like(800)


@pytest.mark.parametrize("error", [1e-3, 6e-3])
@pytest.mark.parametrize("which", ["LA", "LM", "BE", "SA"])
def test_pairs_are_those_of_the_operator(which: str, error: float) -> None:
    values = VALUES.clone()
    values[-3:] = torch.tensor([-20.0, -35.0, -60.0], dtype=torch.float64)
    matrix = symmetric(values)
    A = Twinned(matrix, error)
    found = top_eigenpairs(A, 4 if which != "SA" else 2, which=which, generator=generator())  # type: ignore[arg-type]
    plain = top_eigenpairs(A, len(found), which=which, rounded=False, generator=generator())  # type: ignore[arg-type]
    assert found.converged and found.num_rounded == A.low.num_products > found.num_products
    assert found.num_products + plain.num_products == A.num_products and plain.num_rounded == 0
    residuals = true_residuals(matrix, found.values, found.vectors)
    assert (residuals <= 1.01e-3 * found.values.abs()).all()
    assert (residuals <= 1.5 * found.residuals + 1e-4).all()
    assert ((found.values - plain.values).abs() <= found.error_bounds + plain.error_bounds).all()
    assert 2 * found.num_products < plain.num_products + len(found)


def test_what_the_operator_appends_is_multiplied_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    A = Twinned(symmetric(VALUES), 3e-3)
    sizes: list[tuple[str, int]] = []
    for name, operator in (("exact", A), ("low", A.low)):
        apply = operator.apply_rows
        monkeypatch.setattr(
            operator, "apply_rows", lambda rows, n=name, f=apply: (sizes.append((n, len(rows))), f(rows))[1]
        )
    found = top_eigenpairs(A, 4, generator=generator())
    at = sizes.index(("exact", 4))
    assert found.converged and set(sizes[:at]) == {("low", 1)}
    assert sizes[at + 1] == ("low", 4) and sizes[-1] == ("exact", 1)


def test_the_rounded_space_alone_would_not_do() -> None:
    """Without A itself the pairs are as far off as the twin: what is put right was wrong."""
    matrix = symmetric(VALUES)
    A = Twinned(matrix, 6e-3)
    alone = top_eigenpairs(A.low, 4, verify=False, generator=generator())
    assert (true_residuals(matrix, alone.values, alone.vectors) > 2e-3 * alone.values).all()


@pytest.mark.parametrize("error", [0.1, 1.0])
def test_a_useless_twin_is_given_up(error: float) -> None:
    matrix = symmetric(VALUES)
    A = Twinned(matrix, error)
    found = top_eigenpairs(A, 3, generator=generator())
    assert found.converged and found.num_products < 60
    assert (true_residuals(matrix, found.values, found.vectors) <= 1.01e-3 * found.values).all()
    torch.testing.assert_close(found.values, VALUES[:3], rtol=1e-5, atol=0)


def test_products_that_run_out_are_not_believed() -> None:
    matrix = symmetric(VALUES)
    for budget in (5, 9, 12):
        A = Twinned(matrix, 6e-3)
        found = top_eigenpairs(A, 4, max_products=budget, generator=generator())
        assert found.num_products + found.num_rounded == A.num_products + A.low.num_products <= budget
        residuals = true_residuals(matrix, found.values, found.vectors)
        assert not found.converged and (found.residuals > 0.3 * residuals).all()


@pytest.mark.parametrize("tol, rounded", [(1e-5, True), (1e-3, False)])
def test_when_there_is_no_lower_precision(tol: float, rounded: bool) -> None:
    A = Twinned(symmetric(VALUES), 1e-3)
    found = top_eigenpairs(A, 2, tol=tol, rounded=rounded, generator=generator())
    assert found.converged and found.num_rounded == A.low.num_products == 0


def test_warm_start_and_restarts() -> None:
    matrix = symmetric(VALUES)
    A = Twinned(matrix, 3e-3)
    cold = top_eigenpairs(A, 4, generator=generator())
    warm = top_eigenpairs(A, 4, start=cold, max_basis=12, generator=generator())
    assert cold.converged and warm.converged and warm.num_rounded > 0
    assert (true_residuals(matrix, warm.values, warm.vectors) <= 1.01e-3 * warm.values).all()


def images(channels: int = 3) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    x, y = torch.randn(16, channels, 16, 16), torch.arange(16) % 5
    model(x)
    return Problem(model.eval(), nn.CrossEntropyLoss(), (x, y))


@pytest.mark.parametrize("channels", [3, 6])  # of 3, the first convolution has a float32 kernel of its own
def test_the_twin_of_a_hessian(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """The factors of one primal pass, rounded: the products of an engine built for bfloat16, or better."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    problem = images(channels)
    A, asked = HessianOperator(problem), HessianOperator(problem, precision="bf16")
    low = A.rounded()
    assert low is not None and low.num_products == 0
    row = torch.randn(2, A.shape[0], generator=generator())
    exact, got, want = A.apply_rows(row), low.apply_rows(row), asked.apply_rows(row)
    error = (got - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2
    if channels == 6:  # roundings of float32 before the rounding to bfloat16
        assert (got - want).norm() < 0.05 * (want - exact).norm()
    else:
        assert (got - exact).norm() < 1.1 * (want - exact).norm()
    assert low.precision_error == pytest.approx(float(error), rel=1.0)
    torch.testing.assert_close(A.apply_rows(row), exact, rtol=0, atol=0)  # the twin changed nothing in its engine
    found = top_eigenpairs(A, 2, generator=generator())
    assert found.converged and found.num_rounded > 0
    exactly = HessianOperator(problem.to(torch.float64))
    v = found.vectors.double()
    off = exactly.apply_rows(v) - found.values[:, None] * v
    assert (off.norm(dim=1) <= 1.05e-3 * found.values).all()


def test_where_no_twin_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = images()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert HessianOperator(problem).rounded() is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert HessianOperator(problem, engine="autograd").rounded() is None
    assert HessianOperator(problem, memory_budget=1 << 28).rounded() is None
    assert HessianOperator(problem.to(torch.float64)).rounded() is None
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 5))
    assert HessianOperator(Problem(wide, nn.CrossEntropyLoss(), list(problem.batches()))).rounded() is None
    assert rounded.pays(HessianOperator(problem).engine)


@pytest.mark.parametrize(("k", "max_basis"), [(8, 10), (8, 12), (20, None)])
def test_small_bases_have_room_for_what_the_operator_appends(k: int, max_basis: int | None) -> None:
    """Every time that A is asked, k candidates come to those of the times before."""
    matrix = symmetric(hessian_like(1200))
    A = Twinned(matrix, 2e-2)
    found = top_eigenpairs(A, k, max_basis=max_basis, max_products=1500, generator=generator())
    assert found.num_rounded > 0
    residuals = true_residuals(matrix, found.values, found.vectors)
    assert not found.converged or (residuals <= 1.05e-3 * found.values.abs()).all()
    assert (residuals <= 2 * found.residuals + 1e-4).all()


@pytest.mark.parametrize("top", [105.0, 150.0])
def test_a_warm_start_sees_what_overtakes_in_a_direction_that_it_does_not_hold(top: float) -> None:
    """The old vectors are eigenvectors still: a search that believed them would end at once, with five wrong pairs."""
    values = hessian_like(800)
    before = top_eigenpairs(Twinned(symmetric(values), 3e-3), 5, generator=generator())
    values[400] = top
    matrix = symmetric(values)
    after = top_eigenpairs(Twinned(matrix, 3e-3), 5, start=before, generator=generator())
    assert after.converged and after.num_rounded > after.num_products
    assert (true_residuals(matrix, after.values, after.vectors) <= 1.01e-3 * after.values.abs()).all()
    expected = values.sort(descending=True)[0][:5]
    assert ((after.values - expected).abs() <= after.error_bounds + 1e-4).all()
