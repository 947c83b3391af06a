# SPDX-License-Identifier: Apache-2.0
"""Layers whose derivatives PyTorch gets wrong or scales are looked at in a form whose derivatives are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from curvlab.operators import HessianOperator, Problem
from curvlab.operators.params import unflatten
from tests.operators.models import F64, labels, normal, seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]


def _behind(first: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


def words() -> Tensor:
    return labels(6, 4, classes=5, seed=5)


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "weight_norm": (lambda: _behind(parametrizations.weight_norm(nn.Linear(3, 4)), 4), normal(6, 3)),
    "weight_norm_whole": (lambda: _behind(parametrizations.weight_norm(nn.Linear(3, 4), dim=-1), 4), normal(6, 3)),
    "weight_norm_columns": (lambda: _behind(parametrizations.weight_norm(nn.Linear(3, 4), dim=1), 4), normal(6, 3)),
    "weight_norm_conv": (lambda: _behind(parametrizations.weight_norm(nn.Conv2d(1, 2, 2)), 8), normal(6, 1, 3, 3)),
    "old_weight_norm": (lambda: _behind(old_weight_norm(nn.Linear(3, 4)), 4), normal(6, 3)),
    "scaled_embedding": (lambda: _behind(nn.Embedding(5, 2, scale_grad_by_freq=True), 8), words()),
    "sparse_embedding": (lambda: _behind(nn.Embedding(5, 2, sparse=True), 8), words()),
}


def by_differences(problem: Problem, directions: Tensor) -> Tensor:
    """``[K, K]`` of u^T H v from losses alone, central differences: no derivative of PyTorch enters."""
    values = list(problem.params.values())
    theta = torch.cat([value.reshape(-1) for value in values])
    inputs, targets = next(iter(problem.batches()))

    def loss(at: Tensor) -> Tensor:
        params = dict(zip(problem.params, unflatten(at, values), strict=True))
        return problem.loss.total(problem.outputs(params, inputs), targets) / problem.normalizer

    step = 1e-4
    steps = step * directions
    with torch.no_grad():
        corners = [
            [loss(theta + a + b) - loss(theta + a - b) - loss(theta - a + b) + loss(theta - a - b) for b in steps]
            for a in steps
        ]
    return torch.tensor(corners, dtype=F64) / (4.0 * step * step)


@pytest.mark.parametrize("name", NETS)
def test_second_derivatives_are_those_of_the_loss(name):
    build, x = NETS[name]
    problem = Problem(seeded(build), nn.CrossEntropyLoss(), (x, labels(6, classes=3)))
    directions = normal(6, problem.num_params)
    expected = by_differences(problem, directions)
    for engine in ("autograd", "linearized"):
        found = HessianOperator(problem, engine=engine).to_dense()
        torch.testing.assert_close(found, found.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(directions @ found @ directions.T, expected, rtol=1e-5, atol=1e-5)


def test_the_users_layers_stay_as_they_are():
    new = seeded(lambda: parametrizations.weight_norm(nn.Linear(3, 3)))
    old = seeded(lambda: old_weight_norm(nn.Linear(3, 3)))
    words_ = seeded(lambda: nn.Embedding(3, 3, scale_grad_by_freq=True, sparse=True))
    for model, x in ((new, normal(6, 3)), (old, normal(6, 3)), (words_, labels(6, classes=3))):
        Problem(model, nn.CrossEntropyLoss(), (x, labels(6, classes=3)))
    kinds = {type(module) for module in new.modules()} | {type(hook) for hook in old._forward_pre_hooks.values()}
    assert all(kind.__module__.startswith("torch.") for kind in kinds)
    assert words_.scale_grad_by_freq and words_.sparse
