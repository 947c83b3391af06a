# SPDX-License-Identifier: Apache-2.0
r"""Fully connected layers: ``z = x W^T + b``, x ``[R, I]`` (R: samples times positions), W ``[O, I]``.

    Rz = Rx W^T + x V^T + v_b
    Rδx = Rδ W + δ V,   (H v)_W = Rδ^T x + δ^T Rx,   (H v)_b = column sums of Rδ

Two matrix products for each of the three, the least there is; each second one adds to the first one's output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.layer_rules.affine import AffineBound, AffineStep
from curvlab.operators.engines.rules import Builder, register_function, register_match
from curvlab.operators.engines.steps import Product, Run

__all__ = ["LinearStep", "PackedWeight"]

_SMALLEST = 256  # rows and columns of a weight worth packing: a call of the packed product costs 10 us more
# Rows up to which derivatives in a weight are summed in float32 from rounded factors: a bfloat16 product writes a
# result of its own that is then added. 2048 x 256 from 32 rows: 0.23 for 0.60 ms; 1024 x 1024 from 64: 0.96 for 1.1.
_FEW_ROWS = 64


class PackedWeight:
    """``t -> t W^T`` with W ``[O, I]`` in the order in which MKL's product reads it, packed once for a number of rows.

    An ordinary product packs its factors at every call: 203 against 188 GFLOP/s at 512 x 1024 x 1024, one thread.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.packed: dict[int, Tensor] = {}  # by rows: of a whole chunk and of the last one
        worth = weight.dtype == torch.float32 and weight.device.type == "cpu" and min(weight.shape) >= _SMALLEST
        self.worth = worth and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight(copy.deepcopy(self.weight, memo))  # what is packed cannot be copied

    def __call__(self, t: Tensor) -> Tensor | None:
        """The product of ``t`` ``[R, I]``, or None where it has no packed form."""
        if not self.worth or t.dtype != torch.float32:
            return None
        rows = len(t)
        if rows not in self.packed:
            if len(self.packed) == 2:
                self.packed.clear()
            self.packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        return torch.ops.mkl._mkl_linear(t, self.packed[rows], self.weight, None, rows)


class LinearStep(AffineStep):
    """One fully connected layer."""

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``x W'^T + b'``."""
        weight, bias = self.effective(theta)
        return functional.linear(values[0], weight, bias)

    def set_theta(self, theta: Mapping[str, Tensor], dtype: torch.dtype, compute: torch.dtype) -> None:
        """As for all affine steps; the weight is kept transposed too: products with contiguous factors are faster."""
        super().set_theta(theta, dtype, compute)
        self.weight_t = self.weight.t().contiguous()
        self.ahead, self.back = PackedWeight(self.weight), PackedWeight(self.weight_t)

    def bind(self, product: Product) -> AffineBound:
        """Views of the directions and of the result; copies only where something is folded."""
        bound = AffineBound()
        compute = self.weight.dtype
        effective = self.tangents(product, bound)
        if effective is not None:
            bound.weight = effective.to(compute)
        if bound.bias is not None:
            bound.bias = bound.bias.to(compute).unsqueeze(1)
        self.bind_bias(product, bound)
        if bound.want_weight:
            assert product.result is not None
            if self.plain and not product.capture:
                bound.out_weight = product.target(self.names["weight"])
            else:
                bound.out_weight = product.result.new_zeros(product.count, *self.raw_weight.shape)
        return bound

    def forward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """Rz."""
        x, t, k = kept[0], run.t[self.inputs[0]], run.k
        rows = x.numel() // x.shape[-1]
        out = None if t is None or k > 1 else self.ahead(t.view(rows, -1))  # t W^T of one direction
        if out is not None:
            t, out = None, out.view(1, rows, -1)
            if bound.bias is not None:
                out.add_(bound.bias[run.lo : run.hi])
            if bound.weight is not None:
                out.baddbmm_(x.view(1, rows, -1), bound.weight[run.lo : run.hi].mT)
        elif bound.weight is not None:
            factors = x.view(1, rows, -1).expand(k, -1, -1), bound.weight[run.lo : run.hi].mT
            bias = bound.bias
            out = torch.bmm(*factors) if bias is None else torch.baddbmm(bias[run.lo : run.hi], *factors)
        elif bound.bias is not None:
            out = bound.bias[run.lo : run.hi].expand(-1, rows, -1).contiguous()
        if t is not None:
            flat = t.view(k * rows, -1)
            if out is None:
                out = torch.mm(flat, self.weight_t).view(k, rows, -1)
            else:
                out.view(k * rows, -1).addmm_(flat, self.weight_t)
        if out is not None:
            run.t[self.output] = out.view(k, *x.shape[:-1], out.shape[-1])

    def backward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """Rδx and the weight's share."""
        signal = run.take(self.output)
        if signal is None:
            return
        x, delta = kept
        k, rows = run.k, x.numel() // x.shape[-1]
        t = run.t[self.inputs[0]]
        g = signal.view(k, rows, -1)
        second = run.second and delta is not None
        shared = delta.view(1, rows, -1).expand(k, -1, -1) if second and delta is not None else None
        self.add_bias(run, bound, signal)
        if bound.want_weight:
            self._add_weight(
                run, bound, (g.mT, x.view(1, rows, -1).expand(k, -1, -1)), run.fresh and bound.fresh_weight
            )
            if shared is not None and t is not None:
                self._add_weight(run, bound, (shared.mT, t.view(k, rows, -1)), False)
        if self.has_tangent():
            flat = g.reshape(k * rows, -1)
            below = self.back(flat) if k == 1 else None
            below = torch.mm(flat, self.weight) if below is None else below
            if shared is not None and bound.weight is not None:
                below.view(k, rows, -1).baddbmm_(shared, bound.weight[run.lo : run.hi])
            run.give(self.inputs[0], below.view(k, *x.shape))

    @staticmethod
    def _add_weight(run: Run, bound: AffineBound, factors: tuple[Tensor, Tensor], fresh: bool) -> None:
        assert bound.out_weight is not None
        target = bound.out_weight[run.lo : run.hi]
        rounded = factors[0].dtype != target.dtype  # bfloat16 factors, float32 sums
        if rounded and target.device.type == "cpu" and factors[1].shape[1] <= _FEW_ROWS:
            factors, rounded = (factors[0].to(target.dtype), factors[1].to(target.dtype)), False
        if rounded:
            product = torch.bmm(*factors)
            if fresh:
                target.copy_(product)
            else:
                target.add_(product)
        elif fresh:
            torch.bmm(*factors, out=target)
        else:
            target.baddbmm_(*factors)

    def finish(self, product: Product, bound: AffineBound) -> None:
        """Unfold what was gathered."""
        if product.capture:
            weight = None if bound.out_weight is None else bound.out_weight[0]
            self.gradient = weight, None if bound.out_bias is None else bound.out_bias[0]
        elif product.result is not None and not self.plain:
            self.finish_folded(product, bound, bound.out_weight)


def _is_linear(module: nn.Module) -> bool:
    # A subclass with a forward of its own computes something else, unless it says what: z = affine_scale (x W^T + b).
    own_forward = type(module).forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and (not own_forward or _affine_scale(module) is not None)


def _affine_scale(module: nn.Module) -> float | None:
    scale = getattr(module, "affine_scale", None)
    return scale if isinstance(scale, float) else None


@register_match(_is_linear)
def _linear_module(builder: Builder, node: Any, module: nn.Module) -> None:
    (x,) = builder.slots_of(node, 1)
    weight, bias = builder.parameter(node, "weight"), builder.parameter(node, "bias")
    assert weight is not None
    _add_linear(builder, node, x, weight, bias, _affine_scale(module))


@register_function(functional.linear)
def _linear_function(builder: Builder, node: Any, module: nn.Module | None) -> None:
    del module
    x, weight, bias = builder.arguments(node, ("input", "weight", "bias"), (None,))
    _add_linear(builder, node, builder.slot(node, x), *builder.parameter_arguments(node, weight, bias), None)


def _add_linear(builder: Builder, node: Any, x: int, weight: str, bias: str | None, scale: float | None) -> None:
    if len(builder.program.slots[x].shape) == 3:
        raise builder.unsupported(node, "a linear layer on inputs [N, A, B, I] (two position axes)")
    builder.add(node, LinearStep(builder.label(node), (x,), builder.new_slot(), weight, bias, scale))
