# SPDX-License-Identifier: Apache-2.0
"""The registry of layer rules: how a node of an fx graph becomes a step of the curvature program.

A rule is ``rule(builder, node, module)``: it reads the node's inputs as slots, and adds a :class:`Step`.  Rules are
looked up by module type (exactly: a subclass may compute anything), by a predicate on modules, by function or by
method name.  A layer that lives elsewhere registers its own::

    @register_module(MaskedLinear)
    def _masked_linear(builder, node, module):
        (x,) = builder.slots_of(node, 1)
        builder.add(node, MaskedLinearStep(builder.label(node), (x,), builder.new_slot(), ...))

Nodes whose inputs do not depend on chosen parameters need no rule: what they compute is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from curvlab.operators.engines.protocol import UnsupportedModel
from curvlab.operators.engines.steps import Slot, Step

__all__ = [
    "Builder",
    "Program",
    "find_rule",
    "register_function",
    "register_match",
    "register_method",
    "register_module",
]

Rule = Callable[["Builder", fx.Node, Any], None]

_MODULES: dict[type, Rule] = {}
_MATCHES: list[tuple[Callable[[nn.Module], bool], Rule]] = []
_FUNCTIONS: dict[Any, Rule] = {}
_METHODS: dict[str, Rule] = {}


def register_module(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Rule for modules of exactly these types."""

    def decorate(rule: Rule) -> Rule:
        _MODULES.update(dict.fromkeys(types, rule))
        return rule

    return decorate


def register_match(matches: Callable[[nn.Module], bool]) -> Callable[[Rule], Rule]:
    """Rule for modules of which ``matches(module)`` is true; asked after the exact types."""

    def decorate(rule: Rule) -> Rule:
        _MATCHES.append((matches, rule))
        return rule

    return decorate


def register_function(*functions: Any) -> Callable[[Rule], Rule]:
    """Rule for calls of these functions."""

    def decorate(rule: Rule) -> Rule:
        _FUNCTIONS.update(dict.fromkeys(functions, rule))
        return rule

    return decorate


def register_method(*names: str) -> Callable[[Rule], Rule]:
    """Rule for calls of these methods of tensors."""

    def decorate(rule: Rule) -> Rule:
        _METHODS.update(dict.fromkeys(names, rule))
        return rule

    return decorate


def find_rule(key: nn.Module | Callable[..., Any] | str) -> Rule | None:
    """The rule of a module, a function, or a method's name; None where there is none."""
    if isinstance(key, str):
        return _METHODS.get(key)
    if isinstance(key, nn.Module):
        if key._forward_hooks or key._forward_pre_hooks:
            return None
        rule = _MODULES.get(type(key))
        return rule or next((rule for matches, rule in _MATCHES if matches(key)), None)
    return _FUNCTIONS.get(key)


class Program:
    """Slots, and steps in the order of evaluation.

    Attributes:
        slots: all values.
        steps: all steps, also those that compute constants.
        input_slots: slots of the model's inputs, by name of the argument, or by position.
        output: slot of the model's output.
        probe_output: what the graph gave for the probe.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.steps: list[Step] = []
        self.input_slots: dict[str | int, int] = {}
        self.output = -1
        self.probe_output: Tensor

    def consumers(self, slot: int) -> list[Step]:
        """Steps that read a slot."""
        return [step for step in self.steps if slot in step.inputs]

    def producer(self, slot: int) -> Step | None:
        """The step that writes a slot; None for inputs."""
        return next((step for step in self.steps if step.output == slot), None)

    def sole_consumer(self, slot: int) -> Step | None:
        """The step that reads a slot, if there is one alone and it reads it once, and the slot is not the output."""
        steps = self.consumers(slot)
        if len(steps) != 1 or slot == self.output or steps[0].inputs.count(slot) != 1:
            return None
        return steps[0]


class Builder:
    """What rules see while a graph becomes a program.

    Every step is run on a few samples (the probe) when it is added, in float64: this gives the shapes, and the values
    of what graphs compute with shapes.

    Attributes:
        program: what is being built.
        theta: all parameters in float64, by their full (first) names.
        buffers: all buffers in float64.
        chosen: names of chosen parameters.
        statistics_fixed: whether BatchNorm statistics are the same for all samples, so that they may be folded.
        batch_norm: the problem's BatchNorm mode.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        theta: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        aliases: Mapping[str, str],
        chosen: frozenset[str],
        *,
        batch_norm: str,
        statistics_fixed: bool,
    ) -> None:
        self.program = Program()
        self.modules, self.theta, self.buffers, self.aliases = modules, theta, buffers, aliases
        self.chosen, self.batch_norm, self.statistics_fixed = chosen, batch_norm, statistics_fixed
        self.probe: list[Tensor] = []  # by slot
        self.bound: dict[fx.Node, Any] = {}  # node -> ("slot", index) or ("value", anything)

    def label(self, node: fx.Node) -> str:
        """``node 'conv1' (Conv2d features.0)``: how messages name a node."""
        if node.op == "call_module":
            return f"node '{node.name}' ({type(self.modules[str(node.target)]).__name__} {node.target})"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"node '{node.name}' ({target})"

    def unsupported(self, node: fx.Node, what: str) -> UnsupportedModel:
        """The error that names the node and the layer."""
        return UnsupportedModel(f"fused: model must consist of layers with a rule, got {what} at {self.label(node)}")

    def new_slot(self) -> int:
        """Index of a slot that the next :meth:`add` fills."""
        return len(self.program.slots)

    def is_slot(self, value: Any) -> bool:
        """Whether a node's argument is a value of the program (not a number, shape or parameter)."""
        return isinstance(value, fx.Node) and self.bound[value][0] == "slot"

    def slot(self, node: fx.Node, value: Any) -> int:
        """The slot of a node's argument."""
        if not self.is_slot(value):
            raise self.unsupported(node, f"an operand that is no activation ({value})")
        return self.bound[value][1]

    def slots_of(self, node: fx.Node, count: int) -> list[int]:
        """The slots of all arguments of a node, ``count`` of them."""
        values = [*node.args, *node.kwargs.values()]
        if len(values) != count:
            raise self.unsupported(node, f"{len(values)} arguments")
        return [self.slot(node, value) for value in values]

    def value(self, node: fx.Node, argument: Any) -> Any:
        """An argument that must not be an activation: nodes replaced by what they are."""
        if isinstance(argument, fx.Node):
            kind, value = self.bound[argument]
            if kind == "slot":
                raise self.unsupported(node, f"the activation {argument} as an option")
            if kind == "parameter":
                raise self.unsupported(node, f"the parameter {value} as an operand")
            return value
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.value(node, item) for item in argument)
        return argument

    def arguments(self, node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
        """A function's arguments in the order of ``names``; ``defaults`` are those of the last ones.

        Tensors stay nodes, everything else is a value.
        """
        given = dict(zip(names, node.args, strict=False))
        unknown = [name for name in node.kwargs if name not in names]
        if unknown or len(node.args) > len(names):
            raise self.unsupported(node, f"arguments {[*node.args, *node.kwargs]}")
        given.update(node.kwargs)
        filled = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        result = []
        for name in names:
            argument = given.get(name, filled.get(name))
            tensor = isinstance(argument, fx.Node) and self.bound[argument][0] != "value"
            result.append(argument if tensor else self.value(node, argument))
        return result

    def parameter(self, node: fx.Node, role: str) -> str | None:
        """The full name of a module's parameter; None where it has none."""
        module = self.modules[str(node.target)]
        if getattr(module, role, None) is None:
            return None
        return self.aliases[f"{node.target}.{role}"]

    def parameter_arguments(self, node: fx.Node, weight: Any, bias: Any) -> tuple[str, str | None]:
        """Names of parameters that a function got."""
        names: list[str | None] = []
        for argument in (weight, bias):
            if argument is None:
                names.append(None)
            elif isinstance(argument, fx.Node) and self.bound[argument][0] == "parameter":
                names.append(self.bound[argument][1])
            else:
                raise self.unsupported(node, f"a weight that is no parameter ({argument})")
        assert names[0] is not None
        return names[0], names[1]

    def add(self, node: fx.Node, step: Step) -> None:
        """Append a step and make its output the node's value."""
        inputs = [self.probe[i] for i in step.inputs]
        output = step.primal(inputs, self.theta)
        samples = self.probe[0].shape[0]
        if output.ndim == 0 or output.shape[0] != samples:
            raise self.unsupported(node, f"an output {list(output.shape)} that does not lead with the samples")
        step.active_inputs = tuple(self.program.slots[i].active for i in step.inputs)
        active = any(step.active_inputs) or any(name in self.chosen for name in step.names.values())
        self._append(node, output, active, step)

    def _append(self, node: fx.Node, output: Tensor, active: bool, step: Step | None) -> None:
        self.program.slots.append(Slot(tuple(output.shape[1:]), active))
        self.probe.append(output.detach())
        self.bound[node] = ("slot", len(self.program.slots) - 1)
        if step is not None:
            self.program.steps.append(step)

    def add_input(self, node: fx.Node, value: Tensor, key: str | int) -> None:
        """A model input ``[n, ...]``; ``key`` finds it in a batch (nodes are renamed where a name is a builtin's)."""
        self.program.input_slots[key] = self.new_slot()
        self._append(node, value, False, None)

    def alias(self, node: fx.Node, slot: int) -> None:
        """The node's value is that of a slot (identity)."""
        self.bound[node] = ("slot", slot)

    def is_active(self, slot: int) -> bool:
        """Whether a slot depends on chosen parameters."""
        return self.program.slots[slot].active
