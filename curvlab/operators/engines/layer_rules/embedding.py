# SPDX-License-Identifier: Apache-2.0
"""Embedding tables: ``z_r = W[i_r]``, so ``Rz_r = V[i_r]`` and the derivative adds up the signals of equal indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.rules import Builder, register_module
from curvlab.operators.engines.steps import Kept, Product, Run, Slot, Step

__all__ = ["EmbeddingStep"]


class EmbeddingStep(Step):
    """One table ``[V, D]``."""

    fresh_tangent = True

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``W[i]``."""
        return functional.embedding(values[0], theta[self.names["weight"]])

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """The indices."""
        return {("value", self.inputs[0]): 8 * slots[self.inputs[0]].size}

    def keep(self, kept: Kept, second: bool) -> Any:
        """The indices ``[n, ...]`` and the working dtype."""
        value = kept.values[self.inputs[0]]
        return value, kept.dtype

    def bind(self, product: Product) -> Any:
        """Directions, and where derivatives gather."""
        name = self.names["weight"]
        target = product.target(name)
        return product.direction(name), None if target is None else target.new_zeros(target.shape)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """``V[i]``."""
        index, dtype = kept
        if bound[0] is not None:
            chosen = bound[0][run.lo : run.hi].index_select(1, index.reshape(-1)).to(dtype)
            run.t[self.output] = chosen.view(run.k, *index.shape, -1)

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Sums of signals."""
        signal = run.take(self.output)
        if signal is not None and bound[1] is not None:
            flat = signal.view(run.k, -1, signal.shape[-1])
            bound[1][run.lo : run.hi].index_add_(1, kept[0].reshape(-1), flat.to(bound[1].dtype))

    def finish(self, product: Product, bound: Any) -> None:
        """Into the result."""
        target = product.target(self.names["weight"])
        if target is None or product.capture:
            return
        if self.names["weight"] in product.zeroed:
            target += bound[1]
        else:
            target.copy_(bound[1])


@register_module(nn.Embedding)
def _embedding(builder: Builder, node: Any, module: Any) -> None:
    (x,) = builder.slots_of(node, 1)
    if module.padding_idx is not None or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise builder.unsupported(node, "padding_idx, max_norm, sparse or scale_grad_by_freq")
    if len(builder.program.slots[x].shape) > 1:
        raise builder.unsupported(node, "indices with more than one position axis")
    builder.add(
        node,
        EmbeddingStep(builder.label(node), (x,), builder.new_slot(), {"weight": builder.parameter(node, "weight")}),
    )
