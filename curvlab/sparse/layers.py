# SPDX-License-Identifier: Apache-2.0
r"""Layers that hold and train only the surviving weights: ``values [nnz]`` at the flat positions ``indices [nnz]``.

With W the dense weight, W.flatten()[indices] = values and zero elsewhere,

    MaskedConv2d:  y[n, o] = b[o] + sum_c W[o, c] * x[n, c]        MaskedLinear:  y = x W^T + b

Pruned weights do not exist, so that momentum, weight decay and Adam cannot move them, and an optimizer's state costs
nnz.  They also do not meet the input: an Inf or NaN there passes a pruned weight without a trace, where a dense zero
makes it NaN.  Two paths compute the same: "sparse" (``curvlab.ops.sparse_conv``) and "dense" (values scattered into a
dense weight, then the library's kernel), which is faster where most weights are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.ops import sparse_conv
from curvlab.sparse.crossover import Kernels, Path, check_kernels, choose_path

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear"]


class MaskedLayer(nn.Module):
    """What the two layers share; made from a dense layer, whose geometry, values, dtype and device are taken over.

    Attributes:
        values: parameter ``[nnz]``, the surviving weights in row-major order.
        indices: buffer, int64 ``[nnz]``, strictly increasing flat positions in ``weight_shape``.
        bias: parameter ``[out]`` or None.
        weight_shape: of the dense weight.
        kernels: what was asked for: "auto", "sparse" or "dense".
        path: what computes batches as one trains with: "sparse" or "dense".  Where the sparse kernels have no such
            dtype, under autocast, and for batches too small for them if kernels is "auto", the dense path is taken
            whatever this says.
    """

    values: nn.Parameter
    indices: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, mask: Tensor, *, kernels: Kernels = "auto") -> None:
        super().__init__()
        owner, weight = type(self).__name__, layer.weight
        check_kernels(kernels, owner)
        self.weight_shape: tuple[int, ...] = tuple(weight.shape)
        self.kernels: Kernels = kernels
        indices = self._positions(mask).to(weight.device)
        values = weight.detach().reshape(-1)[indices]
        self.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        # Before the bias: a vector over the parameters has the order of the dense model's, without the pruned ones.
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_buffer("indices", indices)
        self.path: Path = self._choose()
        self.train(layer.training)

    @classmethod
    def from_dense(cls, layer: Any, mask: Tensor, *, kernels: Kernels = "auto") -> Any:
        """The sparse layer of a dense one; see the class.

        Raises:
            TypeError: a layer of another kind.
            ValueError: mask is not boolean or has another shape than the weight; unknown kernels.
        """
        return cls(layer, mask, kernels=kernels)

    @property
    def num_kept(self) -> int:
        """Nnz, surviving weights."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Kept share of the weights; 1 where there are none."""
        total = torch.Size(self.weight_shape).numel()
        return self.num_kept / total if total else 1.0

    @property
    def mask(self) -> Tensor:
        """Boolean, of ``weight_shape``: True where a weight survives."""
        flat = torch.zeros(torch.Size(self.weight_shape).numel(), dtype=torch.bool, device=self.indices.device)
        flat[self.indices] = True
        return flat.view(self.weight_shape)

    def to_dense(self) -> Tensor:
        """The dense weight, differentiable in ``values``."""
        return self.scatter(self.values)

    def scatter(self, values: Tensor) -> Tensor:
        """``[nnz]`` to ``weight_shape``, zero elsewhere."""
        total = torch.Size(self.weight_shape).numel()
        if values.shape[0] == total:  # nothing pruned: the values are the weight, and nothing is written
            return values.view(self.weight_shape)
        # index_copy, not scatter: its derivative, index_select, takes 0.4 ms where gather takes 0.9 (half of 2^20).
        zeros = values.new_zeros(total)
        if torch._C._are_functorch_transforms_active():  # a batch of values cannot be written into one weight
            return zeros.index_copy(0, self.indices, values).view(self.weight_shape)
        return zeros.index_copy_(0, self.indices, values).view(self.weight_shape)

    def set_mask(self, mask: Tensor) -> Tensor:
        """Take another mask: survivors keep their values, grown weights begin at zero.

        ``values`` becomes another parameter object, since its size changes: :func:`curvlab.sparse.update_mask` tells
        an optimizer.

        Returns:
            For each new position the old one in ``values``, -1 where the weight has grown; int64 ``[nnz]``.

        Raises:
            ValueError: mask is not boolean or has another shape than the weight.
        """
        indices = self._positions(mask).to(self.indices.device)
        source = torch.full_like(indices, -1)
        if len(self.indices) and len(indices):
            place = torch.searchsorted(self.indices, indices).clamp_(max=len(self.indices) - 1)
            source = torch.where(self.indices[place] == indices, place, source)
        old = self.values
        self.values = nn.Parameter(moved(old.detach(), source), requires_grad=old.requires_grad)
        if old.grad is not None:
            self.values.grad = moved(old.grad, source)
        self.indices = indices
        self.path = self._choose()
        return source

    def _positions(self, mask: Tensor) -> Tensor:
        """``indices`` of a mask, where it lies: a layer on the meta device could not count its own."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != self.weight_shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{type(self).__name__}: mask must be boolean with the weight's shape {list(self.weight_shape)}, got "
                f"{got}"
            )
        return mask.detach().reshape(-1).nonzero().squeeze(1)

    def _choose(self) -> Path:
        return choose_path(self.kernels, self.density, self.values.device, self.weight_shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As for every module; another device may be another path."""
        super()._apply(fn, recurse)
        self.path = self._choose()
        return self

    def _takes_sparse(self, positions: int) -> bool:
        device, dtype = self.values.device.type, self.values.dtype
        # The library's kernels know what autocast wants, which the meta device does not know.
        if self.path == "dense" or (device != "meta" and torch.is_autocast_enabled(device)):
            return False
        if self.kernels == "auto" and not torch.compiler.is_compiling():  # a compiled graph serves any batch
            path = choose_path(self.kernels, self.density, self.values.device, self.weight_shape, positions)
            if path == "dense":
                return False
        return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and device == "cuda")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As for every module; positions that are none of this weight are refused."""
        indices, values = state_dict.get(f"{prefix}indices"), state_dict.get(f"{prefix}values")
        errors: list[str] = args[-1]
        if isinstance(indices, Tensor) and isinstance(values, Tensor):
            total, name = torch.Size(self.weight_shape).numel(), prefix.rstrip(".") or type(self).__name__
            if indices.shape != self.indices.shape:
                errors.append(
                    f"load_state_dict: {name} must hold {self.num_kept} weights, got {len(indices)}: first give the "
                    "model the mask of the saved one (sparsify or update_mask)"
                )
                return
            increasing = indices.dtype == torch.int64 and bool((indices[1:] > indices[:-1]).all())
            within = not len(indices) or (int(indices[0]) >= 0 and int(indices[-1]) < total)
            if not increasing or not within or values.shape != indices.shape:
                errors.append(
                    f"load_state_dict: {prefix}indices must be increasing int64 positions in [0, {total}), one a "
                    f"value, got {indices.dtype} {list(indices.shape)} for values {list(values.shape)}"
                )
                return
        cast("Any", super())._load_from_state_dict(state_dict, prefix, *args)
        self.path = self._choose()  # assign=True may have brought another device

    def _facts(self) -> str:
        total = torch.Size(self.weight_shape).numel()
        return f"{self.num_kept} of {total} weights, {self.path}" + ("" if self.bias is not None else ", bias=False")


class MaskedConv2d(MaskedLayer):
    """A 2-d convolution by its surviving weights; see the module's text.

    Inputs ``[N, C_in, H, W]``, or ``[C_in, H, W]`` as ``nn.Conv2d`` takes them.

    Args:
        layer: the dense convolution: any stride, padding (numbers, ``"same"``, ``"valid"``), padding mode, dilation and
            groups.  Other padding modes than zeros are padded by the library first.
        mask: boolean ``[C_out, C_in / groups, kH, kW]``.
        kernels: "auto" (the path that is faster at this density), "sparse" or "dense".

    Raises:
        TypeError: layer is no ``nn.Conv2d``, or has a forward of its own.
        ValueError: mask is not boolean or has another shape than the weight; unknown kernels.
    """

    def __init__(self, layer: nn.Conv2d, mask: Tensor, *, kernels: Kernels = "auto") -> None:
        plain = isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward
        if not plain or type(layer)._conv_forward is not nn.Conv2d._conv_forward:
            raise TypeError(
                f"MaskedConv2d: layer must be an nn.Conv2d with its own forward, got {type(layer).__name__}"
            )
        super().__init__(layer, mask, kernels=kernels)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        even = left == right and top == bottom
        # What the kernels pad, and what the library pads before: [left, right, top, bottom].
        self.inner_padding = (top, left) if even and self.padding_mode == "zeros" else (0, 0)
        self.outer_padding = [] if even and self.padding_mode == "zeros" else [left, right, top, bottom]
        # The dense path keeps the layout that the layer had: the library's convolutions go by it.
        weight = layer.weight
        self.channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``; without N, one image."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self.outer_padding:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self.outer_padding, mode)
        if self._takes_sparse(x.numel() // max(x.shape[-3], 1) // (self.stride[0] * self.stride[1])):
            return sparse_conv.masked_conv2d(
                x, self.values, self.indices, self.weight_shape, self.bias,
                stride=self.stride, padding=self.inner_padding, dilation=self.dilation, groups=self.groups,
            )  # fmt: skip
        weight = self.to_dense()
        if self.channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, self.stride, self.inner_padding, self.dilation, self.groups)

    def dense_layer(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` of its own memory with the same values, zero where weights are pruned."""
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,  # type: ignore[arg-type]
            self.dilation, self.groups, self.bias is not None, self.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        filled = cast("nn.Conv2d", _filled(layer, self))
        return filled.to(memory_format=torch.channels_last) if self.channels_last else filled  # type: ignore[call-overload]

    def extra_repr(self) -> str:
        """Geometry, then how much survives and what computes."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding not in (0, (0, 0)) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += f", padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else ""
        return f"{text}, {self._facts()}"


class MaskedLinear(MaskedLayer):
    """A fully connected layer by its surviving weights; see the module's text.  Inputs ``[..., in]``.

    Args:
        layer: the dense layer.
        mask: boolean ``[out, in]``.
        kernels: "auto" (the path that is faster at this density), "sparse" or "dense".

    Raises:
        TypeError: layer is no ``nn.Linear``, or has a forward of its own.
        ValueError: mask is not boolean or has another shape than the weight; unknown kernels.
    """

    def __init__(self, layer: nn.Linear, mask: Tensor, *, kernels: Kernels = "auto") -> None:
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise TypeError(
                f"MaskedLinear: layer must be an nn.Linear with its own forward, got {type(layer).__name__}"
            )
        super().__init__(layer, mask, kernels=kernels)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self._takes_sparse(x.numel() // max(self.in_features, 1)):
            return sparse_conv.masked_linear(x, self.values, self.indices, self.weight_shape, self.bias)
        return F.linear(x, self.to_dense(), self.bias)

    def dense_layer(self) -> nn.Linear:
        """An ``nn.Linear`` of its own memory with the same values, zero where weights are pruned."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return cast("nn.Linear", _filled(layer, self))

    def extra_repr(self) -> str:
        """Sizes, then how much survives and what computes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._facts()}"


def moved(entries: Tensor, source: Tensor) -> Tensor:
    """``entries [nnz]`` brought to other positions: ``entries[source]``, zero where source is -1."""
    if not len(entries):
        return entries.new_zeros(len(source))
    return torch.where(source >= 0, entries[source.clamp(min=0)], torch.zeros_like(entries[:1]))


def _filled(layer: nn.Conv2d | nn.Linear, sparse: MaskedLayer) -> nn.Module:
    weight = sparse.to_dense().detach().clone()
    layer.weight = nn.Parameter(weight, requires_grad=sparse.values.requires_grad)
    if sparse.bias is not None:
        layer.bias = nn.Parameter(sparse.bias.detach().clone(), requires_grad=sparse.bias.requires_grad)
    return layer.train(sparse.training)
