# SPDX-License-Identifier: Apache-2.0
r"""The convolution of a network's inputs, with the 2 x 2 maximum pool behind it: an own kernel in float32 on the CPU.

No tangent arrives from below, so all a product needs is ``V * x + v_b`` and ``x ⋆ Rδ``.  With 3 input channels the
library reaches 25 to 65 GFLOP/s of 220 there, and the map before the pool goes through memory four times: 50 of 156 ms
of the GGN product of a CNN with 32 to 128 channels and 256 images, 6 with the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curvlab.operators.engines.layer_rules.affine import AffineBound
from curvlab.operators.engines.layer_rules.conv import ConvStep
from curvlab.operators.engines.layer_rules.pool import MaxPoolStep, as_pair
from curvlab.operators.engines.rules import Program
from curvlab.operators.engines.steps import Kept, Product, Run, Slot
from curvlab.ops import hvp

__all__ = ["FirstConvStep", "use_first_conv"]

# Where the kernel is faster, one thread, both products, 64 images of 32 x 32: with a pool, up to here; without one the
# library takes 3 to 8 times as long with 1 channel, 1.2 times with 2 to 4 channels, 3 x 3 taps and 16 outputs, and 0.8
# times with 64 outputs.
_MOST_CHANNELS, _MOST_TAPS, _FEW_OUTPUTS = 4, 36, 16


class FirstConvStep(ConvStep):
    """One convolution of constant inputs, and its pool if it has one.

    The kernel is one of float32: where the other steps work in bfloat16 (as ``weight`` says), what passes between is
    converted.
    """

    def __init__(self, conv: ConvStep, shape: Sequence[int], pool: MaxPoolStep | None) -> None:
        self.__dict__.update(conv.__dict__)
        self.flip_padding = None  # nothing goes further down
        self.pool = pool
        self.in_shape = tuple(shape)
        if pool is not None:
            self.output = pool.output

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``W' * x + b'`` and its maxima."""
        found = super().primal(values, theta)
        if self.pool is None:
            return found
        self.columns = found.shape[3]
        return self.pool.primal([found], theta)

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """The padded input and a byte for each window."""
        del second
        channels, height, width = self.in_shape
        size = channels * (height + 2 * self.padding[0]) * (width + 2 * self.padding[1])
        bytes_ = {("padded", self.output): size * itemsize}
        if self.pool is not None:
            bytes_["choice", self.output] = slots[self.output].size
        return bytes_

    def keep(self, kept: Kept, second: bool) -> tuple[Tensor, Tensor | None]:
        """``(x, padded, [n, H, W, C]; which of the four [n, R, O] or None)``."""
        del second
        height, width = self.padding
        source = kept.values[self.inputs[0]]
        assert source is not None
        x = kept.laid_out(functional.pad(source.detach(), (width, width, height, height)))
        if self.pool is None:
            return x, None
        index = self.pool.index
        assert index is not None
        self.pool.index = None
        choice = index // self.columns % 2 * 2 + index % self.columns % 2
        return x, choice.to(torch.uint8).permute(0, 2, 3, 1).contiguous().flatten(1, 2)

    def bind(self, product: Product) -> AffineBound:
        """RW', and where the derivative in W' gathers: the result itself if nothing is folded."""
        bound = AffineBound()
        effective = self.tangents(product, bound)
        if effective is not None:
            own = effective[:1].is_contiguous() or len(effective) == 0
            bound.weight = effective if own else effective.contiguous()
        self.bind_bias(product, bound)
        if bound.want_weight:
            assert product.result is not None
            if self.plain and not product.capture:
                bound.out_weight = product.target(self.names["weight"])
            else:
                bound.out_weight = product.result.new_zeros(product.count, *self.raw_weight.shape)
        return bound

    def _size(self, x: Tensor) -> list[int]:
        pool = 1 if self.pool is None else 2
        kernel = self.shape[2:]
        return [((x.shape[1 + i] - kernel[i]) // self.stride[i] + 1) // pool for i in range(2)]

    def forward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """Rz at the positions that won."""
        x, choice = kept
        lo, hi = run.lo, run.hi
        bias = None if bound.bias is None else bound.bias[lo:hi]
        height, width = self._size(x)
        if bound.weight is not None:
            out = hvp.first_conv_forward(
                x, bound.weight[lo:hi], bias, choice=choice, stride=(self.stride[0], self.stride[1])
            )
            run.t[self.output] = out.view(run.k, len(x), height, width, -1).to(self.weight.dtype)
        elif bias is not None:
            spread = bias[:, None, None, None].expand(-1, len(x), height, width, -1)
            run.t[self.output] = spread.to(self.weight.dtype).contiguous()

    def backward(self, run: Run, kept: Any, bound: AffineBound) -> None:
        """The weight's share."""
        signal = run.take(self.output)
        if signal is None:
            return
        self.add_bias(run, bound, signal)
        if not bound.want_weight:
            return
        assert bound.out_weight is not None
        x, choice = kept
        fresh = run.fresh and bound.fresh_weight
        hvp.first_conv_weight(
            signal.flatten(2, 3).to(x.dtype).contiguous(),
            x,
            bound.out_weight[run.lo : run.hi],
            choice=choice,
            stride=(self.stride[0], self.stride[1]),
            accumulate=not fresh,
        )

    def finish(self, product: Product, bound: AffineBound) -> None:
        """Unfold what was gathered."""
        if product.capture:
            weight = None if bound.out_weight is None else bound.out_weight[0]
            self.gradient = weight, None if bound.out_bias is None else bound.out_bias[0]
        elif product.result is not None and not self.plain:
            self.finish_folded(product, bound, bound.out_weight)


def use_first_conv(program: Program) -> None:
    """Put the step of its own in the place of every convolution that suits it, its pool included."""
    for step in [step for step in program.steps if type(step) is ConvStep]:  # not what inherits, as masked layers do
        source = program.slots[step.inputs[0]]
        plain = step.groups == 1 and step.dilation == [1, 1]
        if source.active or not plain or source.shape[0] > _MOST_CHANNELS:
            continue
        pool = program.sole_consumer(step.output)
        pool = pool if isinstance(pool, MaxPoolStep) and _is_halving(pool) else None
        if pool is None and not _is_small(step):
            continue
        at = program.steps.index(step)
        program.steps[at] = FirstConvStep(step, source.shape, pool)
        if pool is not None:
            program.steps.remove(pool)
            program.slots[step.output].active = False


def _is_small(conv: ConvStep) -> bool:
    """Whether the kernel pays without a pool."""
    outputs, channels, *kernel = conv.shape
    return channels == 1 or (outputs <= _FEW_OUTPUTS and channels * kernel[0] * kernel[1] <= _MOST_TAPS)


def _is_halving(pool: MaxPoolStep) -> bool:
    """Whether windows are 2 x 2 positions that tile the map (a last row or column may be left out)."""
    same = as_pair(pool.kernel) == as_pair(pool.stride) == (2, 2)
    return same and as_pair(pool.padding) == (0, 0) and as_pair(pool.dilation) == (1, 1) and not pool.ceil
