# SPDX-License-Identifier: Apache-2.0
"""Checks that every newcomer inherits: what an op without a derivative must do, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal as bit patterns, so NaN equals NaN and 0 does not equal -0."""
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    assert torch.equal(a.cpu().view(torch.int64), b.cpu().view(torch.int64))


def assert_registered_well(op: Any, args: tuple, *, has_nan: bool = False) -> None:
    """Schema, autograd registration and fake kernel; tracing too, which opcheck compares without NaN == NaN."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(op, args, test_utils=tests if has_nan else [*tests, "test_aot_dispatch_dynamic"])


def assert_compiles(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> None:
    """One graph, the same values."""
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(tensors), function(tensors), rtol=0, atol=0, equal_nan=True)


def assert_refuses_derivatives(function: Callable[[Sequence[Tensor]], Tensor], device: str = "cpu") -> None:
    """Gradients are errors in every route, never silent zeros."""
    x = torch.randn(4, 3, device=device)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        function([leaf]).nansum().backward()
    assert leaf.grad is None
    with torch.no_grad():
        assert not function([leaf]).requires_grad
    assert not function([x]).requires_grad
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match="has no derivative and no batching rule"):
            transform(lambda w: function([w]).nansum())(x)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.func.jvp(lambda w: function([w]), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no derivative"):
        function([forward_ad.make_dual(x, x)])
