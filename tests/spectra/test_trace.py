# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvlab.operators.base import DenseOperator
from curvlab.spectra import TraceEstimate, diagonal, hutchinson_trace, hutchpp_trace, xtrace
from curvlab.spectra import vectors as vec
from tests.spectra.known import DTYPES, generator, hessian_like, operator, rotation, symmetric

RUNS = 200
MATRIX = symmetric(hessian_like(120, top=10.0))


def many(estimate: Callable[[int], TraceEstimate], runs: int = RUNS) -> tuple[Tensor, Tensor]:
    """Values and standard errors over independent runs."""
    found = [estimate(seed) for seed in range(runs)]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    return values, torch.tensor([one.standard_error for one in found], dtype=torch.float64)


def hutchinson_sd(matrix: Tensor) -> float:
    """Of one probe of signs: 2 (||A||_F^2 - sum A_ii^2), for symmetric A."""
    return math.sqrt(2 * float(matrix.square().sum() - matrix.diag().square().sum()))


@pytest.mark.parametrize("num_probes", [4, 16, 64])
def test_hutchinson_has_the_analytic_variance(num_probes: int) -> None:
    """Sigma falls as n^(-1/2), the mean is the trace, and the stated error is the true one."""
    A, exact = operator(MATRIX), float(MATRIX.trace())
    values, errors = many(lambda seed: hutchinson_trace(A, num_probes, generator=generator(seed)))
    sigma = hutchinson_sd(MATRIX) / num_probes**0.5
    assert abs(float(values.mean()) - exact) < 4 * sigma / RUNS**0.5
    assert float(values.std()) == pytest.approx(sigma, rel=4 / (2 * RUNS) ** 0.5)
    assert float(errors.square().mean().sqrt()) == pytest.approx(sigma, rel=0.15)


def test_intervals_cover() -> None:
    A, exact = operator(MATRIX), float(MATRIX.trace())
    found = [hutchinson_trace(A, 12, generator=generator(seed)) for seed in range(RUNS)]
    inside = sum(one.interval[0] <= exact <= one.interval[1] for one in found)
    assert abs(inside / RUNS - 0.95) < 4 * (0.95 * 0.05 / RUNS) ** 0.5


def test_hutchinson_is_exact_for_diagonal_matrices() -> None:
    A = operator(torch.diag(torch.arange(50.0)), torch.float32)
    found = hutchinson_trace(A, 3, generator=generator())
    assert found.value == pytest.approx(1225.0, rel=1e-6) and found.standard_error < 1e-3
    assert found.num_products == A.num_products == 3


def test_hutchinson_sees_matrices_that_are_not_symmetric() -> None:
    matrix = MATRIX + torch.randn(120, 120, dtype=torch.float64, generator=generator(2)).triu() * 0.1
    values, errors = many(lambda seed: hutchinson_trace(DenseOperator(matrix), 16, generator=generator(seed)), 50)
    assert abs(float(values.mean() - matrix.trace())) < 4 * float(errors.mean()) / 50**0.5


@pytest.mark.parametrize("tol", [0.3, 0.1, 0.03])
def test_tolerance_stops(tol: float) -> None:
    A = operator(MATRIX)
    found = hutchinson_trace(A, tol=tol, max_probes=5000, generator=generator(1))
    assert found.converged and found.standard_error <= tol * abs(found.value)
    want = (hutchinson_sd(MATRIX) / (tol * float(MATRIX.trace()))) ** 2
    assert 0.5 * want < found.num_products < 2 * want + 16
    short = hutchinson_trace(A, tol=1e-6, max_probes=20, generator=generator(1))
    assert not short.converged and short.num_products == 20


def test_negative_traces_do_not_stop_early() -> None:
    """A running mean below 0 must not look like convergence."""
    A = operator(-MATRIX)
    for seed in range(20):
        found = hutchinson_trace(A, tol=0.1, generator=generator(seed))
        assert found.num_products >= 8 and found.standard_error <= 0.1 * abs(found.value)
        assert abs(found.value + float(MATRIX.trace())) < 5 * 0.12 * float(MATRIX.trace())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", [hutchpp_trace, xtrace])
def test_low_rank_is_traced_exactly(estimator: Callable[..., TraceEstimate], dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([5.0, -3.0, 2.0, 1.0]), torch.zeros(96)]).double()
    A = operator(symmetric(values), dtype)
    found = estimator(A, 30, generator=generator())
    assert found.value == pytest.approx(5.0, rel=1e3 * torch.finfo(dtype).eps)
    assert found.standard_error < 1e3 * torch.finfo(dtype).eps
    assert found.num_products == A.num_products <= 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", [hutchpp_trace, xtrace])
def test_deflating_estimators_are_unbiased_and_sharper(
    estimator: Callable[..., TraceEstimate], dtype: torch.dtype
) -> None:
    A, exact = operator(MATRIX, dtype), float(MATRIX.trace())
    values, errors = many(lambda seed: estimator(A, 48, generator=generator(seed)), 100)
    spread = float(values.std())
    assert abs(float(values.mean()) - exact) < 4 * spread / 100**0.5
    assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.5)
    assert spread < 0.25 * hutchinson_sd(MATRIX) / 48**0.5


def naive_xtrace(matrix: Tensor, tests: Tensor) -> Tensor:
    """Leave-one-out by its definition, one QR a test vector; tests are columns ``[P, n]``."""
    size, n = tests.shape
    images, out = matrix @ tests, []
    for i in range(n):
        basis = torch.linalg.qr(torch.cat([images[:, :i], images[:, i + 1 :]], 1))[0]
        rest = tests[:, i] - basis @ (basis.T @ tests[:, i])
        scale = (size - n + 1) / rest.square().sum()
        out.append((basis.T @ matrix @ basis).trace() + scale * rest @ matrix @ rest)
    return torch.stack(out)


@pytest.mark.parametrize("symmetric_", [True, False])
def test_xtrace_is_leave_one_out(symmetric_: bool) -> None:
    matrix = MATRIX if symmetric_ else MATRIX + 0.1 * rotation(120, 4)
    tests = torch.randn(10, 120, dtype=torch.float64, generator=generator(7))
    tests *= (120**0.5 / tests.norm(dim=1))[:, None]
    found = xtrace(DenseOperator(matrix), 20, generator=generator(7))
    torch.testing.assert_close(found.samples, naive_xtrace(matrix, tests.T), rtol=1e-9, atol=1e-9)
    error = float(found.samples.std()) / 10**0.5
    assert found.value == pytest.approx(float(found.samples.mean())) and found.standard_error == pytest.approx(error)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_hutchpp_with_room_for_all_is_exact(size: int) -> None:
    """Square matrices of random signs are singular half of the time at 2 x 2: no basis to rely on."""
    A = operator(symmetric(torch.arange(size).double() - 0.5))
    for seed in range(8):
        found = hutchpp_trace(A, 3 * size + 6, generator=generator(seed))
        assert found.value == pytest.approx(float(A.matrix.trace()), abs=1e-12) and found.standard_error == 0.0
        assert found.num_products == size


@pytest.mark.parametrize("size", [4, 5, 8])
def test_tiny_matrices(size: int) -> None:
    matrix = symmetric(torch.arange(size).double() - 1)
    exact = float(matrix.trace())
    assert hutchpp_trace(operator(matrix), 60, generator=generator()).value == pytest.approx(exact, abs=1e-9)
    assert xtrace(operator(matrix), 4, generator=generator()).num_products == 4
    assert hutchinson_trace(operator(torch.zeros(size, size)), 4, generator=generator()).value == 0.0
    assert hutchpp_trace(operator(torch.zeros(size, size)), 9, generator=generator()).value == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_probes", [5, 20, 80])
def test_diagonal_has_the_analytic_variance(num_probes: int, dtype: torch.dtype) -> None:
    """Entry i has variance sum_{j != i} A_ij^2 a probe; pooled over entries, sigma falls as n^(-1/2)."""
    A = operator(MATRIX, dtype)
    variance = (MATRIX.square().sum(1) - MATRIX.diag().square()) / num_probes
    found = [diagonal(A, num_probes, generator=generator(seed)) for seed in range(40)]
    off = torch.stack([(one.value.double() - MATRIX.diag()).square() for one in found]).mean()
    stated = torch.stack([one.standard_error.double().square() for one in found]).mean()
    assert float(off) == pytest.approx(float(variance.mean()), rel=0.15)
    assert float(stated) == pytest.approx(float(variance.mean()), rel=0.15)
    assert found[0].num_products == num_probes and found[0].value.dtype == dtype


def test_diagonal_against_plain_statistics_of_its_probes() -> None:
    one = diagonal(operator(MATRIX), 21, block_size=21, generator=generator(3))
    probes = vec.random_signs(21, 120, dtype=torch.float64, device=torch.device("cpu"), generator=generator(3))
    samples = probes * (probes @ MATRIX)
    torch.testing.assert_close(one.value, samples.mean(0))
    torch.testing.assert_close(one.standard_error, samples.std(0) / 21**0.5)
    assert one.relative_error == pytest.approx(float(one.standard_error.norm() / one.value.norm()))


def test_diagonal_stops_at_its_tolerance() -> None:
    found = diagonal(operator(MATRIX), tol=0.2, generator=generator())
    assert found.converged and found.relative_error <= 0.2 and 8 <= found.num_products < 1000
    assert not diagonal(operator(MATRIX), tol=1e-4, max_probes=9, generator=generator()).converged
    exact = diagonal(operator(torch.diag(torch.arange(5.0))), tol=1e-3, generator=generator())
    assert exact.value.tolist() == [0, 1, 2, 3, 4] and exact.relative_error == 0


@pytest.mark.parametrize("estimate", [hutchinson_trace, diagonal])
def test_refusals_of_probes(estimate: Callable) -> None:
    A, name = operator(torch.eye(4)), estimate.__name__
    with pytest.raises(ValueError, match=f"{name}: num_probes must be None where tol is given, got 3 and tol 0.1"):
        estimate(A, 3, tol=0.1)
    with pytest.raises(ValueError, match=f"{name}: num_probes must be an integer of at least 1, got 0"):
        estimate(A, 0)
    with pytest.raises(ValueError, match=f"{name}: block_size must be an integer of at least 1, got 0"):
        estimate(A, 3, block_size=0)
    with pytest.raises(ValueError, match=f"{name}: tol must be a finite number above 0, got nan"):
        estimate(A, tol=math.nan)
    with pytest.raises(ValueError, match=f"{name}: A must give finite products"):
        estimate(operator(torch.full((4, 4), torch.nan)), 3)
    with pytest.raises(ValueError, match="A must be square"):
        estimate(DenseOperator(torch.ones(2, 3)))


def test_refusals_of_budgets() -> None:
    A = operator(torch.eye(10))
    with pytest.raises(ValueError, match="hutchpp_trace: num_products must be an integer of at least 6, got 5"):
        hutchpp_trace(A, 5)
    for bad in (3, 7, 12):
        with pytest.raises(ValueError, match=rf"xtrace: num_products must be an even integer in 4..10, got {bad}"):
            xtrace(A, bad)
