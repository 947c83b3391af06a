# SPDX-License-Identifier: Apache-2.0
"""One search for eigenpairs: the Krylov space, what is wanted of it, when it is found, and the test at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.lanczos import KrylovSpace

__all__ = ["Found", "Search"]


@dataclass(frozen=True)
class Found:
    """What a search returns: arrays ``[k]`` on the host, rows ``[k, P]`` and the guard ``[g, P]``."""

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    bounds: np.ndarray
    converged: bool
    guard: Tensor


class Search:
    """One run: the Krylov space, what is wanted of it, and the products spent."""

    def __init__(
        self, A: vec.Operator, k: int, which: str, tol: float, block: int, generator: torch.Generator | None
    ) -> None:
        self.A, self.k, self.which, self.tol, self.block, self.generator = A, k, which, tol, block, generator
        self.size = A.shape[0]
        self.num_products = 0
        self.space = KrylovSpace(1, 1, dtype=A.dtype, device=A.device)
        self.values, self.columns, self.residuals = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
        self.unknown = np.zeros(0)  # what of the residuals the space cannot see
        self.exhausted: np.ndarray | None = None  # what was wanted when the recurrence last ended by itself

    def open(self, rows: Tensor, max_basis: int, extra: int = 0) -> None:
        """Make the space around the first block of rows, with room for ``extra`` further candidates."""
        self.max_basis = min(max(max_basis, self.k + 2 * self.block + 1), self.size)
        room = self.max_basis + 2 * self.block + extra
        self.space = KrylovSpace(room, self.size, dtype=self.A.dtype, device=self.A.device)
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
        self._multiply(count)
        self._look()

    def _multiply(self, count: int) -> None:
        self.space.multiply(self.A, count)
        self.num_products += count

    def _look(self) -> None:
        """The Ritz pairs of the space as it is now."""
        self.values, self.columns, self.residuals = self.space.ritz()
        self.unknown = np.zeros(len(self.values))

    @property
    def spent(self) -> int:
        """Products so far, of whatever precision."""
        return self.num_products

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
                self._look()
            if self._found() and self._complete():
                return True
        return self.spent >= budget or self.space.num_multiplied >= self.size

    def _restart(self) -> None:
        """Keep the wanted pairs and half of the rest of the room for the next best ones."""
        self.space.clean()
        self._look()
        room = self.max_basis - 2 * self.block
        keep = np.sort(self._wanted(min(len(self.values) - 1, max(self.k, self.k + (room - self.k) // 2))))
        self.space.restart(self.values[keep], self.columns[:, keep])
        self.values, self.residuals = self.values[keep], self.residuals[keep]
        self.columns = np.eye(len(keep))

    def remark(self) -> str:
        """For the bar: how many of the wanted pairs are found."""
        wanted = self._wanted()
        return f"{int((self.residuals[wanted] <= self._limits(wanted)).sum())} of {self.k} found"

    def close(self, verify: bool, budget: int) -> Found:
        """The pairs with their residuals, tested by products where that is asked for."""
        space = self.space
        space.clean()
        self._look()
        wanted = self._wanted()
        values, columns = self.values[wanted], self.columns[:, wanted]
        more = self._wanted(self.k + (2 if self.which == "BE" else 1))  # one more an end
        extra = self.columns[:, np.setdiff1d(more, wanted)]
        vectors = space.combine(np.concatenate([columns, extra], 1))
        vectors, guard = vectors[: len(wanted)], vectors[len(wanted) :]
        residuals = np.hypot(self.residuals[wanted], self.unknown[wanted])
        limits = self._limits(wanted)
        if verify and self.spent < budget:
            believed = residuals
            residuals = np.hypot(self.residuals[wanted], self._test(vectors, values, columns))
            undecided = (residuals > limits).any() and (believed <= limits).all()
            if undecided and len(wanted) > 1 and self.spent + len(wanted) <= budget:
                residuals = self._true_residuals(vectors, values)
        bounds = np.maximum(_bounds(values, residuals, self.values, self.residuals, wanted), space.rounding())
        converged = len(values) == self.k and bool((residuals <= limits).all())
        return Found(values, vectors, residuals, bounds, converged, guard)

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
