# SPDX-License-Identifier: Apache-2.0
"""Wrappers of csrc/hvp: the elementwise, pooling and softmax steps of batched Hessian-vector products.

K directions lead and channels come last: data are ``[K, ..., C]`` (rows R of a Linear layer, or samples and pixels of
channels-last images), factors that all directions share are ``[..., C]``, arguments per channel ``[C]`` or ``[K, C]``.
Everything is contiguous, but the rows of ``[K, C]`` arguments may lie anywhere, as in a block of flat vectors. Data are
float32, float64 or bfloat16; arguments per channel and sums are float32, for float64 data float64. Sums over rows are
made in a fixed order: the same bits for any number of threads.

The ops have no derivative: an input that requires a gradient is refused while gradients are on, and a ``torch.func``
transform or forward-mode AD is refused always. Buffers that are given as ``out...`` are written; elementwise results
may take the place of an input of their shape (the same tensor, not one that overlaps it). ``tangent_forward_into`` and
the other ``..._into`` are the bare ops: all arguments by position, all buffers given, nothing returned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvlab import _host

KINDS = ("relu", "leaky_relu", "tanh", "sigmoid", "softplus", "gelu", "gelu_tanh", "silu")
"""The activations of ``activation_factors``."""

tangent_forward_into = _host.tangent_forward
"""``(a, b, bias, scale, gain, centered, residual, first, delta, out, pre, dot)``, all but a and out may be None."""
tangent_backward_into = _host.tangent_backward
"""``(g, g2, first, second, pre, scale, gain, delta, centered, t, dot, inv_std, gy, gt, bias_sum, gain_sum,
accumulate)``, all tensors but g may be None; what is None is not written."""
pool_gather_into = _host.pool_gather
"""``(x, index, out)``."""
pool_scatter_into = _host.pool_scatter
"""``(g, index, out, unique)``."""
first_conv_forward_into = _host.first_conv_forward
"""``(x, weight, bias, choice, stride_height, stride_width, out)``, bias and choice may be None."""
first_conv_weight_into = _host.first_conv_weight
"""``(g, x, choice, stride_height, stride_width, out, accumulate)``, choice may be None."""
softmax_hessian_product_into = _host.softmax_hessian_product
"""``(p, label, weight, u, out)``."""


def _refuse_transforms(op: str) -> None:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op}: has no derivative and no batching rule: call it outside torch.func transforms (grad, vjp, jvp, "
            "vmap) and outside forward_ad.dual_level"
        )


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
    r"""What products need of an activation :math:`\varphi`: :math:`\varphi'(z)` and :math:`\varphi''(z)\,\delta`.

    In closed forms that keep their digits where the activation saturates, computed in float64 and rounded once.
    Derivatives at the kinks are torch's: 0 for relu and the slope for leaky_relu at 0.

    Args:
        z: inputs of the activation, any shape, contiguous; float32, float64 or bfloat16.
        delta: derivative of the loss by the activation's output, like ``z``; None: only the first is made.
        kind: one of ``KINDS``.
        slope: of leaky_relu, below 0.
        beta: of softplus, log(1 + exp(beta z)) / beta.
        threshold: of softplus: linear where beta z is larger.
        approximate: ``"tanh"`` makes gelu gelu_tanh.

    Returns:
        First and second. relu: the first is a uint8 mask; relu and leaky_relu: the second is None (it is 0).

    Raises:
        ValueError: another kind, a shape or device that differs, a tensor that is not contiguous.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("activation_factors")
    if kind == "gelu" and approximate == "tanh":
        kind = "gelu_tanh"
    first = torch.empty_like(z, dtype=torch.uint8 if kind == "relu" else z.dtype)
    curved = delta is not None and kind not in ("relu", "leaky_relu")
    second = torch.empty_like(z) if curved else None
    torch.ops.curvlab.activation_factors(z, delta, kind, slope, beta, threshold, first, second)
    return first, second


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
    r"""From the tangents of a matrix product or convolution to those behind the activation, in one pass.

    .. math:: t = a + b,\quad y_{krc} = \mathrm{scale}_c\, t + \mathrm{gain}_{kc}\, \mathrm{centered}_{rc}
              + \mathrm{bias}_{kc} + \mathrm{residual}_{krc},\quad \mathrm{out} = \mathrm{first}_{rc}\, y

    Terms whose argument is None are left out. With batch normalization in eval mode, scale is
    :math:`\gamma / \sigma`, gain and bias the directions' parts of :math:`\gamma` and :math:`\beta`, centered the
    normalized input. Pearlmutter, Fast exact multiplication by the Hessian (1994).

    Args:
        a: ``[K, ..., C]``, for example W applied to the tangents of the layer's input.
        b: like ``a``, for example V applied to the layer's input.
        bias: ``[K, C]``.
        scale: ``[C]``.
        gain: ``[K, C]``, with ``centered``.
        centered: ``[..., C]``.
        residual: like ``a``: tangents of a branch that is added.
        first: ``[..., C]``, :math:`\varphi'(z)` of ``activation_factors``; a uint8 or bool mask selects.
        keep_pre: also return y, which ``tangent_backward`` needs beside a second derivative.
        delta: ``[..., C]``, for ``dot``.
        out: buffer for the result, may be ``a``.
        pre: buffer for y; implies ``keep_pre``.
        dot: buffer ``[K, C]`` for :math:`\sum_r \mathrm{delta}_{rc}\, t_{krc}`.

    Returns:
        out, or (out, y).

    Raises:
        ValueError: a shape or device that does not fit ``a``, a tensor that is not contiguous, a term without its
            partner.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("tangent_forward")
    if out is None:
        out = torch.empty_like(a)
    if keep_pre and pre is None:
        pre = torch.empty_like(a)
    call = torch.ops.curvlab.tangent_forward if torch.compiler.is_compiling() else tangent_forward_into
    call(a, b, bias, scale, gain, centered, residual, first, delta, out, pre, dot)
    return out if pre is None else (out, pre)


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
    r"""From the tangents of the signals behind an activation to those before its layer, and sums over rows.

    .. math:: g^y = \mathrm{first}\,(g + g_2) + \mathrm{second}\cdot\mathrm{pre},\quad
              g^t_{krc} = \mathrm{scale}_c\, g^y + \mathrm{gain}_{kc}\, \mathrm{delta}_{rc},

    .. math:: \mathrm{bias}_{kc} = \sum_r g^y,\quad \mathrm{gain}_{kc} = \sum_r (g^y\, \mathrm{centered}_{rc}
              + \mathrm{inv\_std}_c\, \mathrm{delta}_{rc}\, t_{krc}) + \mathrm{inv\_std}_c\, \mathrm{dot}_{kc}

    Terms whose argument is None are left out. For batch normalization in eval mode, delta is the derivative of the loss
    by its output, gain the directions' part of :math:`\gamma` times inv_std.

    Args:
        g: ``[K, ..., C]``, tangents of the signal at the activation's output.
        g2: like ``g``: the signal of a second consumer.
        first: ``[..., C]``, :math:`\varphi'(z)`; a uint8 or bool mask selects.
        second: ``[..., C]``, :math:`\varphi''(z)\,\delta`, with ``pre``.
        pre: like ``g``: y of ``tangent_forward``.
        scale: ``[C]``.
        gain: ``[K, C]``, with ``delta``.
        delta: ``[..., C]``.
        centered: ``[..., C]``.
        t: like ``g``, with ``delta`` and ``inv_std``; or instead
        dot: ``[K, C]``, the sum over rows of delta t that ``tangent_forward`` made, with ``inv_std``.
        inv_std: ``[C]``.
        want_bias: make the sum for the bias; ``out_bias`` implies it.
        want_gain: make the sum for the gain; ``out_gain`` implies it.
        want_gy: False: only gt and the sums are needed.
        accumulate: add the sums to ``out_bias`` and ``out_gain`` instead of writing them.
        out_gy: buffer, may be ``g``.
        out_gt: buffer, may be ``g``, but not ``out_gy``.
        out_bias: buffer ``[K, C]``, rows anywhere.
        out_gain: buffer ``[K, C]``, rows anywhere.

    Returns:
        gy, gt and the two sums, None where not wanted. gt is gy without scale and gain, and gy is ``g`` where nothing
        changes it.

    Raises:
        ValueError: a shape or device that does not fit ``g``, a tensor that is not contiguous, a term without its
            partner.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("tangent_backward")
    gy, gt = out_gy, out_gt
    modified = first is not None or g2 is not None or second is not None
    moved = scale is not None or gain is not None  # else gt is gy
    if not moved and gy is None:
        gy, gt = gt, None
    if gy is None and (want_gy or not moved) and (modified or gt is g):
        gy = torch.empty_like(g)
    if moved and gt is None:
        gt = torch.empty_like(g)
    if want_bias and out_bias is None:
        out_bias = _sums(g, accumulate)
    if want_gain and out_gain is None:
        out_gain = _sums(g, accumulate)
    call = torch.ops.curvlab.tangent_backward if torch.compiler.is_compiling() else tangent_backward_into
    call(
        g, g2, first, second, pre, scale, gain, delta, centered, t, dot, inv_std, gy, gt, out_bias, out_gain, accumulate
    )
    kept = gy if gy is not None else (g if want_gy or not moved else None)
    result = gt if gt is not None else kept
    assert result is not None
    return kept, result, out_bias, out_gain


def _sums(g: Tensor, zeros: bool) -> Tensor:
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    make = torch.zeros if zeros else torch.empty
    return make(g.shape[0], g.shape[-1], dtype=dtype, device=g.device)


def pool_gather(x: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Maximum pooling whose choices are kept: ``out[k, n, r, c] = x[k, n, index[n, r, c], c]``, 0 where index is -1.

    Args:
        x: ``[K, N, HW, C]``.
        index: int32 ``[N, R, C]``, in [0, HW) or -1. Not checked: on any device that would be a pass of its own.
        out: buffer ``[K, N, R, C]``, not ``x``.

    Returns:
        ``[K, N, R, C]``.

    Raises:
        ValueError: shapes or devices that do not fit, a tensor that is not contiguous.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("pool_gather")
    if out is None:
        out = x.new_empty((*x.shape[:2], index.shape[1], x.shape[-1]))
    call = torch.ops.curvlab.pool_gather if torch.compiler.is_compiling() else pool_gather_into
    call(x, index, out)
    return out


def pool_scatter(g: Tensor, index: Tensor, size: int, *, unique: bool = False, out: Tensor | None = None) -> Tensor:
    r"""The adjoint of ``pool_gather``: ``out[k, n, i, c]`` is the sum of ``g[k, n, r, c]`` over the r that chose i.

    Args:
        g: ``[K, N, R, C]``.
        index: int32 ``[N, R, C]``, in [0, size) or -1. Not checked.
        size: HW, inputs of an image.
        unique: promise that no input was chosen twice in a channel (windows that do not overlap).
        out: buffer ``[K, N, HW, C]``, not ``g``.

    Returns:
        ``[K, N, HW, C]``.

    Raises:
        ValueError: shapes or devices that do not fit, a tensor that is not contiguous.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("pool_scatter")
    if out is None:
        out = g.new_empty((*g.shape[:2], size, g.shape[-1]))
    elif out.dim() != 4 or out.shape[2] != size:
        raise ValueError(f"pool_scatter: out must be [K, N, {size}, C], got {list(out.shape)}")
    call = torch.ops.curvlab.pool_scatter if torch.compiler.is_compiling() else pool_scatter_into
    call(g, index, out, unique)
    return out


def first_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    choice: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
) -> Tensor:
    r"""The convolution of a network's inputs by K weights, at the positions that a 2 x 2 maximum pool chose.

    .. math:: \mathrm{out}_{knro} = \mathrm{bias}_{ko} + \sum_{cij} \mathrm{weight}_{kocij}\;
              x_{n,\,s_h y + i,\,s_w z + j,\,c},

    (y, z) the r-th position, or the one of the r-th 2 x 2 positions that ``choice[n, r, o]`` names. Float32 on the CPU
    alone; for few input channels, where the library's convolutions are slow.

    Args:
        x: ``[N, H, W, C]``, padded already.
        weight: ``[K, O, C, h, w]``, each direction contiguous, rows anywhere.
        bias: ``[K, O]``, rows anywhere.
        choice: uint8 ``[N, R, O]``, 2 dy + dx of the winner, 4 or more: no winner, 0. None: no pool.
        stride: of the convolution.
        out: buffer ``[K, N, R, O]``.

    Returns:
        ``[K, N, R, O]``; R is ``H' W'``, with ``choice`` ``(H' // 2) (W' // 2)``.

    Raises:
        ValueError: shapes that do not fit, a tensor that is not contiguous, a stride below 1.
        TypeError: a dtype other than float32 (uint8 for ``choice``).
        NotImplementedError: see the module; another device than the CPU.
    """
    _refuse_transforms("first_conv_forward")
    if out is None:
        sizes = [(x.shape[1 + i] - weight.shape[3 + i]) // stride[i] + 1 for i in range(2)]
        pool = 1 if choice is None else 2
        out = x.new_empty(weight.shape[0], x.shape[0], (sizes[0] // pool) * (sizes[1] // pool), weight.shape[1])
    call = torch.ops.curvlab.first_conv_forward if torch.compiler.is_compiling() else first_conv_forward_into
    call(x, weight, bias, choice, stride[0], stride[1], out)
    return out


def first_conv_weight(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    choice: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    accumulate: bool = False,
) -> Tensor:
    """The adjoint of ``first_conv_forward`` in its weight; sums over samples and positions are made in float64.

    Args:
        g: ``[K, N, R, O]``.
        x: ``[N, H, W, C]``, padded already.
        out: buffer ``[K, O, C, h, w]``, each direction contiguous, rows anywhere.
        choice: as there.
        stride: as there.
        accumulate: add to ``out`` instead of writing it.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes that do not fit, a tensor that is not contiguous, a stride below 1.
        TypeError: a dtype other than float32 (uint8 for ``choice``).
        NotImplementedError: see the module; another device than the CPU.
    """
    _refuse_transforms("first_conv_weight")
    call = torch.ops.curvlab.first_conv_weight if torch.compiler.is_compiling() else first_conv_weight_into
    call(g, x, choice, stride[0], stride[1], out, accumulate)
    return out


def softmax_hessian_product(
    p: Tensor, label: Tensor, weight: Tensor, u: Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""The Hessian of weighted cross-entropy by its logits, :math:`w_n (\mathrm{diag}\,p - p\,p^\top)`, times u.

    .. math:: s = \sum_c p_c (u_c - u_y),\quad \mathrm{out}_c = w\, p_c (u_c - u_y - s),\quad
              \mathrm{out}_y = -w\, p_y\, s

    Centered at the label y: on a fitted sample :math:`p_y` is 1 to rounding, and :math:`u_y - \sum_c p_c u_c` would
    keep no digit.

    Args:
        p: ``[N, C]`` probabilities; float32, for float64 u float64.
        label: int64 ``[N]``; outside [0, C), the center is class 0. Any center is right, the likeliest class is best.
        weight: ``[N]``, the dtype of ``p``; 0: a row of zeros, whatever p and u are.
        u: ``[K, N, C]``, float32, float64 or bfloat16.
        out: buffer like ``u``, may be ``u``.

    Returns:
        ``[K, N, C]``.

    Raises:
        ValueError: shapes or devices that do not fit, a tensor that is not contiguous.
        TypeError: a dtype that is not supported or differs.
        NotImplementedError: see the module.
    """
    _refuse_transforms("softmax_hessian_product")
    if out is None:
        out = torch.empty_like(u)
    compiling = torch.compiler.is_compiling()
    call = torch.ops.curvlab.softmax_hessian_product if compiling else softmax_hessian_product_into
    call(p, label, weight, u, out)
    return out
