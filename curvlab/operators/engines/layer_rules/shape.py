# SPDX-License-Identifier: Apache-2.0
"""Steps that move values only: reshapes, concatenation; and what is the identity in evaluation mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.rules import Builder, register_function, register_method, register_module
from curvlab.operators.engines.steps import Run, Slot, Step, to_internal, to_natural

__all__ = ["CatStep", "ReshapeStep", "TransposeStep"]


class ReshapeStep(Step):
    """Another shape of the same elements of each sample; a copy only between channels-last and other layouts."""

    def __init__(self, name: str, inputs: Sequence[int], output: int, before: Slot, shape: tuple[int, ...]) -> None:
        super().__init__(name, inputs, output)
        self.before, self.after = before, Slot(shape, before.active)

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The reshaped value."""
        return values[0].reshape(values[0].shape[0], *self.after.shape)

    @staticmethod
    def _moved(x: Tensor, source: Slot, target: Slot) -> Tensor:
        lead = x.shape[:2]
        natural = to_natural(x, 2).reshape(*lead, *target.shape)
        return to_internal(natural, 2)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """The tangents, moved likewise."""
        t = run.t[self.inputs[0]]
        if t is not None:
            run.t[self.output] = self._moved(t, self.before, self.after)

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """The signals, moved back."""
        signal = run.take(self.output)
        if signal is not None:
            run.give(self.inputs[0], self._moved(signal, self.after, self.before))


class TransposeStep(Step):
    """``[n, T, C]`` to ``[n, C, T]``."""

    fresh_signal = True
    fresh_tangent = True

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The transposed value."""
        return values[0].transpose(1, 2)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """The tangents, transposed."""
        t = run.t[self.inputs[0]]
        if t is not None:
            run.t[self.output] = t.transpose(2, 3).clone(memory_format=torch.contiguous_format)

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """The signals, transposed back."""
        signal = run.take(self.output)
        if signal is not None:
            run.give(self.inputs[0], signal.transpose(2, 3).clone(memory_format=torch.contiguous_format))


class CatStep(Step):
    """Concatenation along the channels (the last axis as values are laid out)."""

    def __init__(self, name: str, inputs: Sequence[int], output: int, axis: int, parts: Sequence[Slot]) -> None:
        super().__init__(name, inputs, output)
        self.axis, self.parts = axis, list(parts)

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The concatenation."""
        return torch.cat(list(values), self.axis)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Tangents side by side; zeros where a part is a constant."""
        tangents = [run.t[slot] for slot in self.inputs]
        like = next((t for t in tangents if t is not None), None)
        if like is None:
            return
        filled = [
            like.new_zeros(run.k, run.n, *part.internal) if t is None else t
            for t, part in zip(tangents, self.parts, strict=True)
        ]
        run.t[self.output] = torch.cat(filled, -1)

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """To each part its columns."""
        signal = run.take(self.output)
        if signal is None:
            return
        pieces = signal.split([part.internal[-1] for part in self.parts], -1)
        for slot, active, piece in zip(self.inputs, self.active_inputs, pieces, strict=True):
            if active:
                run.give(slot, piece.contiguous())


def _add_reshape(builder: Builder, node: Any, x: int, result: Tensor) -> None:
    samples = builder.probe[x].shape[0]
    if result.ndim < 2 or result.shape[0] != samples:
        raise builder.unsupported(node, f"a reshape to {list(result.shape)} that mixes samples")
    before = builder.program.slots[x]
    shape = tuple(result.shape[1:])
    if shape == before.shape:
        builder.alias(node, x)
        return
    builder.add(node, ReshapeStep(builder.label(node), (x,), builder.new_slot(), before, shape))


@register_module(nn.Flatten)
def _flatten_module(builder: Builder, node: Any, module: Any) -> None:
    (x,) = builder.slots_of(node, 1)
    _add_reshape(builder, node, x, module(builder.probe[x]))


@register_module(nn.Unflatten)
def _unflatten_module(builder: Builder, node: Any, module: Any) -> None:
    (x,) = builder.slots_of(node, 1)
    _add_reshape(builder, node, x, module(builder.probe[x]))


@register_function(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
@register_method("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten")
def _reshape(builder: Builder, node: Any, module: Any) -> None:
    x, *rest = node.args
    slot = builder.slot(node, x)
    values = [builder.value(node, item) for item in rest]
    options = {key: builder.value(node, item) for key, item in node.kwargs.items()}
    probe = builder.probe[slot].contiguous()
    result = getattr(probe, node.target if isinstance(node.target, str) else node.target.__name__)(*values, **options)
    _add_reshape(builder, node, slot, result)


@register_function(torch.transpose, torch.permute)
@register_method("transpose", "permute")
def _transpose(builder: Builder, node: Any, module: Any) -> None:
    slot = builder.slot(node, node.args[0])
    axes = builder.value(node, node.args[1:])
    axes = tuple(axes[0]) if axes and isinstance(axes[0], (tuple, list)) else axes
    name = node.target if isinstance(node.target, str) else node.target.__name__
    wanted = {1, 2} if name == "transpose" else (0, 2, 1)
    given = tuple(axis % 3 for axis in axes)
    if (
        node.kwargs
        or len(builder.program.slots[slot].shape) != 2
        or (set(given) if name == "transpose" else given) != wanted
    ):
        raise builder.unsupported(node, f"axes {axes} of inputs ['N', *{builder.program.slots[slot].shape}]")
    builder.add(node, TransposeStep(builder.label(node), (slot,), builder.new_slot()))


@register_function(torch.cat, torch.concat)
def _cat(builder: Builder, node: Any, module: Any) -> None:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    slots = [builder.slot(node, tensor) for tensor in tensors]
    parts = [builder.program.slots[slot] for slot in slots]
    rank = len(parts[0].shape) + 1
    channel = 1 if rank == 4 else rank - 1
    if not isinstance(axis, int) or axis % rank != channel or rank < 2:
        raise builder.unsupported(node, f"a concatenation along axis {axis} of {rank}")
    builder.add(node, CatStep(builder.label(node), slots, builder.new_slot(), axis, parts))


@register_module(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
def _identity_module(builder: Builder, node: Any, module: Any) -> None:
    if module.training and not isinstance(module, nn.Identity):
        raise builder.unsupported(node, "dropout in training mode")
    builder.alias(node, builder.slots_of(node, 1)[0])


@register_function(functional.dropout, functional.dropout2d)
def _dropout_function(builder: Builder, node: Any, module: Any) -> None:
    x, p, training, _ = builder.arguments(node, ("input", "p", "training", "inplace"), (0.5, True, False))
    if training and p > 0:
        raise builder.unsupported(node, "dropout in training mode")
    builder.alias(node, builder.slot(node, x))


@register_method("contiguous", "clone")
def _copy_method(builder: Builder, node: Any, module: Any) -> None:
    builder.alias(node, builder.slot(node, node.args[0]))
