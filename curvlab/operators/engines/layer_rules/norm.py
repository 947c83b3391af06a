# SPDX-License-Identifier: Apache-2.0
r"""Normalizations, ``y = γ x̂ + β`` with ``x̂ = (x - m) / σ``.

With constant statistics (:class:`FixedNormStep`), s = γ / σ: ``Ry = s Rx + Rs (x - m) + Rβ``, ``Rδx = s Rδ + Rs δ``.

With statistics of the values (:class:`NormStep`; means < > over the positions of a channel, or over the features of a
layer), D = γ δ, ρ = <x̂ Rx> / σ = Rσ / σ:

    Rx̂ = (Rx - <Rx> - x̂ <x̂ Rx>) / σ,   δx = (D - <D> - x̂ <x̂ D>) / σ
    RD = Rγ δ + γ Rδ
    Rδx = (RD - <RD> - x̂ (<x̂ RD> + <Rx̂ D>) - Rx̂ <x̂ D>) / σ - ρ δx
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.rules import Builder, register_function, register_module
from curvlab.operators.engines.steps import Kept, Product, Run, Slot, Step
from curvlab.ops import hvp

__all__ = ["FixedNormStep", "NormStep"]


class _ScaledStep(Step):
    """What both share: γ and β, and where their derivatives gather."""

    fresh_signal = True
    fresh_tangent = True
    zero_first = True

    def bind(self, product: Product) -> dict[str, Any]:
        """Directions and sums ``[K, C]`` of γ and β."""
        bound: dict[str, Any] = {}
        for role in ("gain", "shift"):
            name = self.names.get(role)
            bound[role] = product.direction(name)
            target = product.target(name)
            bound["sum_" + role] = None if target is None else torch.zeros_like(target)
        return bound

    @staticmethod
    def _add(run: Run, bound: Mapping[str, Any], role: str, sums: Tensor) -> None:
        bound["sum_" + role][run.lo : run.hi] += sums

    def finish(self, product: Product, bound: Any) -> None:
        """Add to what another use of the same parameters gave."""
        if product.capture:
            return
        for role in ("gain", "shift"):
            target = product.target(self.names.get(role))
            if target is not None:
                if self.names[role] in product.zeroed:
                    target += bound["sum_" + role]
                else:
                    target.copy_(bound["sum_" + role])


class FixedNormStep(_ScaledStep):
    """BatchNorm with constant statistics, where it cannot be folded into a layer before it."""

    def __init__(
        self, name: str, inputs: Sequence[int], output: int, names: Mapping[str, str | None], prefix: str, eps: float
    ) -> None:
        super().__init__(name, inputs, output, names)
        self.prefix, self.eps = prefix, eps
        self.statistics: Mapping[str, Tensor] = {}

    def _factors(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """m, 1/σ and γ in float64."""
        mean = self.statistics[f"{self.prefix}.running_mean"].double()
        inv = (self.statistics[f"{self.prefix}.running_var"].double() + self.eps).rsqrt()
        gain = theta[self.names["gain"]] if "gain" in self.names else torch.ones_like(inv)
        return mean, inv, gain

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``γ x̂ + β``."""
        x = values[0]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        mean, inv, gain = self._factors(theta)
        result = (x - mean.view(shape)) * (inv * gain).view(shape)
        if "shift" in self.names:
            result = result + theta[self.names["shift"]].view(shape)
        self._now = mean, inv, gain
        return result

    def deltas(self) -> set[int]:
        """δ at the output."""
        return {self.output}

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """``x - m`` and δ."""
        size = slots[self.output].size * itemsize
        return {("centered", self.output): size, **({("delta", self.output): size} if second else {})}

    def keep(self, kept: Kept, second: bool) -> Any:
        """``(s, 1/σ, x - m, δ or None)``."""
        mean, inv, gain = self._now
        working = torch.float32 if kept.dtype == torch.bfloat16 else kept.dtype
        centered = (kept.exact_value(self.inputs[0]) - mean).to(kept.dtype)
        delta = kept.delta(self.output) if second else None
        return (gain * inv).to(working), inv.to(working), centered, delta

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Ry."""
        scale, inv, centered, _ = kept
        t = run.t[self.inputs[0]]
        gain = None if bound["gain"] is None else bound["gain"][run.lo : run.hi] * inv
        shift = None if bound["shift"] is None else bound["shift"][run.lo : run.hi].contiguous()
        if t is None:
            if gain is None and shift is None:
                return
            t = centered.new_zeros(run.k, *centered.shape)
        out = hvp.tangent_forward(t, scale=scale, gain=gain, centered=None if gain is None else centered, bias=shift)
        assert isinstance(out, Tensor)
        run.t[self.output] = out

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Rδx, and the sums for γ and β."""
        scale, inv, centered, delta = kept
        signal = run.take(self.output)
        if signal is None:
            return
        t = run.t[self.inputs[0]] if run.second else None
        gain = None if not run.second or bound["gain"] is None else bound["gain"][run.lo : run.hi] * inv
        want_gain, want_bias = bound["sum_gain"] is not None, bound["sum_shift"] is not None
        crossed = delta if run.second and (gain is not None or (want_gain and t is not None)) else None
        _, below, bias_sum, gain_sum = hvp.tangent_backward(
            signal,
            scale=scale,
            gain=gain,
            delta=crossed,
            centered=centered if want_gain else None,
            t=t if want_gain and crossed is not None else None,
            inv_std=torch.ones_like(inv) if want_gain and crossed is not None and t is not None else None,
            want_bias=want_bias,
            want_gain=want_gain,
            want_gy=False,
        )
        if bias_sum is not None:
            self._add(run, bound, "shift", bias_sum)
        if gain_sum is not None:
            self._add(run, bound, "gain", gain_sum * inv)
        if self.active_inputs[0]:
            run.give(self.inputs[0], below)


class NormStep(_ScaledStep):
    """Normalization by the statistics of the values themselves: BatchNorm over a batch, or LayerNorm."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[int],
        output: int,
        names: Mapping[str, str | None],
        *,
        over_batch: bool,
        eps: float,
    ) -> None:
        super().__init__(name, inputs, output, names)
        self.over_batch, self.eps = over_batch, eps
        self.whole_batch = over_batch

    def _axes(self, x: Tensor, lead: int) -> list[int]:
        """Axes of the means for values laid out with the channels last."""
        return list(range(lead, x.ndim - 1)) if self.over_batch else [x.ndim - 1]

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """``γ x̂ + β``."""
        x = values[0]
        gain = theta[self.names["gain"]] if "gain" in self.names else None
        shift = theta[self.names["shift"]] if "shift" in self.names else None
        if self.over_batch:
            return functional.batch_norm(x, None, None, gain, shift, True, 0.0, self.eps)
        return functional.layer_norm(x, (x.shape[-1],), gain, shift, self.eps)

    def set_theta(self, theta: Mapping[str, Tensor]) -> None:
        """γ in float64."""
        self.gain = theta[self.names["gain"]] if "gain" in self.names else None

    def deltas(self) -> set[int]:
        """δ at the output."""
        return {self.output}

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """x̂, δ, D and δx."""
        size = slots[self.output].size * itemsize
        return {(f"norm{i}", self.output): size for i in range(4 if second else 1)}

    def keep(self, kept: Kept, second: bool) -> Any:
        """``(x̂, 1/σ, γ, δ, D, <x̂ D>, δx)``; the last four None without second-order terms."""
        x = kept.exact_value(self.inputs[0])
        axes = self._axes(x, 0)
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        inv = (variance + self.eps).rsqrt()
        hat = (x - mean) * inv
        working = kept.dtype
        gain = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if self.gain is None else self.gain
        second_order: tuple[Any, ...] = (None,) * 4
        if second:
            delta = kept.deltas[self.output]
            delta = delta.movedim(1, -1) if delta.ndim == 4 else delta
            scaled = gain * delta
            cross = (hat * scaled).mean(axes, keepdim=True)
            below = (scaled - scaled.mean(axes, keepdim=True) - hat * cross) * inv
            second_order = tuple(v.contiguous().to(working) for v in (delta, scaled, cross, below))
        return (hat.to(working), inv.to(working), gain.to(working), *second_order)

    def _rhat(self, t: Tensor, hat: Tensor, inv: Tensor) -> tuple[Tensor, Tensor]:
        """``(Rx̂, ρ)``."""
        axes = self._axes(t, 1)
        cross = (hat * t).mean(axes, keepdim=True)
        return (t - t.mean(axes, keepdim=True) - hat * cross) * inv, cross * inv

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Ry."""
        hat, inv, gain = kept[:3]
        t = run.t[self.inputs[0]]
        out = None
        if t is not None:
            out = self._rhat(t, hat, inv)[0] * gain
        v, b = bound["gain"], bound["shift"]
        if v is not None:
            part = _per_channel(v[run.lo : run.hi], hat) * hat
            out = part if out is None else out + part
        if b is not None:
            part = _per_channel(b[run.lo : run.hi], hat)
            out = part.expand(run.k, *hat.shape).contiguous() if out is None else out + part
        run.t[self.output] = None if out is None else out.to(hat.dtype)

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Rδx, and the sums for γ and β."""
        hat, inv, gain, delta, scaled, cross, below = kept
        signal = run.take(self.output)
        if signal is None:
            return
        t = run.t[self.inputs[0]] if run.second else None
        rhat, rho = (None, None) if t is None else self._rhat(t, hat, inv)
        if bound["sum_shift"] is not None:
            self._add(run, bound, "shift", signal.flatten(1, -2).sum(1))
        if bound["sum_gain"] is not None:
            total = signal * hat
            if rhat is not None:
                total = total + delta * rhat
            self._add(run, bound, "gain", total.flatten(1, -2).sum(1))
        if not self.active_inputs[0]:
            return
        rd = signal * gain
        if run.second and bound["gain"] is not None:
            rd = rd + _per_channel(bound["gain"][run.lo : run.hi], hat) * delta
        axes = self._axes(rd, 1)
        mixed = (hat * rd).mean(axes, keepdim=True)
        if rhat is not None:
            mixed = mixed + (rhat * scaled).mean(axes, keepdim=True)
        out = rd - rd.mean(axes, keepdim=True) - hat * mixed
        if rhat is not None:
            out = out - rhat * cross
        out = out * inv
        if rho is not None:
            out = out - rho * below
        run.give(self.inputs[0], out.to(hat.dtype).contiguous())


def _per_channel(v: Tensor, like: Tensor) -> Tensor:
    """``[K, C]`` to ``[K, 1, ..., C]`` against ``like [n, ..., C]``."""
    return v.view(v.shape[0], *(1,) * (like.ndim - 1), v.shape[1]).to(like.dtype)


@register_module(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(builder: Builder, node: Any, module: Any) -> None:
    (x,) = builder.slots_of(node, 1)
    rank = len(builder.program.slots[x].shape)
    if rank != (3 if isinstance(module, nn.BatchNorm2d) else 1):
        raise builder.unsupported(node, f"inputs with {rank} axes besides the samples")
    names = {"gain": builder.parameter(node, "weight"), "shift": builder.parameter(node, "bias")}
    label, prefix = builder.label(node), str(node.target)
    if builder.batch_norm == "batch":
        step = NormStep(label, (x,), builder.new_slot(), names, over_batch=True, eps=module.eps)
        step.set_theta(builder.theta)
    else:
        step = FixedNormStep(label, (x,), builder.new_slot(), names, prefix, module.eps)
        step.statistics = builder.buffers
    builder.add(node, step)


@register_module(nn.LayerNorm)
def _layer_norm(builder: Builder, node: Any, module: Any) -> None:
    (x,) = builder.slots_of(node, 1)
    names = {"gain": builder.parameter(node, "weight"), "shift": builder.parameter(node, "bias")}
    _add_layer_norm(builder, node, x, module.normalized_shape, names, module.eps)


@register_function(functional.layer_norm)
def _layer_norm_function(builder: Builder, node: Any, module: Any) -> None:
    arguments = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = builder.arguments(node, arguments, (None, None, 1e-5))
    names: dict[str, str | None] = {}
    for role, argument in (("gain", weight), ("shift", bias)):
        names[role] = None if argument is None else builder.parameter_arguments(node, argument, None)[0]
    _add_layer_norm(builder, node, builder.slot(node, x), shape, names, eps)


def _add_layer_norm(
    builder: Builder, node: Any, x: int, shape: Sequence[int], names: Mapping[str, str | None], eps: float
) -> None:
    own = builder.program.slots[x].shape
    if len(shape) != 1 or len(own) == 3:
        raise builder.unsupported(node, f"a normalization over {list(shape)} of inputs [N, {', '.join(map(str, own))}]")
    step = NormStep(builder.label(node), (x,), builder.new_slot(), names, over_batch=False, eps=eps)
    step.set_theta(builder.theta)
    builder.add(node, step)
