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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.lanczos import KrylovSpace

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

    def __repr__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        lines = [f"{len(self)} eigenpairs, {self.num_products} products, {state}"]
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
        start: pairs found earlier, or rows ``[m, P]``, m >= 1: after 50 training steps they save a seventh to a
            quarter of the products of five pairs, after one a third; of one pair about half. Their sum starts the
            space (with ``block_size`` b, b sums), each pair with weight 1/|value|, plus a tenth of the guard and of a
            random vector; a search of their span as a block of its own takes more products than one from a random
            vector. Rows alone have no guard: an eigenvalue that overtook theirs in a direction that they do not hold
            can then be missed.
        block_size: vectors multiplied at once; default 1, which costs the fewest products.
        max_products: products to spend at most (tests included); default max(300, 30 k).
        max_basis: vectors kept at most, P elements each; default max(3 k, k + 40).
        verify: spend one product on a random combination of the pairs found. What it shows beyond the recurrence
            is added to all residuals; where that decides, k products give each pair its own. False: residuals are
            those of the recurrence, which rounding of A does not enter.
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
    search = _Search(A, k, which, tol, block, generator)
    search.open(rows, max_basis or max(3 * k, k + 40))
    with vec.progress_bar(progress, "eigenpairs", budget) as show:
        while not search.finished(budget - int(verify)):
            search.step(budget - int(verify) - search.num_products)
            show(search.num_products, search.remark())
        return search.close(verify, budget)


class _Search:
    """One run: the Krylov space, what is wanted of it, and the products spent."""

    def __init__(
        self, A: vec.Operator, k: int, which: str, tol: float, block: int, generator: torch.Generator | None
    ) -> None:
        self.A, self.k, self.which, self.tol, self.block, self.generator = A, k, which, tol, block, generator
        self.size = A.shape[0]
        self.num_products = 0
        self.space = KrylovSpace(1, 1, dtype=A.dtype, device=A.device)
        self.values, self.columns, self.residuals = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
        self.exhausted: np.ndarray | None = None  # what was wanted when the recurrence last ended by itself

    def open(self, rows: Tensor, max_basis: int) -> None:
        """Make the space around the first block of rows."""
        self.max_basis = min(max(max_basis, self.k + 2 * self.block + 1), self.size)
        self.space = KrylovSpace(self.max_basis + 2 * self.block, self.size, dtype=self.A.dtype, device=self.A.device)
        self.space.add(rows)
        self._fill(self.block)

    def _fill(self, num: int) -> None:
        """Random candidates up to ``num``, where the recurrence has ended or the first block is not full."""
        for _ in range(3):
            missing = min(num - self.space.num_candidates, self.size - self.space.num_rows)
            if missing <= 0:
                return
            self.space.add(vec.draw_normal(self.A, missing, self.generator))

    def step(self, left: int) -> None:
        """Multiply the next candidates, and look at the Ritz pairs."""
        space = self.space
        if space.num_multiplied + self.block >= self.max_basis and space.num_multiplied + self.block < self.size:
            self._restart()
        if space.num_candidates == 0:
            self.exhausted = np.zeros(0) if self.exhausted is None else self.exhausted
            self._fill(1)
        count = min(space.num_candidates, self.block, left)
        space.multiply(self.A, count)
        self.num_products += count
        self.values, self.columns, self.residuals = space.ritz()

    def _wanted(self, count: int | None = None, among: np.ndarray | None = None) -> np.ndarray:
        """Indices of the wanted Ritz values (of those ``among``), best first."""
        order = np.arange(len(self.values)) if among is None else among
        count = min(self.k if count is None else count, len(order))
        if self.which == "LA":
            return order[::-1][:count]
        if self.which == "SA":
            return order[:count]
        if self.which == "LM":
            return order[np.argsort(-np.abs(self.values[order]), kind="stable")][:count]
        low = count // 2
        return np.concatenate([order[::-1][: count - low], order[:low][::-1]])

    def _limits(self, wanted: np.ndarray) -> np.ndarray:
        return np.maximum(self.tol * np.abs(self.values[wanted]), 4 * self.space.rounding())

    def _found(self) -> bool:
        if len(self.values) < self.k:
            return False
        wanted = self._wanted()
        return bool((self.residuals[wanted] <= self._limits(wanted)).all())

    def _complete(self) -> bool:
        """Whether what the space leaves out can hide a wanted pair.

        A space that ended by itself is blind to the rest, further copies of its eigenvalues among it. So a random
        vector goes on from there, until that chain ends too without a change, or its own best pair is found.
        """
        if self.space.num_candidates == 0 or self.residuals.max() <= 16 * self.space.rounding():
            before, self.exhausted = self.exhausted, self.values[self._wanted()]
            same = before is not None and len(before) == len(self.exhausted)
            return same and bool((np.abs(before - self.exhausted) <= 4 * self.space.rounding()).all())
        if self.exhausted is None:
            return True
        best = self._wanted(2 if self.which == "BE" else 1, np.flatnonzero(self.residuals > self.space.rounding()))
        return bool((self.residuals[best] <= self._limits(best)).all())

    def finished(self, budget: int) -> bool:
        """Found, out of products, or the whole space is multiplied."""
        if self._found():
            if not self.space.is_clean:
                self.space.clean()  # what the panel had lost may matter
                self.values, self.columns, self.residuals = self.space.ritz()
            if self._found() and self._complete():
                return True
        return self.num_products >= budget or self.space.num_multiplied >= self.size

    def _restart(self) -> None:
        """Keep the wanted pairs and half of the rest of the room for the next best ones."""
        self.space.clean()
        self.values, self.columns, self.residuals = self.space.ritz()
        room = self.max_basis - 2 * self.block
        keep = np.sort(self._wanted(min(len(self.values) - 1, max(self.k, self.k + (room - self.k) // 2))))
        self.space.restart(self.values[keep], self.columns[:, keep])
        self.values, self.residuals = self.values[keep], self.residuals[keep]
        self.columns = np.eye(len(keep))

    def remark(self) -> str:
        """For the bar: how many of the wanted pairs are found."""
        wanted = self._wanted()
        return f"{int((self.residuals[wanted] <= self._limits(wanted)).sum())} of {self.k} found"

    def close(self, verify: bool, budget: int) -> Eigenpairs:
        """The pairs with their residuals, tested by products where that is asked for."""
        space = self.space
        space.clean()
        self.values, self.columns, self.residuals = space.ritz()
        wanted = self._wanted()
        values, columns = self.values[wanted], self.columns[:, wanted]
        more = self._wanted(self.k + (2 if self.which == "BE" else 1))  # one more an end
        extra = self.columns[:, np.setdiff1d(more, wanted)]
        vectors = space.combine(np.concatenate([columns, extra], 1))
        vectors, guard = vectors[: len(wanted)], vectors[len(wanted) :]
        residuals = self.residuals[wanted].copy()
        limits = self._limits(wanted)
        if verify and self.num_products < budget:
            off = self._test(vectors, values, columns)
            residuals = np.hypot(residuals, off)
            undecided = (residuals > limits).any() and (self.residuals[wanted] <= limits).all()
            if undecided and len(wanted) > 1 and self.num_products + len(wanted) <= budget:
                residuals = self._true_residuals(vectors, values)
        bounds = np.maximum(_bounds(values, residuals, self.values, self.residuals, wanted), space.rounding())
        converged = len(values) == self.k and bool((residuals <= limits).all())
        host = [torch.from_numpy(np.ascontiguousarray(a)) for a in (values, residuals, bounds)]
        return Eigenpairs(host[0], vectors, host[1], host[2], self.num_products, converged, guard)

    def _test(self, vectors: Tensor, values: np.ndarray, columns: np.ndarray) -> float:
        """||sum_i c_i (A v_i - theta_i v_i - r_i)||, signs c, r_i of the recurrence; mean square: the sum over i."""
        device = torch.device("cpu") if self.generator is None else self.generator.device
        drawn = vec.random_signs(1, len(values), dtype=torch.float64, device=device, generator=self.generator)
        signs = vec.agree(self.A, drawn.to(self.A.device)).cpu().numpy()
        product = self.A.apply_rows(vec.combine_rows(signs, vectors)).clone()
        self.num_products += 1
        vec.subtract_rows(product, signs * values, vectors)
        m, r = self.space.num_multiplied, self.space.num_rows
        _, couplings = self.space.projection()
        vec.subtract_rows(product, (couplings @ columns @ signs.T).T, self.space.rows[m:r])
        return math.sqrt(vec.inner_products(product, product).item())

    def _true_residuals(self, vectors: Tensor, values: np.ndarray) -> np.ndarray:
        products = self.A.apply_rows(vectors)
        self.num_products += len(vectors)
        off = products - torch.from_numpy(values).to(vectors)[:, None] * vectors
        return vec.inner_products(off, off).sqrt().numpy()


def _bounds(
    values: np.ndarray, residuals: np.ndarray, ritz: np.ndarray, ritz_residuals: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """min(residual, residual^2 / gap), gap to the nearest interval that some other Ritz pair names."""
    bounds = residuals.copy()
    for i, index in enumerate(wanted):
        others = np.arange(len(ritz)) != index
        if others.any():
            gap = (np.abs(ritz[others] - values[i]) - ritz_residuals[others]).min()
            if gap > residuals[i]:
                bounds[i] = min(bounds[i], residuals[i] ** 2 / gap)
    return bounds


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
    weights = None
    if isinstance(start, Eigenpairs):
        guards = 0 if start.guard is None else len(start.guard)
        sizes = start.values.abs().numpy()
        # Residuals are relative to the value: of a small one its noise, the same for all, must be the smaller part.
        sizes = np.maximum(sizes, max(0.01 * sizes.max(), 1e-300))
        weights = np.append(sizes.min() / sizes, [ADMIXTURE] * guards)
        start = start.vectors if start.guard is None else torch.cat([start.vectors, start.guard])
    rows = start[None] if start.ndim == 1 else start
    if rows.ndim != 2 or rows.shape[1] != A.shape[0] or not 1 <= len(rows) <= A.shape[0]:
        raise ValueError(
            f"top_eigenpairs: start must be rows [m, {A.shape[0]}] with 1 <= m <= P, got {list(start.shape)}"
        )
    if rows.dtype != A.dtype or rows.device != A.device:
        raise TypeError(f"top_eigenpairs: start must be {A.dtype} on {A.device}, got {rows.dtype} on {rows.device}")
    norms = vec.inner_products(rows, rows).sqrt()
    if not norms.isfinite().all():
        raise ValueError("top_eigenpairs: start must be finite, got an infinity or NaN")
    norms.clamp_(min=torch.finfo(A.dtype).tiny)
    sums = np.zeros((min(block, len(rows)), len(rows)))
    sums[np.arange(len(rows)) % block, np.arange(len(rows))] = (1 if weights is None else weights) / norms.numpy()
    sums = vec.combine_rows(sums, rows)
    noise = vec.draw_normal(A, len(sums), generator)
    return sums.add_(noise, alpha=ADMIXTURE / math.sqrt(A.shape[0]))


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

    Raises:
        ValueError: fewer than two operators, or a subset did not converge.
    """
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
