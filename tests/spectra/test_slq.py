# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from curvlab.operators.base import DenseOperator
from curvlab.spectra import effective_dimension, log_determinant, slq_density, vectors
from tests.spectra.known import DTYPES, generator, hessian_like, operator, rotation, symmetric

VALUES = hessian_like(150, top=10.0)
MATRIX = symmetric(VALUES)
SEEDS = 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_gauss_quadrature_of_each_probe(steps: int, dtype: torch.dtype) -> None:
    """z^T A^q z exactly for q < 2 steps, probe by probe."""
    found = slq_density(operator(MATRIX, dtype), 3, steps, generator=generator(1))
    exact = MATRIX.to(dtype).double() / 10
    rows = [vectors.random_signs(1, 150, dtype=dtype, device=torch.device("cpu"), generator=g) for g in [generator(1)]]
    z = rows[0][0].double()
    for power in range(2 * steps):
        want = float(z @ torch.linalg.matrix_power(exact, power) @ z)
        got = found.trace_of(lambda nodes, q=power: (nodes / 10) ** q).samples[0]
        assert float(got) == pytest.approx(want, rel=1e4 * torch.finfo(dtype).eps)
    assert found.num_products == 3 * steps


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_nodes_are_eigenvalues_without_copies(dtype: torch.dtype) -> None:
    """As many steps as dimensions, outliers that flood rounding: every eigenvalue once (full reorthogonalization)."""
    values = torch.cat([torch.tensor([1e3, 300.0]), torch.linspace(2, -1, 38)]).double()
    found = slq_density(operator(symmetric(values), dtype), 2, 60, generator=generator())
    assert found.nodes.shape == (2, 40) and found.num_products == 80
    for nodes in found.nodes:
        torch.testing.assert_close(nodes.flip(0), values, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


def test_runs_end_at_different_steps() -> None:
    """Few distinct eigenvalues: runs end exactly, at 3 steps of 10, and cost no more."""
    values = torch.tensor([4.0] * 5 + [1.0] * 10 + [0.0] * 15).double()
    A = operator(symmetric(values))
    found = slq_density(A, 6, 10, generator=generator())
    assert found.num_products == A.num_products == 18
    assert ((found.weights > 1e-12).sum(1) == 3).all()
    counts = [float(found.cdf([level])[0]) * 30 for level in (-0.5, 0.5, 2.0, 5.0)]
    assert counts[0] == 0 and counts[3] == pytest.approx(30)
    assert counts[1] == pytest.approx(15, abs=4) and counts[2] == pytest.approx(25, abs=4)


@pytest.mark.parametrize("budget_rows", [21, 50, 1000])
def test_memory_budget_groups_the_runs(budget_rows: int) -> None:
    A = operator(MATRIX)
    found = slq_density(A, 5, 20, memory_budget=budget_rows * 150 * 8, generator=generator(2))
    whole = slq_density(A, 5, 20, generator=generator(2))
    torch.testing.assert_close(found.nodes, whole.nodes, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.weights, whole.weights, rtol=0, atol=1e-9)


def test_density_is_that_of_the_eigenvalues() -> None:
    """Against the exact smoothed spectrum, point by point within twice the band."""
    sigma, grid = 0.5, torch.linspace(-3, 12, 61, dtype=torch.float64)
    found = slq_density(operator(MATRIX), 40, 40, generator=generator())
    kernels = torch.exp(-0.5 * ((grid[:, None] - VALUES) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    exact = kernels.mean(1)
    density, (low, high) = found.density(grid, sigma), found.band(grid, sigma)
    assert (low <= density).all() and (density <= high).all()
    assert ((exact >= density - (high - density) * 2 - 1e-12) & (exact <= high + (high - density) + 1e-12)).all()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)
    wide = slq_density(operator(MATRIX), 10, 40, generator=generator()).band(grid, sigma)
    ratio = float(((wide[1] - wide[0]) / (high - low)).median())
    assert 1.4 < ratio < 3.2  # sqrt(4) times the ratio of t quantiles 2.26 / 2.02
    assert found.support[0] >= float(VALUES.min()) - 1e-9 and found.support[1] == pytest.approx(10.0)
    cdf = found.cdf(grid)
    assert (cdf.diff() >= 0).all() and cdf[0] == 0 and cdf[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_determinant_and_effective_dimension(dtype: torch.dtype) -> None:
    """Within k sigma over seeds, the stated error the true one, sigma ~ n^(-1/2)."""
    matrix = (MATRIX @ MATRIX + (MATRIX @ MATRIX).T) / 2
    A, squares = operator(matrix, dtype), VALUES.square()
    exact = {
        log_determinant: float(torch.log(squares + 4).sum()),
        effective_dimension: float((squares / (squares + 4)).sum()),
    }
    for function, want in exact.items():
        spreads = []
        for probes in (3, 9):
            found = [
                function(A, 4.0, num_probes=probes, num_steps=10, generator=generator(seed)) for seed in range(SEEDS)
            ]
            values = torch.tensor([one.value for one in found], dtype=torch.float64)
            spreads.append(float(values.std()))
            stated = math.sqrt(sum(one.standard_error**2 for one in found) / SEEDS)
            assert abs(float(values.mean()) - want) < 4 * spreads[-1] / SEEDS**0.5
            assert stated == pytest.approx(spreads[-1], rel=0.6)
            assert found[0].num_products == probes * 10 and len(found[0].samples) == probes
        assert 1.0 < spreads[0] / spreads[1] < 3.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [log_determinant, effective_dimension])
@pytest.mark.parametrize("shift, steps", [(1e-4, 8), (1e-4, 20), (1e-2, 60)])
def test_too_few_steps_are_stated(function: Any, shift: float, steps: int, dtype: torch.dtype) -> None:
    """Eigenvalues over nine decades: what the probes' spread does not show, the bracket does."""
    values = 0.9 ** torch.arange(200, dtype=torch.float64)
    matrix = symmetric(values)
    found = function(operator(matrix, dtype), shift, num_probes=6, num_steps=steps, generator=generator())
    exact = torch.log(values + shift) if function is log_determinant else values / (values + shift)
    assert found.interval[0] <= float(exact.sum()) <= found.interval[1]
    # With the same probes, exactly:
    signs = vectors.random_signs(1, 200, dtype=dtype, device=torch.device("cpu"), generator=(g := generator()))
    rows = [signs, *[vectors.random_signs(1, 200, dtype=dtype, device=signs.device, generator=g) for _ in range(5)]]
    weights = (torch.cat(rows).double() @ rotation(200)).square()
    assert abs(found.value - float((weights @ exact).mean())) <= found.quadrature_error + 1e-3
    assert found.quadrature_error > 3 * found.standard_error if steps == 8 else True
    assert found.quadrature_error < 1e-3 if steps == 60 else found.quadrature_error > 0.1


def test_single_probe_has_no_error() -> None:
    found = slq_density(operator(MATRIX), 1, 10, generator=generator())
    assert math.isnan(found.trace_of(lambda nodes: nodes).standard_error)
    with pytest.raises(ValueError, match="num_probes must be at least 2, got 1"):
        found.band([0.0])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_tiny_and_zero(size: int, fill: float) -> None:
    found = slq_density(operator(fill * torch.eye(size)), 3, 10, generator=generator())
    assert found.support == (fill, fill) and found.num_products == 3
    assert float(found.density([fill])[0]) > 0
    assert found.trace_of(lambda nodes: nodes).value == pytest.approx(fill * size)
    assert log_determinant(operator(fill * torch.eye(size)), 2.0).value == pytest.approx(size * math.log(fill + 2))


def test_refusals() -> None:
    A = operator(MATRIX)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_probes": 0}, "num_probes must be an integer of at least 1, got 0"),
        ({"num_steps": 1.5}, "num_steps must be an integer of at least 1, got 1.5"),
        ({"num_steps": 20, "memory_budget": 12000}, "memory_budget must be at least 25200 bytes .* 9 steps would fit"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"slq_density: {message}"):
            slq_density(A, **arguments)
    with pytest.raises(ValueError, match=r"log_determinant: shift must be a finite number above 0, got 0.0"):
        log_determinant(A, 0.0)
    with pytest.raises(ValueError, match="effective_dimension: A must be positive semidefinite, got"):
        effective_dimension(operator(-MATRIX), 1.0)
    with pytest.raises(ValueError, match="A must be symmetric"):
        slq_density(DenseOperator(torch.ones(3, 3).triu()))
    with pytest.raises(ValueError, match="A must give finite products"):
        slq_density(operator(torch.full((4, 4), torch.nan)))
    found = slq_density(A, 2, 5, generator=generator())
    with pytest.raises(ValueError, match="function must be finite at every node"):
        found.trace_of(lambda nodes: torch.log(nodes - 5))
    with pytest.raises(ValueError, match=r"grid must be one-dimensional and finite, got \[1, 1\]"):
        found.density([[0.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="sigma must be a finite number above 0"):
        found.density([0.0], -1.0)
