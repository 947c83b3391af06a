# SPDX-License-Identifier: Apache-2.0
r"""What linear and convolutional steps share: effective weights, bias sums, and a normalization folded into them.

A constant factor (:class:`NTKLinear`'s) or a normalization with constant statistics m, v after the layer is one affine
map with effective parameters, s = γ / sqrt(v + eps):

    W' = s W,  b' = β + s (b - m);   RW' = s V + Rs W,  Rb' = Rβ + s Rb + Rs (b - m),  Rs = Rγ / sqrt(v + eps)

and with G', g' the derivatives in W', b' (g' = column sums), L_W = s G', L_b = s g', L_β = g', and
L_γ = (sum over inputs of G' W + g' (b - m)) / sqrt(v + eps); their tangents follow by the product rule.  So the
normalization costs products nothing but passes over weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.engines.steps import Kept, Product, Run, Slot, Step

__all__ = ["AffineBound", "AffineStep", "Fold"]


@dataclass
class Fold:
    """A normalization with constant statistics: names of γ and β (None where it has none), m, v, eps."""

    gain: str | None
    shift: str | None
    mean: Tensor
    variance: Tensor
    eps: float


@dataclass
class AffineBound:
    """Of one product: RW' and Rb' (None: this parameter is not chosen), and where their derivatives gather."""

    weight: Any = None
    bias: Tensor | None = None
    out_weight: Tensor | None = None
    out_bias: Tensor | None = None
    want_weight: bool = False
    want_bias: bool = False
    gathered: Any = None
    fresh_weight: bool = True  # the first chunk may write where it would add
    fresh_bias: bool = True
    flipped: Any = None
    gain: Tensor | None = None  # Rs


class AffineStep(Step):
    """``z = W' x + b'``; :meth:`set_theta` computes the effective parameters."""

    fresh_signal = True
    fresh_tangent = True

    def __init__(
        self, name: str, inputs: Sequence[int], output: int, weight: str, bias: str | None, scale: float | None = None
    ):
        super().__init__(name, inputs, output, {"weight": weight, "bias": bias})
        self.scale, self.fold = scale, None
        self.index = -1
        self.bias_from_outside = False  # the step after this one sums the signal over the rows on its way
        self.gradient: tuple[Tensor | None, Tensor | None] | None = None  # G', g' at theta
        self.second_weight = False
        self._scale: Tensor | None = None

    fold: Fold | None

    def fold_norm(self, fold: Fold, output: int) -> None:
        """Take the normalization that follows into the layer."""
        self.fold, self.output = fold, output
        if fold.gain is not None:
            self.names["gain"] = fold.gain
        if fold.shift is not None:
            self.names["shift"] = fold.shift

    def _effective(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """W', b', s ``[O]``, and b - m, in the dtype of ``theta``."""
        weight, bias = theta[self.names["weight"]], theta.get(self.names.get("bias", ""))
        if self.fold is None:
            if self.scale is None:
                return weight, bias, None, None
            s = torch.full((weight.shape[0],), self.scale, dtype=weight.dtype, device=weight.device)
            return weight * self.scale, None if bias is None else bias * self.scale, s, None
        inv = (self.fold.variance.to(weight) + self.fold.eps).rsqrt()
        s = inv if self.fold.gain is None else theta[self.fold.gain] * inv
        offset = -self.fold.mean.to(weight) if bias is None else bias - self.fold.mean.to(weight)
        shifted = s * offset
        if self.fold.shift is not None:
            shifted = shifted + theta[self.fold.shift]
        return weight * _column(s, weight), shifted, s, offset

    def effective(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' and b'."""
        return self._effective(theta)[:2]

    def set_theta(self, theta: Mapping[str, Tensor], dtype: torch.dtype, compute: torch.dtype) -> None:
        """Effective parameters from float64 ones: weights in ``compute``, what sums use in ``dtype``."""
        weight, _, s, offset = self._effective(theta)
        self.raw_weight = theta[self.names["weight"]].to(dtype)
        self.weight = weight.to(compute)
        self._scale = None if s is None else s.to(dtype)
        self._offset = None if offset is None else offset.to(dtype)
        self._inv = None
        if self.fold is not None:
            self._inv = (self.fold.variance.double() + self.fold.eps).rsqrt().to(dtype)

    @property
    def plain(self) -> bool:
        """Whether the effective parameters are the parameters."""
        return self._scale is None

    def chosen(self, offsets: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether the effective weight and the effective bias depend on chosen parameters."""
        roles = {role for role, name in self.names.items() if name in offsets}
        return bool(roles & {"weight", "gain"}), bool(roles & {"bias", "gain", "shift"})

    def has_tangent(self) -> bool:
        """Whether tangents arrive from below."""
        return self.active_inputs[0]

    def deltas(self) -> set[int]:
        """δ at the output multiplies V on its way down, and Rx in the weight's derivative."""
        return {self.output} if self.has_tangent() else set()

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """The input (for V x and for weight derivatives) and δ."""
        bytes_ = {("value", self.inputs[0]): slots[self.inputs[0]].size * itemsize}
        if second and self.has_tangent():
            bytes_["delta", self.output] = slots[self.output].size * itemsize
        return bytes_

    def keep(self, kept: Kept, second: bool) -> Any:
        """``(x, δ or None)``."""
        delta = kept.delta(self.output) if second and self.has_tangent() else None
        return kept.value(self.inputs[0]), delta

    def tangents(self, product: Product, bound: AffineBound) -> Tensor | None:
        """RW' ``[K, *W.shape]`` in the dtype of the directions, and into ``bound`` Rb' and Rs."""
        weight, bias = product.direction(self.names.get("weight")), product.direction(self.names.get("bias"))
        if self.plain:
            bound.bias = bias
            return weight
        s = self._scale
        assert s is not None
        gain = product.direction(self.names.get("gain"))
        shift = product.direction(self.names.get("shift"))
        rs = None if gain is None or self._inv is None else gain * self._inv
        bound.gain = rs
        total = None if bias is None else s * bias
        if rs is not None:
            assert self._offset is not None
            part = rs * self._offset
            total = part if total is None else total + part
        if shift is not None:
            total = shift if total is None else total + shift
        bound.bias = total
        effective = None if weight is None else weight * _column(s, self.raw_weight)
        if rs is not None:
            part = rs.view(*rs.shape, *(1,) * (self.raw_weight.ndim - 1)) * self.raw_weight
            effective = part if effective is None else effective.add_(part)
        return effective

    def bind_bias(self, product: Product, bound: AffineBound) -> None:
        """Where g' gathers: the result itself if nothing is folded."""
        if product.result is None:
            return
        bound.want_weight, bound.want_bias = self.chosen(product.offsets)
        if product.capture:  # derivatives in W' and b' themselves are asked for
            bound.want_weight, bound.want_bias = True, True
        if bound.want_bias:
            if self.plain and not product.capture:
                bound.out_bias = product.target(self.names["bias"])
            else:
                shape = (product.count, self.raw_weight.shape[0])
                bound.out_bias = product.result.new_zeros(shape)
        bound.fresh_weight = self.names["weight"] not in product.zeroed
        bound.fresh_bias = self.names.get("bias") not in product.zeroed

    def add_bias(self, run: Run, bound: AffineBound, signal: Tensor) -> None:
        """Column sums of the signal, where the step after this one did not take them already."""
        if bound.want_bias and not self.bias_from_outside:
            self.gather_bias(run, bound, signal.flatten(1, -2).sum(1))

    @staticmethod
    def gather_bias(run: Run, bound: AffineBound, sums: Tensor) -> None:
        """Add column sums ``[k, O]`` to what was gathered."""
        assert bound.out_bias is not None
        target = bound.out_bias[run.lo : run.hi]
        if run.fresh and bound.fresh_bias:
            target.copy_(sums)
        else:
            target.add_(sums)

    def finish_folded(self, product: Product, bound: AffineBound, weight: Tensor | None) -> None:
        """From ``weight``, the tangent of G' ``[K, *W.shape]``, and that of g', to those of chosen parameters."""
        s, sums = self._scale, bound.out_bias
        assert s is not None
        own = self.gradient if product.second else None
        target = product.target(self.names.get("weight"))
        if target is not None and weight is not None:
            value = weight * _column(s, self.raw_weight)
            if own is not None and own[0] is not None and bound.gain is not None:
                value = value + bound.gain.view(*bound.gain.shape, *(1,) * (own[0].ndim - 1)) * own[0]
            self._into(target, value, self.names["weight"] in product.zeroed)
        target = product.target(self.names.get("bias"))
        if target is not None and sums is not None:
            value = s * sums
            if own is not None and own[1] is not None and bound.gain is not None:
                value = value + bound.gain * own[1]
            self._into(target, value, self.names["bias"] in product.zeroed)
        target = product.target(self.names.get("shift"))
        if target is not None and sums is not None:
            self._into(target, sums, self.names["shift"] in product.zeroed)
        target = product.target(self.names.get("gain"))
        if target is not None and weight is not None and sums is not None:
            self._into(target, self._gain_sums(product, bound, weight, sums), self.names["gain"] in product.zeroed)

    def _gain_sums(self, product: Product, bound: AffineBound, weight: Tensor, sums: Tensor) -> Tensor:
        """The derivative in γ: ``(sum of RG' W + G' V + Rg' (b - m) + g' Rb) / sqrt(v + eps)``."""
        assert self._offset is not None and self._inv is not None
        total = (weight * self.raw_weight).flatten(2).sum(2) + sums * self._offset
        if product.second and self.gradient is not None:
            own_weight, own_bias = self.gradient
            v, b = product.direction(self.names.get("weight")), product.direction(self.names.get("bias"))
            if v is not None and own_weight is not None:
                total = total + (v * own_weight).flatten(2).sum(2)
            if b is not None and own_bias is not None:
                total = total + b * own_bias
        return total * self._inv

    @staticmethod
    def _into(target: Tensor, value: Tensor, add: bool) -> None:
        if add:
            target.add_(value)
        else:
            target.copy_(value)


def _column(s: Tensor, weight: Tensor) -> Tensor:
    """``[O]`` to ``[O, 1, ...]`` with the dimensions of ``weight``."""
    return s.view(-1, *(1,) * (weight.ndim - 1))
