# SPDX-License-Identifier: Apache-2.0
r"""Eigenpairs at the ends of the spectrum by thick-restart block Lanczos, each with its residual and an error bound.

A pair (theta, v), ||v|| = 1, counts as found when ||A v - theta v|| <= tol |theta| (or only rounding is left).  For a
symmetric A there is then an eigenvalue within ||A v - theta v|| of theta, and within ||A v - theta v||^2 / gap where no
other eigenvalue lies within gap of theta (Kato and Temple; Parlett 1998, section 11.7).

What costs is products. Every product enlarges one Krylov space, convergence is tested after every product from
quantities at hand, and the last product of all tests the found pairs in truth: A applied to one random combination.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.mixed_search import MixedSearch
from curvlab.spectra.search import Search

__all__ = ["Eigenpairs", "EigenvalueInterval", "eigenvalue_interval", "top_eigenpairs"]

Which = Literal["LA", "SA", "LM", "BE"]

ADMIXTURE = 0.1
"""Share of a warm start for what is not known: free after 50 training steps, half a product more where k is 1."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator. ``values, vectors = pairs.values, pairs.vectors``; ``A v_i ~ values_i v_i``.

    Attributes:
        values: float64 ``[k]`` on the host, in the order asked for.
        vectors: orthonormal rows ``[k, P]`` of the operator's dtype and device: eigenvector i is ``vectors[i]``.
        residuals: float64 ``[k]``, ||A v_i - values_i v_i||, in units of A.
        error_bounds: float64 ``[k]``: some eigenvalue lies within this of values_i; the smaller of the residual and
            residual^2 / gap, with the gap as far as the space searched shows it, and never below rounding.
        num_products: products A v spent, tests included.
        num_rounded: further products spent with the operator's ``rounded()`` twin.
        converged: every residual is at most tol |value|, or rounding.
        guard: rows ``[g, P]``: the next best Ritz vector of the space at each end searched, not converged. A later
            search that is given these pairs as ``start`` sees by it what may have overtaken them.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    error_bounds: Tensor
    num_products: int
    converged: bool
    guard: Tensor | None = None
    num_rounded: int = 0

    def __repr__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        low = f" and {self.num_rounded} in lower precision" if self.num_rounded else ""
        lines = [f"{len(self)} eigenpairs, {self.num_products} products{low}, {state}"]
        for value, residual, bound in zip(self.values, self.residuals, self.error_bounds, strict=True):
            lines.append(f"  {value:.6g}  (residual {residual:.1e}, an eigenvalue within {bound:.1e})")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.values)


@torch.no_grad()
def top_eigenpairs(
    A: vec.Operator,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    start: Tensor | Eigenpairs | None = None,
    block_size: int | None = None,
    max_products: int | None = None,
    max_basis: int | None = None,
    verify: bool = True,
    rounded: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""The k eigenpairs at an end of the spectrum of a symmetric operator, to ||A v - theta v|| <= tol |theta|.

    One Krylov space from one vector finds an eigenvalue of multiplicity q once until its other copies grow from
    rounding or a restart; ``block_size`` of at least q finds them together.

    Args:
        A: symmetric operator ``[P, P]``.
        k: how many pairs, 1 <= k <= P.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest in magnitude; ``"BE"`` both ends, of which the
            upper has one more for odd k. Order: descending, ascending, descending magnitude, descending.
        tol: relative residual asked for, > 0.
        start: pairs found earlier, or rows ``[m, P]``, m >= 1: after one training step they save a third of the
            products of five pairs, of one pair about half. After 50 steps it depends on how far the vectors turned: of
            the new ones the old five hold 0.99 in an MLP (a fifth saved), 0.7 to 0.8 in a CNN (a fifth), 0.45 to 0.7
            in a ResNet-20 (nothing). Their sum starts the space (with ``block_size`` b, b sums), each pair with weight
            1/|value|, plus a tenth of the guard and of a random vector; a search of their span as a block of its own
            takes more products than one from a random vector, and a sum of 10 to 60 old Ritz vectors, which hold 0.8
            of the new ones, saved none beside that of five. Rows alone have no guard: an eigenvalue that overtook
            theirs in a direction that they do not hold can then be missed.
        block_size: vectors multiplied at once; default 1, which costs the fewest products.
        max_products: products to spend at most (tests included); default max(300, 30 k).
        max_basis: vectors kept at most, P elements each; default max(3 k, k + 40). With lower precision, k more come
            whenever the pairs are multiplied by A: once as a rule, up to four times.
        verify: spend one product on a random combination of the pairs found. What it shows beyond the recurrence
            is added to all residuals; where that decides, k products give each pair its own. False: residuals are
            those of the recurrence, which rounding of A does not enter.
        rounded: let the space grow by products in lower precision where the operator offers them (``A.rounded()`` is
            not None) and one vector is multiplied at a time: what they find is multiplied by A itself and put right.
            Residuals and the tolerance are those of A either way.
        generator: for the first vector (on the operator's device or the host). All processes of a group take what
            the first one draws.
        progress: show a bar.

    Returns:
        The pairs; ``converged`` is False when products ran out first, and the residuals say how far it came.

    Raises:
        TypeError: A is no operator, or not float32 or float64; start is of another dtype or device.
        ValueError: k, which, tol, block_size, max_products, max_basis or start out of range; products not finite.
    """
    size = vec.check_operator("top_eigenpairs", A, symmetric=True)
    _check_arguments(size, k, which, tol, block_size, max_products, max_basis)
    block = min(block_size or 1, size)
    rows = _start_rows(A, start, block, generator)
    budget = max_products or max(300, 30 * k)
    basis = max_basis or max(3 * k, k + 40)
    twin = getattr(A, "rounded", None)
    low = twin() if twin and rounded and block == 1 and MixedSearch.serves(A.shape[0], k, tol, basis) else None
    search = Search(A, k, which, tol, block, generator)
    if low is not None:
        search = MixedSearch(A, low, k, which, tol, generator)
    search.open(rows, basis)
    with vec.progress_bar(progress, "eigenpairs", budget) as show:
        while not search.finished(budget - int(verify)):
            search.step(budget - int(verify) - search.spent)
            show(search.spent, search.remark())
        found = search.close(verify, budget)
    host = [torch.from_numpy(np.ascontiguousarray(a)) for a in (found.values, found.residuals, found.bounds)]
    return Eigenpairs(
        host[0],
        found.vectors,
        host[1],
        host[2],
        search.num_products,
        found.converged,
        found.guard,
        search.spent - search.num_products,
    )


def _check_arguments(
    size: int,
    k: int,
    which: str,
    tol: float,
    block_size: int | None,
    max_products: int | None,
    max_basis: int | None,
) -> None:
    if not isinstance(k, int) or not 1 <= k <= size:
        raise ValueError(f"top_eigenpairs: k must be an integer in 1..{size} (rows of A), got {k!r}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"top_eigenpairs: which must be 'LA', 'SA', 'LM' or 'BE', got {which!r}")
    vec.check_positive("top_eigenpairs", tol=tol, block_size=block_size, max_products=max_products, max_basis=max_basis)
    if max_basis is not None and max_basis < min(k + 2, size):
        raise ValueError(f"top_eigenpairs: max_basis must be at least k + 2 = {k + 2}, got {max_basis}")


def _start_rows(
    A: vec.Operator, start: Tensor | Eigenpairs | None, block: int, generator: torch.Generator | None
) -> Tensor:
    """The first block: random, or sums of the given rows, row i in sum i mod block, each with a little of all else."""
    if start is None:
        return vec.draw_normal(A, block, generator)
    weights, guard = None, None
    if isinstance(start, Eigenpairs):
        sizes = start.values.abs().numpy()
        # Residuals are relative to the value: of a small one its noise, the same for all, must be the smaller part.
        sizes = np.maximum(sizes, max(0.01 * sizes.max(), 1e-300))
        weights, guard, start = sizes.min() / sizes, start.guard, start.vectors
    rows = start[None] if start.ndim == 1 else start
    if rows.ndim != 2 or rows.shape[1] != A.shape[0] or not 1 <= len(rows) <= A.shape[0]:
        raise ValueError(
            f"top_eigenpairs: start must be rows [m, {A.shape[0]}] with 1 <= m <= P, got {list(start.shape)}"
        )
    if rows.dtype != A.dtype or rows.device != A.device:
        raise TypeError(f"top_eigenpairs: start must be {A.dtype} on {A.device}, got {rows.dtype} on {rows.device}")
    if weights is None:  # those of pairs have length 1
        norms = vec.inner_products(rows, rows).sqrt()
        weights = 1 / np.maximum(_finite(norms).numpy(), torch.finfo(A.dtype).tiny)
    # The guard is added by itself: joined to the vectors, all of them would be copied.
    guards = 0 if guard is None else len(guard)
    total = len(rows) + guards
    count = min(block, total)
    shares = np.eye(count)[:, np.arange(total) % count] * np.append(weights, [ADMIXTURE] * guards)
    sums = vec.combine_rows(shares[:, : len(rows)], rows)
    if guard is not None:
        vec.subtract_rows(sums, -shares[:, len(rows) :], guard)
    _finite(vec.inner_products(sums, sums))
    noise = vec.draw_normal(A, count, generator)
    return sums.add_(noise, alpha=ADMIXTURE / math.sqrt(A.shape[0]))


def _finite(norms: Tensor) -> Tensor:
    """The norms of a start, when they are finite."""
    if not norms.isfinite().all():
        raise ValueError("top_eigenpairs: start must be finite, got an infinity or NaN")
    return norms


@dataclass(frozen=True)
class EigenvalueInterval:
    """Leading eigenvalues over data subsets: how far the data decide them.

    Attributes:
        values: float64 ``[n, k]``, of every subset.
        mean: float64 ``[k]``.
        low: float64 ``[k]``, end of the 95 % interval of the mean by Student's t over subsets.
        high: float64 ``[k]``.
        num_products: products spent on all subsets together.
    """

    values: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    num_products: int


def eigenvalue_interval(
    operators: Sequence[vec.Operator],
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> EigenvalueInterval:
    """Leading eigenvalues of the same matrix on n >= 2 disjoint subsets of the data, with a 95 % interval of the mean.

    The largest eigenvalue is convex in the matrix, so the mean over subsets is above that of all data (Jensen); the
    interval is of the former, its width what a data set of that size leaves open. Every subset starts from the
    eigenvectors of the one before.

    Args:
        operators: one a subset, ``[HessianOperator(Problem(model, loss, (x[i::n], y[i::n]))) for i in range(n)]``.
        k: how many eigenvalues.
        which: as in :func:`top_eigenpairs`.
        tol: as in :func:`top_eigenpairs`.
        generator: of the first subset's start.

    Raises:
        TypeError: one operator and no list of them.
        ValueError: fewer than two operators, or a subset did not converge.
    """
    if not isinstance(operators, Iterable):
        raise TypeError(
            "eigenvalue_interval: operators must be a list of the same matrix on several subsets of the data, got one "
            f"{type(operators).__name__}"
        )
    operators = list(operators)
    if len(operators) < 2:
        raise ValueError(f"eigenvalue_interval: operators must be at least 2 subsets, got {len(operators)}")
    found, start, products = [], None, 0
    for i, operator in enumerate(operators):
        pairs = top_eigenpairs(operator, k, which=which, tol=tol, start=start, generator=generator)
        if not pairs.converged:
            raise ValueError(f"eigenvalue_interval: operators must converge, got {i} unconverged after "
                             f"{pairs.num_products} products (residuals {pairs.residuals.tolist()})")  # fmt: skip
        found.append(pairs.values)
        start, products = pairs, products + pairs.num_products
    values = torch.stack(found)
    mean = values.mean(0)
    half = vec.student_quantile(len(values) - 1) * values.std(0) / math.sqrt(len(values))
    return EigenvalueInterval(values, mean, mean - half, mean + half, products)
