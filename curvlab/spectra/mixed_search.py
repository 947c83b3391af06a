# SPDX-License-Identifier: Apache-2.0
r"""A search whose space grows by cheap products of lower precision, and whose pairs are those of the operator itself.

With A~ = A + E, ||E v|| about eps ||A v||, the Ritz pairs of a Krylov space of A~ have residuals of about eps |theta|
against A, however long it gets. So

1. the space grows by A~ until its own residuals are small beside eps;
2. A itself multiplies the k wanted Ritz vectors, which are made the first rows of the basis: their columns of the
   relation A X = X N are exact from there on, and what of A v lies outside the space is appended to the candidates;
3. A~ multiplies these, those first that carry most, the first k of them in one block. The wanted pairs hold of them,
   and of all other rows, a share y of about eps, so that what is not known of A is eps |y| ||A x||, of order eps^2: it
   is added to the residuals.

The end is as in any search: a product of A tests the pairs. Where it or step 3 says that eps was too much, step 2 comes
again, and after some rounds all products are those of A.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from curvlab.spectra import vectors as vec
from curvlab.spectra.search import Found, Search

__all__ = ["MixedSearch"]

ROUNDS = 3
"""Times that the pairs are multiplied by A itself before lower precision is given up."""
NOISE = 1e-2
"""Relative error of the products that is assumed until it is measured."""
EARLY = 0.8
"""Share of the tolerance that the rounded space's own residuals may have when A itself is asked: steps after that
advance one of k + 1 chains each (with residuals of 1.7 tolerances a CNN took 13 to 19 steps more, with 0.8 five, as
with 0.6 one step later)."""
KEPT = 2
"""Ritz vectors kept then, a wanted pair: with 8 a CNN takes as many products as with 1, ResNet-20 one more with 1 than
with 2; every one is a row in all later passes (4 for 2: 3 % of the CNN's time)."""
MARGIN = 0.9
"""Share of the tolerance that the estimated residuals may take: the test at the end adds what is not known (1e-5)."""


class MixedSearch(Search):
    """As :class:`Search`, one vector at a time, with products of ``low`` for all but the wanted pairs."""

    def __init__(self, A: vec.Operator, low: Any, k: int, which: str, tol: float, generator: torch.Generator | None):
        super().__init__(A, k, which, tol, 1, generator)
        self.low, self.num_rounded = low, 0
        self.rounds = self.num_exact = self.left = 0
        self.renewed_at = -1  # rows multiplied when A itself was asked last

    @staticmethod
    def serves(size: int, k: int, tol: float, basis: int) -> bool:
        """Whether it can help: a tolerance that eps^2 reaches, a space far from complete."""
        return tol >= NOISE**2 and size > 4 * (basis + 2 * k)

    @property
    def spent(self) -> int:
        """Products so far, of both precisions."""
        return self.num_products + self.num_rounded

    def open(self, rows: torch.Tensor, max_basis: int) -> None:
        """Make the space around the first row, with room for what A itself appends, k candidates every round.

        A candidate that is multiplied leaves another one: none of them goes. Memory is taken as they come.
        """
        super().open(rows, max_basis, extra=(ROUNDS + 1) * self.k + 1)
        self.space.noise = NOISE

    def _multiply(self, count: int) -> None:
        if self.low is None:
            super()._multiply(count)
            return
        space = self.space
        if self.num_exact and space.num_candidates > 1:
            space.clean()
            self._look()
            wanted = self._wanted()
            space.sort_candidates(self.columns[:, wanted] / self._limits(wanted))
            if space.num_multiplied == self.renewed_at:
                # One for every pair is needed, as a rule; in a block a product takes 0.8 of its time by itself.
                count = max(count, min(self.k, space.num_candidates, self.left, len(space.rows) - space.num_rows))
        space.multiply(self.low, count)
        self.num_rounded += count

    def step(self, left: int) -> None:
        """As in any search; the first one after a renewal may take several candidates."""
        self.left = left
        super().step(left)

    def _look(self) -> None:
        super()._look()
        if self.low is not None:
            sizes = self.space.noise * self.space.product_norms()[self.num_exact :, None]
            self.unknown = np.linalg.norm(sizes * self.columns[self.num_exact :], axis=0)

    def _restart(self) -> None:
        super()._restart()
        self.num_exact = 0  # the Ritz vectors kept mix rows of both kinds

    def finished(self, budget: int) -> bool:
        """As in any search; but the pairs of the rounded space are first multiplied by A itself."""
        if self.low is None:
            return super().finished(budget)
        if self.spent >= budget or self.space.num_multiplied >= self.size:
            return True
        if len(self.values) < self.k:
            return False
        wanted = self._wanted()
        residuals = self.residuals[wanted]
        if self.num_exact:
            done = (np.hypot(residuals, self.unknown[wanted]) <= MARGIN * self._limits(wanted)).all()
            # What is unknown does not shrink with further steps: only A itself makes it smaller.
            if done or (self.unknown[wanted] <= 0.5 * self._limits(wanted)).all():
                return bool(done)
        elif (residuals > EARLY * self._limits(wanted)).any():
            return False
        if self.spent + self.k > budget:
            return True
        self._renew()
        return False

    def _renew(self) -> None:
        """Multiply the wanted pairs by A itself; give up lower precision after some rounds."""
        space = self.space
        space.clean()
        self._look()
        wanted = self._wanted()
        self.rounds += 1
        give_up = self.rounds > ROUNDS
        rest = np.setdiff1d(self._wanted(min(len(self.values), KEPT * self.k, self.max_basis)), wanted)
        keep = wanted if give_up else np.concatenate([wanted, rest])
        space.restart(self.values[keep], self.columns[:, keep])
        error = space.renew(self.A.apply_rows(space.rows[: self.k]))
        self.num_products += self.k
        space.noise = 0.0 if give_up else max(min(2 * error, 1.0), 1e-4)
        if give_up:
            self.low = None
        self.num_exact, self.renewed_at = self.k, space.num_multiplied
        self._look()

    def close(self, verify: bool, budget: int) -> Found:
        """As in any search; where the test finds more than was estimated, A itself is asked once more."""
        found = super().close(verify, budget)
        while verify and not found.converged and self.low is not None and self.spent + self.k < budget:
            self._renew()
            while not self.finished(budget - 1):
                self.step(budget - 1 - self.spent)
            found = super().close(verify, budget)
        return found
