# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab import ops
from curvlab.ops import norm_act, reference_norm_act
from tests.ops.norm_act_samples import arguments, assert_right, sample

SHAPES = [
    (3, 5, 7, 9),
    (2, 1, 8, 8),
    (1, 3, 4, 5),
    (4, 70, 16, 16),  # more channels than a block has
    (2, 3, 32, 33),
    (1, 2, 2, 2),
    (33, 4, 5, 6),
    (2, 2, 3, 2100),  # rows longer than the buffer of products
    (9, 3, 70, 71),  # several blocks
    *[(2, 3, 4, width) for width in (2, 3, 6, 8, 11, 14, 15, 18, 22, 30, 40)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_twin(shape: tuple[int, ...], pool: bool, dtype: torch.dtype) -> None:
    for training, affine in itertools.product((False, True), (False, True)):
        assert_right(sample(shape, dtype), pool=pool, training=training, affine=affine)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "images_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "part": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 0), value=torch.nan)[:, :, 3:, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_any_strides(layout: str, pool: bool) -> None:
    x = LAYOUTS[layout](sample((5, 6, 9, 8), torch.float32))
    assert not x.is_contiguous()
    assert_right(x, pool=pool, training=True, affine=True)


def gradient_of(module: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, **options: bool) -> Tensor:
    leaf = x.clone().requires_grad_()
    channels = x.shape[1]
    out = module.batch_norm_relu(
        leaf, weight, bias, torch.zeros(channels), torch.ones(channels), eps=0.0, pool=True, **options
    )
    return torch.autograd.grad(out, leaf, grad)[0]


def test_ties_go_to_the_first_of_a_window_and_zeros_get_nothing() -> None:
    """Every window of values from {-1, 0, 1}, normalized by 0 and 1: the same bits as PyTorch's three functions."""
    windows = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4))).view(81, 1, 2, 2)
    grad = torch.arange(1.0, 82.0).view(81, 1, 1, 1)
    for scale in (1.0, -1.0, 0.0):
        parameters = torch.tensor([scale]), torch.zeros(1)
        ours = gradient_of(norm_act, windows, *parameters, grad, training=False)
        assert torch.equal(ours, gradient_of(reference_norm_act, windows, *parameters, grad, training=False))
    wide = windows.view(1, 9, 9, 2, 2).permute(0, 1, 3, 2, 4).reshape(1, 1, 18, 18)  # rows of 9 windows: vectors
    grads = grad.view(1, 1, 9, 9)
    ours = gradient_of(norm_act, wide, torch.ones(1), torch.zeros(1), grads, training=False)
    want = gradient_of(reference_norm_act, wide, torch.ones(1), torch.zeros(1), grads, training=False)
    assert torch.equal(ours, want)
    assert ours.count_nonzero() == 81 - 16  # the windows of -1 and 0 alone get nothing


def test_equal_values_stay_equal_in_training() -> None:
    """Windows of one repeated value: the gradient through them is that of their first place."""
    values = sample((4, 3, 5, 9), torch.float64)
    x = values.repeat_interleave(2, 2).repeat_interleave(2, 3)
    grad = torch.randn(4, 3, 5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for module in (norm_act, reference_norm_act):
        leaf = x.clone().requires_grad_()
        out = module.batch_norm_relu(leaf, None, None, None, None, training=True, pool=True)
        found.append(torch.autograd.grad(out, leaf, grad)[0])
    torch.testing.assert_close(found[0], found[1])


def test_nan_and_infinity_stay_where_they_are_in_eval_mode() -> None:
    x = sample((2, 2, 6, 6), torch.float32)
    x[0, 0, 1, 1], x[1, 1, 2, 3], x[1, 1, 2, 2], x[0, 1, 0, 0] = torch.nan, torch.nan, torch.inf, torch.inf
    for pool in (False, True):
        results = []
        for module in (norm_act, reference_norm_act):
            leaf = x.clone().requires_grad_()
            out = module.batch_norm_relu(
                leaf, None, None, torch.zeros(2), torch.ones(2), training=False, pool=pool, eps=0.0
            )
            results.append((out, torch.autograd.grad(out, leaf, torch.ones_like(out))[0]))
        torch.testing.assert_close(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_data_far_from_zero_keep_their_digits(offset: float) -> None:
    """Float32 results against float64 ones of the same float32 input: sum x^2 - (sum x)^2 / n in float32 keeps none."""
    x = sample((8, 3, 12, 12), torch.float32) + offset
    got = norm_act.batch_norm_relu(x, None, None, None, None, training=True)
    want = reference_norm_act.batch_norm_relu(x.double(), None, None, None, None, training=True)
    assert (got.double() - want).abs().max() < 1e-6 * want.max()


def test_a_constant_channel_gives_its_bias() -> None:
    bias = torch.tensor([0.25, -1.0])
    x = torch.full((3, 2, 4, 4), 1234.567)
    out = norm_act.batch_norm_relu(x, torch.ones(2), bias, None, None, training=True, pool=True)
    assert torch.equal(out, bias.relu()[None, :, None, None].expand(3, 2, 2, 2))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_training_run_moves_statistics_like_the_module(momentum: float | None, affine: bool) -> None:
    module = torch.nn.BatchNorm2d(4, momentum=momentum, affine=affine)
    mean, var = torch.zeros(4), torch.ones(4)
    for step in range(1, 4):
        x = sample((3, 4, 5, 5), torch.float32) * step + step
        share = 1.0 / step if momentum is None else momentum
        want = module(x).relu()
        got = norm_act.batch_norm_relu(x, module.weight, module.bias, mean, var, training=True, momentum=share)
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)
    before = mean.clone(), var.clone()
    x = sample((3, 4, 5, 5), torch.float32)
    got = norm_act.batch_norm_relu(x, module.weight, module.bias, mean, var, training=False)
    torch.testing.assert_close(got, module.eval()(x).relu())
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_running_statistics_that_another_node_saved_are_seen_as_changed() -> None:
    mean, var, factor = torch.zeros(2), torch.ones(2), torch.ones(2, requires_grad=True)
    product = (factor * mean).sum()
    norm_act.batch_norm_relu(sample((2, 2, 3, 3), torch.float32), None, None, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_threads_give_equal_bits() -> None:
    before, results = torch.get_num_threads(), []
    x = sample((40, 70, 16, 16), torch.float32)
    grad = torch.randn(40, 70, 8, 8, generator=torch.Generator().manual_seed(1))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves, running = arguments(x, affine=True)
            out = norm_act.batch_norm_relu(*leaves, *running, training=True, pool=True)
            results.append((out, *running, *torch.autograd.grad(out, leaves, grad)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_input_changes_nothing(shape: tuple[int, ...]) -> None:
    leaves, running = arguments(torch.zeros(shape), affine=True)
    before = [t.clone() for t in running]
    for training in (True, False):
        out = norm_act.batch_norm_relu(*leaves, *running, training=training)
        assert out.shape == shape
        gradients = torch.autograd.grad(out, leaves, torch.zeros_like(out))
        assert not any(g.any() for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, running, strict=True))


def test_other_dtypes_run_the_plain_functions() -> None:
    x = sample((3, 4, 6, 6), torch.float32).bfloat16()
    mean, var = torch.zeros(4), torch.ones(4)
    got = norm_act.batch_norm_relu(x, None, None, mean, var, training=True, pool=True)
    want = reference_norm_act.batch_norm_relu(x, None, None, torch.zeros(4), torch.ones(4), training=True, pool=True)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want) and mean.any()


# ---- refusals
def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "one value": ({"x": torch.zeros(1, 2, 1, 1)}, ValueError, "more than one value per channel when training"),
        "dims": ({"x": torch.zeros(2, 4, 4)}, ValueError, r"x must be \[N, C, H, W\], got \[2, 4, 4\]"),
        "small": ({"x": torch.zeros(3, 2, 1, 4), "pool": True}, ValueError, "at least 2 high and wide for pooling"),
        "weight": ({"weight": torch.zeros(3)}, ValueError, r"weight must be \[2\] \(channels of x\), got \[3\]"),
        "bias": ({"bias": torch.zeros(2, 1)}, ValueError, r"bias must be \[2\]"),
        "dtype": ({"weight": torch.zeros(2).double()}, TypeError, "weight must be float32, got float64"),
        "running dtype": ({"running_var": torch.ones(2).double()}, TypeError, "running_var must be float32"),
        "one statistic": ({"running_var": None}, ValueError, "must both be tensors or both None"),
        "none in eval": (
            {"running_mean": None, "running_var": None, "training": False},
            ValueError,
            "must be tensors where training is False, got None",
        ),
    }


@pytest.mark.parametrize("which", bad_calls())
def test_bad_input(which: str) -> None:
    change, error, message = bad_calls()[which]
    call: dict[str, Any] = {
        "x": torch.zeros(3, 2, 4, 4),
        "weight": torch.ones(2),
        "bias": torch.zeros(2),
        "running_mean": torch.zeros(2),
        "running_var": torch.ones(2),
        "training": True,
    }
    with pytest.raises(error, match=f"batch_norm_relu: .*{message}"):
        norm_act.batch_norm_relu(**(call | change))


def test_bad_gradient() -> None:
    x, channel = torch.zeros(3, 2, 4, 4), torch.ones(2, dtype=torch.float64)
    backward = torch.ops.curvlab.batch_norm_relu_backward
    with pytest.raises(ValueError, match=r"grad must be \[3, 2, 2, 2\] \(the output's shape\)"):
        backward(x, x, None, None, channel, channel, True, True)
    with pytest.raises(NotImplementedError, match="batch_norm_relu_backward: has no derivative"):
        backward(x.clone().requires_grad_(), x, None, None, channel, channel, True, False)


# ---- every instruction set
CHECK = """
import torch
from tests.ops.norm_act_samples import assert_right, sample
from curvlab import ops
print(ops.cpu_capability())
for dtype in (torch.float32, torch.float64):
    for shape in ((3, 5, 7, 9), (2, 3, 32, 33), (5, 70, 8, 8), (2, 3, 4, 22), (2, 2, 3, 2100)):
        for pool in (False, True):
            assert_right(sample(shape, dtype), pool=pool, training=True, affine=True)
            assert_right(sample(shape, dtype), pool=pool, training=False, affine=True)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    order = ["default", "avx2", "avx512"]
    if order.index(capability) > order.index(ops.cpu_capability()):
        pytest.skip(f"this CPU lacks {capability}")
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"CURVLAB_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability]
