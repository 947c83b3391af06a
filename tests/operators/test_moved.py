# SPDX-License-Identifier: Apache-2.0
"""Operators moved along a training run: what was picked and checked once, at other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from curvlab.operators import FisherOperator, GradientCovarianceOperator, HessianOperator, Problem


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def moved_network(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, value in enumerate([*other.parameters(), other[1].running_mean, other[1].running_var]):
            value += 0.1 + 0.05 * i
    return other


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64, generator=generator), torch.arange(7) % 3


@pytest.mark.parametrize("params", [None, "3.*"])
@pytest.mark.parametrize("engine", ["auto", "linearized", "autograd"])
def test_moved_operator_is_the_operator_of_the_moved_network(engine: str, params: str | None) -> None:
    model = network()
    other = moved_network(model)
    first = HessianOperator(Problem(model, nn.CrossEntropyLoss(), samples(), params=params), engine=engine)
    before = first.to_dense()
    moved = first.at(other)
    expected = HessianOperator(Problem(other, nn.CrossEntropyLoss(), samples(), params=params)).to_dense()
    torch.testing.assert_close(moved.to_dense(), expected)
    torch.testing.assert_close(first.to_dense(), before, rtol=0, atol=0)
    assert not torch.allclose(before, expected, rtol=1e-2)
    assert type(moved.engine) is type(first.engine)


def test_moving_forgets_what_belongs_to_the_old_parameters() -> None:
    model = network()
    other = moved_network(model)
    problem = Problem(model, nn.CrossEntropyLoss(), samples())
    covariance = GradientCovarianceOperator(problem)
    old_mean = covariance.mean
    moved = covariance.at(other)
    fresh = GradientCovarianceOperator(Problem(other, nn.CrossEntropyLoss(), samples()))
    torch.testing.assert_close(moved.to_dense(), fresh.to_dense())
    assert not torch.allclose(old_mean, moved.mean, rtol=1e-2)
    fisher = FisherOperator(problem, kind="monte_carlo", num_samples=2)
    again = FisherOperator(Problem(other, nn.CrossEntropyLoss(), samples()), kind="monte_carlo", num_samples=2)
    torch.testing.assert_close(fisher.at(other).to_dense(), again.to_dense())


def test_another_network_is_refused() -> None:
    operator = HessianOperator(Problem(network(), nn.CrossEntropyLoss(), samples()))
    with pytest.raises(ValueError, match=r"at: model must have shape \[6, 4\] for 0\.weight, got \[5, 4\]"):
        operator.at(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match=r"at: model must have '0\.weight', got \['bias', 'weight'\]"):
        operator.at(nn.Linear(4, 3))
