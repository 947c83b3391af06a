# SPDX-License-Identifier: Apache-2.0
"""The parts of the neural tangent kernel: which layers have a product form, and what each kind of layer adds.

Formulas stand in ``ntk.py``.  All functions add to the lower triangle of K only (row blocks against the columns up to
their own end): half the work; ``mirror_lower`` fills the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

from curvlab.operators.calls import call_at

__all__ = ["BLOCK_ROWS", "Layer", "add_by_jacobians", "add_layers", "find_layers", "mirror_lower"]

# Rows of K a block: a 512 x 5000 block of float32 is 10 MB, and the triangle wastes half a block per block row.
BLOCK_ROWS = 512


@dataclass
class Layer:
    """A layer ``y = scale (W a + b)`` (or its convolution) that is called once, with parameters of its own."""

    prefix: str
    module: nn.Linear | nn.Conv2d
    names: tuple[str, ...]
    weight: bool
    bias: bool
    scale: float
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def has_positions(self) -> bool:
        """Whether a weight is used at several positions of one sample (images, tokens)."""
        return isinstance(self.module, nn.Conv2d) or self.outputs.ndim > 2

    def signal_size(self, classes: int) -> int:
        """Elements of ``B`` a sample, and of the patches it meets."""
        patches = self.patches(self.inputs[:1]).numel() if self.has_positions else 0
        return classes * self.outputs[0].numel() + patches

    def activation_size(self) -> int:
        """Elements that the forward pass keeps a sample."""
        return self.inputs[0].numel() + self.outputs[0].numel()

    def patches(self, inputs: Tensor) -> Tensor:
        """What the weight multiplies at each position: ``[N, fan_in, positions]``."""
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            return F.unfold(
                inputs,
                kernel_size=conv.kernel_size,  # type: ignore[arg-type]
                dilation=conv.dilation,  # type: ignore[arg-type]
                padding=conv.padding,  # type: ignore[arg-type]
                stride=conv.stride,  # type: ignore[arg-type]
            )
        return inputs.flatten(1, -2).transpose(1, 2)

    def channels_first(self, signal: Tensor) -> Tensor:
        """A gradient in the layer's output as ``[N, out, positions]``."""
        if isinstance(self.module, nn.Conv2d):
            return signal.flatten(2)
        return signal.flatten(1, -2).transpose(1, 2)


def _scale_of(module: nn.Module) -> float | None:
    """The factor s when the module is ``s (W a + b)`` with a known product form, else None.

    A subclass of ``nn.Linear`` with another forward takes part by an attribute ``affine_scale``.
    """
    if isinstance(module, nn.Linear):
        if hasattr(module, "affine_scale"):
            return float(module.affine_scale)  # type: ignore[arg-type]
        return 1.0 if type(module).forward is nn.Linear.forward else None
    if isinstance(module, nn.Conv2d):
        plain = type(module).forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
        zero_padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return 1.0 if plain and zero_padded and module.groups == 1 else None
    return None


def _run(model: nn.Module, theta: dict[str, Tensor], x: Tensor, layers: list[Layer]) -> tuple[Tensor, list[int]]:
    """Outputs, with each layer's input and output kept; and how often each layer was called."""
    calls = [0] * len(layers)
    handles = []
    for i, layer in enumerate(layers):

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, i: int = i) -> Tensor:
            calls[i] += 1
            layers[i].inputs = args[0].detach() if len(args) == 1 else torch.empty(0)
            layers[i].outputs = output
            # The network goes on with an alias: an in-place activation behind the layer (ReLU(inplace=True)) would
            # turn the kept tensor into the activation's output, and B into another gradient.
            return output.clone()

        handles.append(layer.module.register_forward_hook(keep))
    try:
        return call_at(model, theta, (x,)), calls
    finally:
        for handle in handles:
            handle.remove()


def find_layers(model: nn.Module, theta: dict[str, Tensor], x: Tensor) -> list[Layer]:
    """The layers with a product form that are called exactly once and whose parameters no one else holds."""
    holders: dict[int, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        holders[id(param)] = holders.get(id(param), 0) + 1
    found: list[Layer] = []
    for prefix, module in model.named_modules():
        scale = _scale_of(module)
        own = dict(module.named_parameters(recurse=False))
        # exactly weight and bias: a parametrized layer (weight norm) holds other tensors, and has no product form
        if scale is None or set(own) - {"weight", "bias"} or "weight" not in own:
            continue
        if any(holders[id(param)] > 1 for param in own.values()):
            continue
        names = tuple(name for part in own if (name := f"{prefix}.{part}" if prefix else part) in theta)
        if names:
            parts = {name.rpartition(".")[2] for name in names}
            found.append(Layer(prefix, module, names, "weight" in parts, "bias" in parts, scale))  # type: ignore[arg-type]
    with torch.no_grad():
        _, calls = _run(model, theta, x, found)
    return [
        layer
        for layer, count in zip(found, calls, strict=True)
        if count == 1 and layer.inputs.ndim > 1 and len(layer.inputs) == 1 and len(layer.outputs) == 1
    ]


def add_layers(
    kernel: Tensor, model: nn.Module, theta: dict[str, Tensor], x: Tensor, layers: list[Layer], spare_bytes: int
) -> None:
    """Add what all ``layers`` contribute; their signals are made in groups that fit into ``spare_bytes``."""
    if not layers:
        return
    leaves = {name: value.requires_grad_() for name, value in theta.items()}
    try:
        with torch.enable_grad():
            outputs, _ = _run(model, leaves, x, layers)
            for group in _groups(layers, outputs.shape[1], len(x), spare_bytes // (2 * x.element_size())):
                for layer, signal in zip(group, _signals(outputs, group), strict=True):
                    with torch.no_grad():
                        (_add_positions if layer.has_positions else _add_product)(kernel, layer, signal)
                    layer.outputs = layer.inputs = torch.empty(0)
    finally:
        for value in theta.values():
            value.requires_grad_(False)


def _groups(layers: list[Layer], classes: int, samples: int, limit: int) -> Iterator[list[Layer]]:
    group: list[Layer] = []
    size = 0
    for layer in layers:
        own = layer.signal_size(classes) * samples
        if group and size + own > limit:
            yield group
            group, size = [], 0
        group.append(layer)
        size += own
    yield group


def _signals(outputs: Tensor, group: list[Layer]) -> list[Tensor]:
    """B of each layer, ``[N, C, *output]``: one backward pass an output (samples do not meet: sums over n are B)."""
    kept = [layer.outputs for layer in group]
    signals = [y.new_zeros(len(y), outputs.shape[1], *y.shape[1:]) for y in kept]
    for c in range(outputs.shape[1]):
        grads = torch.autograd.grad(outputs[:, c].sum(), kept, retain_graph=True, allow_unused=True)
        for signal, grad in zip(signals, grads, strict=True):
            if grad is not None:
                signal[:, c] = grad
    return signals


def _row_blocks(samples: int, classes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ROWS // classes)
    for first in range(0, samples, step):
        yield first, min(first + step, samples)


def _add_product(kernel: Tensor, layer: Layer, signal: Tensor) -> None:
    """``K += s^2 (B B^T) * (a_n . a_m + 1)`` for a fully connected layer."""
    samples, classes, width = signal.shape
    rows = signal.view(samples * classes, width)
    inner = layer.inputs @ layer.inputs.T if layer.weight else layer.inputs.new_zeros(samples, samples)
    inner = (inner + 1.0 if layer.bias else inner).mul_(layer.scale**2)
    for first, last in _row_blocks(samples, classes):
        block = rows[first * classes : last * classes] @ rows[: last * classes].T
        block.view(last - first, classes, last, classes).mul_(inner[first:last, None, :last, None])
        kernel[first * classes : last * classes, : last * classes].add_(block)


def _add_gram(kernel: Tensor, jacobian: Tensor, scale: float = 1.0) -> None:
    """``K += scale J J^T``, J ``[N C, p]``."""
    for first in range(0, len(jacobian), BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, len(jacobian))
        kernel[first:last, :last].addmm_(jacobian[first:last], jacobian[:last].T, alpha=scale)


def _add_positions(kernel: Tensor, layer: Layer, signal: Tensor) -> None:
    """Per-sample gradients of a layer used at several positions, in blocks of output channels."""
    samples, classes = signal.shape[:2]
    rows = layer.channels_first(signal.flatten(0, 1))  # [N C, out, positions]
    rows = rows.view(samples, classes, *rows.shape[1:])
    if layer.weight:
        patches = layer.patches(layer.inputs)  # [N, fan_in, positions]
        # A block of J no larger than the signal: that much is in the budget.
        channels = max(1, signal.numel() // (samples * classes * patches.shape[1]))
        for part in rows.split(channels, 2):
            jacobian = torch.einsum("ncop,nip->ncoi", part, patches)
            _add_gram(kernel, jacobian.reshape(samples * classes, -1), layer.scale**2)
    if layer.bias:
        _add_gram(kernel, rows.sum(-1).view(samples * classes, -1), layer.scale**2)


def add_by_jacobians(kernel: Tensor, model: nn.Module, theta: dict[str, Tensor], x: Tensor, name: str) -> None:
    """Add one parameter tensor's part by its exact per-sample Jacobian, ``J [N C, p]``."""
    others = {key: value for key, value in theta.items() if key != name}

    def one_sample(value: Tensor, sample: Tensor) -> Tensor:
        return call_at(model, {**others, name: value}, (sample[None],))[0]

    # chunks: each holds C backward passes of its samples at once
    jacobian = vmap(jacrev(one_sample), in_dims=(None, 0), chunk_size=min(len(x), 32))(theta[name], x)
    _add_gram(kernel, jacobian.reshape(kernel.shape[0], -1).detach())


def mirror_lower(kernel: Tensor) -> None:
    """Copy the lower triangle onto the upper one, block by block."""
    for first in range(0, len(kernel), BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, len(kernel))
        square = kernel[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).T)
        kernel[:first, first:last] = kernel[first:last, :first].T
