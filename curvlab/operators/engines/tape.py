# SPDX-License-Identifier: Apache-2.0
"""A linear map recorded once as a list of tensor operations, then replayed: ``record(function, inputs)``.

A derivative at a fixed point, ``v -> H v`` or ``v -> J v`` or ``u -> Jᵀ u``, is linear in its argument, so nothing in
it may branch on the argument: the operations of one run, taken below autograd, are the map.  What does not depend on
the argument (activations, masks, pooling indices, softmax) was computed while recording and is held as a constant.

Why not ``torch.func.linearize``: it does the same by symbolic tracing and costs 4 to 8 s on a ResNet-20 (CPU time, one
thread, 128 samples), where a product takes 0.9 s; recording costs about one run of the function.  It also needs
forward mode, which this does not: a double backward can be recorded as well as a ``jvp``.  Replaying leaves out the
autograd engine, so there is no graph that a later in-place change could break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["LinearProgram", "Unrecordable", "record"]

aten = torch.ops.aten
# Sum of two products as one call that accumulates: the second product is not written out and read again.
_FACTORS = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}
# Elementwise operations that may write over their first argument once nobody else reads it.
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.neg.default: aten.neg_.default,
}


class Unrecordable(RuntimeError):
    """The function does something with its argument that a replay could not repeat; the message says what."""


class _Slot:
    """A value of the program: an input or the result of a step (``step`` is -1 for inputs)."""

    __slots__ = ("number", "step", "tensor")

    def __init__(self, number: int, step: int, tensor: Tensor) -> None:
        self.number, self.step, self.tensor = number, step, tensor


class _Step:
    """One operation: its flat arguments are slots, constants (tensors) or plain values; ``outputs`` its flat slots."""

    __slots__ = ("arguments", "function", "mutates", "outputs", "spec")

    def __init__(self, function: Any, arguments: list[Any], spec: Any, mutates: bool) -> None:
        self.function, self.arguments, self.spec, self.mutates = function, arguments, spec, mutates
        self.outputs: list[_Slot | None] = []

    def slots(self) -> list[_Slot]:
        return [argument for argument in self.arguments if isinstance(argument, _Slot)]


def _storage(tensor: Tensor) -> int | None:
    """Identity of the memory; None for tensors without any (the zeros of forward mode)."""
    if tensor._is_zerotensor():
        return None
    return tensor.untyped_storage()._cdata


def _key(tensor: Tensor) -> tuple[Any, ...]:
    # Not the object: autograd hands a saved tensor back as another object over the same memory.
    return (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


class _Recorder(TorchDispatchMode):
    """Runs everything, and notes the operations that an input reaches."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.count = 0
        self.slots: dict[tuple[Any, ...], _Slot] = {}
        self.reached: set[int] = set()  # storages that hold a value of the program
        self.kept: list[Tensor] = []  # memory that keys speak of must not be handed out again while recording
        self.inputs = [self._slot(tensor, -1) for tensor in inputs]
        self.given = set(self.reached)

    def _slot(self, tensor: Tensor, step: int) -> _Slot:
        storage = _storage(tensor)
        slot = _Slot(self.count, step, tensor)
        self.count += 1
        self.slots[_key(tensor)] = slot
        if storage is not None:
            self.reached.add(storage)
        self.kept.append(tensor)
        return slot

    def find(self, tensor: Tensor) -> _Slot | None:
        """The slot that holds ``tensor``, None for a constant."""
        storage = _storage(tensor)
        if storage is None or storage not in self.reached:
            return None
        slot = self.slots.get(_key(tensor))
        if slot is None:
            raise Unrecordable("a view that no recorded operation made of a recorded value")
        return slot

    def _written(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found: list[Tensor] = []
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        return found

    def _own_copy(self, tensor: Tensor) -> None:
        """A constant that is about to be written to: the program works on a copy, made anew in each replay."""
        before = tensor.detach().clone(memory_format=torch.preserve_format)
        if before.stride() != tensor.stride() or before.shape != tensor.shape:
            raise Unrecordable("a write into a part of a constant")
        leaves, spec = tree_flatten(((before,), {"memory_format": torch.preserve_format}))
        step = _Step(aten.clone.default, leaves, spec, False)
        self.steps.append(step)
        step.outputs = [self._slot(tensor, len(self.steps) - 1)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        reached = any(isinstance(leaf, Tensor) and self.find(leaf) is not None for leaf in leaves)
        if not reached:
            return func(*args, **kwargs)
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            raise Unrecordable(f"{func} takes a Python value out of the argument")
        mutates = func._schema.is_mutable
        if mutates:
            for tensor in self._written(func, args, kwargs):
                if self.find(tensor) is None:
                    self._own_copy(tensor)
                elif _storage(tensor) in self.given:
                    raise Unrecordable(f"{func} writes into the argument")
        arguments = [(self.find(leaf) or leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = func(*args, **kwargs)
        step = _Step(func, arguments, spec, mutates)
        self.steps.append(step)
        for leaf in tree_flatten(result)[0]:
            if not isinstance(leaf, Tensor):
                step.outputs.append(None)
            elif mutates and (old := self.slots.get(_key(leaf))) is not None:
                step.outputs.append(old)
            else:
                step.outputs.append(self._slot(leaf, len(self.steps) - 1))
        return result


def record(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor], *, rounded: torch.dtype | None = None
) -> tuple[LinearProgram, Sequence[Tensor | None]]:
    """The program of ``function``, which must be linear in ``inputs``, and the results of this one run.

    Args:
        function: takes the inputs, returns a list of tensors; None stands for a zero result.  It may use autograd.
        inputs: example values; a replay takes others of the same shape, dtype and device.
        rounded: multiply in this dtype: constants and inputs are rounded to it, the results come in it. What the
            constants were computed from is not: masks and softmax are those of the full precision.

    Raises:
        Unrecordable: a Python value was taken out of an input, or memory was shared in a way a replay cannot repeat.
    """
    recorder = _Recorder(inputs)
    with recorder:
        results = list(function(*inputs))
    outputs = [None if result is None else recorder.find(result.detach()) for result in results]
    program = LinearProgram(recorder.steps, recorder.inputs, outputs, rounded)
    return program, results


class LinearProgram:
    """What :func:`record` returns: call it with new inputs.

    Attributes:
        constant_bytes: memory of the constants (their storages, each counted once).
        temporary_bytes: largest memory of values alive at one time in a replay, results included.
        recording_bytes: all values of the recorded run together; recording holds them until it ends.
        num_steps: operations in one replay.
    """

    def __init__(
        self,
        steps: list[_Step],
        inputs: list[_Slot],
        outputs: list[_Slot | None],
        rounded: torch.dtype | None = None,
    ) -> None:
        steps = _live_steps(steps, outputs)
        self.recording_bytes = _bytes_of([slot.tensor for step in steps for slot in step.outputs if slot])
        steps = _accumulate_products(steps, outputs)
        self.temporary_bytes = _peak_bytes(steps, outputs, inputs)
        _reuse_memory(steps, inputs, outputs)
        self._run, self.constants = _compile(steps, inputs, outputs, rounded)
        self.constant_bytes = _bytes_of(self.constants)
        self.num_steps = len(steps)

    def bytes_besides(self, owned: set[int]) -> int:
        """Memory of the constants but those in storages (``untyped_storage()._cdata``) that somebody else owns."""
        return _bytes_of([tensor for tensor in self.constants if _storage(tensor) not in owned])

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        """The results for new inputs; None where the function gave None or the inputs reach nothing: zero."""
        return self._run(*inputs)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    found = {storage: tensor for tensor in tensors if (storage := _storage(tensor)) is not None}
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def _live_steps(steps: list[_Step], outputs: list[_Slot | None]) -> list[_Step]:
    """Steps that a result depends on; a step that writes in place counts for all memory it wrote to."""
    wanted = {slot.number for slot in outputs if slot is not None}
    storages = {_storage(slot.tensor) for slot in outputs if slot is not None}
    live: list[_Step] = []
    for step in reversed(steps):
        made = any(slot is not None and slot.number in wanted for slot in step.outputs)
        written = step.mutates and any(slot is not None and _storage(slot.tensor) in storages for slot in step.outputs)
        if made or written:
            live.append(step)
            wanted.update(slot.number for slot in step.slots())
            storages.update(_storage(slot.tensor) for slot in step.slots())
    return live[::-1]


def _uses(steps: list[_Step], outputs: list[_Slot | None]) -> dict[int, int]:
    """How many times each slot is read."""
    count: dict[int, int] = {}
    for slot in [slot for step in steps for slot in step.slots()] + [slot for slot in outputs if slot is not None]:
        count[slot.number] = count.get(slot.number, 0) + 1
    return count


def _accumulate_products(steps: list[_Step], outputs: list[_Slot | None]) -> list[_Step]:
    """``add(p, mm(a, b))`` as ``addmm(p, a, b)`` where that product is read nowhere else."""
    uses = _uses(steps, outputs)
    makers = {slot.number: step for step in steps if len(step.outputs) == 1 for slot in step.outputs if slot}
    dropped: set[int] = set()
    for step in steps:
        if step.function is not aten.add.Tensor or len(step.arguments) != 2:
            continue
        for own, other in ((1, 0), (0, 1)):
            product, rest = step.arguments[own], step.arguments[other]
            if not isinstance(product, _Slot) or uses[product.number] != 1:
                continue
            maker = makers.get(product.number)
            tensor = rest.tensor if isinstance(rest, _Slot) else rest
            if maker is None or maker.function not in _FACTORS or not isinstance(tensor, Tensor):
                continue
            if tensor.shape != product.tensor.shape or tensor.dtype != product.tensor.dtype:
                continue
            step.function = _FACTORS[maker.function]
            step.arguments, step.spec = tree_flatten(((rest, *maker.arguments), {}))
            dropped.add(id(maker))
            break
    return [step for step in steps if id(step) not in dropped]


def _reuse_memory(steps: list[_Step], inputs: list[_Slot], outputs: list[_Slot | None]) -> None:
    """Elementwise steps write over an argument that is read for the last time: fresh memory costs as much as the sum.

    Memory counts as read while any value that shares it is.
    """
    last: dict[int | None, int] = {}
    for i, step in enumerate(steps):
        for slot in step.slots():
            last[_storage(slot.tensor)] = i
    for slot in (*inputs, *outputs):
        if slot is not None:
            last[_storage(slot.tensor)] = len(steps)
    for i, step in enumerate(steps):
        if step.function not in _IN_PLACE or step.outputs[0] is None:
            continue
        target = step.arguments[0]
        if not isinstance(target, _Slot) or not _is_alike(target.tensor, step.outputs[0].tensor):
            continue
        own = _storage(target.tensor)
        others = {_storage(argument.tensor) for argument in step.slots()[1:]}
        if own is not None and last[own] == i and own not in others:
            step.function = _IN_PLACE[step.function]


def _is_alike(target: Tensor, result: Tensor) -> bool:
    """Same layout and dtype, and ``target`` is all there is in its memory."""
    same = target.shape == result.shape and target.stride() == result.stride() and target.dtype == result.dtype
    return same and target.untyped_storage().nbytes() == target.numel() * target.element_size()


def _peak_bytes(steps: list[_Step], outputs: list[_Slot | None], inputs: list[_Slot]) -> int:
    """Memory of the program's values at its worst step, by storage."""
    last: dict[int | None, int] = {}
    size: dict[int | None, int] = {}
    own = {_storage(slot.tensor) for slot in inputs}
    for i, step in enumerate(steps):
        for slot in [*step.slots(), *(slot for slot in step.outputs if slot is not None)]:
            storage = _storage(slot.tensor)
            if storage is not None and storage not in own:
                last[storage] = i
                size[storage] = slot.tensor.untyped_storage().nbytes()
    for slot in outputs:
        if slot is not None:
            last[_storage(slot.tensor)] = len(steps)
    alive: dict[int | None, int] = {}
    peak = 0
    for i, step in enumerate(steps):
        for slot in step.outputs:
            if slot is not None and (storage := _storage(slot.tensor)) in size:
                alive[storage] = size[storage]
        peak = max(peak, sum(alive.values()))
        alive = {storage: n for storage, n in alive.items() if last[storage] > i}
    return peak


def _compile(
    steps: list[_Step], inputs: list[_Slot], outputs: list[_Slot | None], rounded: torch.dtype | None
) -> tuple[Callable[..., list[Any]], list[Tensor]]:
    """The steps as one Python function: straight-line code, values dropped after their last use."""
    scope: dict[str, Any] = {"rounded": rounded}
    constants: dict[int, Tensor] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for slot in [*step.slots(), *(slot for slot in step.outputs if slot is not None)]:
            last[slot.number] = i
    kept = {slot.number for slot in outputs if slot is not None} | {slot.number for slot in inputs}

    def name(value: Any) -> str:
        if isinstance(value, _Slot):
            return f"v{value.number}"
        if isinstance(value, Tensor):
            if id(value) not in constants:
                lower = rounded is not None and value.is_floating_point()
                constants[id(value)] = value.detach().to(rounded) if lower else value.detach()
            value = constants[id(value)]
        elif value is None or isinstance(value, bool | int):
            return repr(value)
        key = f"c{id(value)}"
        scope[key] = value
        return key

    lines = [f"def run({', '.join(f'v{slot.number}' for slot in inputs)}):"]
    if rounded is not None:
        lines += [f"    v{slot.number} = v{slot.number}.to(rounded)" for slot in inputs]
    for i, step in enumerate(steps):
        args, kwargs = tree_unflatten([_Name(name(value)) for value in step.arguments], step.spec)
        scope[f"f{i}"] = step.function
        call = f"f{i}({', '.join([*(_source(a) for a in args), *(f'{k}={_source(a)}' for k, a in kwargs.items())])})"
        lines.append(f"    {_targets(step)}{call}")
        dead = {slot.number for slot in [*step.slots(), *step.outputs] if slot is not None and last[slot.number] == i}
        if dead - kept:
            lines.append(f"    del {', '.join(f'v{number}' for number in sorted(dead - kept))}")
    lines.append(f"    return [{', '.join('None' if slot is None else f'v{slot.number}' for slot in outputs)}]")
    exec("\n".join(lines), scope)
    # Out of its own globals: a function that holds itself, and so all constants, would wait for the garbage collector.
    return scope.pop("run"), list(constants.values())


class _Name(str):
    """Source text of one argument."""


def _source(value: Any) -> str:
    if isinstance(value, _Name):
        return str(value)
    items = ", ".join(_source(item) for item in value)
    return f"[{items}]" if isinstance(value, list) else f"({items},)"


def _targets(step: _Step) -> str:
    schema = step.function._schema.returns
    names = ["_" if slot is None else f"v{slot.number}" for slot in step.outputs]
    if not schema:
        return ""
    if len(schema) == 1 and schema[0].type.kind() != "ListType":
        return f"{names[0]} = "
    return f"{', '.join(names)}, = "
