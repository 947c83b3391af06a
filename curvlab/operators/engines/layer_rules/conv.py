# SPDX-License-Identifier: Apache-2.0
r"""Convolutions: ``z = W * x + b``, channels last, by the library's convolutions.

    Rz = W * Rx + V * x + v_b;   Rδx = W^T * Rδ + V^T * δ;   (H v)_W = x ⋆ Rδ + Rx ⋆ δ

With float32 on the CPU the second convolution of a sum adds to the first one's output (oneDNN's ``sum``
post-operation): no pass over memory between them.  With stride 1 and one group, W^T * δ is a convolution with the
flipped weight, so the same holds downwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.layer_rules.affine import AffineBound, AffineStep
from curvlab.operators.engines.layer_rules.exact_conv import exact_conv2d
from curvlab.operators.engines.layer_rules.pool import as_pair
from curvlab.operators.engines.rules import Builder, register_function, register_match
from curvlab.operators.engines.steps import Product, Run

__all__ = ["ConvStep"]

_LAST = torch.channels_last


class ConvStep(AffineStep):
    """One 2-d convolution with zero padding."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[int],
        output: int,
        weight: str,
        bias: str | None,
        *,
        shape: tuple[int, ...],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__(name, inputs, output, weight, bias)
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups
        self.shape = shape  # of the weight
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, shape[2:], padding, strict=True)]
        self.flip_padding = reach if groups == 1 and tuple(stride) == (1, 1) and min(reach) >= 0 else None
        self.in_place_sum = False

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``W' * x + b'``."""
        weight, bias = self.effective(theta)
        return exact_conv2d(values[0], weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def set_theta(self, theta: Mapping[str, Tensor], dtype: torch.dtype, compute: torch.dtype) -> None:
        """As for all affine steps; weights channels last, and flipped ones where they serve."""
        super().set_theta(theta, dtype, compute)
        self.weight = self.weight.contiguous(memory_format=_LAST)
        self.flipped = _flipped(self.weight.unsqueeze(0))[0] if self.flip_padding is not None else None
        self.in_place_sum = _can_sum_in_place(self.weight)

    def bind(self, product: Product) -> AffineBound:
        """RW' channels last, direction by direction (and flipped, for the way down)."""
        bound = AffineBound()
        effective = self.tangents(product, bound)
        if effective is not None:
            effective = effective.to(self.weight.dtype)
            last = effective.movedim(2, -1).contiguous().movedim(-1, 2)
            bound.weight = list(last.unbind(0))
            if product.second and self.has_tangent() and self.flip_padding is not None:
                bound.flipped = _flipped(effective)
        if bound.bias is not None:
            bound.bias = bound.bias.to(self.weight.dtype)
        self.bind_bias(product, bound)
        bound.gathered = [None] * product.count
        return bound

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _conv_add(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int] | None) -> None:
        """``out += weight * x + bias``."""
        pad, stride = (self.padding, self.stride) if padding is None else (padding, [1, 1])
        if self.in_place_sum:
            torch.ops.mkldnn._convolution_pointwise_.binary(
                out, x, weight, bias, pad, stride, self.dilation, self.groups, "add", 1.0, None, [], None
            )
        else:
            out.add_(functional.conv2d(x, weight, bias, stride, pad, self.dilation, self.groups))

    def forward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """Rz."""
        x, t = kept[0], run.t[self.inputs[0]]
        image = _image(x)
        lo, hi = run.lo, run.hi
        if t is not None:
            out = _rows(self._conv(_images(t), self.weight), run.k)
            if bound.weight is not None:
                for i, k in enumerate(range(lo, hi)):
                    bias = None if bound.bias is None else bound.bias[k]
                    self._conv_add(_image(out[i]), image, bound.weight[k], bias, None)
            elif bound.bias is not None:
                out += bound.bias[lo:hi, None, None, None]
            run.t[self.output] = out
        elif bound.weight is not None:
            biases = [None if bound.bias is None else bound.bias[k] for k in range(lo, hi)]
            parts = [self._conv(image, bound.weight[k], biases[i]) for i, k in enumerate(range(lo, hi))]
            rows = [_rows(part, 1) for part in parts]
            run.t[self.output] = rows[0] if len(rows) == 1 else torch.cat(rows)
        elif bound.bias is not None:
            size = self._conv(image[:1], self.weight).shape[2:]
            out = bound.bias[lo:hi, None, None, None].expand(-1, len(image), *size, -1)
            run.t[self.output] = out.contiguous()

    def backward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """Rδx and the weight's share."""
        g = run.take(self.output)
        if g is None:
            return
        x, delta = kept
        t = run.t[self.inputs[0]]
        image = _image(x)
        self.add_bias(run, bound, g)
        shared = _image(delta) if run.second and delta is not None else None
        if bound.want_weight:
            for i, k in enumerate(range(run.lo, run.hi)):
                self._gather(bound, k, self._weight_derivative(_image(g[i]), image))
                if shared is not None and t is not None:
                    self._gather(bound, k, self._weight_derivative(shared, _image(t[i])))
        if self.has_tangent():
            run.give(self.inputs[0], self._down(run, g, x, shared, bound))

    def _down(self, run: Run, g: Tensor, x: Tensor, shared: Tensor | None, bound: AffineBound) -> Tensor:
        signals = _images(g)
        if self.flip_padding is not None:
            assert self.flipped is not None
            out = _rows(functional.conv2d(signals, self.flipped, None, 1, self.flip_padding, self.dilation), run.k)
            if shared is not None and bound.flipped is not None:
                for i, k in enumerate(range(run.lo, run.hi)):
                    self._conv_add(_image(out[i]), shared, bound.flipped[k], None, self.flip_padding)
            return out
        like = _image(x if run.k == 1 else x.new_empty(run.k * x.shape[0], *x.shape[1:]))  # only its shape is read
        out = _rows(self._input_derivative(signals, like, self.weight), run.k)
        if shared is not None and bound.weight is not None:
            for i, k in enumerate(range(run.lo, run.hi)):
                out[i] += _rows(self._input_derivative(shared, _image(x), bound.weight[k]), 1)[0]
        return out

    def _derivative(self, g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, mask
        )

    def _weight_derivative(self, g: Tensor, x: Tensor) -> Tensor:
        return self._derivative(g, x, self.weight, [False, True, False])[1]

    def _input_derivative(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._derivative(g, x, weight, [True, False, False])[0]

    def _gather(self, bound: AffineBound, k: int, part: Tensor) -> None:
        if bound.gathered[k] is None:
            bound.gathered[k] = part.to(self.raw_weight.dtype)
        else:
            bound.gathered[k].add_(part)

    def finish(self, product: Product, bound: AffineBound) -> None:
        """Bring the gathered derivatives into the result's layout, unfolded."""
        if product.result is None or not bound.want_weight:
            if product.result is not None and not self.plain:
                self.finish_folded(product, bound, None)
            return
        if product.capture:
            self.gradient = bound.gathered[0], None if bound.out_bias is None else bound.out_bias[0]
        elif self.plain:
            target = product.target(self.names["weight"])
            assert target is not None
            for k, part in enumerate(bound.gathered):
                self._into(target[k], part, self.names["weight"] in product.zeroed)
        else:
            self.finish_folded(product, bound, torch.stack(bound.gathered))


def _image(x: Tensor) -> Tensor:
    """``[n, H, W, C]`` as a channels-last ``[n, C, H, W]``."""
    return x.permute(0, 3, 1, 2)


def _images(x: Tensor) -> Tensor:
    """``[K, n, H, W, C]`` as a channels-last ``[K n, C, H, W]``."""
    return x.reshape(-1, *x.shape[2:]).permute(0, 3, 1, 2)


def _rows(x: Tensor, k: int) -> Tensor:
    """``[k n, C, H, W]`` as ``[k, n, H, W, C]``, contiguous."""
    return x.permute(0, 2, 3, 1).contiguous().view(k, -1, *x.shape[2:], x.shape[1])


def _flipped(weight: Tensor) -> Tensor:
    """``[K, O, I, h, w]`` to the weights ``[K, I, O, h, w]`` of the transposed convolution, channels last."""
    return weight.flip(3, 4).permute(0, 2, 3, 4, 1).contiguous().permute(0, 1, 4, 2, 3)


def _can_sum_in_place(weight: Tensor) -> bool:
    """Whether oneDNN's convolution with a sum is there for this weight: float32 (or bfloat16) on the CPU."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn._convolution_pointwise_, "binary")


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward


@register_match(_is_conv)
def _conv_module(builder: Builder, node: Any, module: nn.Module) -> None:
    assert isinstance(module, nn.Conv2d)
    (x,) = builder.slots_of(node, 1)
    weight, bias = builder.parameter(node, "weight"), builder.parameter(node, "bias")
    assert weight is not None
    if module.padding_mode != "zeros":
        raise builder.unsupported(node, f"padding_mode={module.padding_mode!r}")
    _add_conv(builder, node, x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


@register_function(functional.conv2d)
def _conv_function(builder: Builder, node: Any, module: nn.Module | None) -> None:
    del module
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = builder.arguments(node, names, (None, 1, 0, 1, 1))
    named = builder.parameter_arguments(node, weight, bias)
    _add_conv(builder, node, builder.slot(node, x), *named, stride, padding, dilation, groups)


def _add_conv(
    builder: Builder,
    node: Any,
    x: int,
    weight: str,
    bias: str | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> None:
    kernel = builder.theta[weight].shape[2:]
    pair_dilation = as_pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(pair_dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            raise builder.unsupported(node, "padding='same' with an even kernel (unequal sides)")
        padding = tuple(t // 2 for t in total)
    if len(builder.program.slots[x].shape) != 3:
        raise builder.unsupported(node, "a convolution of inputs without a sample axis")
    pair_stride, pair_padding = as_pair(stride), as_pair(padding)
    kinds = {"stride": pair_stride, "padding": pair_padding, "dilation": pair_dilation, "groups": groups}
    make: Any = ConvStep
    if tuple(kernel) == (1, 1) and groups == 1 and pair_padding == (0, 0) and max(pair_stride) > 1:
        # It inherits from this module's step.
        from curvlab.operators.engines.layer_rules.skip_conv import SkipConvStep

        make, kinds = SkipConvStep, {"stride": pair_stride, "positions": builder.program.slots[x].shape[1:]}
    shape = tuple(builder.theta[weight].shape)
    builder.add(node, make(builder.label(node), (x,), builder.new_slot(), weight, bias, shape=shape, **kinds))
