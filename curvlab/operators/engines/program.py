# SPDX-License-Identifier: Apache-2.0
"""From a model to a curvature program: trace, one step a layer, and rewrites that let steps do more in one pass.

Rewrites: a BatchNorm with constant statistics goes into the layer before it; a ReLU before a max-pooling trades places
with it (maxima commute with monotone functions, and there is a quarter as much to pass over); a sum before an
activation becomes part of it; column sums for biases are taken by the activation above the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvlab.operators.engines import layer_rules
from curvlab.operators.engines.layer_rules.activation import ActivationStep, AddStep
from curvlab.operators.engines.layer_rules.affine import AffineStep, Fold
from curvlab.operators.engines.layer_rules.first_conv import use_first_conv
from curvlab.operators.engines.layer_rules.norm import FixedNormStep
from curvlab.operators.engines.layer_rules.pool import MaxPoolStep
from curvlab.operators.engines.protocol import UnsupportedModel
from curvlab.operators.engines.rules import Builder, Program, find_rule
from curvlab.operators.engines.steps import Step

__all__ = ["build_program", "check_outputs"]

_ = layer_rules  # imported for its registrations


class _Tracer(fx.Tracer):
    """Traces into what has no rule of its own, and stops at what has one, or is PyTorch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As always; a graph does not show by itself what stands in a ``torch.no_grad`` block of the model."""
        node = super().create_node(*args, **kwargs)
        node.meta["no_grad"] = not torch.is_grad_enabled()
        return node


class _Constant(Step):
    """What depends on no chosen parameter: run in the primal pass alone."""

    def __init__(self, name: str, inputs: tuple[int, ...], output: int, function: Any) -> None:
        super().__init__(name, inputs, output)
        self.function = function

    def primal(self, values: Any, theta: Mapping[str, Tensor]) -> Tensor:
        """The function of the values."""
        return self.function(*values)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        with torch.enable_grad():
            return _Tracer().trace(model)
    except Exception as error:
        raise UnsupportedModel(
            f"fused: model must be traceable by torch.fx, got {type(error).__name__}: {error} ({type(model).__name__})"
        ) from error


def build_program(
    model: nn.Module,
    theta: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    chosen: frozenset[str],
    probe: Any,
    *,
    batch_norm: str,
    statistics: Mapping[str, Tensor] | None,
    first_conv: bool = False,
) -> Program:
    """The program of a model.

    Args:
        model: its structure, in evaluation mode.
        theta: all parameters in float64.
        buffers: all buffers in float64.
        chosen: names of the parameters that products are taken in.
        probe: a few samples of inputs: a tensor, a tuple or a dict.
        batch_norm: the problem's BatchNorm mode.
        statistics: BatchNorm's running statistics by buffer name, if all samples share them; else None.
        first_conv: whether the own kernel for convolutions of inputs may be used: float32 on the CPU.

    Raises:
        UnsupportedModel: naming the node and the layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases = _aliases(model)
    builder = Builder(
        modules,
        theta,
        {**buffers, **(statistics or {})},
        aliases,
        chosen,
        batch_norm=batch_norm,
        statistics_fixed=statistics is not None,
    )
    inputs = _named_inputs(probe)
    with torch.no_grad():
        for position, node in enumerate(graph_nodes := list(_trace(model).nodes)):
            try:
                _visit(builder, node, inputs, position)
            except UnsupportedModel:
                raise
            except Exception as error:  # a call that no rule foresaw: another engine runs what PyTorch runs
                raise builder.unsupported(node, f"{type(error).__name__}: {error}") from error
    del graph_nodes
    program = builder.program
    program.probe_output = builder.probe[program.output]
    if not program.slots[program.output].active:
        raise UnsupportedModel("fused: model must depend on a chosen parameter, got an output that is a constant")
    _prune(program)
    _rewrite(program, builder, first_conv)
    return program


def check_outputs(program: Program, run: Callable[[int], Tensor]) -> None:
    """Compare the program with the model itself: a graph shows no in-place change through another name.

    Args:
        program: as built.
        run: the outputs of the model for the first ``n`` samples of the probe. Fewer than the program saw, so that a
            size of the batch that was taken for a constant is found out; all where samples see each other.

    Raises:
        UnsupportedModel: the outputs differ.
    """
    got = program.probe_output
    count = len(got) if any(step.whole_batch for step in program.steps) else 2
    try:
        expected = run(count)
    except RuntimeError:  # a forward pass that names a dtype does not run in float64
        return
    got = got[:count]
    scale = float(got.abs().max()) if got.numel() else 0.0
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0.0, atol=1e-8 * scale, equal_nan=True):
        raise UnsupportedModel(
            "fused: model must compute what torch.fx traces, got other outputs from the graph (values changed in place "
            "under another name, the size of a batch as a number, or a layer with a forward pass of its own)"
        )


def _prune(program: Program) -> None:
    """Drop what the output does not read: no signal would ever reach it."""
    needed, steps = {program.output}, []
    for step in reversed(program.steps):
        if step.output in needed:
            needed.update(step.inputs)
            steps.append(step)
    program.steps = steps[::-1]
    for index, slot in enumerate(program.slots):
        slot.active = slot.active and index in needed


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(param), name)
    return names


def _named_inputs(probe: Any) -> Any:
    if isinstance(probe, Mapping):
        return dict(probe)
    return list(probe) if isinstance(probe, (tuple, list)) else [probe]


def _visit(builder: Builder, node: fx.Node, inputs: Any, position: int) -> None:
    """Bring one node into the program."""
    if node.op == "placeholder":
        _visit_input(builder, node, inputs, position)
    elif node.op == "get_attr":
        target = str(node.target)
        if target in builder.aliases:
            builder.bound[node] = ("parameter", builder.aliases[target])
        else:
            value: Any = builder.buffers.get(target)
            if value is None:
                raise builder.unsupported(node, "a constant that is no buffer")
            builder.bound[node] = ("buffer", value)
    elif node.op == "output":
        result = node.args[0]
        if not builder.is_slot(result):
            raise builder.unsupported(node, f"an output that is not one tensor ({result})")
        builder.program.output = builder.slot(node, result)
    else:
        _visit_call(builder, node)


def _visit_input(builder: Builder, node: fx.Node, inputs: Any, position: int) -> None:
    given = inputs.get(str(node.target)) if isinstance(inputs, dict) else None
    if isinstance(inputs, list) and position < len(inputs):
        given = inputs[position]
    if given is None:
        if node.args and node.args[0] is not None:
            raise builder.unsupported(node, f"an argument left at its default {node.args[0]!r}")
        builder.bound[node] = ("value", None)
        return
    if not isinstance(given, torch.Tensor):
        raise builder.unsupported(node, f"an input of type {type(given).__name__}")
    builder.add_input(node, given, str(node.target) if isinstance(inputs, dict) else position)


def _visit_call(builder: Builder, node: fx.Node) -> None:
    _refuse_shared_in_place(builder, node)
    arguments = list(node.all_input_nodes)
    kinds = {builder.bound[argument][0] for argument in arguments}
    if not kinds & {"slot", "parameter", "buffer"}:
        if node.op != "call_function":
            raise builder.unsupported(node, "a call without activations")
        args, kwargs = builder.value(node, node.args), builder.value(node, tuple(node.kwargs.items()))
        builder.bound[node] = ("value", node.target(*args, **dict(kwargs)))  # type: ignore[operator]
        return
    if _is_shape_query(node):
        probe = builder.probe[builder.slot(node, node.args[0])]
        rest = builder.value(node, node.args[1:])
        options = dict(builder.value(node, tuple(node.kwargs.items())))
        builder.bound[node] = ("value", _query(node, probe, rest, options))
        return
    slots = [builder.slot(node, argument) for argument in arguments if builder.is_slot(argument)]
    touched = {builder.bound[a][1] for a in arguments if builder.bound[a][0] == "parameter"}
    if node.op == "call_module":
        prefix = str(node.target)
        own = builder.modules[prefix].named_parameters(remove_duplicate=False)
        touched |= {builder.aliases[f"{prefix}.{name}"] for name, _ in own}
    constant = bool(slots) and not any(builder.is_active(slot) for slot in slots) and not touched & builder.chosen
    if constant and _add_constant(builder, node, arguments, slots):
        return
    if node.meta.get("no_grad") and not constant:
        raise builder.unsupported(node, "a part under torch.no_grad that depends on chosen parameters")
    key = builder.modules[str(node.target)] if node.op == "call_module" else node.target
    rule = find_rule(key)  # type: ignore[arg-type]
    if rule is None:
        raise builder.unsupported(node, "a layer without a rule (or with hooks)")
    rule(builder, node, key if node.op == "call_module" else None)


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def _query(node: fx.Node, probe: Tensor, rest: Any, options: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(probe, str(node.target))(*rest, **options)
    return getattr(probe, rest[0])


def _refuse_shared_in_place(builder: Builder, node: fx.Node) -> None:
    """An in-place call changes its input for all other readers; steps do not."""
    module = builder.modules.get(str(node.target)) if node.op == "call_module" else None
    method = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    in_place = method or bool(getattr(module, "inplace", False)) or bool(node.kwargs.get("inplace", False))
    source = node.args[0] if node.args else None
    if in_place and isinstance(source, fx.Node) and len(source.users) > 1:
        raise builder.unsupported(node, f"an in-place change of '{source.name}', which others read")


def _add_constant(builder: Builder, node: fx.Node, arguments: list[fx.Node], slots: list[int]) -> bool:
    """A node that no chosen parameter moves; False where its samples seem to depend on each other."""
    module = builder.modules[str(node.target)] if node.op == "call_module" else None
    if module is not None and any(True for _ in module.parameters()):
        return False
    readers = [argument for argument in arguments if builder.is_slot(argument)]

    def function(*values: Tensor) -> Tensor:
        result = compute(*values)
        # ``x.float()`` or bytes divided by 255: the value is what the model says, the pass goes on in float64.
        return result.double() if isinstance(result, Tensor) and result.is_floating_point() else result

    def compute(*values: Tensor) -> Tensor:
        given = dict(zip(readers, values, strict=True))

        def resolve(argument: fx.Node) -> Any:
            if argument in given:
                return given[argument]
            kind, value = builder.bound[argument]
            return builder.theta[value] if kind == "parameter" else value

        args, kwargs = fx.map_arg(node.args, resolve), fx.map_arg(node.kwargs, resolve)
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [builder.probe[slot].clone() for slot in slots]
    whole = function(*values)
    try:
        part = function(*[builder.probe[slot][:1].clone() for slot in slots])
    except RuntimeError:  # ``x.view(x.size(0), -1)``: the graph's shapes are those of all samples of the probe
        return False
    if not isinstance(whole, torch.Tensor) or whole.ndim == 0 or whole.shape[0] != values[0].shape[0]:
        return False
    if part.shape[1:] != whole.shape[1:] or not torch.allclose(whole[:1], part, rtol=1e-8, equal_nan=True):
        return False
    builder.add(node, _Constant(builder.label(node), tuple(slots), builder.new_slot(), function))
    return True


def _rewrite(program: Program, builder: Builder, first_conv: bool) -> None:
    """All rewrites, then what steps may overwrite and sum for each other."""
    if builder.statistics_fixed:
        _fold_norms(program, builder)
    _swap_pools(program)
    _merge_sums(program)
    if first_conv:
        use_first_conv(program)
    for index, step in enumerate(program.steps):
        if hasattr(step, "index"):
            step.index = index  # type: ignore[attr-defined]
        step.active_inputs = tuple(program.slots[slot].active for slot in step.inputs)
    for step in program.steps:
        if isinstance(step, ActivationStep):
            _settle_activation(program, step)


def _fold_norms(program: Program, builder: Builder) -> None:
    for norm in [step for step in program.steps if isinstance(step, FixedNormStep)]:
        layer = program.producer(norm.inputs[0])
        foldable = isinstance(layer, AffineStep) and layer.fold is None and layer.scale is None
        if not foldable or program.sole_consumer(norm.inputs[0]) is not norm:
            continue
        assert isinstance(layer, AffineStep)
        names = norm.names
        layer.fold_norm(
            Fold(
                names.get("gain"),
                names.get("shift"),
                builder.buffers[f"{norm.prefix}.running_mean"].double(),
                builder.buffers[f"{norm.prefix}.running_var"].double(),
                norm.eps,
            ),
            norm.output,
        )
        program.steps.remove(norm)


def _swap_pools(program: Program) -> None:
    for pool in [step for step in program.steps if isinstance(step, MaxPoolStep)]:
        act = program.producer(pool.inputs[0])
        if not isinstance(act, ActivationStep) or not act.monotone_piecewise or len(act.inputs) != 1:
            continue
        if program.sole_consumer(act.output) is not pool:
            continue
        between, first, last = act.output, act.inputs[0], pool.output
        program.slots[between].shape = program.slots[last].shape
        program.slots[between].active = program.slots[first].active
        pool.inputs, pool.output = (first,), between
        act.inputs, act.output = (between,), last
        i, j = program.steps.index(act), program.steps.index(pool)
        program.steps[i], program.steps[j] = pool, act


def _merge_sums(program: Program) -> None:
    for add in [step for step in program.steps if isinstance(step, AddStep)]:
        act = program.sole_consumer(add.output)
        if isinstance(act, ActivationStep) and len(act.inputs) == 1 and add.inputs[0] != add.inputs[1]:
            act.inputs = add.inputs
            program.steps.remove(add)


def _settle_activation(program: Program, act: ActivationStep) -> None:
    """What the activation may overwrite, and whose bias sums it takes."""
    source = program.producer(act.inputs[0])
    alone = program.sole_consumer(act.inputs[0]) is act
    act.overwrite_tangent = alone and source is not None and source.fresh_tangent
    consumers = program.consumers(act.output)
    act.overwrite_signal = act.output != program.output and all(step.fresh_signal for step in consumers)
    for slot in act.inputs:
        layer, reader = program.producer(slot), program.sole_consumer(slot)
        while isinstance(layer, MaxPoolStep) and reader is not None:
            reader = program.sole_consumer(layer.inputs[0])
            layer = program.producer(layer.inputs[0])
        if isinstance(layer, AffineStep) and reader is not None:
            layer.bias_from_outside = True
            act.sinks.append(layer)
