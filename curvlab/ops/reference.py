# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch, valid in float64: the second opinion. Same signatures and results, no kernel of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NAN = float("nan")


def _sums(x: Tensor, reference: Tensor | None) -> Tensor:
    """l1, sum of squares, linf, nonzeros, squared distance, inner product, squared reference of one tensor."""
    x = x.detach().double().reshape(-1)
    linf = x.abs().max() if x.numel() else x.new_zeros(())
    own = [x.abs().sum(), x.square().sum(), linf, torch.count_nonzero(x).double()]
    if reference is None:
        return torch.stack([*own, *[x.new_full((), _NAN)] * 3])
    r = reference.detach().double().reshape(-1)
    return torch.stack([*own, (x - r).square().sum(), (x * r).sum(), r.square().sum()])


def multi_tensor_norms(tensors: Sequence[Tensor], reference: Sequence[Tensor] = (), *, l2_only: bool = False) -> Tensor:
    """As ``curvlab.ops.norms.multi_tensor_norms``."""
    if not tensors:
        return torch.zeros(1, 7, dtype=torch.float64)
    references: Sequence[Tensor | None] = reference or [None] * len(tensors)
    rows = torch.stack([_sums(x, r) for x, r in zip(tensors, references, strict=True)])
    total = rows.sum(0)
    total[2] = rows[:, 2].max()
    out = torch.cat([rows, total[None]])
    out[:, [1, 4, 6]] = out[:, [1, 4, 6]].sqrt()
    if l2_only:
        out[:, [0, 2, 3, 4, 5, 6]] = _NAN
    return out


def _filter_norms(w: Tensor) -> Tensor:
    w = w.detach().double()
    rows = w.shape[0] if w.dim() else 1
    return w.reshape(rows, w.numel() // max(rows, 1)).square().sum(1).sqrt()


def filter_norms(tensors: Sequence[Tensor]) -> Tensor:
    """As ``curvlab.ops.norms.filter_norms``."""
    return torch.cat([_filter_norms(w) for w in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)


# ---- hvp: computed in the dtype of the arguments, so that float64 arguments give the second opinion ------------------
_SQRT_HALF, _INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_GELU_K, _GELU_A = math.sqrt(2 / math.pi), 0.044715


def _tanh_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    e = torch.exp(-2 * z.abs())
    first = 4 * e / (1 + e).square()  # 1 - tanh^2 without its cancellation
    return first, -2 * torch.tanh(z) * first


def _sigmoid_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    e = torch.exp(-z.abs())
    first = e / (1 + e).square()
    return first, -torch.tanh(z / 2) * first


def _gelu_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-z.square() / 2) * _INV_SQRT_2PI
    return torch.special.erfc(-z * _SQRT_HALF) / 2 + z * density, density * (2 - z.square())


def _gelu_tanh_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    u = _GELU_K * (z + _GELU_A * z**3)
    u1, u2 = _GELU_K * (1 + 3 * _GELU_A * z.square()), 6 * _GELU_K * _GELU_A * z
    s, s1 = _tanh_derivatives(u)  # the first and second derivative of tanh at u
    return torch.sigmoid(2 * u) + z / 2 * s * u1, s * u1 + z / 2 * (s * u2 + s1 * u1.square())


def _silu_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _sigmoid_derivatives(z)
    return torch.sigmoid(z) + z * first, 2 * first + z * second


def _softplus_derivatives(z: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = beta * z > threshold
    first, second = torch.sigmoid(beta * z), beta * _sigmoid_derivatives(beta * z)[0]
    return torch.where(linear, 1.0, first), torch.where(linear, 0.0, second)


_DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "tanh": _tanh_derivatives,
    "sigmoid": _sigmoid_derivatives,
    "gelu": _gelu_derivatives,
    "gelu_tanh": _gelu_tanh_derivatives,
    "silu": _silu_derivatives,
}


def activation_factors(
    z: Tensor,
    delta: Tensor | None,
    kind: str,
    *,
    slope: float = 0.01,
    beta: float = 1.0,
    threshold: float = 20.0,
    approximate: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """As ``curvlab.ops.hvp.activation_factors``."""
    if kind == "relu":
        return (~(z <= 0)).to(torch.uint8), None
    if kind == "leaky_relu":
        return torch.where(z <= 0, z.new_tensor(slope), z.new_tensor(1.0)), None
    if kind == "softplus":
        first, second = _softplus_derivatives(z, beta, threshold)
    else:
        first, second = _DERIVATIVES["gelu_tanh" if kind == "gelu" and approximate == "tanh" else kind](z)
    return first.to(z.dtype), None if delta is None else (second * delta).to(z.dtype)


def _given(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def _rows(x: Tensor) -> Tensor:
    """``[K, ..., C]`` as ``[K, R, C]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])  # not -1: a size may be 0


def _shared(x: Tensor) -> Tensor:
    """``[..., C]`` as ``[1, R, C]``."""
    return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def _times(first: Tensor, y: Tensor) -> Tensor:
    """φ' y; a mask selects, so that what it drops may be NaN."""
    factor = _shared(first)
    return torch.where(factor != 0, y, 0.0) if first.dtype == torch.uint8 else factor * y


def tangent_forward(
    a: Tensor,
    b: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    centered: Tensor | None = None,
    residual: Tensor | None = None,
    first: Tensor | None = None,
    keep_pre: bool = False,
    delta: Tensor | None = None,
    out: Tensor | None = None,
    pre: Tensor | None = None,
    dot: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As ``curvlab.ops.hvp.tangent_forward``."""
    t = _rows(a) if b is None else _rows(a) + _rows(b)
    if dot is not None and delta is not None:
        dot.copy_((_shared(delta) * t).sum(1))
    y = t if scale is None else scale * t
    if gain is not None and centered is not None:
        y = y + gain[:, None] * _shared(centered)
    if bias is not None:
        y = y + bias[:, None]
    if residual is not None:
        y = y + _rows(residual)
    result = y if first is None else _times(first, y)
    y, result = y.to(a.dtype).reshape(a.shape), result.to(a.dtype).reshape(a.shape)
    if keep_pre or pre is not None:
        return _given(out, result), _given(pre, y)
    return _given(out, result)


def tangent_backward(
    g: Tensor,
    *,
    g2: Tensor | None = None,
    first: Tensor | None = None,
    second: Tensor | None = None,
    pre: Tensor | None = None,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    delta: Tensor | None = None,
    centered: Tensor | None = None,
    t: Tensor | None = None,
    dot: Tensor | None = None,
    inv_std: Tensor | None = None,
    want_bias: bool = False,
    want_gain: bool = False,
    want_gy: bool = True,
    accumulate: bool = False,
    out_gy: Tensor | None = None,
    out_gt: Tensor | None = None,
    out_bias: Tensor | None = None,
    out_gain: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """As ``curvlab.ops.hvp.tangent_backward``."""
    gy = _rows(g) if g2 is None else _rows(g) + _rows(g2)
    if first is not None:
        gy = _times(first, gy)
    if second is not None and pre is not None:
        gy = gy + _shared(second) * _rows(pre)
    gt = gy if scale is None else scale * gy
    if gain is not None and delta is not None:
        gt = gt + gain[:, None] * _shared(delta)
    bias_sum = gain_sum = None
    if want_bias or out_bias is not None:
        bias_sum = _summed(out_bias, gy.sum(1), accumulate)
    if want_gain or out_gain is not None:
        total = gy.new_zeros(gy.shape[0], gy.shape[2]) if centered is None else (gy * _shared(centered)).sum(1)
        if t is not None and delta is not None and inv_std is not None:
            total = total + inv_std * (_shared(delta) * _rows(t)).sum(1)
        if dot is not None and inv_std is not None:
            total = total + inv_std * dot
        gain_sum = _summed(out_gain, total, accumulate)
    same = scale is None and gain is None
    gy, gt = gy.to(g.dtype).reshape(g.shape), gt.to(g.dtype).reshape(g.shape)
    kept = _given(out_gy, gy) if want_gy or same else None
    return kept, kept if same and kept is not None else _given(out_gt, gt), bias_sum, gain_sum


def _summed(out: Tensor | None, value: Tensor, accumulate: bool) -> Tensor:
    if value.dtype == torch.bfloat16:
        value = value.float()
    if out is None:
        return value
    return out.add_(value) if accumulate else out.copy_(value)


def pool_gather(x: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As ``curvlab.ops.hvp.pool_gather``."""
    taken = torch.gather(x, 2, index.clamp(min=0).long().expand(x.shape[0], *index.shape))
    return _given(out, torch.where(index >= 0, taken, 0.0))


def pool_scatter(g: Tensor, index: Tensor, size: int, *, unique: bool = False, out: Tensor | None = None) -> Tensor:
    """As ``curvlab.ops.hvp.pool_scatter``."""
    del unique  # a promise that this route does not need
    result = g.new_zeros(g.shape[0], g.shape[1], size, g.shape[3])
    alive = torch.where(index >= 0, g, 0.0)
    result.scatter_add_(2, index.clamp(min=0).long().expand(g.shape), alive)
    return _given(out, result)


def _windows(x: Tensor, weight: Tensor, choice: Tensor | None, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``[N, Q, R, taps]`` of x, Q positions a window, and what each counts for: ``[N, Q, R, O]``."""
    patches = x.unfold(1, weight.shape[3], stride[0]).unfold(2, weight.shape[4], stride[1])  # [N, H', W', C, h, w]
    rows, columns = patches.shape[1:3]
    if choice is None:
        flat = patches.reshape(x.shape[0], 1, rows * columns, -1)
        return flat, flat.new_ones(*flat.shape[:3], weight.shape[1])
    even = patches[:, : rows // 2 * 2, : columns // 2 * 2]
    parts = [even[:, dy::2, dx::2].flatten(1, 2).flatten(2) for dy in (0, 1) for dx in (0, 1)]
    won = [choice == position for position in range(4)]
    return torch.stack(parts, 1), torch.stack(won, 1).to(x.dtype)


def first_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    choice: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
) -> Tensor:
    """As ``curvlab.ops.hvp.first_conv_forward``."""
    patches, won = _windows(x, weight, choice, stride)
    maps = torch.einsum("nqrt,kot->knqro", patches, weight.flatten(2))
    if bias is not None:
        maps = maps + bias[:, None, None, None]
    return _given(out, (maps * won).sum(2))


def first_conv_weight(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    choice: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    accumulate: bool = False,
) -> Tensor:
    """As ``curvlab.ops.hvp.first_conv_weight``."""
    patches, won = _windows(x, out, choice, stride)
    found = torch.einsum("knro,nqro,nqrt->kot", g, won, patches).view(out.shape)
    return _given(out, found + out if accumulate else found)


def softmax_hessian_product(
    p: Tensor, label: Tensor, weight: Tensor, u: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """As ``curvlab.ops.hvp.softmax_hessian_product``."""
    classes = p.shape[-1]
    if not classes:
        return _given(out, torch.zeros_like(u))
    center = torch.where((label >= 0) & (label < classes), label, 0)[:, None]
    shifted = u - u.gather(2, center.expand(u.shape[0], *center.shape))  # zero at the center
    mean = (p * shifted).sum(2, keepdim=True)
    product = weight[:, None] * p * (shifted - mean)
    return _given(out, torch.where(weight[:, None] != 0, product, 0.0).to(u.dtype))
