# SPDX-License-Identifier: Apache-2.0
r"""The package's layers in the fused curvature engine: products by the Hessian restricted to the surviving weights.

With S the rows of the identity that belong to surviving weights, the ticket's Hessian is S H S^T.  The dense layer's
step computes H: directions are scattered into dense ones before it, its derivatives gathered after it, so the formulas
(normalizations folded in, sums of biases) stand in one place.  A :class:`BatchNormReLU` is the steps of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.operators.engines.layer_rules.activation import ActivationStep
from curvlab.operators.engines.layer_rules.affine import AffineStep
from curvlab.operators.engines.layer_rules.conv import ConvStep
from curvlab.operators.engines.layer_rules.linear import LinearStep
from curvlab.operators.engines.layer_rules.pool import MaxPoolStep
from curvlab.operators.engines.rules import Builder, find_rule, register_module
from curvlab.operators.engines.steps import Product
from curvlab.sparse.fusion import BatchNormReLU
from curvlab.sparse.layers import MaskedConv2d, MaskedLinear

__all__ = ["MaskedConvStep", "MaskedLinearStep"]


@dataclass
class _Scattered(Product):
    """A product as the dense layer's step sees it: one weight's part of directions and result is dense."""

    weight: str = ""
    dense_rows: Tensor | None = None
    dense_result: Tensor | None = None

    def direction(self, name: str | None) -> Tensor | None:
        return self.dense_rows if name == self.weight else super().direction(name)

    def target(self, name: str | None) -> Tensor | None:
        return self.dense_result if name == self.weight else super().target(name)


class _Masked(AffineStep):
    """What masking adds to an affine step; to be inherited before the dense layer's step."""

    positions: Tensor
    weight_shape: tuple[int, ...]

    def mask_weight(self, indices: Tensor, weight_shape: tuple[int, ...]) -> None:
        """Which entries of the dense weight the parameter holds."""
        self.positions, self.weight_shape = indices, weight_shape

    def _dense(self, values: Tensor) -> Tensor:
        """``[*lead, nnz]`` to ``[*lead, *weight_shape]``."""
        size = torch.Size(self.weight_shape).numel()
        whole = values.new_zeros(*values.shape[:-1], size)
        whole[..., self.positions] = values
        return whole.view(*values.shape[:-1], *self.weight_shape)

    def primal(self, values: Any, theta: Mapping[str, Tensor]) -> Tensor:
        """As the dense step, at the scattered weight."""
        return super().primal(values, self._theta(theta))

    def set_theta(self, theta: Mapping[str, Tensor], dtype: torch.dtype, compute: torch.dtype) -> None:
        """As the dense step, at the scattered weight."""
        super().set_theta(self._theta(theta), dtype, compute)

    def _theta(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.names["weight"]
        return {**theta, name: self._dense(theta[name])}

    def bind(self, product: Product) -> Any:
        """As the dense step, with directions scattered; the dense result is made here."""
        name = self.names["weight"]
        given = {field.name: getattr(product, field.name) for field in fields(Product)}
        scattered = _Scattered(**given, weight=name)
        rows = product.direction(name)
        if rows is not None:
            scattered.dense_rows = self._dense(rows)
        if product.target(name) is not None:
            assert product.result is not None
            scattered.dense_result = product.result.new_zeros(product.count, *self.weight_shape)
        bound = super().bind(scattered)
        bound.scattered = scattered
        return bound

    def finish(self, product: Product, bound: Any) -> None:
        """As the dense step, then gather what belongs to surviving weights."""
        super().finish(bound.scattered, bound)
        target, dense = product.target(self.names["weight"]), bound.scattered.dense_result
        if target is not None and dense is not None and not product.capture:
            self._into(target, dense.flatten(1)[:, self.positions], self.names["weight"] in product.zeroed)


class MaskedConvStep(_Masked, ConvStep):
    """A :class:`MaskedConv2d`."""


class MaskedLinearStep(_Masked, LinearStep):
    """A :class:`MaskedLinear`."""


@register_module(MaskedConv2d)
def _masked_conv(builder: Builder, node: Any, module: MaskedConv2d) -> None:
    (x,) = builder.slots_of(node, 1)
    if module.outer_padding:
        raise builder.unsupported(node, f"padding={module.padding!r} with padding_mode={module.padding_mode!r}")
    if len(builder.program.slots[x].shape) != 3:
        raise builder.unsupported(node, "a convolution of inputs without a sample axis")
    values = builder.parameter(node, "values")
    assert values is not None
    step = MaskedConvStep(
        builder.label(node),
        (x,),
        builder.new_slot(),
        values,
        builder.parameter(node, "bias"),
        shape=tuple(module.weight_shape),
        stride=module.stride,  # type: ignore[arg-type]
        padding=module.inner_padding,
        dilation=module.dilation,  # type: ignore[arg-type]
        groups=module.groups,
    )
    step.mask_weight(module.indices, module.weight_shape)
    builder.add(node, step)


@register_module(MaskedLinear)
def _masked_linear(builder: Builder, node: Any, module: MaskedLinear) -> None:
    (x,) = builder.slots_of(node, 1)
    if len(builder.program.slots[x].shape) == 3:
        raise builder.unsupported(node, "a linear layer on inputs [N, A, B, I] (two position axes)")
    values = builder.parameter(node, "values")
    assert values is not None
    step = MaskedLinearStep(builder.label(node), (x,), builder.new_slot(), values, builder.parameter(node, "bias"))
    step.mask_weight(module.indices, module.weight_shape)
    builder.add(node, step)


@register_module(BatchNormReLU)
def _batch_norm_relu(builder: Builder, node: Any, module: BatchNormReLU) -> None:
    norm = find_rule(nn.BatchNorm2d(1))
    assert norm is not None
    norm(builder, node, module)  # makes its output the node's value, which the next step takes
    relu = ActivationStep(builder.label(node), (builder.slot(node, node),), builder.new_slot(), "relu", {})
    builder.add(node, relu)
    if module.pool:
        pool = MaxPoolStep(builder.label(node), (builder.slot(node, node),), builder.new_slot(), 2, 2, 0, 1, False)
        builder.add(node, pool)
