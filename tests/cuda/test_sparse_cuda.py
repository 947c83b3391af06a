# SPDX-License-Identifier: Apache-2.0
"""The masked convolutions on a GPU: against the dense convolution in float64, and what only a GPU has: graphs, streams,
no synchronization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlab.ops import sparse_conv
from tests.cuda.harness.sparse_host import Conv

pytestmark = pytest.mark.cuda

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
SHAPES = {
    "windows": Conv(128, 64, 64, (32, 32)),
    "windows, ragged": Conv(97, 33, 70, (13, 19)),
    "windows, stride": Conv(64, 32, 48, (17, 31), stride=(2, 2)),
    "windows, groups": Conv(32, 32, 64, (8, 9), kernel=(3, 2), dilation=(1, 2), groups=2),
    "one image": Conv(1, 16, 33, (9, 7)),
    "few images": Conv(5, 3, 16, (31, 8), stride=(1, 3), padding=(2, 0)),
    "depthwise": Conv(40, 12, 24, (6, 6), groups=12),
    "linear": Conv(200, 784, 300, (1, 1), kernel=(1, 1), padding=(0, 0)),
    "no image": Conv(0, 4, 5, (6, 6)),
}


class Case:
    """Data on the GPU, and what the three ops must give, in float64."""

    def __init__(self, conv: Conv, dtype: torch.dtype, density: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(conv.weight_shape, generator=generator) < density

        def data(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to("cuda", dtype)

        self.shape = list(conv.weight_shape)
        self.options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        self.indices = mask.flatten().nonzero().flatten().cuda()
        self.x, self.values = data(conv.images, conv.c_in, *conv.size), data(self.indices.numel())
        self.gradient, self.bias = data(conv.images, conv.c_out, *conv.result), data(conv.c_out)

    def run(self, x: Tensor | None = None, gradient: Tensor | None = None) -> list[Tensor]:
        """Forward, input gradient, weight gradient."""
        x = self.x if x is None else x
        gradient = self.gradient if gradient is None else gradient
        y = sparse_conv.masked_conv2d(x, self.values, self.indices, self.shape, self.bias, **self.options)
        to_x = sparse_conv.masked_conv2d_input(
            gradient, self.values, self.indices, self.shape, tuple(x.shape), **self.options
        )
        to_values = sparse_conv.masked_conv2d_weight(x, gradient, self.indices, self.shape, **self.options)
        return [y, to_x, to_values]

    def expected(self) -> list[Tensor]:
        """On the CPU."""
        dense = torch.zeros(self.shape, dtype=torch.float64).flatten()
        dense[self.indices.cpu()] = self.values.double().cpu()
        weight, x = dense.reshape(self.shape).requires_grad_(), self.x.double().cpu().requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, self.bias.double().cpu(), **self.options)
        to_x, to_weight = torch.autograd.grad(y, (x, weight), self.gradient.double().cpu())
        return [y.detach(), to_x, to_weight.flatten()[self.indices.cpu()]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name: str, dtype: torch.dtype) -> None:
    case = Case(SHAPES[name], dtype)
    found = case.run()
    for got, again, want in zip(found, case.run(), case.expected(), strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, again), "two runs have different bits"
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((got.double().cpu() - want).abs().max()) if want.numel() else 0.0
        assert error <= DTYPES[dtype] * scale, error


def test_any_strides() -> None:
    case = Case(SHAPES["windows, ragged"], torch.float32)
    plain = case.run()
    channels_last = case.run(*(t.to(memory_format=torch.channels_last) for t in (case.x, case.gradient)))
    wide = [
        torch.empty(*t.shape[:-1], 2 * t.shape[-1], device="cuda")[..., ::2].copy_(t) for t in (case.x, case.gradient)
    ]
    for found in (channels_last, case.run(*wide)):
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_no_nonzeros_and_all_of_them() -> None:
    for density in (0.0, 1.1):
        case = Case(SHAPES["few images"], torch.float64, density)
        for got, want in zip(case.run(), case.expected(), strict=True):
            torch.testing.assert_close(got.cpu(), want)


def test_a_graph_replays_new_values_and_nothing_synchronizes() -> None:
    case = Case(SHAPES["windows, groups"], torch.float32)
    case.run()  # builds the plans
    try:
        torch.cuda.set_sync_debug_mode("error")
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for factor in (1.0, 2.0, 3.0):
        case.x.mul_(factor)
        case.values.mul_(factor)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, case.run(), strict=True))


def test_a_mask_without_a_plan_cannot_be_captured() -> None:
    case = Case(Conv(32, 16, 16, (8, 8)), torch.float32)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"call the op .* once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        case.run()


def test_other_streams_and_changed_indices() -> None:
    case = Case(SHAPES["windows, stride"], torch.float32)
    first = case.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = case.run()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    last = case.indices[-1].item()
    assert last + 1 < torch.Size(case.shape).numel()
    case.indices[-1] += 1  # in place: the plan of the old positions must not be used
    for got, want in zip(case.run(), case.expected(), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)


def test_indices_are_checked() -> None:
    case = Case(SHAPES["one image"], torch.float32)
    case.indices = case.indices.flip(0)
    with pytest.raises(ValueError, match="masked_conv2d: indices must be strictly increasing"):
        case.run()


def test_registration() -> None:
    case = Case(SHAPES["few images"], torch.float32)
    o = case.options
    numbers = (case.shape, list(o["stride"]), list(o["padding"]), list(o["dilation"]), o["groups"])
    ops = torch.ops.curvlab
    torch.library.opcheck(ops.masked_conv2d.default, (case.x, case.values, case.indices, case.bias, *numbers))
    size = list(case.x.shape)
    torch.library.opcheck(ops.masked_conv2d_input.default, (case.gradient, case.values, case.indices, size, *numbers))
    torch.library.opcheck(ops.masked_conv2d_weight.default, (case.x, case.gradient, case.indices, *numbers))
    both = ops.masked_conv2d_backward(case.x, case.gradient, case.values, case.indices, *numbers)
    assert all(torch.equal(a, b) for a, b in zip(both[:2], case.run()[1:], strict=True))
    torch.testing.assert_close(both[2], case.gradient.sum((0, 2, 3)))
