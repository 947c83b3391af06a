# SPDX-License-Identifier: Apache-2.0
"""Two processes with half of the data and random states of their own each: the numbers of one, the same on both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from curvlab.operators.ggn import GGNOperator
from curvlab.operators.problem import Problem
from curvlab.spectra import EigenpairTracker, diagonal, hutchinson_trace, slq_density, top_eigenpairs, xtrace
from tests.processes import in_two_processes


def ggn(rank: int | None, group: Any = None) -> GGNOperator:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(6, 3).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    share = slice(None) if rank is None else slice(0, 7) if rank == 0 else slice(7, 20)
    return GGNOperator(
        Problem(model, nn.CrossEntropyLoss(), (x[share], y[share]), process_group=group), engine="autograd"
    )


def measured(A: GGNOperator) -> list[float]:
    """No generator: every process has its own global one. Expressions keep the group."""
    pairs = top_eigenpairs(A.shift(0.1), 3)
    warm = top_eigenpairs(2.0 * A, 3, start=pairs)
    density = slq_density(A + A, 2, 5)
    numbers = [*pairs.values.tolist(), *warm.values.tolist(), *density.nodes.reshape(-1).tolist()]
    return [*numbers, hutchinson_trace(A, 5).value, xtrace(A, 8).value, *diagonal(A, 4).value.tolist()]


def steps_measured(A: GGNOperator, tick: float) -> list[int]:
    """Steps at which a tracker measures whose clock runs ahead by ``tick`` a look: no two processes agree on time."""
    now = [0.0]

    def clock() -> float:
        now[0] += tick
        return now[0]

    tracker = EigenpairTracker(lambda _: A, unit="steps", budget_share=0.1, clock=clock)
    state: Any = SimpleNamespace(step=0, epoch=0)
    tracker.on_start(state)
    for step in range(1, 12):
        now[0] += 1.0
        state.step = step
        tracker.on_step(state)
    return [row["step"] for row in tracker.rows]


def work(rank: int, folder: str) -> None:
    A = ggn(rank, torch.distributed.group.WORLD)
    torch.manual_seed(rank)
    values = measured(A)
    torch.save([values, steps_measured(A, 0.2 if rank == 0 else 1e-6)], f"{folder}/{rank}.pt")


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    in_two_processes(work, tmp_path)
    (first, steps), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second and steps == others
    assert 2 <= len(steps) < 12  # the budget of the first process' clock; the second's would allow all
    alone = ggn(None)
    torch.manual_seed(0)  # as the first process, whose draws all take
    assert first == pytest.approx(measured(alone), rel=1e-6, abs=1e-9)
