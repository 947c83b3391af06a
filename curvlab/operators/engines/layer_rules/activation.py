# SPDX-License-Identifier: Apache-2.0
r"""Elementwise activations ``a = φ(z)``, with ``z = x + r`` where a residual sum comes just before.

    Ra = φ'(z) Rz;   Rδz = φ'(z) Rδa + φ''(z) δa Rz

Kept: φ'(z) (one byte for ReLU) and φ''(z) δa (not for piecewise linear ones), each from float64.  One pass forward, one
backward, which also takes the column sums that are the bias derivative of the layer below.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.engines.layer_rules.affine import AffineBound, AffineStep
from curvlab.operators.engines.rules import Builder, register_function, register_method, register_module
from curvlab.operators.engines.steps import Kept, Run, Slot, Step
from curvlab.ops import hvp

__all__ = ["ActivationStep", "AddStep"]

_PIECEWISE = ("relu", "leaky_relu")


class ActivationStep(Step):
    """``a = φ(x)`` or ``φ(x + r)``."""

    def __init__(self, name: str, inputs: Sequence[int], output: int, kind: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, inputs, output)
        self.kind, self.options = kind, dict(options)
        self.index = -1
        self.overwrite_tangent = False  # nobody else reads the tangent of the input
        self.overwrite_signal = False  # the signal at the output is ours alone
        self.sinks: list[AffineStep] = []

    @property
    def monotone_piecewise(self) -> bool:
        """Whether maxima commute with it."""
        return self.kind == "relu" or (self.kind == "leaky_relu" and self.options["slope"] >= 0)

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """φ(z)."""
        z = values[0] if len(values) == 1 else values[0] + values[1]
        return _apply(z, self.kind, self.options)

    def deltas(self) -> set[int]:
        """δa, where φ'' is not zero."""
        return set() if self.kind in _PIECEWISE else {self.output}

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """φ' and φ'' δ."""
        size = slots[self.output].size
        if self.kind in _PIECEWISE:
            return {("first", self.output): size * (1 if self.kind == "relu" else itemsize)}
        return {("first", self.output): size * itemsize * (2 if second else 1)}

    def keep(self, kept: Kept, second: bool) -> tuple[Tensor, Tensor | None]:
        """``(φ', φ'' δ or None)``."""
        # A piecewise linear function of positive slopes has the sign of its argument: no sum to take again.
        of = (self.output,) if self.monotone_piecewise else self.inputs
        z = kept.natural(of[0])
        for other in of[1:]:
            z = z + kept.natural(other)
        delta = kept.deltas[self.output].contiguous() if second and self.kind not in _PIECEWISE else None
        first, curved = hvp.activation_factors(z, delta, self.kind, **self.options)
        return kept.laid_out(first), None if curved is None else kept.laid_out(curved)

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Ra, in place where nobody else reads Rz."""
        first, curved = kept
        x = run.t[self.inputs[0]]
        residual = run.t[self.inputs[1]] if len(self.inputs) == 2 else None
        if x is None:
            x, residual = residual, None
            out = None
        else:
            out = x if self.overwrite_tangent else None
        if x is None:
            return
        if run.second and curved is not None:
            if residual is None:
                run.extra[self.index] = x
                result = hvp.tangent_forward(x, first=first)
                assert isinstance(result, Tensor)
                run.t[self.output] = result
            else:
                pair = hvp.tangent_forward(x, residual=residual, first=first, keep_pre=True)
                run.t[self.output], run.extra[self.index] = pair
            return
        result = hvp.tangent_forward(x, residual=residual, first=first, out=out)
        assert isinstance(result, Tensor)
        run.t[self.output] = result

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Rδz to all inputs, and column sums to the layers whose bias it is."""
        g, g2 = run.take_both(self.output)
        first, curved = kept
        pre = run.extra.get(self.index) if run.second and curved is not None else None
        if g is None:
            if pre is None:
                return
            g = torch.zeros_like(pre)
        second = curved if pre is not None else None
        sinks = [(step, sunk) for step in self.sinks if (sunk := _bound_of(run, step)) is not None and sunk.want_bias]
        out = g if self.overwrite_signal else None
        if len(sinks) == 1:
            sunk = sinks[0][1]
            assert sunk.out_bias is not None
            target = sunk.out_bias[run.lo : run.hi]
            gz = hvp.tangent_backward(
                g,
                g2=g2,
                first=first,
                second=second,
                pre=pre,
                out_gy=out,
                out_bias=target,
                accumulate=not (run.fresh and sunk.fresh_bias),
            )[0]
        else:
            gz, _, sums, _ = hvp.tangent_backward(
                g, g2=g2, first=first, second=second, pre=pre, out_gy=out, want_bias=bool(sinks)
            )
            for step, sunk in sinks:
                assert sums is not None
                step.gather_bias(run, sunk, sums)
        assert gz is not None
        for slot, active in zip(self.inputs, self.active_inputs, strict=True):
            if active:
                run.give(slot, gz)


def _bound_of(run: Run, step: AffineStep) -> AffineBound | None:
    return run.bound[step.index]


class AddStep(Step):
    """``y = x + r`` of two activations of one shape, where no activation function follows."""

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The sum."""
        return values[0] + values[1]

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Rx + Rr."""
        x, r = (run.t[slot] for slot in self.inputs)
        run.t[self.output] = r if x is None else x if r is None else x + r

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """The same signal to both."""
        signal = run.take(self.output)
        for slot, active in zip(self.inputs, self.active_inputs, strict=True):
            if active and signal is not None:
                run.give(slot, signal)


class ScaleStep(Step):
    """``y = c x``, or ``x + c``, for a number or a tensor without a sample axis (one that is not chosen)."""

    def __init__(self, name: str, inputs: Sequence[int], output: int, function: Any, factor: float) -> None:
        super().__init__(name, inputs, output)
        self.function, self.factor = function, factor

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """What the graph computes."""
        return self.function(values[0])

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """The factor times Rx."""
        t = run.t[self.inputs[0]]
        run.t[self.output] = t if t is None or self.factor == 1.0 else t * self.factor

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """The factor times Rδ."""
        signal = run.take(self.output)
        if signal is not None:
            run.give(self.inputs[0], signal if self.factor == 1.0 else signal * self.factor)


class MultiplyStep(Step):
    """``y = x r`` of two activations of one shape (gates): ``Ry = r Rx + x Rr``, ``Rδx = r Rδ + δ Rr``."""

    fresh_signal = True

    def primal(self, values: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The product."""
        return values[0] * values[1]

    def deltas(self) -> set[int]:
        """δ at the product."""
        return {self.output}

    def kept_bytes(self, slots: Sequence[Slot], itemsize: int, second: bool) -> dict[tuple[str, int], int]:
        """Both factors and δ."""
        size = slots[self.output].size * itemsize
        bytes_ = {("value", slot): size for slot in self.inputs}
        if second:
            bytes_["delta", self.output] = size
        return bytes_

    def keep(self, kept: Kept, second: bool) -> Any:
        """``(x, r, δ or None)``."""
        return kept.value(self.inputs[0]), kept.value(self.inputs[1]), kept.delta(self.output) if second else None

    def forward(self, run: Run, kept: Any, bound: Any) -> None:
        """Ry."""
        x, r, _ = kept
        tx, tr = (run.t[slot] for slot in self.inputs)
        if tx is not None:
            out = r * tx
            run.t[self.output] = out if tr is None else out.addcmul_(x.expand_as(tr), tr)
        elif tr is not None:
            run.t[self.output] = x * tr

    def backward(self, run: Run, kept: Any, bound: Any) -> None:
        """Rδx and Rδr."""
        x, r, delta = kept
        signal = run.take(self.output)
        if signal is None:
            return
        tangents = [run.t[slot] for slot in self.inputs]
        for slot, active, own, across in zip(self.inputs, self.active_inputs, (r, x), tangents[::-1], strict=True):
            if active:
                below = own * signal
                if run.second and delta is not None and across is not None:
                    below = below + delta * across
                run.give(slot, below)


def _apply(z: Tensor, kind: str, options: Mapping[str, Any]) -> Tensor:
    if kind == "leaky_relu":
        return functional.leaky_relu(z, options["slope"])
    if kind == "softplus":
        return functional.softplus(z, options["beta"], options["threshold"])
    if kind == "gelu":
        return functional.gelu(z, approximate=options["approximate"])
    simple = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": functional.silu}
    return simple[kind](z)


def _add_activation(builder: Builder, node: Any, x: int, kind: str, **options: Any) -> None:
    builder.add(node, ActivationStep(builder.label(node), (x,), builder.new_slot(), kind, options))


_PLAIN = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}


@register_module(*_PLAIN)
def _plain_module(builder: Builder, node: Any, module: Any) -> None:
    _add_activation(builder, node, builder.slots_of(node, 1)[0], _PLAIN[type(module)])


@register_module(nn.LeakyReLU)
def _leaky_module(builder: Builder, node: Any, module: Any) -> None:
    _add_activation(builder, node, builder.slots_of(node, 1)[0], "leaky_relu", slope=module.negative_slope)


@register_module(nn.Softplus)
def _softplus_module(builder: Builder, node: Any, module: Any) -> None:
    options = {"beta": float(module.beta), "threshold": float(module.threshold)}
    _add_activation(builder, node, builder.slots_of(node, 1)[0], "softplus", **options)


@register_module(nn.GELU)
def _gelu_module(builder: Builder, node: Any, module: Any) -> None:
    _add_activation(builder, node, builder.slots_of(node, 1)[0], "gelu", approximate=module.approximate)


_FUNCTIONS = {
    functional.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    functional.silu: "silu",
}


@register_function(*_FUNCTIONS)
def _plain_function(builder: Builder, node: Any, module: Any) -> None:
    x, _ = builder.arguments(node, ("input", "inplace"), (False,))
    _add_activation(builder, node, builder.slot(node, x), _FUNCTIONS[node.target])


@register_method("relu", "relu_", "tanh", "sigmoid")
def _plain_method(builder: Builder, node: Any, module: Any) -> None:
    _add_activation(builder, node, builder.slots_of(node, 1)[0], node.target.rstrip("_"))


@register_function(functional.leaky_relu)
def _leaky_function(builder: Builder, node: Any, module: Any) -> None:
    x, slope, _ = builder.arguments(node, ("input", "negative_slope", "inplace"), (0.01, False))
    _add_activation(builder, node, builder.slot(node, x), "leaky_relu", slope=slope)


@register_function(functional.gelu)
def _gelu_function(builder: Builder, node: Any, module: Any) -> None:
    x, approximate = builder.arguments(node, ("input", "approximate"), ("none",))
    _add_activation(builder, node, builder.slot(node, x), "gelu", approximate=approximate)


@register_function(functional.softplus)
def _softplus_function(builder: Builder, node: Any, module: Any) -> None:
    x, beta, threshold = builder.arguments(node, ("input", "beta", "threshold"), (1.0, 20.0))
    _add_activation(builder, node, builder.slot(node, x), "softplus", beta=float(beta), threshold=float(threshold))


def _two_operands(builder: Builder, node: Any, module: Any) -> None:
    a, b = node.args[:2] if len(node.args) == 2 else (None, None)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    kind = name.strip("_").removeprefix("i")
    if node.kwargs or len(node.args) != 2:
        raise builder.unsupported(node, f"arguments {[*node.args, *node.kwargs]}")
    if builder.is_slot(a) and builder.is_slot(b):
        _two_activations(builder, node, kind, builder.slot(node, a), builder.slot(node, b))
        return
    forward = builder.is_slot(a)
    x, other = (a, builder.value(node, b)) if forward else (b, builder.value(node, a))
    slot = builder.slot(node, x)
    if not isinstance(other, (int, float)) or isinstance(other, bool):
        raise builder.unsupported(node, f"an operand of type {type(other).__name__}")
    factors = {"add": 1.0, "sub": 1.0 if forward else -1.0, "mul": float(other)}
    if kind == "truediv" or kind == "div":
        if not forward:
            raise builder.unsupported(node, "a number divided by an activation")
        factors[kind] = 1.0 / other
    functions = {
        "add": lambda v: v + other,
        "sub": (lambda v: v - other) if forward else (lambda v: other - v),
        "mul": lambda v: v * other,
        "truediv": lambda v: v / other,
        "div": lambda v: v / other,
    }
    builder.add(node, ScaleStep(builder.label(node), (slot,), builder.new_slot(), functions[kind], factors[kind]))


def _two_activations(builder: Builder, node: Any, kind: str, a: int, b: int) -> None:
    slots = builder.program.slots
    if slots[a].shape != slots[b].shape:
        raise builder.unsupported(node, f"operands of shapes {slots[a].shape} and {slots[b].shape}")
    if kind not in ("add", "mul"):
        raise builder.unsupported(node, f"'{kind}' of two activations")
    step = AddStep if kind == "add" else MultiplyStep
    builder.add(node, step(builder.label(node), (a, b), builder.new_slot()))


register_function(
    operator.add,
    operator.iadd,
    operator.sub,
    operator.isub,
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.itruediv,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
)(_two_operands)
register_method("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")(_two_operands)
