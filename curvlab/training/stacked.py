# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of S stacked fully connected networks: one update of all of them in 24 calls.

Weights ``W [S, out, in]``, biases ``b [S, 1, out]``, activations ``a [S, B, in]``.  Forward and backward are written by
hand into buffers that are made once (glibc gives fresh pages to every large result otherwise).  With
y = s (a W^T + b) (s = 1, or 1/sqrt(3 fan_in) with NTK parametrization), G = B dL/dy, L the batch-mean cross-entropy:

    G_last = softmax(y) - onehot                            G_l = (s G_{l+1} W_{l+1}) * (a_{l+1} > 0)
    v_W <- momentum v_W + (s/B) G^T a                       v_b <- momentum v_b + (s/B) 1^T G
    theta <- theta - lr v

The momentum update *is* the accumulation of the weight-gradient product (``beta`` and ``alpha`` of ``baddbmm_``): the
gradient is never stored, and the optimizer is one ``add_`` over one flat buffer.  At width 4096 this takes 43 ms a
layer where a fresh gradient and torch's fused SGD take 62.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.models import MLP

__all__ = ["Stack"]

# Offsets in the flat buffers are multiples of this many elements (64 bytes of float32): aligned rows for the BLAS.
ALIGN = 16


@dataclass
class _Layer:
    """One stacked layer: parameters and momentum (views of the flat buffers) and its factor s."""

    weight: Tensor  # [S, out, in]
    bias: Tensor  # [S, 1, out]
    weight_velocity: Tensor
    bias_velocity: Tensor
    scale: float


@dataclass
class _Buffers:
    """Scratch for one batch size B."""

    activations: list[Tensor]  # what each layer reads, [S, B, in]
    signals: list[Tensor]  # G of each layer but the last, [S, B, out]
    last_signal: Tensor  # G of the last layer, [S, C, B]: softmax over a short last dimension is 5 times slower
    ones: Tensor  # [S, 1, B]


class Stack:
    """S networks of one shape in two flat buffers, ``theta`` and ``velocity``; layer by layer, network by network.

    Args:
        models: the networks (their parameters are copied).
        batch_sizes: the batch sizes that will come (the full one and the last, partial one).
        momentum: factor of the velocity at each step.
    """

    def __init__(self, models: Sequence[MLP], batch_sizes: set[int], momentum: float) -> None:
        self.count, self.momentum = len(models), momentum
        self.layers, self.theta, self.velocity = _flatten_models(models)
        self.features = self.layers[0].weight.shape[2]
        self.classes = self.layers[-1].weight.shape[1]
        self._buffers = self._make_buffers(batch_sizes)

    def views(self, s: int) -> list[Tensor]:
        """The live parameters of network s, in the order of ``model.parameters()``."""
        return [view for layer in self.layers for view in (layer.weight[s], layer.bias[s, 0])]

    def _make_buffers(self, batch_sizes: set[int]) -> dict[int, _Buffers]:
        """Buffers for each batch size: prefixes of the same memory."""
        count, largest = self.count, max(batch_sizes)
        widths_in = [layer.weight.shape[2] for layer in self.layers]
        widths_out = [layer.weight.shape[1] for layer in self.layers[:-1]]
        flats_in = [self.theta.new_empty(count * largest * width) for width in widths_in]
        flats_out = [self.theta.new_empty(count * largest * width) for width in widths_out]
        made = {}
        for size in batch_sizes:
            made[size] = _Buffers(
                [f[: count * size * w].view(count, size, w) for f, w in zip(flats_in, widths_in, strict=True)],
                [f[: count * size * w].view(count, size, w) for f, w in zip(flats_out, widths_out, strict=True)],
                self.theta.new_empty(count, self.classes, size),
                self.theta.new_ones(count, 1, size),
            )
        return made

    def step(self, x: Tensor, rows: Tensor, onehot: Tensor, logits: Tensor, minus_lr: float | Tensor) -> None:
        """One update of every network.  No host synchronization, static shapes: capturable in a CUDA graph.

        Args:
            x: all samples, ``[N, features]``.
            rows: sample numbers of the batch, network after network, ``[S B]``.
            onehot: the labels' indicators, ``[S, C, B]``.
            logits: receives the outputs before the update, ``[S, C, B]``, contiguous.
            minus_lr: minus the learning rate; a 0-d tensor inside a captured graph, where a number would be baked in.
        """
        size = logits.shape[2]
        buffers = self._buffers[size]
        inputs = buffers.activations
        torch.index_select(x, 0, rows, out=inputs[0].view(-1, self.features))
        for layer, a, h in zip(self.layers[:-1], inputs[:-1], inputs[1:], strict=True):
            s = layer.scale
            torch.baddbmm(layer.bias.expand_as(h), a, layer.weight.transpose(1, 2), beta=s, alpha=s, out=h)
            h.relu_()
        last, s = self.layers[-1], self.layers[-1].scale
        bias = last.bias.transpose(1, 2).expand_as(logits)
        torch.baddbmm(bias, last.weight, inputs[-1].transpose(1, 2), beta=s, alpha=s, out=logits)
        torch.softmax(logits, 1, out=buffers.last_signal)
        buffers.last_signal.sub_(onehot)
        signals = [*buffers.signals, buffers.last_signal.transpose(1, 2)]
        for i in reversed(range(len(self.layers))):
            self._backward(i, inputs[i], signals, buffers.ones, self.layers[i].scale / size)
        if isinstance(minus_lr, Tensor):
            self.theta.addcmul_(self.velocity, minus_lr)
        else:
            self.theta.add_(self.velocity, alpha=minus_lr)

    def _backward(self, i: int, a: Tensor, signals: list[Tensor], ones: Tensor, alpha: float) -> None:
        layer, signal = self.layers[i], signals[i]
        if i > 0:
            below = signals[i - 1]
            torch.bmm(signal, layer.weight, out=below)
            if layer.scale != 1.0:
                below.mul_(layer.scale)
            torch.ops.aten.threshold_backward.grad_input(below, a, 0, grad_input=below)
        layer.weight_velocity.baddbmm_(signal.transpose(1, 2), a, beta=self.momentum, alpha=alpha)
        layer.bias_velocity.baddbmm_(ones, signal, beta=self.momentum, alpha=alpha)


def _flatten_models(models: Sequence[MLP]) -> tuple[list[_Layer], Tensor, Tensor]:
    """Copy the models' parameters into one flat buffer; returns the stacked views, theta and v (zero)."""
    count, first = len(models), models[0].linear_layers()
    sizes = [count * param.numel() for layer in first for param in (layer.weight, layer.bias)]
    padded = [-(-size // ALIGN) * ALIGN for size in sizes]
    theta = first[0].weight.detach().new_zeros(sum(padded))
    velocity = torch.zeros_like(theta)
    pieces = list(zip(theta.split(padded), velocity.split(padded), sizes, strict=True))
    layers = []
    for i, layer in enumerate(first):
        (weight, weight_v, n), (bias, bias_v, m) = pieces[2 * i : 2 * i + 2]
        weights = [flat[:n].view(count, *layer.weight.shape) for flat in (weight, weight_v)]
        biases = [flat[:m].view(count, 1, -1) for flat in (bias, bias_v)]
        for s, model in enumerate(models):
            weights[0][s].copy_(model.linear_layers()[i].weight.detach())
            biases[0][s, 0].copy_(model.linear_layers()[i].bias.detach())
        scale = getattr(layer, "affine_scale", 1.0)
        layers.append(_Layer(weights[0], biases[0], weights[1], biases[1], scale))
    return layers, theta, velocity
