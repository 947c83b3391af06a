# SPDX-License-Identifier: Apache-2.0
"""Calls at other values leave the model as it was, however its tensors are shared."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from curvlab.operators import HessianOperator, Problem
from curvlab.operators.calls import call_at
from curvlab.operators.ntk import empirical_ntk, linearized_outputs
from tests.operators.models import F64, Tied, labels, normal, seeded


def twice() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def twice_normalized() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(nn.Linear(3, 3), norm, nn.Tanh(), norm).eval()


SHARED: dict[str, Callable[[], nn.Module]] = {"module": twice, "weight": Tied, "buffer": twice_normalized}


@pytest.mark.parametrize("name", SHARED)
def test_values_reach_all_places_and_the_model_gets_its_own_back(name):
    model = seeded(SHARED[name])
    x = normal(4, 4 if name == "weight" else 3)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    before = {key: value.detach().clone() for key, value in own.items()}
    values = {key: value.detach() * 1.5 for key, value in model.named_parameters()}
    values |= {key: value + 0.5 for key, value in model.named_buffers() if value.is_floating_point()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for key, tensor in [*other.named_parameters(), *other.named_buffers()]:
            if key in values:
                tensor.copy_(values[key])
    torch.testing.assert_close(call_at(model, values, (x,)), other(x), rtol=0, atol=0)
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    assert all(after[key] is tensor for key, tensor in own.items())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_inputs_by_name_and_values_left_out():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return scale * self.layer(x)

    model, x = seeded(Named), normal(4, 3)
    zero = torch.zeros(2, dtype=F64)
    expected = 2.0 * x @ model.get_parameter("layer.weight").T
    torch.testing.assert_close(call_at(model, {"layer.bias": zero}, (), {"x": x, "scale": 2.0}), expected)


def test_a_users_model_survives_its_kernel_and_its_operators():
    """A module of two names kept the last value that a transform had put in: a tensor without storage."""
    model, x = seeded(twice), normal(4, 3)
    weight, bias = model.get_parameter("0.weight"), model.get_parameter("0.bias")

    def outputs(w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ w.T + b) @ w.T + b

    parts = jacrev(outputs, argnums=(0, 1))(weight.detach(), bias.detach())
    jacobian = torch.cat([part.reshape(12, -1) for part in parts], 1)
    for _ in range(2):
        for structured in (True, False):
            found = empirical_ntk(model, x, structured=structured)
            torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-12, atol=1e-12)
    params = [value.detach() for value in model.parameters()]
    torch.testing.assert_close(linearized_outputs(model, params, params, x), outputs(*params))
    problem = Problem(model, nn.CrossEntropyLoss(), (x, labels(4, classes=3)))
    for engine in ("autograd", "linearized", "fused"):
        HessianOperator(problem, engine=engine).to_dense()
    assert model.get_parameter("2.weight") is weight and model.get_parameter("2.bias") is bias
    assert problem.model.get_parameter("0.weight").is_leaf
    copy.deepcopy(problem.model)
