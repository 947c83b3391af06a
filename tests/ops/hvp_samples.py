# SPDX-License-Identifier: Apache-2.0
"""Random calls of the ops of csrc/hvp, shared by the tests of the CPU and of CUDA."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlab.ops import hvp, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
# K, R, C: no full register, periods of several rows, wide rows with and without a rest, several blocks of columns
SHAPES = ((1, 1, 1), (2, 3, 5), (5, 129, 10), (2, 1000, 16), (1, 700, 127), (3, 65, 130), (2, 64, 300), (1, 70, 2049))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw:
    """Makes tensors of one dtype and device from one seed, and throws coins."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device
        self.coin = random.Random(seed)

    def data(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def channels(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, accumulation(self.dtype))

    def rows(self, k: int, c: int) -> Tensor:
        """``[K, C]`` out of a block of flat vectors: rows that start anywhere."""
        return self.channels(k, 2 * c + 3)[:, 1 : 1 + c]

    def mask(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator, dtype=torch.uint8).to(self.device)

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.coin.random() < 0.5 else None

    def first(self, r: int, c: int) -> Tensor | None:
        return self.coin.choice([None, self.mask(r, c), self.data(r, c)])


def wide(value: Any) -> Any:
    """A tensor of numbers in float64 on the CPU; masks and the rest as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu() if value.dtype in (torch.uint8, torch.int32, torch.int64) else value.cpu().double()


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within the dtype's tolerance, relative to the largest number."""
    assert got.shape == want.shape
    largest = float(want.abs().max()) if want.numel() else 0.0
    error = float((got.cpu().double() - want).abs().max()) if want.numel() else 0.0
    assert error <= TOLERANCE[dtype] * max(scale, largest), f"{error} at {largest}"


def check_forward(draw: Draw, shape: tuple[int, int, int]) -> None:
    """A call with any of the terms."""
    k, r, c = shape
    a, b = draw.data(k, r, c), draw.maybe(lambda: draw.data(k, r, c))
    terms: dict[str, Any] = {
        "bias": draw.maybe(lambda: draw.rows(k, c)),
        "scale": draw.maybe(lambda: draw.channels(c)),
        "gain": draw.maybe(lambda: draw.rows(k, c)),
        "centered": draw.data(r, c),
        "residual": draw.maybe(lambda: draw.data(k, r, c)),
        "first": draw.first(r, c),
        "delta": draw.data(r, c),
    }
    dot = draw.maybe(lambda: draw.channels(k, c))
    want_dot = None if dot is None else torch.empty(k, c, dtype=torch.float64)
    want = reference.tangent_forward(
        wide(a), wide(b), keep_pre=True, dot=want_dot, **{n: wide(x) for n, x in terms.items()}
    )
    keep, out = draw.coin.random() < 0.5, draw.coin.choice([None, a])
    got = hvp.tangent_forward(a, b, keep_pre=keep, out=out, dot=dot, **terms)
    assert isinstance(got, tuple) == keep
    result, pre = got if isinstance(got, tuple) else (got, None)
    assert out is None or result is a
    assert_near(result, want[0], draw.dtype)
    if pre is not None:
        assert_near(pre, want[1], draw.dtype)
    if dot is not None and want_dot is not None:
        assert_near(dot, want_dot, _sum_dtype(draw.dtype), 10 * r**0.5)


def check_backward(draw: Draw, shape: tuple[int, int, int]) -> None:
    """A call with any of the terms."""
    k, r, c = shape
    g = draw.data(k, r, c)
    terms: dict[str, Any] = {
        "g2": draw.maybe(lambda: draw.data(k, r, c)),
        "first": draw.first(r, c),
        "second": draw.maybe(lambda: draw.data(r, c)),
        "pre": draw.data(k, r, c),
        "scale": draw.maybe(lambda: draw.channels(c)),
        "gain": draw.maybe(lambda: draw.rows(k, c)),
        "delta": draw.data(r, c),
        "centered": draw.maybe(lambda: draw.data(r, c)),
        "t": draw.maybe(lambda: draw.data(k, r, c)),
        "dot": draw.maybe(lambda: draw.rows(k, c)),
        "inv_std": draw.channels(c),
    }
    sums: dict[str, Any] = {
        "out_bias": draw.maybe(lambda: draw.rows(k, c)),
        "out_gain": draw.maybe(lambda: draw.rows(k, c)),
    }
    flags: dict[str, Any] = {name: draw.coin.random() < 0.5 for name in ("want_bias", "want_gain", "accumulate")}
    want = reference.tangent_backward(
        wide(g),
        **{n: wide(x) for n, x in terms.items()},
        **{n: None if x is None else wide(x).clone() for n, x in sums.items()},
        **flags,
    )
    want_gy, out_gt = draw.coin.random() < 0.7, draw.coin.choice([None, g])
    gy, gt, bias, gain = hvp.tangent_backward(g, **terms, **sums, **flags, want_gy=want_gy, out_gt=out_gt)
    if want_gy:
        assert gy is not None and want[0] is not None
        assert_near(gy, want[0], draw.dtype)
    assert_near(gt, want[1], draw.dtype)
    for name, found, right in (("bias", bias, want[2]), ("gain", gain, want[3])):
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            assert sums[f"out_{name}"] is None or found is sums[f"out_{name}"]
            assert_near(found, right, _sum_dtype(draw.dtype), 10 * r**0.5)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of bfloat16 data are made of float32 numbers that were not rounded yet."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def check_pooling(draw: Draw, shape: tuple[int, int, int, int, int]) -> None:
    """Gather, scatter with windows that meet and with windows that do not; shape is (K, N, HW, R, C)."""
    k, n, size, windows, c = shape
    x, g = draw.data(k, n, size, c), draw.data(k, n, windows, c)
    index = torch.randint(-1, size, (n, windows, c), generator=draw.generator, dtype=torch.int32)
    assert torch.equal(hvp.pool_gather(x, index.to(x.device)).cpu(), reference.pool_gather(x.cpu(), index))
    scattered = hvp.pool_scatter(g, index.to(x.device), size)
    assert_near(scattered, reference.pool_scatter(wide(g), index, size), draw.dtype)
    order = torch.rand(n, size, c, generator=draw.generator).argsort(1)[:, :windows].int()
    alone = torch.where(torch.rand(order.shape, generator=draw.generator) < 0.2, -1, order)
    scattered = hvp.pool_scatter(g[:, :, : alone.shape[1]].contiguous(), alone.to(x.device), size, unique=True)
    assert_near(scattered, reference.pool_scatter(wide(g)[:, :, : alone.shape[1]], alone, size), draw.dtype)


# K, N, H, W, C, O, h, w, stride, pool: less than a register of outputs, several, a rest; odd maps; taps of one to five
# calls; nothing but a rest of positions
FIRST_CONVS = (
    (2, 3, 11, 9, 1, 20, 3, 3, (1, 1), True),
    (1, 9, 14, 18, 3, 32, 3, 3, (1, 1), True),
    (3, 2, 12, 15, 3, 5, 7, 7, (2, 1), True),
    (2, 17, 12, 20, 3, 16, 3, 3, (1, 1), False),
    (1, 4, 15, 13, 4, 70, 5, 3, (2, 2), False),
    (1, 1, 3, 3, 2, 1, 3, 3, (1, 1), False),
    (1, 2, 3, 3, 2, 4, 3, 3, (1, 1), True),
)


def check_first_conv(draw: Draw, shape: tuple[int, int, int, int, int, int, int, int, tuple[int, int], bool]) -> None:
    """Both ops, with rows of a block of flat vectors, some windows without a winner, and sums that are added."""
    k, n, height, width, c, o, h, w, stride, pool = shape
    x = draw.data(n, height, width, c)
    rows = draw.rows(k, o * c * h * w)
    weight, bias = rows.view(k, o, c, h, w), draw.maybe(lambda: draw.rows(k, o))
    part = 2 if pool else 1
    windows = (((height - h) // stride[0] + 1) // part) * (((width - w) // stride[1] + 1) // part)
    choice = torch.randint(0, 5, (n, windows, o), generator=draw.generator, dtype=torch.uint8) if pool else None
    options: dict[str, Any] = {"choice": choice, "stride": stride}
    got = hvp.first_conv_forward(x, weight, bias, **options)
    assert_near(got, reference.first_conv_forward(wide(x), wide(weight), wide(bias), **options), draw.dtype)
    g, start = draw.data(k, n, windows, o), draw.rows(k, o * c * h * w).view(k, o, c, h, w)
    for accumulate in (False, True):
        want = reference.first_conv_weight(wide(g), wide(x), wide(start).clone(), **options, accumulate=accumulate)
        assert_near(hvp.first_conv_weight(g, x, start, **options, accumulate=accumulate), want, draw.dtype)


def softmax_arguments(draw: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, label (some outside of the classes), weight (some 0), u."""
    k, n, c = shape
    p = torch.softmax(3 * draw.channels(n, c), 1)
    label = torch.randint(-1, c, (n,), generator=draw.generator).to(p.device)
    return p, label, draw.channels(n).relu(), draw.data(k, n, c)


def check_softmax(draw: Draw, shape: tuple[int, int, int]) -> None:
    """Into a new tensor and in place."""
    p, label, weight, u = softmax_arguments(draw, shape)
    want = reference.softmax_hessian_product(wide(p), wide(label), wide(weight), wide(u))
    assert_near(hvp.softmax_hessian_product(p, label, weight, u), want, draw.dtype)
    assert hvp.softmax_hessian_product(p, label, weight, u, out=u) is u
    assert_near(u, want, draw.dtype)


def check_activation(draw: Draw, kind: str) -> None:
    """In and out of saturation, at 0, with odd parameters."""
    z = draw.data(1003)
    z *= torch.tensor([0.01, 1.0, 5.0, 30.0], dtype=z.dtype, device=z.device).repeat(251)[:1003]
    z[5] = 0.0
    delta = draw.data(1003)
    numbers: dict[str, Any] = {"slope": 0.3, "beta": 1.7, "threshold": 5.0}
    first, second = hvp.activation_factors(z, delta, kind, **numbers)
    want_first, want_second = reference.activation_factors(wide(z), wide(delta), kind, **numbers)
    assert_near(first, want_first.double(), draw.dtype)
    assert (second is None) == (want_second is None)
    if second is not None and want_second is not None:
        assert_near(second, want_second, draw.dtype)
    only, nothing = hvp.activation_factors(z, None, kind, **numbers)
    assert nothing is None and torch.equal(only, first)
