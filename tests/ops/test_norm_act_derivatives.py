# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab.ops import norm_act, reference_norm_act
from tests.ops.norm_act_samples import arguments, sample

MODES = [(training, pool) for training in (True, False) for pool in (False, True)]
BOTH = (norm_act, reference_norm_act)


def function_of(module: Any, *, training: bool, pool: bool, tracked: bool = True) -> Callable[..., Tensor]:
    """Of x, weight and bias; running statistics are fresh at every call, or absent."""

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        mean, var = torch.full((3,), 0.1, dtype=x.dtype), torch.full((3,), 1.5, dtype=x.dtype)
        running = (mean, var) if tracked or not training else (None, None)
        return module.batch_norm_relu(x, weight, bias, *running, training=training, pool=pool)

    return function


def inputs() -> list[Tensor]:
    return arguments(sample((2, 3, 4, 5), torch.float64), affine=True)[0]


@pytest.mark.parametrize(("training", "pool"), MODES)
def test_gradcheck(training: bool, pool: bool) -> None:
    function = function_of(norm_act, training=training, pool=pool)
    assert torch.autograd.gradcheck(function, inputs())
    assert torch.autograd.gradcheck(function, inputs()[:1])
    assert torch.autograd.gradgradcheck(function, inputs())
    assert torch.autograd.gradgradcheck(function, inputs()[:1])


@pytest.mark.parametrize(("training", "pool"), MODES)
def test_second_derivatives_where_inputs_depend_on_each_other(training: bool, pool: bool) -> None:
    """Weight and bias made of x: a path through another input must be followed once."""
    x = inputs()[0]
    found = []
    for module in BOTH:
        function = function_of(module, training=training, pool=pool)
        out = function(x, x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append((gradient, *torch.autograd.grad(gradient.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_wanted_gradients_are_made(wanted: tuple[int, ...], create_graph: bool) -> None:
    found = []
    for module in BOTH:
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs())]
        out = function_of(module, training=True, pool=True)(*tensors)
        leaves = [tensors[i] for i in wanted]
        found.append(torch.autograd.grad(out.square().sum(), leaves, create_graph=create_graph))
        out = function_of(module, training=True, pool=True)(*tensors)
        out.square().sum().backward()
        assert [t.grad is not None for t in tensors] == [i in wanted for i in range(3)]
    torch.testing.assert_close(found[0], found[1])


def test_a_bias_without_a_weight() -> None:
    x, _, bias = inputs()
    found = []
    for module in BOTH:
        for create_graph in (False, True):
            out = module.batch_norm_relu(x, None, bias, None, None, training=True)
            found.append(torch.autograd.grad(out.square().sum(), (x, bias), create_graph=create_graph))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize(("training", "pool"), MODES)
def test_torch_func_and_forward_mode(training: bool, pool: bool) -> None:
    tensors = [t.detach() for t in inputs()]
    ours, twin = (function_of(module, training=training, pool=pool, tracked=False) for module in BOTH)
    loss = lambda function: lambda *a: function(*a).square().sum()  # noqa: E731
    close = torch.testing.assert_close
    for argument in range(3):
        close(torch.func.grad(loss(ours), argument)(*tensors), torch.func.grad(loss(twin), argument)(*tensors))
    close(torch.func.hessian(loss(ours), 1)(*tensors), torch.func.hessian(loss(twin), 1)(*tensors))
    tangents = tuple(torch.ones_like(t) for t in tensors)
    close(torch.func.jvp(ours, tuple(tensors), tangents), torch.func.jvp(twin, tuple(tensors), tangents))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tangents[0])
        results = [torch.autograd.forward_ad.unpack_dual(f(dual, *tensors[1:])) for f in (ours, twin)]
    close(results[0].primal, results[1].primal)
    close(results[0].tangent, results[1].tangent)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("training", "pool"), MODES)
def test_registrations(training: bool, pool: bool, requires_grad: bool) -> None:
    (x, weight, bias), (mean, var) = arguments(sample((2, 3, 5, 6), torch.float32), affine=True)
    tensors = [t.detach().requires_grad_(requires_grad) for t in (x, weight, bias)]
    check, library = torch.library.opcheck, torch.ops.curvlab
    check(library.batch_norm_relu, (*tensors, mean, var, training, 0.1, 1e-5, pool))
    check(library.batch_norm_relu, (tensors[0], None, None, mean, var, training, 0.1, 1e-5, pool))
    if training:
        check(library.batch_norm_relu, (*tensors, None, None, training, 0.1, 1e-5, pool))
    if not requires_grad:
        out, *used = library.batch_norm_relu(*tensors, mean, var, training, 0.1, 1e-5, pool)
        check(library.batch_norm_relu_backward, (out, *tensors, *used, training, pool))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    leaves, _ = arguments(sample((4, 3, 8, 6), torch.float32), affine=True)
    running = [[torch.zeros(3), torch.ones(3)] for _ in range(2)]

    def loss(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return norm_act.batch_norm_relu(x.sin(), weight, bias, mean, var, training=True, pool=True).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = compiled(*leaves, *running[0]), loss(*leaves, *running[1])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))
    torch.testing.assert_close(running[0], running[1])
    assert running[0][0].any()
    if dynamic:
        small = leaves[0][:3]
        torch.testing.assert_close(compiled(small, *leaves[1:], *running[0]), loss(small, *leaves[1:], *running[1]))
