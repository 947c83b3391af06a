# SPDX-License-Identifier: Apache-2.0
r"""Krylov spaces of a symmetric operator: block Lanczos with full, delayed reorthogonalization and thick restarts.

Rows x_0, x_1, ... stand in one buffer ``[capacity, P]`` and are multiplied in their order.  With m of r multiplied,

    A x_j = sum_i N_ij x_i,   j < m,  i < r            (N is ``[r, m]``, kept in float64)

holds to rounding at any time, so that with orthonormal rows T = N[:m] is the projection of A, and N[m:] y is the
residual of the Ritz vector y: ||A v - theta v|| = ||N[m:] y||, without a further product.

Full reorthogonalization against m rows reads the basis twice (dots, then update), which for P in the millions costs
more than the product itself.  Here a new row is orthogonalized at once against the few rows that the recurrence names,
and every few steps the rows since then (a panel) are orthogonalized together against all rows before: two passes a
panel, not two passes a step.  What the rows had lost in between is measured by the same dots, X = Q C with C upper
triangular, and N is rewritten exactly,

    A Q = Q (C N C_m^-1),

so T is the projection onto the span of the orthonormal rows whatever was lost, as long as C is well conditioned; the
panel's length follows the measured loss (one step where an outlying eigenvalue amplifies rounding fast, up to eight).

Sources: block Lanczos and its thick restart, Wu and Simon 2000; one synchronization a step by delayed second
orthogonalization, Bielich et al. 2022; loss of orthogonality and what T survives, Simon 1984.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec

__all__ = ["KrylovSpace"]

MAX_PANEL = 8  # with 4, 18 products of an MLP of 1.9 M parameters took 3.5 % longer; with 16 no less
SHRINKING = 1e-2  # measured loss of orthogonality from which on the panel gets shorter
AGAIN = 0.5  # share of a row's norm beyond which rounding of the part removed is left in it: a second pass follows
CAREFUL = 0.5  # the same for the part of a row that is new, beside the rows cleaned together with it
LOST = 0.3  # loss of orthogonality foreseen from which on a row is cleaned before it is multiplied
TINY = np.finfo(float).tiny


class KrylovSpace:
    """The rows, N, and the operations that keep A X = X N.

    Args:
        capacity: most rows that it will hold, those not yet multiplied included.
        size: P.
        dtype: of the rows, float32 or float64.
        device: of the rows.
        buffer: ``[capacity, P]`` with unit column stride to hold the rows; allocated otherwise.

    Attributes:
        rows: the buffer.
        num_rows: r, rows that it holds.
        num_multiplied: m, those multiplied: the dimension of T.
        scale: largest |theta| seen: what rounding is measured against.
        noise: relative error of the products where it is above rounding (a lower precision); set from outside. Rows
            are then orthonormal to rounding as ever, and A X = X N holds to ||A|| times this.
    """

    def __init__(
        self, capacity: int, size: int, *, dtype: torch.dtype, device: torch.device, buffer: Tensor | None = None
    ) -> None:
        self.rows = torch.empty(capacity, size, dtype=dtype, device=device) if buffer is None else buffer
        self.num_rows = self.num_multiplied = 0
        self.scale = self.noise = 0.0
        self._eps = torch.finfo(dtype).eps
        self._clean = 0  # rows known to be orthonormal
        self._relation = np.zeros((capacity, capacity))  # N
        self._norms = np.ones(capacity)  # of the rows; 1 for clean ones
        self._renewed = 0  # first rows, whose products are better than the others'
        self._panel = 1
        self._lost = self._eps  # bound of what the newest row has lost: eps times ||A|| / ||row|| for each step
        self._share = 1.0  # of that bound, what rows of noisy products lose in fact

    @property
    def num_candidates(self) -> int:
        """Rows not yet multiplied."""
        return self.num_rows - self.num_multiplied

    @property
    def is_clean(self) -> bool:
        """All rows are orthonormal to rounding."""
        return self._clean == self.num_rows

    def rounding(self) -> float:
        """Size of residuals that only rounding explains: 8 eps max |theta|."""
        return 8 * self._eps * self.scale

    def add(self, rows: Tensor) -> int:
        """Append the part of ``rows [b, P]`` that is new, as orthonormal rows; returns how many that were."""
        self.clean()
        count, start = len(rows), self.num_rows
        self.rows[start : start + count] = rows
        own = self.rows[start : start + count]
        norms = vec.inner_products(own, own).sqrt().numpy()
        fine = np.isfinite(norms) & (norms > 0)
        own.mul_(torch.from_numpy(np.where(fine, 1 / np.where(fine, norms, 1), 0)).to(own)[:, None])
        self._norms[start : start + count] = fine
        self._relation[:, start : start + count] = 0
        self._relation[start : start + count] = 0
        self.num_rows += count
        if start == 0 and count == 1 and fine.all():
            self._clean = 1  # alone, of length 1: two passes saved
            return 1
        # Of a row of length 1, less than 100 eps is rounding of a combination of the others.
        self._make_orthonormal(np.ones(count), 100 * self._eps)
        return self.num_rows - start

    def multiply(self, operator: vec.Operator, count: int = 1) -> None:
        """Multiply the next ``count`` candidates in one block product and append what is new in the results."""
        start = self.num_multiplied
        if count > 1 or self.num_candidates > 1:
            self.clean()  # several chains grow together: nothing is gained by waiting
        self.take(operator.apply_rows(self.rows[start : start + count]))

    def take(self, products: Tensor) -> None:
        """As :meth:`multiply`, with ``products [b, P]`` = A times the next b candidates (at their present scale)."""
        b, m, r = len(products), self.num_multiplied, self.num_rows
        low = self._first_coupled(m, m + b)
        near, norms = self.rows[low:r], self._norms[low:r]
        # A x_j for a row of norm n_j is n_j times the product of a unit row: n_j is divided out as the row is written.
        shrink = self._norms[m : m + b]
        dots = vec.row_dots(near, products) / norms[:, None] ** 2
        new = self.rows[r : r + b]
        self._norms[r : r + b] = np.sqrt(vec.recur(products, 1 / shrink, (dots / shrink).T, near, new))
        self._relation[low:r, m : m + b] = dots
        self._relation[r : r + b, m : m + b] = np.diag(shrink)
        if not np.isfinite(self._norms[r : r + b]).all():
            raise ValueError("lanczos: A must give finite products, got an infinity or NaN")
        self.num_rows, self.num_multiplied = r + b, m + b
        # ||A x_j|| / ||x_j|| <= ||A||: the first steps must not take the rounding of a large A for something new.
        lengths = np.sqrt((norms[:, None] ** 2 * dots**2).sum(0) / shrink**2 + self._norms[r : r + b] ** 2)
        self.scale = max(self.scale, float(lengths.max()))
        least = self._norms[r : r + b].min()
        # The panel's length follows losses seen; where ||A|| is 1e8 and the row 1, one step more loses all.
        self._lost = (self._lost + self._eps) * self.scale / max(least, TINY)
        small = least <= 100 * self.rounding() or self._lost * self._share > LOST
        if b > 1 or self.num_candidates > 1 or small or self.num_rows - self._clean >= self._panel:
            self.clean()

    def _first_coupled(self, m: int, stop: int) -> int:
        """First row i < m with a share in A x_j for j in m..stop, by symmetry: <x_i, A x_j> = N_ji ||x_j||^2."""
        couplings = np.abs(self._relation[m:stop, :m]).max(axis=0, initial=0.0) * self._norms[m:stop].max()
        found = np.flatnonzero(couplings > max(100 * self._eps, 4 * self.noise) * self.scale)
        low = int(found[0]) if len(found) else m
        return min(low, max(m - 1, 0)) if self.noise else low

    def clean(self) -> None:
        """Make all rows orthonormal; candidates of which only rounding is new are dropped."""
        if self.is_clean:
            return
        m, r = self.num_multiplied, self.num_rows
        # A candidate counts by its part in the products, which is what N says of it.
        parts = np.abs(self._relation[self._clean : r, :m] / self._norms[:m]).max(axis=1, initial=0.0)
        self._make_orthonormal(parts, self.rounding())

    def _make_orthonormal(self, weights: np.ndarray, negligible: float) -> None:
        for _ in range(4):
            weights, done = self._orthogonalize(weights, negligible)
            if done:
                break
        self._clean, self._lost = self.num_rows, max(self._eps, self.noise)

    def _orthogonalize(self, weights: np.ndarray, negligible: float) -> tuple[np.ndarray, bool]:
        """One pass of dots and one update; returns the weights of the rows left, and whether rounding stayed small."""
        c, r = self._clean, self.num_rows
        new = self.rows[c:r]
        dots = vec.row_dots(self.rows[:r], new)
        inside, gram = dots[:c], dots[c:]
        lengths = np.sqrt(np.diag(gram))
        loss = np.linalg.norm(inside, axis=0) / np.maximum(lengths, TINY)
        factor, kept, sharpest = _triangular(
            gram - inside.T @ inside, lengths, weights, negligible, 4 * np.sqrt(self._eps), self.num_multiplied - c
        )
        if self.num_multiplied >= c and r > c:
            self._follow(float(loss.max()))
        if kept:
            solved = np.zeros((len(kept), r - c))  # new - inside^T basis = factor^T q, solved for the orthonormal q
            solved[:, kept] = np.linalg.inv(factor[:, kept]).T
            vec.transform_rows(new, solved, solved @ inside.T, self.rows[:c])
        self._rewrite(c, r, inside, factor, kept)
        weights = weights[kept] * np.diag(factor[:, kept])
        return weights, bool(sharpest > CAREFUL and (loss < AGAIN).all()) or not kept

    def _follow(self, loss: float) -> None:
        """Length of the next panel from the loss of orthogonality measured on this one."""
        if self.noise:  # no measure of what rounding lost
            self._panel = MAX_PANEL if loss < LOST else 1
            # Noise points anywhere, the bound is for noise along the largest eigenvectors: bfloat16 products of a CNN
            # lose 0.001 to 0.01 of it, of ResNet-20 up to 0.1. Panels of seven rows for three: 13 % of the CNN's time.
            self._share = min(1.0, max(8 * loss / max(self._lost, TINY), self._share / 2))
        elif loss > SHRINKING:
            self._panel = max(1, self._panel // 2)
        elif loss**2 < SHRINKING * self._eps:  # a loss of eps g^steps becomes loss^2 / eps with twice the steps
            self._panel = min(MAX_PANEL, self._panel * 2)

    def _rewrite(self, c: int, r: int, inside: np.ndarray, factor: np.ndarray, kept: list[int]) -> None:
        """N <- C N C_m^-1 with C the old rows in terms of the new ones."""
        m, fresh = self.num_multiplied, c + len(kept)
        change = np.zeros((fresh, r))
        change[:c, :c] = np.eye(c)
        change[:c, c:] = inside
        change[c:, c:] = factor
        relation = change @ self._relation[:r, :m]
        if m > c:
            relation = np.linalg.solve(change[:m, :m].T, relation.T).T
        self._relation[:fresh, :m] = relation
        self._relation[fresh:, :m] = 0
        self._relation[:, m:] = 0
        self._norms[c:fresh] = 1
        self.num_rows = fresh

    def projection(self) -> tuple[np.ndarray, np.ndarray]:
        """T ``[m, m]``, symmetric, and the couplings ``[r - m, m]`` to the candidates; estimates until clean."""
        m, r = self.num_multiplied, self.num_rows
        relation = self._relation[:r, :m] * (self._norms[:r, None] / self._norms[None, :m])
        projection = (relation[:m] + relation[:m].T) / 2
        if self._renewed:  # <x_i, A x_j> as the better product has it
            better = relation[:m, : self._renewed]
            projection[:, : self._renewed], projection[: self._renewed] = better, better.T
        return projection, relation[m:]

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending ``[m]``, coefficients of the vectors as columns ``[m, m]``, residual norms ``[m]``."""
        projection, couplings = self.projection()
        values, columns = np.linalg.eigh(projection)
        if len(values):
            self.scale = max(self.scale, float(np.abs(values).max()))
        return values, columns, np.linalg.norm(couplings @ columns, axis=0)

    def combine(self, columns: np.ndarray) -> Tensor:
        """The vectors with these coefficients: rows ``[k, P]`` from columns ``[m, k]``; the rows must be clean."""
        return vec.combine_rows(columns.T, self.rows[: columns.shape[0]])

    def renew(self, products: Tensor) -> float:
        """Put ``products [b, P]`` = A times the first b rows, which are multiplied already, in place of what N holds.

        What of them lies outside the space is appended to the candidates. Returns the largest relative error of the
        former products.
        """
        self.clean()
        b, m, r = len(products), self.num_multiplied, self.num_rows
        dots = vec.row_dots(self.rows[:r], products)
        before = self._relation[:r, :b]
        new = self.rows[r : r + b]
        new.copy_(products)
        vec.subtract_rows(new, dots.T, self.rows[:r])
        outside = vec.inner_products(new, new).numpy()
        size = np.sqrt((dots**2).sum(0) + outside)
        error = np.sqrt(((dots - before) ** 2).sum(0) + outside) / np.maximum(size, TINY)
        if not np.isfinite(size).all():
            raise ValueError("lanczos: A must give finite products, got an infinity or NaN")
        self._relation[:r, :b] = dots
        self._relation[:b, b:m] = dots[b:m].T
        self._relation[r : r + b, :m] = 0
        self._relation[:, m:] = 0
        self._relation[r : r + b, :b] = np.eye(b)
        self._norms[r : r + b] = np.sqrt(outside)
        self.num_rows, self._renewed = r + b, b
        self.clean()
        return float(error.max())

    def sort_candidates(self, columns: np.ndarray) -> None:
        """Turn the candidates so that the first carry most of the residuals of the Ritz vectors ``columns [m, k]``."""
        self.clean()
        m, r = self.num_multiplied, self.num_rows
        turn = np.linalg.svd(self._relation[m:r, :m] @ columns)[0].T
        vec.combine_rows(turn, self.rows[m:r], out=self.rows[m:r])
        self._relation[m:r, :m] = turn @ self._relation[m:r, :m]

    def product_norms(self) -> np.ndarray:
        """||A x_j|| of the rows multiplied, ``[m]``."""
        m, r = self.num_multiplied, self.num_rows
        return np.linalg.norm(self._relation[:r, :m] * self._norms[:r, None], axis=0) / self._norms[:m]

    def restart(self, values: np.ndarray, columns: np.ndarray) -> None:
        """Keep the Ritz vectors with these values and columns ``[m, keep]`` and the candidates (thick restart)."""
        self.clean()
        m, r, keep = self.num_multiplied, self.num_rows, columns.shape[1]
        couplings = self._relation[m:r, :m] @ columns
        vec.combine_rows(columns.T, self.rows[:m], out=self.rows[:keep])
        for i in range(r - m):
            self.rows[keep + i] = self.rows[m + i]
        self.num_multiplied, self.num_rows, self._renewed = keep, keep + r - m, 0
        self._clean = self.num_rows
        self._relation[:] = 0
        self._relation[:keep, :keep] = np.diag(values)
        self._relation[keep : self.num_rows, :keep] = couplings
        self._norms[:] = 1


def _triangular(
    gram: np.ndarray, lengths: np.ndarray, weights: np.ndarray, negligible: float, floor: float, multiplied: int
) -> tuple[np.ndarray, list[int], float]:
    """Upper triangular R ``[kept, n]`` with R^T R = gram, the columns kept, and the least share of a row that is new.

    Cholesky in the order of the rows. A column is dropped when weight times pivot is at most ``negligible``; the first
    ``multiplied`` ones are in use and stay. A pivot below ``floor`` of the row's length is rounding, and so are the
    products of what is left of that row with others: the pivot is raised, the products are left alone, and a second
    pass over the rows so scaled finds what they really were.
    """
    n = len(gram)
    factor, kept, sure, sharpest = np.zeros((n, n)), [], [], 1.0
    for j in range(n):
        count = len(kept)
        for i in sure:
            factor[i, j] = (gram[kept[i], j] - factor[:i, kept[i]] @ factor[:i, j]) / factor[i, kept[i]]
        new = np.sqrt(max(gram[j, j] - factor[:count, j] @ factor[:count, j], 0.0))
        pivot = max(new, floor * lengths[j])
        if j >= multiplied and weights[j] * pivot <= negligible:
            continue
        factor[count, j] = max(pivot, TINY)
        sharpest = min(sharpest, new / max(lengths[j], TINY))
        if new == pivot:
            sure.append(count)
        kept.append(j)
    return factor[: len(kept)], kept, sharpest
