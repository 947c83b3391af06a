# SPDX-License-Identifier: Apache-2.0
"""The invariants of a Krylov space, against dense float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlab.operators.base import DenseOperator
from curvlab.spectra import lanczos
from curvlab.spectra.lanczos import KrylovSpace
from tests.spectra.known import DTYPES, generator, hessian_like, operator, symmetric

CPU = torch.device("cpu")


def space_of(matrix: Tensor, rows: int, capacity: int, dtype: torch.dtype, seed: int = 0) -> KrylovSpace:
    space = KrylovSpace(capacity, len(matrix), dtype=dtype, device=CPU)
    assert space.add(torch.randn(rows, len(matrix), generator=generator(seed)).to(dtype)) == rows
    return space


def assert_consistent(space: KrylovSpace, matrix: Tensor) -> None:
    """Orthonormal rows, A X = X N with N as projection and couplings say."""
    eps = torch.finfo(space.rows.dtype).eps
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    rows = space.rows[: space.num_rows].double()
    assert (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max() < 50 * eps
    projection, couplings = (torch.from_numpy(part) for part in space.projection())
    m = space.num_multiplied
    exact = rows[:m] @ matrix @ rows[:m].T
    assert (projection - exact).abs().max() < 50 * eps * scale
    relation = torch.cat([projection, couplings])
    assert (rows[:m] @ matrix - relation.T @ rows).norm(dim=1).max() < 100 * eps * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("top", [10.0, 1e5])
def test_relation_holds_through_steps_and_restarts(top: float, block: int, dtype: torch.dtype) -> None:
    """An outlier 1e5 times the bulk's width amplifies rounding by 1e5 a step: the panel must give way to it."""
    matrix = symmetric(hessian_like(200, top=top))
    A = operator(matrix, dtype)
    space = space_of(matrix, block, 60, dtype)
    for _ in range(3):
        while space.num_multiplied + block <= 30 and space.num_candidates:
            space.multiply(A, min(block, space.num_candidates))
        space.clean()
        assert_consistent(space, matrix)
        values, columns, residuals = space.ritz()
        v = space.combine(columns).double()
        want = (v @ matrix - torch.from_numpy(values)[:, None] * v).norm(dim=1)
        rounding = 200 * torch.finfo(dtype).eps * top
        torch.testing.assert_close(torch.from_numpy(residuals), want, rtol=1e-3, atol=rounding)
        space.restart(values[-8:], columns[:, -8:])
        assert space.num_multiplied == 8
        assert_consistent(space, matrix)


@pytest.mark.parametrize("panel", [1, 2, 4])
def test_panels_of_any_length_agree(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay loses nothing: the same Ritz values whatever the panel, while in between orthogonality is lost."""
    monkeypatch.setattr(KrylovSpace, "_follow", lambda self, loss: lost.append(loss))
    lost: list[float] = []
    matrix = symmetric(hessian_like(200))
    A = operator(matrix, torch.float32)
    space = space_of(matrix, 1, 41, torch.float32)
    space._panel = panel
    for _ in range(40):
        space.multiply(A)
    space.clean()
    assert_consistent(space, matrix)
    single = space_of(matrix, 1, 41, torch.float64)
    B = operator(matrix)
    for _ in range(40):
        single.multiply(B)
    np.testing.assert_allclose(space.ritz()[0][-10:], single.ritz()[0][-10:], rtol=2e-6)
    if panel == 4:
        assert max(lost) > 1e-3


def test_estimates_before_cleaning_are_close() -> None:
    matrix = symmetric(hessian_like(200))
    A = operator(matrix)
    space = space_of(matrix, 1, 20, torch.float64)
    while space.is_clean or space.num_multiplied < 9:
        space.multiply(A)
    before = space.ritz()
    space.clean()
    after = space.ritz()
    np.testing.assert_allclose(before[0], after[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(before[2], after[2], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dependent_rows_are_dropped(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 40, generator=generator()).to(dtype)
    block = torch.cat([rows, rows[:1] + rows[1:2], torch.zeros(1, 40, dtype=dtype), 1e-5 * rows[2:]])
    space = KrylovSpace(9, 40, dtype=dtype, device=CPU)
    assert space.add(block) == 3
    assert space.add(rows[:2] + rows[2]) == 0
    got = space.rows[:3].double()
    assert (got @ got.T - torch.eye(3, dtype=torch.float64)).abs().max() < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_nearly_dependent_rows_become_orthonormal(angle: float, dtype: torch.dtype) -> None:
    """Gram matrices square the condition: one pass would leave eps / angle^2 of orthogonality."""
    rows = torch.randn(4, 500, generator=generator()).to(dtype)
    rows[1] = rows[0] + angle * rows[1]
    rows[3] = rows[2] + angle * rows[3]
    space = KrylovSpace(4, 500, dtype=dtype, device=CPU)
    assert space.add(rows) == 4
    got = space.rows[:4].double()
    assert (got @ got.T - torch.eye(4, dtype=torch.float64)).abs().max() < 50 * torch.finfo(dtype).eps
    want = torch.linalg.qr(rows.double().T)[0].T
    assert ((got @ want.T).abs().diagonal() > 1 - 1e-4).all()


def test_invariant_subspaces_end_the_recurrence() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    A = operator(matrix)
    space = space_of(matrix, 1, 6, torch.float64)
    for _ in range(3):
        space.multiply(A)
    assert space.num_candidates == 0 and space.num_rows == 3
    np.testing.assert_allclose(space.ritz()[0], [0, 1, 3], atol=1e-12)
    assert (space.ritz()[2] < 1e-12).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
def test_a_single_first_row_is_only_scaled(size: float) -> None:
    row = size * torch.randn(1, 500, generator=generator())
    space = KrylovSpace(3, 500, dtype=torch.float32, device=CPU)
    assert space.add(row) == 1 and space.is_clean
    torch.testing.assert_close(space.rows[:1], row / row.double().norm().float(), rtol=1e-6, atol=0)
    assert space.add(row) == 0
    assert KrylovSpace(3, 500, dtype=torch.float32, device=CPU).add(0 * row) == 0


def test_panel_length_follows_the_loss() -> None:
    space = KrylovSpace(4, 10, dtype=torch.float32, device=CPU)
    lengths = []
    for loss in (1e-6, 3e-5, 1e-7, 1e-6, 1e-7, 1e-3, 0.1, 0.1, 0.1, 0.1, 1e-4):
        space._follow(loss)
        lengths.append(space._panel)
    assert lengths == [2, 4, 8, 8, 8, 8, 4, 2, 1, 1, 1]
    assert lanczos.MAX_PANEL == 8


@pytest.mark.parametrize(("noise", "least", "most"), [(3e-3, 4, 8), (0.3, 1, 4)])
def test_panels_of_noisy_products_follow_what_they_lose(noise: float, least: int, most: int) -> None:
    """The bound of the loss is pessimistic where noise points anywhere; the relation holds whatever was lost."""
    matrix = symmetric(hessian_like(600, top=3.0)).float()

    class Noisy(DenseOperator):
        def _apply(self, rows: Tensor) -> Tensor:
            product = rows @ self.matrix.T
            drawn = torch.randn(rows.shape, generator=generator(int(self.num_products)))
            return product + noise * product.norm(dim=1, keepdim=True) * drawn / rows.shape[1] ** 0.5

    space = KrylovSpace(40, 600, dtype=torch.float32, device=CPU)
    space.add(torch.randn(1, 600, generator=generator()))
    space.noise, panels, before = max(1e-2, noise), [], 1
    A = Noisy(matrix, is_symmetric=True)
    for _ in range(30):
        space.multiply(A)
        if space.is_clean:
            panels.append(space.num_rows - before)
            before = space.num_rows
    assert least <= max(panels) <= most, panels
    space.clean()
    rows = space.rows[: space.num_rows].double()
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-5
    relation = torch.from_numpy(space._relation[: space.num_rows, : space.num_multiplied])
    off = rows[: space.num_multiplied] @ matrix.double() - relation.T @ rows
    assert off.norm(dim=1).max() <= 3 * noise * 3.0
