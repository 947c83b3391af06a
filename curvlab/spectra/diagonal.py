# SPDX-License-Identifier: Apache-2.0
r"""The diagonal of a matrix that only multiplies, each entry with its standard error.

Over random signs z, E[z_i (A z)_i] = A_ii, of variance sum_{j != i} A_ij^2 a probe (``A`` symmetric or not).
Source: Bekas, Kokiopoulou, Saad 2007; with signs its denominators are 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.trace import MIN_PROBES, check_probes

__all__ = ["DiagonalEstimate", "diagonal"]


@dataclass(frozen=True)
class DiagonalEstimate:
    """An estimate of the diagonal of A.

    Attributes:
        value: ``[P]``, of the operator's dtype and device.
        standard_error: ``[P]``, of each entry over probes; NaN with a single one.
        relative_error: ||standard_error|| / ||value||: about the relative error of the diagonal as a vector.
        num_products: products A v spent.
        converged: the tolerance asked for was reached (True where none was).
    """

    value: Tensor
    standard_error: Tensor
    relative_error: float
    num_products: int
    converged: bool

    def __repr__(self) -> str:
        state = "" if self.converged else ", tolerance NOT reached"
        return (
            f"diagonal of {len(self.value)} entries, relative error {self.relative_error:.2g}, "
            f"{self.num_products} products{state}"
        )


@torch.no_grad()
def diagonal(
    A: vec.Operator,
    num_probes: int | None = None,
    *,
    tol: float | None = None,
    max_probes: int = 1000,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> DiagonalEstimate:
    r"""A_ii = E[z_i (A z)_i] over n probes of random signs, with standard errors sd_i / sqrt(n).

    Args:
        A: square operator ``[P, P]``.
        num_probes: n; default 32 where no ``tol`` is given.
        tol: instead of ``num_probes``: stop when ||standard_error|| <= tol ||value|| (after at least 8 probes), or at
            ``max_probes``.
        max_probes: see ``tol``.
        block_size: probes multiplied at once; default 8, fewer where 8 vectors pass 1 GiB.
        generator: of the probes (on the operator's device or the host).
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: both or bad num_probes and tol; products not finite.
    """
    size = vec.check_operator("diagonal", A)
    target = check_probes("diagonal", num_probes, tol, max_probes, block_size)
    mean = torch.zeros(size, dtype=A.dtype, device=A.device)
    squares = torch.zeros_like(mean)  # sum of squared deviations, updated block by block (Chan, Golub, LeVeque 1983)
    done, relative = 0, math.inf
    with vec.progress_bar(progress, "diagonal", target) as show:
        for count in vec.probe_blocks(target, size, A.dtype.itemsize, block_size):
            probes = vec.draw_signs(A, count, generator)
            values = probes.mul_(A.apply_rows(probes))
            block_mean = values.mean(0)
            values.sub_(block_mean)
            shift = block_mean.sub_(mean)
            squares.add_(values.square_().sum(0)).addcmul_(shift, shift, value=done * count / (done + count))
            mean.add_(shift, alpha=count / (done + count))
            done += count
            relative = _relative_error(mean, squares, done)
            show(done, "")
            if tol is not None and done >= MIN_PROBES and relative <= tol:
                break
    if not mean.isfinite().all():
        raise ValueError("diagonal: A must give finite products, got an infinity or NaN")
    error = torch.sqrt(squares / (done * (done - 1))) if done > 1 else torch.full_like(mean, math.nan)
    return DiagonalEstimate(mean, error, relative, done, tol is None or relative <= tol)


def _relative_error(mean: Tensor, squares: Tensor, done: int) -> float:
    if done == 1:
        return math.nan
    norm = math.sqrt(vec.inner_products(mean[None], mean[None]).item())
    error = math.sqrt(float(squares.sum(dtype=torch.float64)) / (done * (done - 1)))
    return error / norm if norm > 0 else (0.0 if error == 0 else math.inf)
