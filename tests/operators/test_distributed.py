# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo, uneven shares of uneven batches: every matrix is that of one process, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvlab.operators.covariance import GradientCovarianceOperator
from curvlab.operators.fisher import EmpiricalFisherOperator, FisherOperator
from curvlab.operators.ggn import GGNOperator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.ntk_operator import NTKOperator
from curvlab.operators.problem import Problem
from tests.processes import in_two_processes

OPERATORS = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "empirical": EmpiricalFisherOperator,
    "covariance": GradientCovarianceOperator,
    "jacobian": JacobianOperator,
    "ntk": NTKOperator,
}
SHARES = ([5, 2], [4])  # samples of the batches of each process


def problem_of(rank: int | None, group: Any = None) -> Problem:
    """The share of ``rank``; None: all samples. Class weights make Z differ from N."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (11,), generator=generator)
    sizes = [size for share in SHARES for size in share]
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    if rank is not None:
        start = sum(len(share) for share in SHARES[:rank])
        batches = batches[start : start + len(SHARES[rank])]
    loss = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    return Problem(model, loss, batches, process_group=group)


def products(problem: Problem) -> dict[str, Tensor]:
    found = {"facts": torch.tensor([problem.num_samples, problem.normalizer], dtype=torch.float64)}
    generator = torch.Generator().manual_seed(4)
    for name, build in OPERATORS.items():
        operator = build(problem)
        rows = torch.randn(3, operator.shape[1], generator=generator, dtype=torch.float64)
        found[name] = operator.apply_rows(rows)
        if not operator.is_symmetric:
            rows = torch.randn(2, operator.shape[0], generator=generator, dtype=torch.float64)
            found[f"{name} transposed"] = operator.apply_rows_transposed(rows)
    found["mean"] = GradientCovarianceOperator(problem).mean
    return found


def work(rank: int, folder: str) -> None:
    torch.save(products(problem_of(rank, dist.group.WORLD)), Path(folder) / f"{rank}.pt")


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no distributed")
def test_two_processes_are_one(tmp_path: Path, one_thread: None) -> None:
    in_two_processes(work, tmp_path)
    alone = products(problem_of(None))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]
    for name, expected in alone.items():
        for got in both:
            assert got[name].shape == expected.shape, name
            assert (got[name] - expected).abs().max().item() <= 1e-12 * expected.abs().max().item(), name
        assert torch.equal(both[0][name], both[1][name]), name
