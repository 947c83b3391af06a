# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from curvlab.spectra import vectors as vec
from tests.spectra.known import DTYPES, generator

CPU = torch.device("cpu")
SIZES = [1, 7, 1000, vec.BLOCK, 4 * vec.BLOCK + 3]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def tolerance(dtype: torch.dtype, size: int) -> dict:
    return {"rtol": 0, "atol": 60 * torch.finfo(dtype).eps * max(1, size) ** 0.5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("m", [0, 1, 13, 40])
@pytest.mark.parametrize("size", SIZES)
def test_passes_over_a_basis(size: int, m: int, b: int, dtype: torch.dtype) -> None:
    # Rows of a wider buffer, as in lockstep runs: the column stride is 1, the row stride is not the width.
    basis, rows = random(m, 2, size, dtype=dtype)[:, 1], random(b, size, dtype=dtype, seed=1)
    exact = basis.double() @ rows.double().T
    got = torch.from_numpy(vec.row_dots(basis, rows))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, **tolerance(dtype, size))
    coefficients = random(b, m, seed=2).numpy()
    want = rows.double() - torch.from_numpy(coefficients) @ basis.double()
    changed = rows.clone()
    vec.subtract_rows(changed, coefficients, basis)
    torch.testing.assert_close(changed.double(), want, **tolerance(dtype, m))

    change = random(b, b, seed=3).numpy()
    want = torch.from_numpy(change) @ rows.double() - torch.from_numpy(coefficients) @ basis.double()
    changed = rows.clone()
    vec.transform_rows(changed, change, coefficients, basis)
    torch.testing.assert_close(changed.double(), want, **tolerance(dtype, 20 * m + 20))

    scale, out = random(b, seed=4).numpy(), torch.empty_like(rows)
    want = torch.from_numpy(scale)[:, None] * rows.double() - torch.from_numpy(coefficients) @ basis.double()
    squares = vec.recur(rows, scale, coefficients, basis, out)
    torch.testing.assert_close(out.double(), want, **tolerance(dtype, m))
    torch.testing.assert_close(torch.from_numpy(squares), out.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_combine_over_its_own_rows(size: int) -> None:
    basis = random(9, size)
    coefficients = random(4, 9, seed=1).numpy()
    want = torch.from_numpy(coefficients) @ basis
    torch.testing.assert_close(vec.combine_rows(coefficients, basis), want)
    vec.combine_rows(coefficients, basis, out=basis[:4])
    torch.testing.assert_close(basis[:4], want)


def test_inner_products_keep_digits_of_constant_data() -> None:
    """A running float32 sum of 2e6 equal terms would be off by 1e-2; blocks summed in float64 by 1e-5."""
    rows = torch.full((2, 2_000_003), 0.1)
    got = vec.inner_products(rows, 3 * rows)
    want = 2_000_003 * float(rows[0, 0]) * float((3 * rows)[0, 0])
    torch.testing.assert_close(got, torch.full((2,), want, dtype=torch.float64), rtol=1e-5, atol=0)
    assert vec.row_dots(rows, rows)[0, 1] == pytest.approx(want / 3, rel=2e-5)


@pytest.mark.parametrize("size", [1, 8, 13, 4096])
def test_random_signs_are_fair_and_independent(size: int) -> None:
    signs = vec.random_signs(4000, size, dtype=torch.float32, device=CPU, generator=generator(1))
    assert signs.shape == (4000, size) and signs.is_contiguous()
    assert signs.abs().eq(1).all()
    assert abs(float(signs.mean())) < 5 / signs.numel() ** 0.5
    bits = signs[:, : min(size, 64)]
    assert (bits.mean(0).abs() < 5 / 4000**0.5).all()  # every bit of a drawn word, its highest too
    gram = bits.T @ bits / 4000 - torch.eye(bits.shape[1])
    assert (gram.abs() < 6 / 4000**0.5).all()


def test_random_signs_follow_the_generator() -> None:
    draw = [vec.random_signs(2, 100, dtype=torch.float64, device=CPU, generator=generator(s)) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 9, 30, 101, 5000])
def test_student_quantiles(dof: int) -> None:
    assert vec.student_quantile(dof) == pytest.approx(float(stats.t.ppf(0.975, dof)), rel=1e-9)
    assert vec.student_quantile(dof, 0.8) == pytest.approx(float(stats.t.ppf(0.8, dof)), rel=1e-9)


def test_probe_blocks_add_up() -> None:
    assert list(vec.probe_blocks(20, 10, 4, None)) == [8, 8, 4]
    assert list(vec.probe_blocks(5, 10, 4, 2)) == [2, 2, 1]
    assert set(vec.probe_blocks(5, 1 << 28, 4, None)) == {1}  # 1 GiB a vector
    assert list(vec.probe_blocks(0, 10, 4, None)) == []


def test_progress_is_silent_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (False, True):
        with vec.progress_bar(show, "trace", 3) as update:
            update(3, "done")
    assert np.isfinite(len(capsys.readouterr().out))
