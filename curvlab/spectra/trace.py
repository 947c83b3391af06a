# SPDX-License-Identifier: Apache-2.0
r"""Traces of matrices that only multiply, each with its standard error.

Hutchinson: E[z^T A z] = tr A for random signs z, of variance 2 (||A||_F^2 - sum_i A_ii^2) a probe.
Hutch++: the part of A in the span of A S is traced exactly, and only the rest is sampled.
XTrace: every test vector serves both ends, leave-one-out; the estimates of a run are exchangeable: hence its error.

Sources: Hutchinson 1989; Meyer, Musco, Musco, Woodruff 2021; Epperly, Tropp, Webber 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.lanczos import KrylovSpace

__all__ = ["MIN_PROBES", "TraceEstimate", "check_probes", "hutchinson_trace", "hutchpp_trace", "xtrace"]

MIN_PROBES = 8
"""Probes before a tolerance may stop: a standard error from fewer stops early by luck too often."""


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of tr A.

    Attributes:
        value: the estimate, in units of A.
        standard_error: its standard error over probes; NaN with a single one, 0 where nothing was left to sample.
        interval: 95 % interval by Student's t over probes.
        num_products: products A v spent.
        samples: float64 ``[n]``, what each probe gave (of Hutch++ and XTrace: the n estimates averaged).
        converged: the tolerance asked for was reached (True where none was).
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    num_products: int
    samples: Tensor
    converged: bool

    def __repr__(self) -> str:
        low, high = self.interval
        state = "" if self.converged else ", tolerance NOT reached"
        return (
            f"trace {self.value:.6g}, standard error {self.standard_error:.2g}, 95 % interval [{low:.6g}, {high:.6g}], "
            f"n = {len(self.samples)}, {self.num_products} products{state}"
        )


@torch.no_grad()
def hutchinson_trace(
    A: vec.Operator,
    num_probes: int | None = None,
    *,
    tol: float | None = None,
    max_probes: int = 1000,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceEstimate:
    r"""The trace by Hutchinson: tr A = E[z^T A z] over random signs z, n probes, standard error sd / sqrt(n).

    Args:
        A: square operator ``[P, P]``.
        num_probes: n; default 32 where no ``tol`` is given.
        tol: instead of ``num_probes``: stop when the standard error is at most tol |estimate| (after at least 8
            probes), or at ``max_probes``.
        max_probes: see ``tol``.
        block_size: probes multiplied at once; default 8, fewer where 8 vectors pass 1 GiB.
        generator: of the probes (on the operator's device or the host).
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: both or bad num_probes and tol; products not finite.
    """
    size = vec.check_operator("hutchinson_trace", A)
    target = check_probes("hutchinson_trace", num_probes, tol, max_probes, block_size)
    samples: list[float] = []
    with vec.progress_bar(progress, "trace", target) as show:
        for count in vec.probe_blocks(target, size, A.dtype.itemsize, block_size):
            probes = vec.draw_signs(A, count, generator)
            samples += vec.inner_products(probes, A.apply_rows(probes)).tolist()
            show(len(samples), "")
            if tol is not None and len(samples) >= MIN_PROBES and _reached(samples, tol):
                break
    return _estimate("hutchinson_trace", samples, len(samples), tol)


@torch.no_grad()
def hutchpp_trace(
    A: vec.Operator,
    num_products: int = 48,
    *,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceEstimate:
    r"""The trace by Hutch++: tr(Q^T A Q) + E[g^T A g], Q a basis of A S, g = (1 - Q Q^T) z, random signs S and z.

    A third of the products each for A S, A Q and A g. Exact where A has rank num_products / 3 or less; the standard
    error, that of the sampled part, falls like 1 / num_products for a PSD matrix rather than its square root.

    Args:
        A: square operator ``[P, P]``.
        num_products: products to spend, >= 6; where P is a third of it or less, P products give the exact trace.
        block_size: vectors multiplied at once, see :func:`hutchinson_trace`. Memory: num_products / 3 vectors more.
        generator: of the random signs.
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: num_products below 6; products not finite.
    """
    size = vec.check_operator("hutchpp_trace", A)
    if not isinstance(num_products, int) or num_products < 6:
        raise ValueError(f"hutchpp_trace: num_products must be an integer of at least 6, got {num_products!r}")
    vec.check_positive("hutchpp_trace", block_size=block_size)
    third = min(num_products // 3, size)
    space = KrylovSpace(third, size, dtype=A.dtype, device=A.device)
    spent = 0
    with vec.progress_bar(progress, "trace", num_products) as show:
        if third == size:  # no room for a square matrix of signs that is singular, as half of those of 2 x 2 are
            space.add(torch.eye(size, dtype=A.dtype, device=A.device))
        for count in () if third == size else vec.probe_blocks(third, size, A.dtype.itemsize, block_size):
            space.add(A.apply_rows(vec.draw_signs(A, count, generator)))
            spent += count
            show(spent, "")
        basis = space.rows[: space.num_rows]
        inside = 0.0
        for part in _blocks(basis, block_size):
            inside += float(vec.inner_products(part, A.apply_rows(part)).sum())
            spent += len(part)
            show(spent, "")
        samples: list[float] = []
        for count in vec.probe_blocks(num_products - spent, size, A.dtype.itemsize, block_size):
            if len(basis) == size:
                break
            probes = vec.draw_signs(A, count, generator)
            vec.subtract_rows(probes, vec.row_dots(basis, probes).T, basis)
            samples += vec.inner_products(probes, A.apply_rows(probes)).tolist()
            spent += count
            show(spent, "")
    return _estimate("hutchpp_trace", [inside + sample for sample in samples] or [inside] * 2, spent, None)


@torch.no_grad()
def xtrace(
    A: vec.Operator,
    num_products: int = 48,
    *,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceEstimate:
    r"""The trace by XTrace: the mean of n = num_products / 2 leave-one-out estimates, with normalized vectors.

    With omega_i uniform on the sphere of radius sqrt(P), Y = A Omega, and Q_(i) an orthonormal basis of Y without
    column i,

        t_i = tr(Q_(i)^T A Q_(i)) + s_i  mu_i^T (A mu_i),   mu_i = (1 - Q_(i) Q_(i)^T) omega_i,
        s_i = (P - n + 1) / ||mu_i||^2,

    all from the products A Omega and A Q. Unbiased; standard error sqrt(sum_i (t_i - mean)^2 / (n (n - 1))).

    Args:
        A: square operator ``[P, P]``.
        num_products: products to spend, an even number >= 4, at most P.
        block_size: vectors multiplied at once, see :func:`hutchinson_trace`. Memory: 1.5 num_products vectors more.
        generator: of the test vectors.
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: num_products odd, below 4 or above P; products not finite.
    """
    size = vec.check_operator("xtrace", A)
    if not isinstance(num_products, int) or num_products < 4 or num_products % 2 or num_products > size:
        raise ValueError(f"xtrace: num_products must be an even integer in 4..{size}, got {num_products!r}")
    vec.check_positive("xtrace", block_size=block_size)
    n = num_products // 2
    tests = vec.draw_normal(A, n, generator)
    lengths = vec.inner_products(tests, tests).sqrt()
    tests.mul_((math.sqrt(size) / lengths).to(tests)[:, None])
    with vec.progress_bar(progress, "trace", num_products) as show:
        images = _apply(A, tests, block_size)
        show(n, "")
        space = KrylovSpace(n, size, dtype=A.dtype, device=A.device)
        space.add(images)
        basis = space.rows[: space.num_rows]
        products = _apply(A, basis, block_size)
        show(n + len(basis), "")
    R, W = vec.row_dots(basis, images), vec.row_dots(basis, tests)
    H, HW = vec.row_dots(basis, products), vec.row_dots(products, tests)
    own = vec.inner_products(tests, images).numpy()
    estimates = [_leave_one_out(i, R, W, H, HW, float(own[i]), size) for i in range(n)]
    return _estimate("xtrace", estimates, n + len(basis), None)


def _leave_one_out(i: int, R: np.ndarray, W: np.ndarray, H: np.ndarray, HW: np.ndarray, own: float, size: int) -> float:
    """t_i from R = Q^T A Omega, W = Q^T Omega, H = Q^T A Q, HW = (A Q)^T Omega and own = omega_i^T A omega_i."""
    # The span of the other columns of R, in coordinates of Q: everything of A that enters is known in those.
    others = np.linalg.svd(np.delete(R, i, axis=1), full_matrices=False)
    inner = others[0][:, others[1] > 1e-7 * max(others[1].max(initial=0.0), 1e-300)]
    share = inner.T @ W[:, i]
    inside = float(np.trace(inner.T @ H @ inner))
    # mu^T A mu with mu = omega - Q inner share; omega^T A Q and Q^T A omega differ where A is not symmetric
    across = float(share @ (inner.T @ (HW[:, i] + R[:, i])))
    rest = own - across + float(share @ (inner.T @ H @ inner) @ share)
    left = size - float(share @ share)
    if inner.shape[1] == size or left <= 0:
        return inside
    return inside + (size - inner.shape[1]) / left * rest


def _apply(A: vec.Operator, rows: Tensor, block_size: int | None) -> Tensor:
    out = torch.empty_like(rows)
    done = 0
    for part in _blocks(rows, block_size):
        out[done : done + len(part)] = A.apply_rows(part)
        done += len(part)
    return out


def _blocks(rows: Tensor, block_size: int | None) -> Sequence[Tensor]:
    sizes = list(vec.probe_blocks(len(rows), rows.shape[1], rows.element_size(), block_size))
    return rows.split(sizes) if sizes else ()


def check_probes(owner: str, num_probes: int | None, tol: float | None, max_probes: int, block_size: int | None) -> int:
    """Probes to draw at most: ``num_probes`` (32 where none is given), or ``max_probes`` under a tolerance.

    Raises:
        ValueError: both num_probes and tol; one of the arguments out of range.
    """
    if num_probes is not None and tol is not None:
        raise ValueError(f"{owner}: num_probes must be None where tol is given, got {num_probes} and tol {tol}")
    for name, value in (("num_probes", num_probes), ("max_probes", max_probes), ("block_size", block_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{owner}: {name} must be an integer of at least 1, got {value!r}")
    vec.check_positive(owner, tol=tol)
    return max_probes if tol is not None else num_probes or 32


def _reached(samples: Sequence[float], tol: float) -> bool:
    mean, error = _mean_and_error(samples)
    return error <= tol * abs(mean)


def _mean_and_error(samples: Sequence[float]) -> tuple[float, float]:
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((sample - mean) ** 2 for sample in samples) / (n * (n - 1)))


def _estimate(owner: str, samples: Sequence[float], num_products: int, tol: float | None) -> TraceEstimate:
    mean, error = _mean_and_error(samples)
    if not math.isfinite(mean):
        raise ValueError(f"{owner}: A must give finite products, got an infinity or NaN")
    half = vec.student_quantile(len(samples) - 1) * error if len(samples) > 1 else math.nan
    interval = (mean - half, mean + half)
    reached = tol is None or error <= tol * abs(mean)
    return TraceEstimate(mean, error, interval, num_products, torch.tensor(samples, dtype=torch.float64), reached)
