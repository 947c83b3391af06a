# SPDX-License-Identifier: Apache-2.0
r"""Pooling. Maxima take their tangent where the float64 maximum was: ``Ry_j = Rx_{i(j)}``, and the transpose downwards.

Averages are linear maps: the same for tangents, their transpose for signals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.rules import Builder, register_function, register_method, register_module
from curvlab.operators.engines.steps import Kept, Run, Slot, Step
from curvlab.ops import hvp

__all__ = ["AveragePoolStep", "MaxPoolStep", "MeanStep", "as_pair"]


def as_pair(value: Any) -> tuple[int, int]:
    """One number for both axes, or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class MaxPoolStep(Step):
    """Maximum over windows; the index of each window's first maximum in its plane is kept (int32)."""

    fresh_signal = True
    fresh_tangent = True

    def __init__(
        self,
        name: str,
        inputs: Sequence[int],
        output: int,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil: bool,
    ):
        super().__init__(name, inputs, output)
        self.kernel, self.stride, self.padding, self.dilation, self.ceil = kernel, stride, padding, dilation, ceil
        apart = [(k - 1) * d < s for k, s, d in zip(as_pair(kernel), as_pair(stride), as_pair(dilation), strict=True)]
        self.unique = all(apart)
        self.index: Tensor | None = None

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The maxima; remembers where they were."""
        result, self.index = functional.max_pool2d(
            values[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil, return_indices=True
        )
        return result

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """The indices."""
        return {("index", self.output): 4 * slots[self.output].size}

    def keep(self, kept: Kept, second: bool) -> Any:
        """``(index [n, H' W', C], (H, W), (H', W'))``."""
        assert self.index is not None
        source, target = kept.values[self.inputs[0]], self.index
        assert source is not None
        index = target.permute(0, 2, 3, 1).to(torch.int32).flatten(1, 2).contiguous()
        self.index = None
        return index, tuple(source.shape[2:]), tuple(target.shape[2:])

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Gather."""
        t = run.t[self.inputs[0]]
        if t is None:
            return
        index, _, size = kept
        run.t[self.output] = hvp.pool_gather(t.flatten(2, 3), index).view(run.k, -1, *size, t.shape[-1])

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Scatter."""
        signal = run.take(self.output)
        if signal is None:
            return
        index, (height, width), _ = kept
        below = hvp.pool_scatter(signal.flatten(2, 3), index, height * width, unique=self.unique)
        run.give(self.inputs[0], below.view(run.k, -1, height, width, signal.shape[-1]))


class AveragePoolStep(Step):
    """Average over windows, or adaptive average: a linear map of each plane."""

    fresh_signal = True
    fresh_tangent = True

    def __init__(self, name: str, inputs: Sequence[int], output: int, options: dict[str, Any], adaptive: bool) -> None:
        super().__init__(name, inputs, output)
        self.options, self.adaptive = options, adaptive

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The averages."""
        return self._forward(values[0])

    def _forward(self, x: Tensor) -> Tensor:
        if self.adaptive:
            return functional.adaptive_avg_pool2d(x, self.options["output_size"])
        return functional.avg_pool2d(x, **self.options)

    def keep(self, kept: Kept, second: bool) -> Any:
        """Height and width of the input."""
        source = kept.values[self.inputs[0]]
        assert source is not None
        return tuple(source.shape[2:])

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """The averages of the tangents."""
        t = run.t[self.inputs[0]]
        if t is None:
            return
        images = t.reshape(-1, *t.shape[2:]).permute(0, 3, 1, 2)
        out = self._forward(images).permute(0, 2, 3, 1).contiguous()
        run.t[self.output] = out.view(run.k, -1, *out.shape[1:])

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """The transpose."""
        signal = run.take(self.output)
        if signal is None:
            return
        images = signal.reshape(-1, *signal.shape[2:]).permute(0, 3, 1, 2)
        like = images.new_empty(images.shape[0], *kept, images.shape[1]).permute(0, 3, 1, 2)  # only its shape is read
        aten = torch.ops.aten
        if self.adaptive:
            below = aten._adaptive_avg_pool2d_backward(images, like)
        else:
            o = self.options
            kernel, stride, padding = as_pair(o["kernel_size"]), as_pair(o["stride"]), as_pair(o["padding"])
            below = aten.avg_pool2d_backward(
                images, like, kernel, stride, padding, o["ceil_mode"], o["count_include_pad"], o["divisor_override"]
            )
        below = below.permute(0, 2, 3, 1).contiguous()
        run.give(self.inputs[0], below.view(run.k, -1, *below.shape[1:]))


class MeanStep(Step):
    """Mean over all positions: ``[n, C, H, W]`` to ``[n, C]`` or ``[n, C, 1, 1]``; ``[n, T, C]`` to ``[n, C]``."""

    fresh_signal = True
    fresh_tangent = True

    def __init__(self, name: str, inputs: Sequence[int], output: int, dims: tuple[int, ...], keepdim: bool) -> None:
        super().__init__(name, inputs, output)
        self.dims, self.keepdim = dims, keepdim

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The means."""
        return values[0].mean(self.dims, self.keepdim)

    def keep(self, kept: Kept, second: bool) -> Any:
        """Shape of the input, laid out, and of the output."""
        return tuple(kept.exact_value(self.inputs[0]).shape), tuple(kept.exact_value(self.output).shape)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """The means of the tangents: all axes between samples and channels."""
        t = run.t[self.inputs[0]]
        if t is not None:
            run.t[self.output] = t.flatten(2, -2).mean(2).view(run.k, *kept[1])

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Each position its share."""
        signal = run.take(self.output)
        if signal is None:
            return
        shape = kept[0]
        count = torch.Size(shape[1:-1]).numel()
        spread = (signal / count).view(run.k, shape[0], *(1,) * (len(shape) - 2), shape[-1])
        run.give(self.inputs[0], spread.expand(run.k, *shape).contiguous())


def _check_image(builder: Builder, node: Any, slot: int) -> None:
    if len(builder.program.slots[slot].shape) != 3:
        raise builder.unsupported(node, f"pooling of {['N', *builder.program.slots[slot].shape]}")


def _add_max(
    builder: Builder, node: Any, x: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> None:
    _check_image(builder, node, x)
    args = (kernel, kernel if stride in (None, [], ()) else stride, padding, dilation, ceil)
    builder.add(node, MaxPoolStep(builder.label(node), (x,), builder.new_slot(), *args))


@register_module(nn.MaxPool2d)
def _max_module(builder: Builder, node: Any, module: Any) -> None:
    if module.return_indices:
        raise builder.unsupported(node, "return_indices=True")
    x = builder.slots_of(node, 1)[0]
    _add_max(builder, node, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)


_MAX_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


@register_function(functional.max_pool2d, torch.max_pool2d)
def _max_function(builder: Builder, node: Any, module: Any) -> None:
    x, *options, indices = builder.arguments(node, _MAX_ARGUMENTS, (None, 0, 1, False, False))
    if indices:
        raise builder.unsupported(node, "return_indices=True")
    _add_max(builder, node, builder.slot(node, x), *options)


_AVERAGE_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _add_average(builder: Builder, node: Any, x: int, values: Sequence[Any]) -> None:
    _check_image(builder, node, x)
    options: dict[str, Any] = dict(zip(_AVERAGE_ARGUMENTS, values, strict=True))
    if options["stride"] in (None, [], ()):
        options["stride"] = options["kernel_size"]
    builder.add(node, AveragePoolStep(builder.label(node), (x,), builder.new_slot(), options, False))


@register_module(nn.AvgPool2d)
def _average_module(builder: Builder, node: Any, module: Any) -> None:
    values = [getattr(module, name) for name in _AVERAGE_ARGUMENTS]
    _add_average(builder, node, builder.slots_of(node, 1)[0], values)


@register_function(functional.avg_pool2d)
def _average_function(builder: Builder, node: Any, module: Any) -> None:
    x, *values = builder.arguments(node, ("input", *_AVERAGE_ARGUMENTS), (None, 0, False, True, None))
    _add_average(builder, node, builder.slot(node, x), values)


def _add_adaptive(builder: Builder, node: Any, x: int, size: Any) -> None:
    _check_image(builder, node, x)
    if all(one == 1 for one in as_pair(size)):
        builder.add(node, MeanStep(builder.label(node), (x,), builder.new_slot(), (2, 3), True))
        return
    step = AveragePoolStep(builder.label(node), (x,), builder.new_slot(), {"output_size": size}, True)
    builder.add(node, step)


@register_module(nn.AdaptiveAvgPool2d)
def _adaptive_module(builder: Builder, node: Any, module: Any) -> None:
    _add_adaptive(builder, node, builder.slots_of(node, 1)[0], module.output_size)


@register_function(functional.adaptive_avg_pool2d)
def _adaptive_function(builder: Builder, node: Any, module: Any) -> None:
    x, size = builder.arguments(node, ("input", "output_size"), ())
    _add_adaptive(builder, node, builder.slot(node, x), size)


@register_function(torch.mean)
@register_method("mean")
def _mean(builder: Builder, node: Any, module: Any) -> None:
    x, dims, keepdim = builder.arguments(node, ("input", "dim", "keepdim"), (None, False))
    slot = builder.slot(node, x)
    shape = builder.program.slots[slot].shape
    rank = len(shape) + 1
    if dims is None:
        raise builder.unsupported(node, "a mean over the samples")
    axes = tuple(sorted(d % rank for d in ((dims,) if isinstance(dims, int) else dims)))
    positions = (2, 3) if rank == 4 else (1,) if rank == 3 else None
    if axes != positions:
        raise builder.unsupported(node, f"a mean over axes {axes} of {rank}")
    builder.add(node, MeanStep(builder.label(node), (slot,), builder.new_slot(), axes, bool(keepdim)))
