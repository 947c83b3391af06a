# SPDX-License-Identifier: Apache-2.0
"""Wrappers of csrc/sparse_conv: convolutions and linear layers whose weight is zero outside a mask.

A weight is given by its ``values`` [nnz] and their flat positions ``indices`` (int64 [nnz], strictly increasing, which
is ``mask.flatten().nonzero()``) in ``weight_shape``. The work is proportional to nnz; results have the same bits for
any number of threads. Unlike a dense convolution with zeros in its weight, an infinity or NaN of the input reaches only
the outputs that a nonzero connects it with (dense: 0 * inf = NaN).

The three convolution ops are closed under differentiation: each one's derivatives are the other two, so derivatives of
any order run on the same kernels. ``torch.func`` transforms (``grad``, ``vjp``, ``jvp``, ``vmap``) and
``torch.compile`` are supported; a batch of directions that ``vmap`` puts on the data is folded into N. In forward mode
over forward mode (``jvp`` of ``jvp``) and under transforms that are compiled, PyTorch's dense convolution computes.

Index lists are prepared once per ``indices`` tensor and geometry and kept while that tensor lives unchanged: keep
``indices`` (a buffer), do not make it anew at every call. Changes through ``indices.data`` are not seen.

On CUDA a multiplication costs a number from shared memory, where dense convolutions have tensor cores. By counting (no
GPU was there to measure; the count is in ``csrc/sparse_conv/masked_conv2d_kernel.cuh``), cuDNN is expected to win below
about 64 % zeros in true float32 and below about 95 % in TF32 (torch's default for convolutions) and in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvlab.ops import reference_sparse

Pair = int | Sequence[int]

_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]


@dataclass(frozen=True)  # no tuple: vmap's generated rules would take one apart and then miss its parts
class _Geometry:
    weight_shape: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, ...] = ()  # of masked_conv2d_input

    @property
    def arguments(self) -> tuple:
        """As the last arguments of the bare ops."""
        return self.weight_shape, self.stride, self.padding, self.dilation, self.groups

    @property
    def named(self) -> dict[str, Any]:
        """As the keywords of the reference."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


def _pair(op: str, name: str, value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise ValueError(f"{op}: {name} must be an integer or two, got {value!r}")
    return pair


def _check_sizes(op: str, name: str, sizes: Sequence[int], wanted: str) -> None:
    if not isinstance(sizes, Sequence) or len(sizes) != wanted.count(",") + 1:
        got = list(sizes) if isinstance(sizes, Sequence) else repr(sizes)
        raise ValueError(f"{op}: {name} must be {wanted}, got {got}")


def _geometry(
    op: str, weight_shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> _Geometry:
    _check_sizes(op, "weight_shape", weight_shape, "[C_out, C_in / groups, kH, kW]")
    if not isinstance(groups, int):
        raise ValueError(f"{op}: groups must be an integer >= 1, got {groups!r}")
    return _Geometry(
        tuple(weight_shape),
        _pair(op, "stride", stride),
        _pair(op, "padding", padding),
        _pair(op, "dilation", dilation),
        groups,
    )


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _takes_functions() -> bool:
    """Whether an autograd.Function is right under the transforms that are active.

    Not while compiling, which cannot trace one. Not in forward mode over forward mode (``jacfwd`` of ``jacfwd``):
    PyTorch calls a Function's jvp with forward mode off for the level around it too, whose tangents are lost silently.
    """
    if torch.compiler.is_compiling():
        return False
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack) < 2


# ---- the three ops by route: the bare op; under torch.func or forward-mode AD, where a C++ derivative would be an
# error, an autograd.Function around it; where that would not do either, ATen.


def _conv(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    if not _transforms_active():
        return torch.ops.curvlab.masked_conv2d(x, values, indices, bias, *geometry.arguments)
    if not _takes_functions():
        return reference_sparse.masked_conv2d(x, values, indices, geometry.weight_shape, bias, **geometry.named)
    out = _Conv.apply(x, values, indices, geometry)
    return out if bias is None else out + bias[:, None, None]


def _input(grad: Tensor, values: Tensor, indices: Tensor, size: Sequence[int], geometry: _Geometry) -> Tensor:
    if not _transforms_active():
        return torch.ops.curvlab.masked_conv2d_input(grad, values, indices, size, *geometry.arguments)
    if not _takes_functions():
        return reference_sparse.masked_conv2d_input(
            grad, values, indices, geometry.weight_shape, size, **geometry.named
        )
    return _Input.apply(grad, values, indices, replace(geometry, input_size=tuple(size)))


def _weight(x: Tensor, grad: Tensor, indices: Tensor, geometry: _Geometry) -> Tensor:
    if not _transforms_active():
        return torch.ops.curvlab.masked_conv2d_weight(x, grad, indices, *geometry.arguments)
    if not _takes_functions():
        return reference_sparse.masked_conv2d_weight(x, grad, indices, geometry.weight_shape, **geometry.named)
    return _Weight.apply(x, grad, indices, geometry)


def _sum_of(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _Conv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, indices: Tensor, geometry: _Geometry) -> Tensor:
        return torch.ops.curvlab.masked_conv2d(x, values, indices, None, *geometry.arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, values, indices, ctx.geometry = inputs
        ctx.save_for_backward(x, values, indices)
        ctx.save_for_forward(x, values, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, values, indices = ctx.saved_tensors
        gx = _input(grad, values, indices, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        gv = _weight(x, grad, indices, ctx.geometry) if ctx.needs_input_grad[1] else None
        return gx, gv, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tv: Tensor | None, *_: None) -> Tensor | None:
        x, values, indices = ctx.saved_tensors
        along_x = None if tx is None else _conv(tx, values, indices, None, ctx.geometry)
        return _sum_of([along_x, None if tv is None else _conv(x, tv, indices, None, ctx.geometry)])


class _Input(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, values: Tensor, indices: Tensor, geometry: _Geometry) -> Tensor:
        return torch.ops.curvlab.masked_conv2d_input(grad, values, indices, geometry.input_size, *geometry.arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, values, indices, ctx.geometry = inputs
        ctx.save_for_backward(grad, values, indices)
        ctx.save_for_forward(grad, values, indices)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple:
        grad, values, indices = ctx.saved_tensors
        gg = _conv(a, values, indices, None, ctx.geometry) if ctx.needs_input_grad[0] else None
        gv = _weight(a, grad, indices, ctx.geometry) if ctx.needs_input_grad[1] else None
        return gg, gv, None, None

    @staticmethod
    def jvp(ctx: Any, tg: Tensor | None, tv: Tensor | None, *_: None) -> Tensor | None:
        grad, values, indices = ctx.saved_tensors
        along_grad = None if tg is None else _input(tg, values, indices, ctx.geometry.input_size, ctx.geometry)
        return _sum_of(
            [along_grad, None if tv is None else _input(grad, tv, indices, ctx.geometry.input_size, ctx.geometry)]
        )


class _Weight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grad: Tensor, indices: Tensor, geometry: _Geometry) -> Tensor:
        return torch.ops.curvlab.masked_conv2d_weight(x, grad, indices, *geometry.arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, grad, indices, ctx.geometry = inputs
        ctx.save_for_backward(x, grad, indices)
        ctx.save_for_forward(x, grad, indices)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple:
        x, grad, indices = ctx.saved_tensors
        gx = _input(grad, b, indices, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        gg = _conv(x, b, indices, None, ctx.geometry) if ctx.needs_input_grad[1] else None
        return gx, gg, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tg: Tensor | None, *_: None) -> Tensor | None:
        x, grad, indices = ctx.saved_tensors
        along_x = None if tx is None else _weight(tx, grad, indices, ctx.geometry)
        return _sum_of([along_x, None if tg is None else _weight(x, tg, indices, ctx.geometry)])


# ---- batching rules of the bare ops


def _one_by_one(op: Callable, info: Any, in_dims: tuple, args: tuple, count: int) -> tuple[Any, Any]:
    """The op for each of the batch: what no fold into N expresses (as many values, or sums over N apart)."""
    size = info.batch_size
    first = [a.movedim(d, 0) if d is not None else None for a, d in zip(args[:count], in_dims, strict=False)]
    if not size:  # one call tells the shapes
        first = [None if a is None else a.new_zeros(1, *a.shape[1:]) for a in first]
    rows = [
        op(*[a if moved is None else moved[i] for a, moved in zip(args, first, strict=False)], *args[count:])
        for i in range(max(size, 1))
    ]
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column)[:size] for column in zip(*rows, strict=True)), (0,) * len(rows[0])
    return torch.stack(rows)[:size], 0


def _fold(data: Tensor, dim: int) -> tuple[Tensor, tuple[int, int]]:
    """The batch in N, and the sizes to take it out again (either may be 0)."""
    moved = data.movedim(dim, 0)
    return moved.flatten(0, 1), (moved.shape[0], moved.shape[1])


def _vmap_conv(info: Any, in_dims: tuple, x: Tensor, values: Tensor, indices: Tensor, bias: Any, *rest: Any) -> tuple:
    op = torch.ops.curvlab.masked_conv2d
    if any(dim is not None for dim in in_dims[1:4]):
        return _one_by_one(op, info, in_dims, (x, values, indices, bias, *rest), 4)
    folded, sizes = _fold(x, in_dims[0])
    return op(folded, values, indices, bias, *rest).unflatten(0, sizes), 0


def _vmap_input(
    info: Any, in_dims: tuple, grad: Tensor, values: Tensor, indices: Tensor, size: Sequence[int], *rest: Any
) -> tuple:
    op = torch.ops.curvlab.masked_conv2d_input
    if in_dims[1] is not None or in_dims[2] is not None:
        return _one_by_one(op, info, in_dims, (grad, values, indices, size, *rest), 3)
    folded, sizes = _fold(grad, in_dims[0])
    return op(folded, values, indices, (folded.shape[0], *size[1:]), *rest).unflatten(0, sizes), 0


def _vmap_weight(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _one_by_one(torch.ops.curvlab.masked_conv2d_weight, info, in_dims, args, 3)


def _vmap_backward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _one_by_one(torch.ops.curvlab.masked_conv2d_backward, info, in_dims, args, 4)


torch.library.register_vmap("curvlab::masked_conv2d", _vmap_conv)
torch.library.register_vmap("curvlab::masked_conv2d_input", _vmap_input)
torch.library.register_vmap("curvlab::masked_conv2d_weight", _vmap_weight)
torch.library.register_vmap("curvlab::masked_conv2d_backward", _vmap_backward)


# ---- the public functions


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
    r"""Convolution of ``x`` with a weight that is ``values`` at ``indices`` and zero elsewhere.

    .. math:: \mathrm{out}_{nohw} = b_o + \sum_{(o,c,r,s)\,\in\,\mathrm{mask}} w_{ocrs}\,
              x_{n,\,c',\,h s_h - p_h + r d_h,\,w s_w - p_w + s d_w}

    with :math:`c'` the c-th channel of o's group, as ``torch.nn.functional.conv2d``.

    Args:
        x: ``[N, C_in, H, W]``, float32 or float64 (CUDA: bfloat16 too), of any strides.
        values: ``[nnz]``, in the dtype of ``x``.
        indices: int64 ``[nnz]``, strictly increasing flat positions in ``weight_shape``.
        weight_shape: ``[C_out, C_in / groups, kH, kW]``.
        bias: ``[C_out]`` or None.
        stride: one integer or two (rows, columns).
        padding: zeros around the planes, one integer or two.
        dilation: one integer or two.
        groups: as in ``conv2d``.

    Returns:
        ``[N, C_out, H_out, W_out]``, contiguous.

    Raises:
        TypeError: a dtype that is not supported or differs.
        ValueError: a shape or device that does not fit, indices that are not increasing or out of range.
        NotImplementedError: no kernel for the device or dtype.
    """
    geometry = _geometry("masked_conv2d", weight_shape, stride, padding, dilation, groups)
    return _conv(x, values, indices, bias, geometry)


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
    r"""The derivative of :math:`\langle \mathrm{grad}, \mathrm{masked\_conv2d}(x, v) \rangle` by x: the adjoint.

    .. math:: g^x_{nc'yz} = \sum w_{ocrs}\, \mathrm{grad}_{nohw},\quad h s_h - p_h + r d_h = y,\ w s_w - p_w + s d_w = z

    Args:
        grad: ``[N, C_out, H_out, W_out]``, of any strides.
        values: as in ``masked_conv2d``.
        indices: as in ``masked_conv2d``.
        weight_shape: as in ``masked_conv2d``.
        input_size: ``[N, C_in, H, W]`` of x.
        stride: as in ``masked_conv2d``.
        padding: as in ``masked_conv2d``.
        dilation: as in ``masked_conv2d``.
        groups: as in ``masked_conv2d``.

    Returns:
        ``input_size``, contiguous.

    Raises:
        TypeError: see ``masked_conv2d``.
        ValueError: see ``masked_conv2d``.
        NotImplementedError: see ``masked_conv2d``.
    """
    geometry = _geometry("masked_conv2d_input", weight_shape, stride, padding, dilation, groups)
    _check_sizes("masked_conv2d_input", "input_size", input_size, "[N, C_in, H, W]")
    return _input(grad, values, indices, input_size, geometry)


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
    r"""The derivative of :math:`\langle \mathrm{grad}, \mathrm{masked\_conv2d}(x, v) \rangle` by v, at nonzeros only.

    .. math:: g^v_k = \sum_{nhw} \mathrm{grad}_{nohw}\, x_{n,\,c',\,h s_h - p_h + r d_h,\,w s_w - p_w + s d_w}

    for the k-th nonzero (o, c, r, s).

    Args:
        x: ``[N, C_in, H, W]``, of any strides.
        grad: ``[N, C_out, H_out, W_out]``, of any strides.
        indices: as in ``masked_conv2d``.
        weight_shape: as in ``masked_conv2d``.
        stride: as in ``masked_conv2d``.
        padding: as in ``masked_conv2d``.
        dilation: as in ``masked_conv2d``.
        groups: as in ``masked_conv2d``.

    Returns:
        ``[nnz]``.

    Raises:
        TypeError: see ``masked_conv2d``.
        ValueError: see ``masked_conv2d``.
        NotImplementedError: see ``masked_conv2d``.
    """
    geometry = _geometry("masked_conv2d_weight", weight_shape, stride, padding, dilation, groups)
    return _weight(x, grad, indices, geometry)


def masked_linear(
    x: Tensor, values: Tensor, indices: Tensor, weight_shape: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    r"""Linear layer whose weight is ``values`` at ``indices`` and zero elsewhere.

    .. math:: \mathrm{out}_{bo} = \mathrm{bias}_o + \sum_{(o,i)\,\in\,\mathrm{mask}} w_{oi}\, x_{bi}

    A 1 x 1 convolution of 1 x 1 planes, so it shares the ops (and derivatives) of ``masked_conv2d``.

    Args:
        x: ``[..., in]``, float32 or float64 (CUDA: bfloat16 too).
        values: ``[nnz]``, in the dtype of ``x``.
        indices: int64 ``[nnz]``, strictly increasing flat positions in ``weight_shape``.
        weight_shape: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``.

    Raises:
        TypeError: see ``masked_conv2d``.
        ValueError: see ``masked_conv2d``.
        NotImplementedError: see ``masked_conv2d``.
    """
    _check_sizes("masked_linear", "weight_shape", weight_shape, "[out, in]")
    if x.dim() == 0 or x.shape[-1] != weight_shape[1]:
        raise ValueError(
            f"masked_linear: x must be [..., in] with in == {weight_shape[1]} (from weight_shape), got {list(x.shape)}"
        )
    geometry = _Geometry((weight_shape[0], weight_shape[1], 1, 1), (1, 1), (0, 0), (1, 1), 1)
    # numel() would make a symbolic number of rows a constant, so only where -1 is ambiguous.
    rows = x.reshape(-1 if weight_shape[1] else x.shape[:-1].numel(), weight_shape[1])
    out = _conv(rows[:, :, None, None], values, indices, bias, geometry)
    return out.reshape(*x.shape[:-1], weight_shape[0])
