# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor

from curvlab.operators.base import DenseOperator
from curvlab.spectra import Eigenpairs, eigenvalue_interval, power_iteration, slq_density, top_eigenpairs
from tests.spectra.known import DTYPES, generator, hessian_like, operator, rotation, symmetric

SPECTRA = {
    "outliers": hessian_like(),
    "sharp outliers": hessian_like(top=1e4),
    "geometric": 50 * 0.9 ** torch.arange(300, dtype=torch.float64),
    "no gap": torch.linspace(3, -1, 120, dtype=torch.float64),
}


def wishart(size: int, samples: int) -> Tensor:
    x = torch.randn(samples, size, dtype=torch.float64, generator=generator(5))
    return x.T @ x / samples


def assert_right(pairs: Eigenpairs, matrix: Tensor, want: Tensor, tol: float) -> None:
    """Residuals are what they are said to be, vectors orthonormal, values within their bounds."""
    assert pairs.converged and len(pairs) == len(want)
    v = pairs.vectors.double()
    residuals = (v @ matrix - pairs.values[:, None] * v).norm(dim=1)
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    rounding = (8 if pairs.vectors.dtype == torch.float64 else 16) * torch.finfo(pairs.vectors.dtype).eps * scale
    assert (residuals <= tol * pairs.values.abs() * 1.01 + rounding).all(), residuals
    assert (residuals <= 1.05 * pairs.residuals + rounding).all()
    assert (pairs.residuals <= 1.5 * residuals + rounding).all()
    assert ((pairs.values - want).abs() <= pairs.error_bounds * 1.01 + rounding).all()
    assert (pairs.error_bounds <= pairs.residuals + rounding).all()
    gram_error = (v @ v.T - torch.eye(len(v), dtype=torch.float64)).abs().max()
    assert gram_error < 100 * torch.finfo(pairs.vectors.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name: str, block_size: int, dtype: torch.dtype) -> None:
    values = SPECTRA[name]
    matrix = symmetric(values)
    A = operator(matrix, dtype)
    pairs = top_eigenpairs(A, 5, block_size=block_size, generator=generator())
    assert_right(pairs, matrix, values[:5], 1e-3)
    assert pairs.num_products == A.num_products


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
def test_wishart_to_any_tolerance(tol: float) -> None:
    matrix = wishart(100, 150)
    pairs = top_eigenpairs(operator(matrix), 4, tol=tol, generator=generator())
    want = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    assert_right(pairs, matrix, want, tol)
    assert (pairs.error_bounds < 0.1 * pairs.residuals).any() or tol == 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_end(k: int, dtype: torch.dtype) -> None:
    below = torch.tensor([-30.0, -14.0, -9.0, -60.0, -5.0], dtype=torch.float64)
    values = torch.cat([hessian_like(200), below]).sort(descending=True)[0]
    matrix = symmetric(values)
    low, by_size = values.flip(0), values[values.abs().argsort(descending=True)]
    ends = torch.cat([values[: k - k // 2], low[: k // 2].flip(0)])
    for which, want in (("LA", values[:k]), ("SA", low[:k]), ("LM", by_size[:k]), ("BE", ends)):
        pairs = top_eigenpairs(operator(matrix, dtype), k, which=which, generator=generator())  # type: ignore[arg-type]
        assert_right(pairs, matrix, want, 1e-3)


@pytest.mark.parametrize("name", ["outliers", "sharp outliers"])
def test_fewer_products_than_arpack(name: str) -> None:
    """Each with its own test of what was found; SciPy's stops at the same tolerance, but only where it restarts."""
    A = operator(symmetric(SPECTRA[name]))
    ours = top_eigenpairs(A, 5, generator=generator()).num_products
    A.num_products = 0

    def product(v: np.ndarray) -> np.ndarray:
        return A.apply_rows(torch.from_numpy(v.reshape(1, -1)))[0].numpy()

    scipy = ScipyOperator(A.shape, matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    eigsh(scipy, k=5, which="LA", tol=1e-3, v0=np.ones(A.shape[0]))  # type: ignore[arg-type]
    assert ours <= A.num_products
    assert ours < 21


@pytest.mark.parametrize("dtype", DTYPES)
def test_thick_restart_keeps_what_it_had(dtype: torch.dtype) -> None:
    values = SPECTRA["no gap"]
    matrix = symmetric(values)
    pairs = top_eigenpairs(operator(matrix, dtype), 5, max_basis=16, max_products=500, generator=generator())
    free = top_eigenpairs(operator(matrix, dtype), 5, max_basis=200, max_products=500, generator=generator())
    assert_right(pairs, matrix, values[:5], 1e-3)
    assert free.num_products < pairs.num_products < 4 * free.num_products


@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_eigenvalues_by_blocks(dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([7.0, 7.0, 7.0, 2.0, 2.0]), torch.linspace(1, -1, 95)]).double()
    matrix = symmetric(values)
    pairs = top_eigenpairs(operator(matrix, dtype), 5, block_size=3, generator=generator())
    assert_right(pairs, matrix, values[:5], 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3])
def test_exhausted_spaces_go_on_from_new_vectors(block_size: int, dtype: torch.dtype) -> None:
    """Two distinct eigenvalues: a Krylov space ends after two products, and the other copies need fresh vectors."""
    values = torch.cat([torch.full((3,), 5.0), torch.full((17,), -1.0)]).double()
    matrix = symmetric(values)
    pairs = top_eigenpairs(operator(matrix, dtype), 4, block_size=block_size, generator=generator())
    assert_right(pairs, matrix, values[:4], 1e-3)


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("which", ["LA", "LM", "BE"])
def test_twelve_decades(which: str, block_size: int) -> None:
    """Where ||A|| is 1e8 times a row, a step multiplies what is lost by as much: no two rows may wait to be cleaned."""
    values = torch.cat([torch.tensor([1e8, 1e4, 1.0, 1e-2]), 1e-4 * torch.rand(196, generator=generator())]).double()
    matrix = symmetric(values)
    k = 3 if which != "BE" else 1
    pairs = top_eigenpairs(operator(matrix), k, which=which, block_size=block_size, generator=generator())  # type: ignore[arg-type]
    assert_right(pairs, matrix, values[:k], 1e-3)
    assert pairs.num_products < 20
    found = slq_density(operator(matrix), 1, 8, generator=generator())
    torch.testing.assert_close(found.nodes[0].flip(0)[:3], values[:3], rtol=1e-6, atol=1e-6)


def test_a_space_that_ended_but_for_rounding_is_not_believed() -> None:
    """Rank 3: the fourth product ends the space, what is left is rounding, and 0 is the smallest eigenvalue thrice."""
    values = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(197)]).double()
    for seed in range(3):
        pairs = top_eigenpairs(operator(symmetric(values, seed)), 3, which="SA", generator=generator(seed))
        assert pairs.converged and pairs.values.abs().max() < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_pairs_of_tiny_matrices(size: int, block_size: int, dtype: torch.dtype) -> None:
    matrix = symmetric(torch.arange(size).double() - 2)
    pairs = top_eigenpairs(operator(matrix, dtype), size, block_size=block_size, generator=generator())
    assert_right(pairs, matrix, torch.linalg.eigvalsh(matrix).flip(0), 1e-3)


@pytest.mark.parametrize("matrix", [torch.zeros(9, 9), torch.eye(9), -3 * torch.eye(9)], ids=["zero", "one", "minus 3"])
def test_multiples_of_one(matrix: Tensor) -> None:
    pairs = top_eigenpairs(operator(matrix, torch.float32), 9, generator=generator())
    assert pairs.converged and torch.allclose(pairs.values, matrix.diag().double(), atol=1e-6)
    assert (pairs.residuals < 1e-5).all()


def test_products_run_out() -> None:
    A = operator(symmetric(SPECTRA["no gap"]))
    pairs = top_eigenpairs(A, 5, max_products=12, generator=generator())
    assert not pairs.converged and pairs.num_products == A.num_products == 12
    v = pairs.vectors
    assert torch.allclose((v @ A.matrix - pairs.values[:, None] * v).norm(dim=1), pairs.residuals, rtol=1e-6)


class _Noisy(DenseOperator):
    """Rounds its products coarsely: what the recurrence believes is no longer what A does."""

    def _apply(self, rows: Tensor) -> Tensor:
        noise = torch.randn(rows.shape, dtype=rows.dtype, generator=generator(int(self.num_products)))
        return rows @ self.matrix + 0.02 * noise * rows.norm(dim=1, keepdim=True)


def test_products_that_do_not_repeat_are_found_out() -> None:
    """Noise of norm 0.02 sqrt(300) = 0.35 a product: above tol * 24, the fifth value, so no pair may count as found."""
    A = _Noisy(symmetric(SPECTRA["outliers"]), is_symmetric=True)
    pairs = top_eigenpairs(A, 5, max_products=40, generator=generator())
    assert not pairs.converged and (pairs.residuals > 0.2).all()
    trusting = top_eigenpairs(A, 5, max_products=40, verify=False, generator=generator())
    assert trusting.num_products <= 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_start(dtype: torch.dtype) -> None:
    values = hessian_like(300)
    matrix = symmetric(values)
    cold = top_eigenpairs(operator(matrix, dtype), 5, generator=generator())
    same = top_eigenpairs(operator(matrix, dtype), 5, start=cold.vectors, generator=generator())
    assert_right(same, matrix, values[:5], 1e-3)
    drift = torch.randn(300, 300, dtype=torch.float64, generator=generator(3)) / 300**0.5
    moved = matrix + 0.05 * (drift + drift.T)
    warm = top_eigenpairs(operator(moved, dtype), 5, start=cold.vectors, generator=generator())
    again = top_eigenpairs(operator(moved, dtype), 5, generator=generator())
    assert_right(warm, moved, torch.linalg.eigvalsh(moved).flip(0)[:5], 1e-3)
    assert same.num_products <= warm.num_products < again.num_products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [105.0, 150.0])
@pytest.mark.parametrize("k, which", [(1, "LA"), (5, "LA"), (1, "BE"), (1, "SA"), (2, "LM")])
def test_an_eigenvalue_that_overtakes_is_seen(k: int, which: str, top: float, dtype: torch.dtype) -> None:
    """The old vectors are eigenvectors still, so that they alone would pass every test of residuals."""
    values, sign = hessian_like(300), -1 if which == "SA" else 1
    before = top_eigenpairs(operator(sign * symmetric(values), dtype), k, which=which, generator=generator())  # type: ignore[arg-type]
    values[k] = top
    matrix = sign * symmetric(values)
    after = top_eigenpairs(operator(matrix, dtype), k, which=which, start=before, generator=generator())  # type: ignore[arg-type]
    assert_right(after, matrix, sign * values.sort(descending=True)[0][:k], 1e-3)


def test_start_may_be_anything_finite() -> None:
    values = hessian_like(60)
    matrix = symmetric(values)
    rows = torch.randn(4, 60, dtype=torch.float64, generator=generator())
    for start in (rows[0], torch.zeros(2, 60).double(), torch.cat([rows, rows]), torch.stack([rows[0], -rows[0]])):
        for block_size in (1, 3):
            pairs = top_eigenpairs(operator(matrix), 3, start=start, block_size=block_size, generator=generator())
            assert_right(pairs, matrix, values[:3], 1e-3)


def test_same_generator_same_bits() -> None:
    A = operator(symmetric(SPECTRA["outliers"]), torch.float32)
    first, second = (top_eigenpairs(A, 3, generator=generator(4)) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.values, second.values)


def test_the_operator_may_return_its_own_buffers() -> None:
    """An operator that gives back the same tensor every time, and one that gives back its input."""
    values = hessian_like(50)
    matrix = symmetric(values)

    class Reusing(DenseOperator):
        out = torch.empty(8, 50, dtype=torch.float64)

        def _apply(self, rows: Tensor) -> Tensor:
            return torch.mm(rows, self.matrix, out=self.out[: len(rows)])

    class Identity(DenseOperator):
        def _apply(self, rows: Tensor) -> Tensor:
            return rows

    assert_right(top_eigenpairs(Reusing(matrix), 4, generator=generator()), matrix, values[:4], 1e-3)
    one = torch.eye(12, dtype=torch.float64)
    assert_right(top_eigenpairs(Identity(one), 3, generator=generator()), one, torch.ones(3).double(), 1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, r"k must be an integer in 1..20 \(rows of A\), got 0"),
        ({"k": 21}, "k must be an integer in 1..20"),
        ({"which": "SM"}, "which must be 'LA', 'SA', 'LM' or 'BE', got 'SM'"),
        ({"tol": 0.0}, "tol must be a finite number above 0, got 0.0"),
        ({"block_size": -1}, "block_size must be"),
        ({"max_products": 0}, "max_products must be"),
        ({"max_basis": 3, "k": 4}, r"max_basis must be at least k \+ 2 = 6, got 3"),
        ({"start": torch.zeros(3, 19).double()}, r"start must be rows \[m, 20\] with 1 <= m <= P, got \[3, 19\]"),
        ({"start": torch.full((20,), torch.nan).double()}, "start must be finite"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"top_eigenpairs: {message}"):
        top_eigenpairs(operator(torch.eye(20)), **change)


def test_refused_operators() -> None:
    with pytest.raises(TypeError, match="top_eigenpairs: A must be a LinearOperator"):
        top_eigenpairs(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A must be square with at least one row, got 2 x 3"):
        top_eigenpairs(DenseOperator(torch.ones(2, 3), is_symmetric=True))
    with pytest.raises(ValueError, match="A must be symmetric"):
        top_eigenpairs(DenseOperator(torch.ones(2, 2).triu()))
    with pytest.raises(TypeError, match=r"A must be float32 or float64, got torch.bfloat16"):
        top_eigenpairs(DenseOperator(torch.eye(3, dtype=torch.bfloat16)))
    with pytest.raises(TypeError, match=r"start must be torch.float64 on cpu, got torch.float32 on cpu"):
        top_eigenpairs(operator(torch.eye(3)), start=torch.ones(3))
    with pytest.raises(ValueError, match="A must give finite products"):
        top_eigenpairs(operator(torch.full((4, 4), torch.inf)), generator=generator())


def test_interval_over_subsets() -> None:
    """lambda_max of subsets spreads about its mean as Student's interval says."""
    base = hessian_like(80)
    parts = []
    for i in range(6):
        noise = torch.randn(80, 80, dtype=torch.float64, generator=generator(i))
        parts.append(symmetric(base) + 0.2 * (noise + noise.T))
    found = eigenvalue_interval([operator(part) for part in parts], 2, tol=1e-6, generator=generator())
    exact = torch.stack([torch.linalg.eigvalsh(part).flip(0)[:2] for part in parts])
    torch.testing.assert_close(found.values, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-6, atol=0)
    half = 2.5706 * exact.std(0) / 6**0.5  # t quantile of 5 degrees of freedom
    torch.testing.assert_close(found.high - found.mean, half, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.mean - found.low, half, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="operators must be at least 2 subsets, got 1"):
        eigenvalue_interval([operator(parts[0])])
    with pytest.raises(TypeError, match="must be a list of the same matrix on several subsets of the data, got one"):
        eigenvalue_interval(operator(parts[0]))  # type: ignore[arg-type]


def test_power_iteration_is_the_protocol() -> None:
    values = torch.cat([torch.tensor([-10.0, 8.0]), torch.linspace(1, 0, 28)]).double()
    vectors = rotation(30)
    A = operator(symmetric(values))
    found = power_iteration(A, 30, generator=generator())
    assert A.num_products == found.num_products == len(found.history) == 30
    v = torch.randn(1, 30, dtype=torch.float64, generator=generator())[0]
    for _ in range(29):
        v = A.matrix @ v / (A.matrix @ v).norm()
    assert found.value == pytest.approx(float(v @ A.matrix @ v), rel=1e-9)
    assert found.residual == pytest.approx(float((A.matrix @ v - (v @ A.matrix @ v) * v).norm()), rel=1e-6)
    assert abs(float(found.vector @ vectors[:, 0])) > 0.99  # the largest magnitude, though negative
    assert power_iteration(operator(torch.zeros(4, 4)), 3, generator=generator()).value == 0.0
    with pytest.raises(ValueError, match="num_iterations must be an integer of at least 1, got 0"):
        power_iteration(A, 0)
