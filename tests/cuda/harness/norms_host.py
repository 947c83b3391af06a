# SPDX-License-Identifier: Apache-2.0
"""The CUDA launchers of ``csrc/norms`` on numpy arrays, through the host harness, and their reference in numpy."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.harness import build

Array = NDArray[Any]
COLUMNS = ("l1", "l2", "linf", "nonzeros", "distance", "inner", "reference_l2")
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random 1": (2, 1), "random 2": (2, 2)}
MODES = {"norms": 0, "with_reference": 1, "l2_only": 2}
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
_STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
_GUARD = 64


@dataclass(frozen=True)
class Tensor:
    """Elements between guard bytes, at a chosen distance from a 64-byte boundary."""

    dtype: str
    buffer: NDArray[np.uint8]
    start: int
    numel: int

    @property
    def stored(self) -> Array:
        """The elements as stored (bfloat16: bits in uint16)."""
        storage = np.dtype(_STORAGE[self.dtype])
        return self.buffer[self.start : self.start + self.numel * storage.itemsize].view(storage)

    @property
    def values(self) -> NDArray[np.float64]:
        """The elements in float64, exactly."""
        stored = self.stored
        if self.dtype == "bfloat16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64)

    @property
    def address(self) -> int:
        """Where the elements start."""
        return self.buffer.ctypes.data + self.start


def tensor(values: Array, dtype: str = "float32", *, offset: int = 0) -> Tensor:
    """A tensor of ``values`` rounded to ``dtype``, ``offset`` elements past a 64-byte boundary, between 0xFF bytes."""
    storage = np.dtype(_STORAGE[dtype])
    flat = np.asarray(values).ravel()
    buffer = np.full(flat.size * storage.itemsize + 4 * _GUARD, 0xFF, np.uint8)
    start = _GUARD + (-(buffer.ctypes.data + _GUARD)) % _GUARD + offset * storage.itemsize
    result = Tensor(dtype, buffer, start, flat.size)
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            bits = flat.astype(np.float32).view(np.uint32)
            result.stored[:] = np.where(np.isnan(flat), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        else:
            result.stored[:] = flat.astype(storage)
    return result


class HostNorms:
    """The library of both launchers; ``order`` is one of ``ORDERS``."""

    def __init__(self) -> None:
        sources = (*build.NORMS_LAUNCHERS, build.HARNESS / "norms_binding.cpp")
        self._library = ctypes.CDLL(str(build.host_library("norms_host", sources)))
        self._library.host_multi_tensor_norms.restype = ctypes.c_char_p
        self._library.host_filter_norms.restype = ctypes.c_char_p

    def multi_tensor_norms(
        self,
        tensors: Sequence[Tensor],
        reference: Sequence[Tensor] | None = None,
        *,
        mode: str | None = None,
        order: str = "forward",
        multiprocessors: int = 4,
        ticket: NDArray[np.uint32] | None = None,
    ) -> NDArray[np.float64]:
        """``[T + 1, 7]`` of one launch; ``RuntimeError`` with the harness's or CUDA's words."""
        mode = mode or ("with_reference" if reference is not None else "norms")
        ticket = np.zeros(1, np.uint32) if ticket is None else ticket
        out = np.full((len(tensors) + 1, len(COLUMNS)), -7.0)
        guards = [(t, t.buffer.copy()) for t in (*tensors, *(reference or ()))]
        numel = np.array([t.numel for t in tensors], np.int64)
        self._launch(
            order,
            self._library.host_multi_tensor_norms,
            ctypes.c_int64(len(tensors)),
            _addresses(tensors),
            _addresses(reference) if reference is not None else None,
            _pointer(numel),
            _pointer(_types(tensors)),
            ctypes.c_int32(MODES[mode]),
            ctypes.c_int32(multiprocessors),
            _pointer(ticket),
            _pointer(out),
        )
        if any((t.buffer != before).any() for t, before in guards):
            raise AssertionError("the kernel wrote into its input, or beside it")
        return out

    def filter_norms(
        self,
        tensors: Sequence[Tensor],
        rows: Sequence[int],
        *,
        order: str = "forward",
        multiprocessors: int = 4,
    ) -> NDArray[np.float64]:
        """``[sum of rows]`` of one launch."""
        out = np.full(sum(rows) + 2, -7.0)
        row_numel = np.array([t.numel // r if r else 1 for t, r in zip(tensors, rows, strict=True)], np.int64)
        self._launch(
            order,
            self._library.host_filter_norms,
            ctypes.c_int64(len(tensors)),
            _addresses(tensors),
            _pointer(np.array(rows, np.int64)),
            _pointer(row_numel),
            _pointer(_types(tensors)),
            ctypes.c_int32(multiprocessors),
            _pointer(out[1:]),
        )
        if out[0] != -7.0 or out[-1] != -7.0:
            raise AssertionError("the kernel wrote beside its output")
        return out[1:-1]

    def statistics(self) -> dict[str, int]:
        """Launches, blocks, threads and so on since the last call."""
        six = np.zeros(6, np.uint64)
        self._library.host_take_statistics(_pointer(six))
        names = ("launches", "blocks", "threads", "switches", "barriers", "warp_operations")
        return dict(zip(names, map(int, six), strict=True))

    def _launch(self, order: str, function: Any, *arguments: Any) -> None:
        kind, seed = ORDERS[order]
        self._library.host_set_order(ctypes.c_int(kind), ctypes.c_uint64(seed))
        if error := function(*arguments):
            raise RuntimeError(error.decode())


@functools.cache
def host_norms() -> HostNorms:
    """The library, built and loaded once a process."""
    return HostNorms()


def reference_norms(
    tensors: Sequence[Tensor], reference: Sequence[Tensor] | None = None, *, mode: str | None = None
) -> NDArray[np.float64]:
    """The table that ``multi_tensor_norms`` promises, by numpy in extended precision where the machine has it."""
    mode = mode or ("with_reference" if reference is not None else "norms")
    x = [t.values.astype(np.longdouble) for t in tensors]
    r = [t.values.astype(np.longdouble) for t in reference] if mode == "with_reference" and reference else None
    rows = [_row(v, r[i] if r is not None else None) for i, v in enumerate(x)]
    empty = np.zeros(0, np.longdouble)
    rows.append(_row(np.concatenate([empty, *x]), np.concatenate([empty, *r]) if r is not None else None))
    table = np.array(rows, np.float64)
    if mode == "l2_only":
        table[:, [i for i, name in enumerate(COLUMNS) if name != "l2"]] = np.nan
    return table


def _row(x: Array, r: Array | None) -> list[float]:
    with np.errstate(invalid="ignore", over="ignore"):
        plain = [np.abs(x).sum(), np.sqrt((x * x).sum()), np.abs(x).max(initial=0.0), np.count_nonzero(x)]
        if r is None:
            return [float(v) for v in plain] + [np.nan] * 3
        return [float(v) for v in (*plain, np.sqrt(((x - r) ** 2).sum()), (x * r).sum(), np.sqrt((r * r).sum()))]


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[t.address for t in tensors])


def _types(tensors: Sequence[Tensor]) -> NDArray[np.int32]:
    return np.array([DTYPES[t.dtype] for t in tensors], np.int32)


def _pointer(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)  # keeps the array alive, unlike a bare address
