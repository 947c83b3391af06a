# SPDX-License-Identifier: Apache-2.0
"""Eigenpairs along a training run: a callback that measures, warm-started, at an overhead that it states and can bound.

A callback of the training loop is any object with ``on_start(state)``, ``on_step(state)``, ``on_epoch(state)`` and
``on_end(state)``; nothing of the loop is known here but ``state.step``, ``state.epoch``, and what the caller's function
makes of ``state``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.top_eigenpairs import Eigenpairs, Which, top_eigenpairs

__all__ = ["EigenpairTracker"]


class _State(Protocol):
    step: int
    epoch: int


class EigenpairTracker:
    """Training callback: the k leading eigenpairs every n steps or epochs, each search started from the last vectors.

    ``EigenpairTracker(lambda state: HessianOperator(Problem(state.model, loss, (x, y))), k=3, every=50)``

    Args:
        operator: ``state -> A``, called once a measurement; A is let go of after it.
        k: pairs.
        every: measure when the step (epoch) is a multiple of this; the start and the end are measured too.
        unit: ``"steps"`` or ``"epochs"``.
        which: end of the spectrum, as for :func:`curvlab.spectra.top_eigenpairs`.
        tol: relative residual.
        max_products: products a measurement at most; what is not converged then is recorded as such.
        budget_share: None, or the share of the run's wall-clock time (training and measuring) that measurements may
            take, 0..1: one whose turn comes while the next would pass it is put off to the next turn. The first two
            and the last are always made.
        seed: of the first vector.
        clock: seconds; for tests.

    Attributes:
        rows: one dict a measurement: ``step``, ``epoch``, ``values``, ``residuals``, ``error_bounds`` (lists of k),
            ``num_products``, ``converged``, ``seconds`` (of this measurement, building A included), ``share`` (of the
            run's time so far that measurements took).
        num_skipped: turns put off for the budget.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        operator: Callable[[Any], vec.Operator],
        *,
        k: int = 1,
        every: int = 1,
        unit: Literal["steps", "epochs"] = "epochs",
        which: Which = "LA",
        tol: float = 1e-3,
        max_products: int | None = None,
        budget_share: float | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("k", k), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"EigenpairTracker: {name} must be an integer of at least 1, got {value!r}")
        if unit not in ("steps", "epochs"):
            raise ValueError(f"EigenpairTracker: unit must be 'steps' or 'epochs', got {unit!r}")
        if budget_share is not None and not 0 < budget_share <= 1:
            raise ValueError(f"EigenpairTracker: budget_share must be above 0 and at most 1, got {budget_share}")
        vec.check_positive("EigenpairTracker", tol=tol, max_products=max_products)
        self.rows: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._operator, self._k, self._every, self._unit = operator, k, every, unit
        self._which: Which = which
        self._tol, self._max_products, self._budget, self._seed = tol, max_products, budget_share, seed
        self._clock = clock
        self._pairs: Eigenpairs | None = None
        self._group: Any = None  # of the last operator's processes
        self._started = clock()
        self._earlier = 0.0  # seconds of the run before a checkpoint
        self._measuring = 0.0

    @property
    def vectors(self) -> Tensor | None:
        """Eigenvectors of the last measurement, rows ``[k, P]``; None before the first."""
        return None if self._pairs is None else self._pairs.vectors

    @property
    def share(self) -> float:
        """Share of the run's wall-clock time so far that measurements took."""
        total = self._earlier + self._clock() - self._started
        return self._measuring / total if total > 0 else 0.0

    def on_start(self, state: _State) -> None:
        """Starts the clock; measures the initial network."""
        self._started = self._clock()
        if state.step == 0 and not self.rows:
            self._measure(state)

    def on_step(self, state: _State) -> None:
        """Measures when it is the step's turn."""
        if self._unit == "steps" and state.step % self._every == 0:
            self._take_turn(state)

    def on_epoch(self, state: _State) -> None:
        """Measures when it is the epoch's turn."""
        if self._unit == "epochs" and state.epoch % self._every == 0:
            self._take_turn(state)

    def on_end(self, state: _State) -> None:
        """Measures the final network if that was not done."""
        if not self.rows or self.rows[-1]["step"] != state.step:
            self._measure(state)

    def state_dict(self) -> dict[str, Any]:
        """Rows and times so far, as JSON, for a checkpoint; eigenvectors are not in it: the next search starts cold."""
        seconds = self._earlier + self._clock() - self._started
        return {
            "rows": list(self.rows),
            "num_skipped": self.num_skipped,
            "seconds": seconds,
            "measuring": self._measuring,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows and times of :meth:`state_dict` back."""
        self.rows, self.num_skipped = list(state["rows"]), state["num_skipped"]
        self._earlier, self._measuring = state["seconds"], state["measuring"]
        self._started = self._clock()

    def _take_turn(self, state: _State) -> None:
        if self._budget is not None and len(self.rows) > 1:
            expected = self.rows[-1]["seconds"]
            total = self._earlier + self._clock() - self._started
            if self._first_says(self._measuring + expected > self._budget * (total + expected)):
                self.num_skipped += 1
                return
        self._measure(state)

    def _first_says(self, skip: bool) -> bool:
        """The first process' clock decides for all: a measurement in which one is missing never ends."""
        if self._group is None:
            return skip
        said = [skip]
        torch.distributed.broadcast_object_list(said, group=self._group, group_src=0)
        return said[0]

    def _measure(self, state: _State) -> None:
        begin = self._clock()
        operator = self._operator(state)
        start = self._pairs if self._fits(operator) else None
        pairs = top_eigenpairs(
            operator,
            min(self._k, operator.shape[0]),
            which=self._which,
            tol=self._tol,
            start=start,
            max_products=self._max_products,
            generator=torch.Generator().manual_seed(self._seed),
        )
        self._pairs, self._group = pairs, vec.process_group(operator)
        seconds = self._clock() - begin
        self._measuring += seconds
        self.rows.append(
            {
                "step": state.step,
                "epoch": state.epoch,
                "values": pairs.values.tolist(),
                "residuals": pairs.residuals.tolist(),
                "error_bounds": pairs.error_bounds.tolist(),
                "num_products": pairs.num_products,
                "converged": pairs.converged,
                "seconds": seconds,
                "share": self.share,
            }
        )

    def _fits(self, operator: vec.Operator) -> bool:
        kept = self.vectors
        if kept is None or kept.dtype != operator.dtype or kept.device != operator.device:
            return False
        return kept.shape[1] == operator.shape[0]
