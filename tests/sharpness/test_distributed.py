# SPDX-License-Identifier: Apache-2.0
"""Two processes with a share of the data each give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from curvlab.operators.problem import Problem
from curvlab.sharpness.ascent import sam_ascent, worst_case_sharpness
from curvlab.sharpness.batches import batch_sharpness
from curvlab.sharpness.perturbation import average_flatness
from curvlab.sharpness.slices import loss_slice
from tests.processes import in_two_processes
from tests.sharpness.nets import draw, images, network


def measured(problem: Problem) -> list[float]:
    flat = average_flatness(problem, [0.05, 0.3], num_draws=3)  # the global generator: each process has its own
    assert flat.accuracies is not None
    line = loss_slice(problem, 1, num_points=5, generator=draw(2), memory_budget=1)
    sam, worst = sam_ascent(problem, 0.1), worst_case_sharpness(problem, 0.1, num_steps=4)
    return [flat.base_loss, sam.increase, worst.increase, *line.losses.tolist(), *flat.losses.reshape(-1).tolist(),
            *flat.accuracies.reshape(-1).tolist()]  # fmt: skip


def work(rank: int, folder: str) -> None:
    x, y = images()
    share = slice(0, 7) if rank == 0 else slice(7, 24)
    group = torch.distributed.group.WORLD
    problem = Problem(network(), nn.CrossEntropyLoss(), (x[share], y[share]), process_group=group)
    batches = batch_sharpness(problem, 7, num_batches=2, generator=draw())
    torch.manual_seed(rank)
    values, refused = measured(problem), ""
    try:
        loss_slice(problem, 1, folder=folder)
    except ValueError as error:
        refused = str(error)
    torch.save([values, batches.curvatures.tolist(), refused], f"{folder}/{rank}.pt")


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    in_two_processes(work, tmp_path)
    (first, batches, refused), (second, others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second and batches == others and len(batches) == 4
    alone = Problem(network(), nn.CrossEntropyLoss(), images())
    torch.manual_seed(0)  # as the first process, whose draws all take
    assert first == pytest.approx(measured(alone), rel=1e-9)
    x, y = images()
    own = Problem(network(), nn.CrossEntropyLoss(), (x[:7], y[:7]))
    assert batches[0] == pytest.approx(batch_sharpness(own, 7, num_batches=1).curvatures[0].item(), rel=1e-8)
    assert "loss_slice: folder must be None with a process group" in refused
