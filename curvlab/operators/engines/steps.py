# SPDX-License-Identifier: Apache-2.0
r"""The steps of a curvature program: what one layer contributes to every product.

With z = step(x; w), a direction v and R = d/dt at theta + t v (Pearlmutter 1994), a step carries the tangents Rx
forward and the tangents Rδ of the backward signals δ = dL/dz backward, K directions at once.  What depends on theta
alone (x, δ, masks, pooling indices) is computed once, in float64, and kept in the working dtype.

Layout: a value of natural shape ``[n, C, H, W]`` is kept as ``[n, H, W, C]``, any other as it is; tangents have the
directions in front, ``[K, n, H, W, C]``, and are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kept", "Product", "Run", "Slot", "Step", "is_image", "to_internal", "to_natural"]


def is_image(shape: Sequence[int]) -> bool:
    """Whether a value of this natural shape, without the sample axis, is laid out channels last."""
    return len(shape) == 3


def to_internal(x: Tensor, lead: int = 1) -> Tensor:
    """``[*lead, C, H, W]`` to ``[*lead, H, W, C]``, contiguous; other shapes are only made contiguous."""
    return (x.movedim(lead, -1) if x.ndim == lead + 3 else x).contiguous()


def to_natural(x: Tensor, lead: int = 1) -> Tensor:
    """The inverse of :func:`to_internal`; a view where that is possible."""
    return x.movedim(-1, lead) if x.ndim == lead + 3 else x


@dataclass
class Slot:
    """A value of the program: natural shape without the sample axis, and whether it depends on chosen parameters."""

    shape: tuple[int, ...]
    active: bool

    @property
    def size(self) -> int:
        """Elements a sample."""
        return torch.Size(self.shape).numel()

    @property
    def internal(self) -> tuple[int, ...]:
        """The shape as it is kept."""
        return (*self.shape[1:], self.shape[0]) if is_image(self.shape) else self.shape


class Kept:
    """The primal pass of one chunk, as steps see it while they choose what to keep.

    ``values`` and ``deltas`` are float64 and natural; :meth:`value` and :meth:`delta` give them rounded and laid out,
    one tensor for all who ask.
    """

    def __init__(
        self,
        values: list[Tensor | None],
        deltas: dict[int, Tensor],
        statistics: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.values, self.deltas, self.statistics, self.dtype = values, deltas, statistics, dtype
        self._cache: dict[tuple[str, int], Tensor] = {}

    def _rounded(self, kind: str, slot: int, source: Tensor | None) -> Tensor:
        assert source is not None
        key = (kind, slot)
        if key not in self._cache:
            self._cache[key] = self.laid_out(source.detach())
        return self._cache[key]

    def laid_out(self, source: Tensor) -> Tensor:
        """A natural value in the working layout and, if it has a floating point, dtype: in one pass."""
        moved = source.movedim(1, -1) if source.ndim == 4 else source
        dtype = self.dtype if source.is_floating_point() else source.dtype
        return torch.empty(moved.shape, dtype=dtype, device=source.device).copy_(moved)

    def natural(self, slot: int) -> Tensor:
        """The value in float64, as the graph has it, contiguous."""
        value = self.values[slot]
        assert value is not None
        return value.detach().contiguous()

    def value(self, slot: int) -> Tensor:
        """The value of a slot in the working dtype and layout."""
        return self._rounded("value", slot, self.values[slot])

    def delta(self, slot: int) -> Tensor:
        """dL/d(value of the slot), likewise."""
        return self._rounded("delta", slot, self.deltas.get(slot))

    def exact_value(self, slot: int) -> Tensor:
        """The value in float64, laid out."""
        value = self.values[slot]
        assert value is not None
        return to_internal(value.detach())


@dataclass
class Product:
    """One call of the engine: K directions ``rows [K, P]`` in, ``result [K, P]`` out (either may be missing)."""

    rows: Tensor | None
    result: Tensor | None
    count: int
    offsets: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, torch.Size]
    second: bool
    zeroed: frozenset[str] = frozenset()
    capture: bool = False

    def direction(self, name: str | None) -> Tensor | None:
        """``[K, *shape]``, the part of the directions that belongs to a chosen parameter; else None."""
        if self.rows is None or name is None or name not in self.offsets:
            return None
        lo, hi = self.offsets[name]
        return self.rows[:, lo:hi].view(self.count, *self.shapes[name])

    def target(self, name: str | None) -> Tensor | None:
        """``[K, *shape]``, the part of the result that belongs to a chosen parameter; else None."""
        if self.result is None or name is None or name not in self.offsets:
            return None
        lo, hi = self.offsets[name]
        return self.result[:, lo:hi].view(self.count, *self.shapes[name])


@dataclass
class Run:
    """A pass over one chunk with some of the directions: ``lo`` to ``hi``."""

    n: int
    lo: int
    hi: int
    fresh: bool  # the first chunk writes its share of the result, the others add
    second: bool  # whether second-order terms are in (Hessian) or not (J^T u)
    t: list[Tensor | None]
    g: list[Tensor | None]
    g2: list[Tensor | None]
    bound: list[Any]
    extra: dict[int, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """Number of directions."""
        return self.hi - self.lo

    def give(self, slot: int, signal: Tensor) -> None:
        """Add to the signal that arrives at a slot. The tensor stays the giver's: two slots may share it."""
        second = self.g2[slot]
        if self.g[slot] is None:
            self.g[slot] = signal
        else:
            self.g2[slot] = signal if second is None else second + signal

    def take(self, slot: int) -> Tensor | None:
        """The signal that arrived, and forget it."""
        g, other = self.g[slot], self.g2[slot]
        self.g[slot] = self.g2[slot] = None
        return g if g is None or other is None else g + other

    def take_both(self, slot: int) -> tuple[Tensor | None, Tensor | None]:
        """As :meth:`take`, in two parts that are still to be added."""
        g, other = self.g[slot], self.g2[slot]
        self.g[slot] = self.g2[slot] = None
        return g, other


class Step:
    """One layer of the program; subclasses say what it computes, keeps and contributes.

    Attributes:
        name: node and layer, for messages.
        inputs, output: slots.
        names: parameters by role, full names (``{"weight": "features.0.weight"}``); None where the layer has none.
        fresh_signal: whether ``backward`` gives its inputs new tensors of their own, which the taker may overwrite.
        fresh_tangent: the same for the output of ``forward``.
    """

    fresh_signal = False
    fresh_tangent = False
    whole_batch = False

    def __init__(self, name: str, inputs: Sequence[int], output: int, names: Mapping[str, str | None] | None = None):
        self.name, self.inputs, self.output = name, tuple(inputs), output
        self.names: dict[str, str] = {role: n for role, n in (names or {}).items() if n is not None}
        self.active_inputs: tuple[bool, ...] = (True,) * len(self.inputs)

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The output in natural layout, differentiable in ``values``; may note indices for :meth:`keep`."""
        raise NotImplementedError

    def deltas(self) -> set[int]:
        """Slots whose signal dL/dvalue second-order terms need."""
        return set()

    def keep(self, kept: Kept, second: bool) -> Any:
        """What products need of one chunk."""
        del kept, second

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """Bytes a sample of what :meth:`keep` keeps, by a key that those who share a tensor share."""
        del slots, itemsize, second
        return {}

    def bind(self, product: Product) -> Any:
        """What depends on the directions alone: views and transposed copies of them, views of the result."""
        del product

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Write ``run.t[output]`` from ``run.t[inputs]``."""
        raise NotImplementedError

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Take the signal at the output, give the inputs theirs, add to the result."""
        raise NotImplementedError

    def finish(self, product: Product, bound: Any) -> None:
        """Bring what the chunks summed up into the result."""
        del product, bound
