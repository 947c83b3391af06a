# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab.ops import reference_sparse, sparse_conv
from tests.ops.sparse_conv_samples import Case, tensors

CASES = [
    Case(n=2, c_in=2, c_out=3, height=4, width=5),
    Case(
        n=2, c_in=4, c_out=4, kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, height=5, width=4
    ),
]
Loss = Callable[..., Tensor]


def leaves(case: Case) -> tuple[Tensor, ...]:
    x, values, indices, bias, grad = tensors(case, torch.float64)
    return x.requires_grad_(), values.requires_grad_(), indices, bias.requires_grad_(), grad.requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_of_every_op(case: Case) -> None:
    x, values, indices, bias, grad = leaves(case)
    shape, options = case.weight_shape, case.options
    functions = [
        (lambda x, v, b: sparse_conv.masked_conv2d(x, v, indices, shape, b, **options), (x, values, bias)),
        (lambda g, v: sparse_conv.masked_conv2d_input(g, v, indices, shape, x.shape, **options), (grad, values)),
        (lambda x, g: sparse_conv.masked_conv2d_weight(x, g, indices, shape, **options), (x, grad)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradcheck_of_linear() -> None:
    indices = torch.tensor([0, 3, 5])
    x, values = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    inputs = (x.requires_grad_(), values.requires_grad_(), torch.randn(2, dtype=torch.float64).requires_grad_())
    function = lambda x, v, b: sparse_conv.masked_linear(x, v, indices, (2, 3), b)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("wanted", ["x", "values", "both"])
def test_only_wanted_gradients_are_made(wanted: str, with_bias: bool) -> None:
    case = Case(n=17)
    x, values, indices, bias, grad = tensors(case, torch.float32)
    x.requires_grad_(wanted != "values")
    values.requires_grad_(wanted != "x")
    out = sparse_conv.masked_conv2d(x, values, indices, case.weight_shape, bias if with_bias else None, **case.options)
    out.backward(grad)
    assert (x.grad is not None) == (wanted != "values") and (values.grad is not None) == (wanted != "x")
    assert bias.grad is None


def loss_of(module: Any, case: Case, indices: Tensor) -> Loss:
    return lambda x, v, b: module.masked_conv2d(x, v, indices, case.weight_shape, b, **case.options).sin().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_torch_func(case: Case, argument: int) -> None:
    """Grad, Hessian (jvp of vmap of vjp), reverse over reverse, vmap over data and over values: those of the twin."""
    x, values, indices, bias, _ = tensors(case, torch.float64)
    ours, twin = loss_of(sparse_conv, case, indices), loss_of(reference_sparse, case, indices)
    inputs = (x, values, bias)
    close = torch.testing.assert_close
    close(torch.func.grad(ours, argument)(*inputs), torch.func.grad(twin, argument)(*inputs))
    close(torch.func.hessian(ours, argument)(*inputs), torch.func.hessian(twin, argument)(*inputs))
    mixed = [torch.func.jacrev(torch.func.jacrev(loss, argument), 1)(*inputs) for loss in (ours, twin)]
    close(mixed[0], mixed[1])
    dims = tuple(0 if i == argument else None for i in range(3))
    batch = tuple(torch.stack([t, 2 * t, -t]) if i == argument else t for i, t in enumerate(inputs))
    both = [torch.func.vmap(torch.func.grad(loss, 1), dims)(*batch) for loss in (ours, twin)]
    close(both[0], both[1])


def _sum_of_sines(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return function(at).sin().sum()


@pytest.mark.parametrize("transforms", ["ff", "fff", "ffr", "frf", "rff", "frr", "rfr", "rrf"])
def test_nested_transforms(transforms: str) -> None:
    """Forward over forward too, where PyTorch loses the outer tangents of an autograd.Function: they were zeros."""
    case = CASES[0]
    x, values, indices, bias, grad = tensors(case, torch.float64)
    shape, options = case.weight_shape, case.options

    def functions(module: Any) -> list[Callable[[Tensor], Tensor]]:
        data = lambda a, t: a * t[0] + a.sin() * t[1] ** 2  # noqa: E731
        other = lambda a, t: a * t[1] + a.cos() * t[2] * t[0]  # noqa: E731
        return [
            lambda t: module.masked_conv2d(data(x, t), other(values, t), indices, shape, bias * t[3], **options),
            lambda t: module.masked_conv2d_input(data(grad, t), other(values, t), indices, shape, x.shape, **options),
            lambda t: module.masked_conv2d_weight(data(x, t), other(grad, t), indices, shape, **options),
        ]

    at = torch.tensor([0.3, -0.7, 1.1, 0.5], dtype=torch.float64)
    for ours, twin in zip(functions(sparse_conv), functions(reference_sparse), strict=True):
        results = []
        for function in (ours, twin):
            derivative: Callable[..., Any] = partial(_sum_of_sines, function)
            for letter in reversed(transforms):
                derivative = {"f": torch.func.jacfwd, "r": torch.func.jacrev}[letter](derivative)
            results.append(derivative(at))
        assert results[1].abs().max() > 0.1
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_vmap_folds_directions_into_the_batch() -> None:
    case = Case(n=3)
    x, values, indices, _, _ = tensors(case, torch.float64)
    directions = torch.randn(5, *x.shape, dtype=torch.float64)
    conv = lambda x: sparse_conv.masked_conv2d(x, values, indices, case.weight_shape, **case.options)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(conv)(directions), torch.stack([conv(d) for d in directions]))
    out = torch.func.vmap(conv, in_dims=1, out_dims=2)(directions.movedim(0, 1))
    torch.testing.assert_close(out, torch.stack([conv(d) for d in directions], 2))


def test_vmap_over_nothing() -> None:
    case = Case(n=3)
    x, values, indices, _, grad = tensors(case, torch.float64)
    conv = lambda x, v: sparse_conv.masked_conv2d(x, v, indices, case.weight_shape, **case.options)  # noqa: E731
    none = torch.zeros(0, len(values), dtype=torch.float64)
    assert torch.func.vmap(conv, in_dims=(None, 0))(x, none).shape == (0, *grad.shape)
    assert torch.func.vmap(conv, in_dims=(0, None))(x.new_zeros(0, *x.shape), values).shape == (0, *grad.shape)
    both = lambda g: torch.ops.curvlab.masked_conv2d_backward(x, g, values, indices, *case.arguments)  # noqa: E731
    grads = torch.func.vmap(both)(grad.new_zeros(0, *grad.shape))
    assert [g.shape for g in grads[:2]] == [(0, *x.shape), (0, *values.shape)]


def test_the_joint_op_refuses_derivatives() -> None:
    case = Case(n=2)
    x, values, indices, _, grad = tensors(case, torch.float64)
    with pytest.raises(NotImplementedError, match="masked_conv2d_backward: has no derivative"):
        torch.ops.curvlab.masked_conv2d_backward(x.requires_grad_(), grad, values, indices, *case.arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_registrations(requires_grad: bool) -> None:
    case = Case(n=17)
    x, values, indices, bias, grad = tensors(case, torch.float32)
    for tensor in (x, values, bias, grad):
        tensor.requires_grad_(requires_grad)
    check = torch.library.opcheck
    library = torch.ops.curvlab
    check(library.masked_conv2d, (x, values, indices, bias, *case.arguments))
    check(library.masked_conv2d, (x, values, indices, None, *case.arguments))
    check(library.masked_conv2d_input, (grad, values, indices, x.shape, *case.arguments))
    check(library.masked_conv2d_weight, (x, grad, indices, *case.arguments))
    if not requires_grad:
        check(library.masked_conv2d_backward, (x, grad, values, indices, *case.arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    case = Case(n=17)
    x, values, indices, bias, _ = tensors(case, torch.float32)
    inputs = (x.requires_grad_(), values.requires_grad_(), bias.requires_grad_())

    def loss(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
        out = sparse_conv.masked_conv2d(x, v, indices, case.weight_shape, b, **case.options).relu()
        rows = sparse_conv.masked_linear(out.flatten(1), v[:5], positions, (3, out[0].numel()))
        return rows.square().sum()

    positions = torch.tensor([0, 3, 8, 400, 401])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))
    if dynamic:
        torch.testing.assert_close(compiled(x[:9], values, bias), loss(x[:9], values, bias))
