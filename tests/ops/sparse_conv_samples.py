# SPDX-License-Identifier: Apache-2.0
"""Masked convolutions to try, and what their results must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlab.ops import reference_sparse, sparse_conv

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}  # of the largest result


@dataclass(frozen=True)
class Case:
    n: int = 18
    c_in: int = 4
    c_out: int = 6
    height: int = 8
    width: int = 7
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.4
    empty_rows: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def arguments(self) -> tuple:
        """The integers of the bare ops."""
        return self.weight_shape, self.stride, self.padding, self.dilation, self.groups

    def __str__(self) -> str:
        plain = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(plain, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()).replace(" ", "") or "plain"


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same numbers, lying otherwise."""
    return {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
        "images_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
        "part": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 0), value=torch.nan)[:, :, 3:, 1:-2],
    }


def tensors(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, ...]:
    """x, values, indices, bias, grad."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(case.weight_shape, generator=generator) < case.density
    if case.empty_rows:
        mask[::2] = False
        mask[:, 1] = False
    indices = reference_sparse.nonzero_positions(mask)
    values = torch.randn(len(indices), generator=generator, dtype=dtype)
    bias = torch.randn(case.c_out, generator=generator, dtype=dtype)
    x = layouts()[layout](torch.randn(case.n, case.c_in, case.height, case.width, generator=generator, dtype=dtype))
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            (case.height, case.width), case.kernel, case.stride, case.padding, case.dilation, strict=True
        )
    ]
    grad = layouts()[layout](torch.randn(case.n, case.c_out, *sizes, generator=generator, dtype=dtype))
    return x, values, indices, bias, grad


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.is_contiguous(), name
    if got.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error < TOLERANCE[got.dtype], f"{name}: {error:.1e} of the largest"


def assert_right(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Every op against its twin in float64."""
    x, values, indices, bias, grad = tensors(case, dtype, layout)
    wide = [t.double() for t in (x, values, bias, grad)]
    shape, options = case.weight_shape, case.options
    want = reference_sparse.masked_conv2d(wide[0], wide[1], indices, shape, wide[2], **options)
    assert_close("out", sparse_conv.masked_conv2d(x, values, indices, shape, bias, **options), want)
    plain = reference_sparse.masked_conv2d(wide[0], wide[1], indices, shape, **options)
    assert_close("out without bias", sparse_conv.masked_conv2d(x, values, indices, shape, **options), plain)
    gx = reference_sparse.masked_conv2d_input(wide[3], wide[1], indices, shape, x.shape, **options)
    gv = reference_sparse.masked_conv2d_weight(wide[0], wide[3], indices, shape, **options)
    assert_close("gx", sparse_conv.masked_conv2d_input(grad, values, indices, shape, x.shape, **options), gx)
    assert_close("gv", sparse_conv.masked_conv2d_weight(x, grad, indices, shape, **options), gv)
    both = torch.ops.curvlab.masked_conv2d_backward(x, grad, values, indices, *case.arguments)
    assert_close("gx of both", both[0], gx)
    assert_close("gv of both", both[1], gv)
    assert_close("gradient of the bias", both[2], wide[3].sum((0, 2, 3)))
