# SPDX-License-Identifier: Apache-2.0
r"""Norms of parameters, and how far they moved: one pass over memory for everything.

For a list of tensors x_t with reference r_t (say the initialization), per tensor and for the list as one vector: L1,
L2, L-infinity, number of nonzeros, distance ||x - r||, inner product <x, r>, ||r||; hence relative movement
||x - r|| / ||r|| and cosine <x, r> / (||x|| ||r||).

Nothing here has a derivative: a backward pass through a result raises, it never gives a silent zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvlab.ops import norms as ops

__all__ = ["NormRecorder", "NormTable", "ParameterNorms", "filter_norms", "parameter_norms", "total_norm"]

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""A module (its parameters), a dict or pairs of names and tensors, or plain tensors (named by their index)."""

_L1, _L2, _LINF, _NONZEROS, _DISTANCE, _INNER, _REFERENCE_L2 = range(len(ops.COLUMNS))


@dataclass(frozen=True)
class ParameterNorms:
    r"""Norms per tensor, each float64 ``[T]``; ``total`` holds those of all tensors as one vector, each 0-d.

    Without a reference, ``distance``, ``inner``, ``reference_l2`` and what follows from them are NaN.
    """

    table: Tensor
    """float64 ``[T + 1, 7]``, the last row total (in ``total`` ``[7]``); columns: ``curvlab.ops.norms.COLUMNS``."""
    names: tuple[str, ...]

    @property
    def values(self) -> Tensor:
        """The rows of the tensors, float64 ``[T, 7]``; in ``total`` ``[7]``."""
        return self.table[:-1] if self.table.dim() == 2 else self.table

    @property
    def total(self) -> ParameterNorms:
        """The same quantities of all tensors as one vector."""
        return ParameterNorms(self.table[-1] if self.table.dim() == 2 else self.table, ("total",))

    def detach(self) -> ParameterNorms:
        """The same numbers without their tie to autograd, ready for ``float`` and ``numpy``."""
        return ParameterNorms(self.table.detach(), self.names)

    @property
    def l1(self) -> Tensor:
        """Absolute sum, sum |x_i|."""
        return self.values[..., _L1]

    @property
    def l2(self) -> Tensor:
        """Euclidean norm, sqrt(sum x_i^2)."""
        return self.values[..., _L2]

    @property
    def linf(self) -> Tensor:
        """Largest magnitude, max |x_i|; 0 for an empty tensor."""
        return self.values[..., _LINF]

    @property
    def nonzeros(self) -> Tensor:
        """Number of x_i != 0 (a NaN counts), exact up to 2^53."""
        return self.values[..., _NONZEROS]

    @property
    def distance(self) -> Tensor:
        """Distance from the reference, ||x - r||_2."""
        return self.values[..., _DISTANCE]

    @property
    def inner(self) -> Tensor:
        """Inner product with the reference, <x, r>."""
        return self.values[..., _INNER]

    @property
    def reference_l2(self) -> Tensor:
        """Euclidean norm of the reference, ||r||_2."""
        return self.values[..., _REFERENCE_L2]

    @property
    def relative_movement(self) -> Tensor:
        """||x - r|| / ||r||; 0/0 (a zero or empty reference that did not move) is NaN, movement from zero infinite."""
        return self.distance / self.reference_l2

    @property
    def cosine(self) -> Tensor:
        """<x, r> / (||x|| ||r||); NaN where x or r is zero or empty."""
        return self.inner / (self.l2 * self.reference_l2)

    def __str__(self) -> str:
        """A line a tensor and one for the total; columns that hold no number are left out. Waits for the device."""
        rows = self.table.detach().reshape(-1, self.table.shape[-1]).tolist()
        labels = [*self.names, "total"] if self.table.dim() == 2 else list(self.names)
        columns = range(len(ops.COLUMNS))
        shown = [c for c in columns if not all(math.isnan(row[c]) for row in rows)]
        width = max(map(len, labels))
        lines = [" " * width + "".join(f"{ops.COLUMNS[c]:>14}" for c in shown)]
        for label, row in zip(labels, rows, strict=True):
            lines.append(f"{label:<{width}}" + "".join(f"{row[c]:>14.6g}" for c in shown))
        return "\n".join(lines)


def _named_after(function: str, error: Exception, op: str = "multi_tensor_norms") -> Exception:
    """The error of an op, with the function and the argument that the user wrote."""
    text = str(error).replace(f"{op}: tensors", f"{function}: params").replace(f"{op}:", f"{function}:")
    return type(error)(text.replace("like tensors", "like params"))


_ERRORS = (TypeError, ValueError, NotImplementedError)


@lru_cache(maxsize=64)
def _indices(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _named(function: str, argument: str, params: Parameters) -> tuple[list[Tensor], tuple[str, ...] | None]:
    """Tensors and names; None for plain tensors, whose names are their indices."""
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    if isinstance(params, list | tuple):
        entries: list[Any] = list(params)
    elif isinstance(params, Mapping):
        entries = list(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, Tensor):
        entries = list(params)
    else:
        got = "one tensor: wrap it in a list" if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"{function}: {argument} must be a module or a collection of tensors, got {got}")
    names = None
    if entries and isinstance(entries[0], tuple):
        if not all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries):
            raise TypeError(f"{function}: {argument} must hold tensors, or (name, tensor) pairs throughout")
        names, entries = tuple(str(entry[0]) for entry in entries), [entry[1] for entry in entries]
    if not _PLAIN.issuperset(map(type, entries)):
        _check_tensors(function, argument, entries)
    return entries, names


_PLAIN = {Tensor, nn.Parameter}  # checked by type: 200 isinstance calls cost 10 us


def _check_tensors(function: str, argument: str, entries: list[Any]) -> None:
    for index, entry in enumerate(entries):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{function}: {argument}[{index}] must be a tensor, got {type(entry).__name__}")
        if is_lazy(entry):  # it has no elements yet, and its norms would be those of an empty tensor
            raise ValueError(
                f"{function}: {argument}[{index}] must be initialized, got a lazy parameter: run its module once first"
            )


def _pair(
    function: str, params: Parameters, reference: Parameters | None
) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
    tensors, names = _named(function, "params", params)
    references: list[Tensor] = []
    if reference is not None:
        references, reference_names = _named(function, "reference", reference)
        if len(references) != len(tensors):
            raise ValueError(
                f"{function}: reference must have {len(tensors)} tensors like params, got {len(references)}"
            )
        if names is not None and reference_names is not None and names != reference_names:
            wrong = next(i for i, pair in enumerate(zip(names, reference_names, strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"{function}: reference must have the names of params in their order: expected {names[wrong]!r} at "
                f"{wrong}, got {reference_names[wrong]!r}"
            )
    return tensors, references, names or _indices(len(tensors))


def parameter_norms(params: Parameters, reference: Parameters | None = None) -> ParameterNorms:
    r"""L1, L2, L-infinity, nonzeros, and against a reference distance and inner product, in one pass over memory.

    Sums are accumulated in float64 in a fixed order: the same bits for any number of threads. Relative error: at most
    1e-7 for float32 at 1e8 elements, 1e-14 for float64 (the inner product relative to ||x|| ||r||). NaN and infinities
    propagate. On CUDA: one launch, no synchronization. Results of parameters that require grad require it too, so that
    a backward pass is refused aloud: to read them, use ``torch.no_grad()`` or ``.detach()``.

    Args:
        params: a module, tensors, or named tensors; float32, float64, bfloat16 or float16, any shapes, one device.
        reference: the same number of tensors with the same shapes and dtypes, or None.

    Returns:
        The norms per tensor and in total, on the device of ``params``. An empty collection has totals of 0, on the CPU.

    Raises:
        TypeError: not tensors, an unsupported dtype or layout, a reference of another dtype.
        ValueError: reference of another length, other names or shapes; tensors on several devices; lazy parameters.
        NotImplementedError: called inside a ``torch.func`` transform or forward-mode AD.
    """
    tensors, references, names = _pair("parameter_norms", params, reference)
    try:
        return ParameterNorms(ops.multi_tensor_norms(tensors, references), names)
    except _ERRORS as error:
        raise _named_after("parameter_norms", error) from None


def total_norm(params: Parameters) -> Tensor:
    r"""L2 norm of all tensors as one vector, :math:`\sqrt{\sum_t \sum_i x_{t,i}^2}`: 0-d float64 on their device.

    As ``torch.nn.utils.get_total_norm`` with float64 accumulation. Raises what ``parameter_norms`` raises. The norm of
    parameters that require grad requires it too: to read it, use ``torch.no_grad()`` or ``.detach()``.
    """
    tensors, _ = _named("total_norm", "params", params)
    try:
        return ops.multi_tensor_norms(tensors, l2_only=True)[-1, _L2]
    except _ERRORS as error:
        raise _named_after("total_norm", error) from None


def filter_norms(params: Parameters) -> list[Tensor]:
    r"""L2 norm of each filter (slice along the first dimension): :math:`\sqrt{\sum_i w_{j,i}^2}`.

    For a convolution ``[C_out, C_in, kH, kW]`` or a linear layer ``[out, in]`` these are the norms of "Visualizing the
    Loss Landscape of Neural Nets" (Li et al. 2018). A 1-d tensor (bias, normalization) has slices of one element, so
    its entry holds |w_j|; whether to scale those too is the caller's choice. A 0-d tensor is one slice.
    Results of parameters that require grad require it too: to read them, use ``torch.no_grad()`` or ``.detach()``.

    Args:
        params: as in ``parameter_norms``.

    Returns:
        One float64 tensor ``[C]`` for each parameter (``[1]`` for a 0-d one), views of one buffer.

    Raises:
        TypeError: not tensors, an unsupported dtype or layout.
        ValueError: tensors on several devices; lazy parameters.
        NotImplementedError: called inside a ``torch.func`` transform or forward-mode AD.
    """
    tensors, _ = _named("filter_norms", "params", params)
    try:
        out = ops.filter_norms(tensors)
    except _ERRORS as error:
        raise _named_after("filter_norms", error, "filter_norms") from None
    return list(out.split([t.shape[0] if t.dim() else 1 for t in tensors])) if tensors else []


class NormTable:
    """``parameter_norms`` prepared for repeated calls, for tensors that stay and whose values change.

    It holds the tensors: optimizer steps and ``p.data = ...`` are seen, another tensor put in a parameter's place
    (``module.weight = nn.Parameter(...)``) is not. Raises what ``parameter_norms`` raises, at construction.
    Results of parameters that require grad require it too: to read them, use ``torch.no_grad()`` or ``.detach()``.
    """

    def __init__(self, params: Parameters, reference: Parameters | None = None) -> None:
        tensors, references, self.names = _pair("NormTable", params, reference)
        try:
            self._prepared = ops.PreparedNorms(tensors, references)
        except _ERRORS as error:
            raise _named_after("NormTable", error) from None

    def __call__(self) -> ParameterNorms:
        """The norms of the tensors as they are now."""
        return ParameterNorms(self._prepared(), self.names)

    def total_norm(self) -> Tensor:
        """L2 norm of all tensors as one vector, as they are now: 0-d float64."""
        return self._prepared(l2_only=True)[-1, _L2]


def _kept(params: Any) -> Any:
    """``params`` in a form that can be walked through more than once: a generator becomes a list."""
    once = isinstance(params, Iterable) and not isinstance(params, nn.Module | Mapping | Tensor | str)
    return list(params) if once else params


class _State(Protocol):
    step: int
    params: list[Tensor]


class NormRecorder:
    """Training callback: the total norms along a run, one kernel call a step and no synchronization with the device.

    Args:
        params: what to watch; None: the ``state.params`` of the run.
        reference: None, tensors, or ``"start"``: a copy of the parameters made when training starts.
        every: record steps 0, every, 2 every, ...; the end is always recorded.

    Rows stay on the parameters' device until they are asked for. Raises ValueError for ``every < 1`` or another string.
    """

    def __init__(
        self, params: Parameters | None = None, reference: Parameters | str | None = None, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"NormRecorder: every must be at least 1, got {every}")
        if isinstance(reference, str) and reference != "start":
            raise ValueError(f"NormRecorder: reference must be tensors, 'start' or None, got {reference!r}")
        self._params, self._reference, self._every = _kept(params), _kept(reference), every
        self._prepared: ops.PreparedNorms | None = None
        self._steps: list[int] = []
        self._buffer = torch.empty(0, len(ops.COLUMNS), dtype=torch.float64)

    def on_start(self, state: _State) -> None:
        """Takes hold of the parameters (and copies them, for ``reference="start"``)."""
        params = state.params if self._params is None else self._params
        if self._reference == "start":
            tensors, _ = _named("NormRecorder", "params", params)
            # preserve_format: a reference of the same layout is read in place
            reference: Parameters | None = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
        else:
            reference = None if self._reference is None else self._reference  # type: ignore[assignment]
        tensors, references, _ = _pair("NormRecorder", params, reference)
        try:
            self._prepared = ops.PreparedNorms(tensors, references)
        except _ERRORS as error:
            raise _named_after("NormRecorder", error) from None
        self._steps.clear()
        device = tensors[0].device if tensors else torch.device("cpu")
        self._buffer = torch.empty(256, len(ops.COLUMNS), dtype=torch.float64, device=device)
        if state.step == 0:
            self._record(0)

    def on_step(self, state: _State) -> None:
        """Records the step if it is its turn."""
        if state.step % self._every == 0:
            self._record(state.step)

    def on_end(self, state: _State) -> None:
        """Records the last step if it was not."""
        if not self._steps or self._steps[-1] != state.step:
            self._record(state.step)

    def state_dict(self) -> dict[str, list]:
        """The rows so far, as JSON, for a checkpoint.

        The reference is not in it: on resume the training loop shows the initial network to ``on_start`` again.
        """
        return {"steps": list(self._steps), "rows": self.table().tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Puts back what ``state_dict`` gave; what ``on_start`` recorded is replaced."""
        self._steps = [int(step) for step in state["steps"]]
        rows = torch.tensor(state["rows"], dtype=torch.float64, device=self._buffer.device).reshape(
            -1, len(ops.COLUMNS)
        )
        self._buffer = torch.cat([rows, self._buffer.new_empty(max(256, len(rows)), len(ops.COLUMNS))])

    @torch.no_grad()
    def _record(self, step: int) -> None:
        if self._prepared is None:
            raise RuntimeError("NormRecorder: on_start(state) must come before on_step and on_end")
        if self._steps and self._steps[-1] == step:
            return
        row = len(self._steps)
        if row == len(self._buffer):  # doubled: the copies add up to one row a step
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
        self._buffer[row] = self._prepared()[-1]
        self._steps.append(step)

    def table(self) -> Tensor:
        """float64 ``[recorded steps, 7]`` on the device, columns as in ``curvlab.ops.norms.COLUMNS``."""
        return self._buffer[: len(self._steps)].clone()

    @property
    def steps(self) -> Sequence[int]:
        """The recorded steps."""
        return tuple(self._steps)

    def rows(self) -> list[dict[str, float]]:
        """A dict per recorded step: ``step``, the columns, ``relative_movement``, ``cosine``; waits for the device."""
        values = self.table().cpu()
        moved = (values[:, _DISTANCE] / values[:, _REFERENCE_L2]).tolist()
        cosine = (values[:, _INNER] / (values[:, _L2] * values[:, _REFERENCE_L2])).tolist()
        return [
            {"step": step, **dict(zip(ops.COLUMNS, row, strict=True)), "relative_movement": m, "cosine": c}
            for step, row, m, c in zip(self._steps, values.tolist(), moved, cosine, strict=True)
        ]
