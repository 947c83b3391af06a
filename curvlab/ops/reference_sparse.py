# SPDX-License-Identifier: Apache-2.0
"""The masked convolutions in plain PyTorch, valid in float64: dense weights, the values scattered into them.

Same signatures and results as ``curvlab.ops.sparse_conv``; differentiable in every route that PyTorch's own
convolution is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

Pair = int | Sequence[int]


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pairs(stride: Pair, padding: Pair, dilation: Pair) -> dict[str, Any]:
    """For conv2d_input and conv2d_weight, whose annotations say int."""
    return {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation)}


def dense_weight(values: Tensor, indices: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The weight ``[C_out, C_in / groups, kH, kW]``: ``values`` at the flat positions ``indices``, zeros elsewhere."""
    return values.new_zeros(math.prod(weight_shape)).index_put((indices,), values).view(tuple(weight_shape))


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight_shape: Sequence[int],
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """As ``curvlab.ops.sparse_conv.masked_conv2d``."""
    weight = dense_weight(values, indices, weight_shape)
    return F.conv2d(x, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def masked_conv2d_input(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weight_shape: Sequence[int],
    input_size: Sequence[int],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """As ``curvlab.ops.sparse_conv.masked_conv2d_input``."""
    weight = dense_weight(values, indices, weight_shape)
    return conv2d_input(tuple(input_size), weight, grad, **_pairs(stride, padding, dilation), groups=groups)


def masked_conv2d_weight(
    x: Tensor,
    grad: Tensor,
    indices: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """As ``curvlab.ops.sparse_conv.masked_conv2d_weight``."""
    dense = conv2d_weight(x, tuple(weight_shape), grad, **_pairs(stride, padding, dilation), groups=groups)
    return dense.reshape(-1)[indices]


def masked_linear(
    x: Tensor, values: Tensor, indices: Tensor, weight_shape: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """As ``curvlab.ops.sparse_conv.masked_linear``."""
    return F.linear(x, dense_weight(values, indices, weight_shape), bias)


def nonzero_positions(mask: Tensor) -> Tensor:
    """``indices`` of a mask: the flat positions of its nonzeros, in increasing order."""
    return torch.nonzero(mask.reshape(-1)).reshape(-1)
