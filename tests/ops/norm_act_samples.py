# SPDX-License-Identifier: Apache-2.0
"""Inputs of batch normalization with ReLU and pooling, and what its results must be."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.ops import norm_act, reference_norm_act

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest result


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers around 0.7, on a grid of 1/8 where they are many, so that windows have ties.

    A sample of few numbers is left off the grid: one of them may be the mean itself, and which side of zero rounding
    puts it on decides its gradient.
    """
    x = 0.7 + 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return (8 * x).round() / 8 if x.numel() > 1000 else x


def arguments(x: Tensor, *, affine: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves (x, and with ``affine`` weight and bias, some weights negative) and running statistics."""
    generator = torch.Generator().manual_seed(6)
    channels = x.shape[1]
    scale = torch.randn(2, channels, generator=generator, dtype=torch.float64).to(x.dtype)
    leaves = [x, scale[0], scale[1]] if affine else [x]
    running = [torch.linspace(-0.93, 1.07, channels, dtype=x.dtype), torch.linspace(0.5, 2, channels, dtype=x.dtype)]
    return [leaf.detach().requires_grad_() for leaf in leaves], running  # x keeps its strides


def assert_right(x: Tensor, *, pool: bool, training: bool, affine: bool) -> None:
    """Result, running statistics and gradients against the twin in float64."""
    results = []
    for module, dtype in ((norm_act, x.dtype), (reference_norm_act, torch.float64)):
        leaves, running = arguments(x, affine=affine)
        leaves, running = [t.detach().to(dtype).requires_grad_() for t in leaves], [t.to(dtype) for t in running]
        scale = leaves[1:] or [None, None]
        out = module.batch_norm_relu(leaves[0], *scale, *running, training=training, momentum=0.3, pool=pool)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        results.append([out, *running, *torch.autograd.grad(out, leaves, grad)])
    names = ("out", "running_mean", "running_var", "gx", "gweight", "gbias")
    assert results[0][0].is_contiguous()
    for name, got, want in zip(names, *results, strict=False):
        assert got.shape == want.shape, name
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-9)
        assert error < TOLERANCE[x.dtype], f"{name}: {error:.1e} of the largest"
