# SPDX-License-Identifier: Apache-2.0
"""The CUDA launchers of ``csrc/sparse_conv`` on numpy arrays: plans, argument structs, the host harness, the reference.

The plan is the product's own (``plan_cuda.h``, plain C++); what it must lead to is computed by torch's dense
convolution and its autograd in float64.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.cuda.harness import build
from tests.cuda.harness.norms_host import ORDERS, Tensor, tensor

TYPES = {"float32": 0, "float64": 1, "bfloat16": 2}
OPS = ("forward", "input", "weight")
LISTS = ("phases", "order", "first", "offsets", "taps", "source")
Array = NDArray[Any]


class PairStruct(ctypes.Structure):
    _fields_ = [("h", c_int32), ("w", c_int32)]


def _pairs(*names: str) -> list[tuple[str, Any]]:
    return [(name, PairStruct) for name in names]


class ConvolutionStruct(ctypes.Structure):
    _fields_ = [
        *[(name, c_int32) for name in ("groups", "out_channels", "in_channels")],
        *_pairs("kernel", "stride", "padding", "dilation", "x", "y"),
    ]


class Gather(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("images", "nonzeros")],
        *[(name, c_int32) for name in ("groups", "in_channels", "out_channels", "type")],
        *_pairs("in", "out", "in_step", "out_step", "tile", "window", "tiles"),
        *[(name, c_int32) for name in ("stage_channels", "stages", "shared_bytes", "windowed")],
        *[(name, c_void_p) for name in (*LISTS[:-1], "in_data", "values", "bias", "out_data")],
    ]


@dataclass(frozen=True)
class Conv:
    """A convolution of ``images`` x [c_in, h, w] with a weight [c_out, c_in / groups, kH, kW]."""

    images: int
    c_in: int
    c_out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the dense weight."""
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    @property
    def result(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return h, w

    def struct(self) -> ConvolutionStruct:
        """As plans take it."""
        pairs = (self.kernel, self.stride, self.padding, self.dilation, self.size, self.result)
        return ConvolutionStruct(
            self.groups, self.c_out // self.groups, self.c_in // self.groups, *[PairStruct(*pair) for pair in pairs]
        )


@dataclass
class Call:
    """An op on concrete data. ``windows``: whether to take the windowed kernels; None: by the number of images."""

    op: str
    conv: Conv
    dtype: str
    indices: NDArray[np.int64]
    x: Tensor
    gradient: Tensor
    values: Tensor
    bias: Tensor | None
    out: Tensor
    windows: bool | None = None
    arguments: Gather = field(default_factory=Gather)


def make_call(
    op: str,
    conv: Conv,
    dtype: str = "float32",
    *,
    density: float = 0.3,
    mask: Array | None = None,
    bias: bool = False,
    seed: int = 0,
    offset: int = 0,
    windows: bool | None = None,
) -> Call:
    """Normal numbers; a uniform mask unless one is given. Outputs hold 7 before the call."""
    rng = np.random.default_rng(seed)
    if mask is None:
        mask = rng.random(conv.weight_shape) < density
    indices = np.flatnonzero(mask).astype(np.int64)
    x = (conv.images, conv.c_in, *conv.size)
    y = (conv.images, conv.c_out, *conv.result)

    def data(*shape: int) -> Tensor:
        return tensor(rng.standard_normal(shape), dtype, offset=offset)

    outputs = {"forward": y, "input": x, "weight": indices.shape}
    return Call(
        op=op,
        conv=conv,
        dtype=dtype,
        indices=indices,
        x=data(*x),
        gradient=data(*y),
        values=data(indices.size),
        bias=data(conv.c_out) if bias and op == "forward" else None,
        out=tensor(np.full(outputs[op], 7.0), dtype, offset=offset),
        windows=windows,
    )


def expected(call: Call) -> NDArray[np.float64]:
    """What ``call.out`` must hold: torch's dense convolution in float64, and its gradients."""
    conv = call.conv
    dense = torch.zeros(int(np.prod(conv.weight_shape)), dtype=torch.float64)
    dense[torch.from_numpy(call.indices)] = torch.from_numpy(call.values.values)
    weight = dense.reshape(conv.weight_shape).requires_grad_()
    x = torch.from_numpy(call.x.values.reshape(conv.images, conv.c_in, *conv.size)).requires_grad_()
    bias = None if call.bias is None else torch.from_numpy(call.bias.values)
    y = torch.nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if call.op == "forward":
        return y.detach().numpy().ravel()
    gradient = torch.from_numpy(call.gradient.values.reshape(y.shape))
    to_x, to_weight = torch.autograd.grad(y, (x, weight), gradient)
    if call.op == "input":
        return to_x.numpy().ravel()
    return to_weight.numpy().ravel()[call.indices]


def assert_right(call: Call, want: NDArray[np.float64]) -> None:
    """Within a few roundings of the accumulation type, and one of the storage type, of the largest number."""
    terms = call.indices.size if call.op != "weight" else call.conv.images * int(np.prod(call.conv.result))
    tolerance = {"float32": 3e-7, "float64": 1e-15, "bfloat16": 3e-7}[call.dtype] * (4 + np.sqrt(terms))
    tolerance += 2.0**-8 if call.dtype == "bfloat16" else 0.0
    found, scale = call.out.values, max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    error = np.nanmax(np.abs(found - want), initial=0.0)
    assert error <= tolerance * scale, f"{call.op} of {call.conv}: off by {error} at scale {scale}"


class Plan:
    """A plan of the product; its lists are views of its memory."""

    def __init__(self, library: ctypes.CDLL, call: Call) -> None:
        self._library = library
        windows = call.windows
        if windows is None:
            windows = bool(library.host_images_fill_lanes(c_int64(call.conv.images)))
        self._handle = c_void_p(
            library.host_make_plan(
                ctypes.byref(call.conv.struct()),
                call.indices.ctypes.data_as(c_void_p),
                c_int64(call.indices.size),
                c_int32(call.op == "input"),
                c_int32(windows),
                c_int32(TYPES[call.dtype]),
            )
        )
        self.arguments = Gather()
        library.host_plan_arguments(self._handle, ctypes.byref(self.arguments))
        self.arguments.images = call.conv.images

    def list(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one of ``LISTS``."""
        data = c_void_p()
        size = self._library.host_plan_list(self._handle, c_int32(LISTS.index(name)), ctypes.byref(data))
        if not size:
            return np.zeros(0, np.uint8)
        return np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_uint8)), (size,))

    def close(self) -> None:
        """Frees it; views of its lists are invalid from then on."""
        self._library.host_free_plan(self._handle)


def fill_arguments(
    call: Call, plan: Plan, place: Callable[[Tensor], int], place_list: Callable[[Array], int]
) -> Gather:
    """The kernels' arguments, with addresses that a level of verification chooses; values are placed by the caller."""
    x = plan.arguments
    for name in LISTS[:-1]:
        setattr(x, name, place_list(plan.list(name)))
    source, target = {"forward": ("x", "out"), "input": ("gradient", "out"), "weight": ("x", "gradient")}[call.op]
    x.in_data, x.out_data = place(getattr(call, source)), place(getattr(call, target))
    x.bias = None if call.bias is None else place(call.bias)
    return x


class HostSparse:
    """The library of plans and launchers; ``run`` fills a call's output and checks that nothing else was written."""

    def __init__(self) -> None:
        sources = (*build.SPARSE_LAUNCHERS, build.HARNESS / "sparse_binding.cpp")
        self.library = ctypes.CDLL(str(build.host_library("sparse_host", sources)))
        for name in ("gather", "permute_values", "weight_gradient", "check_indices"):
            getattr(self.library, f"host_{name}").restype = ctypes.c_char_p
        self.library.host_make_plan.restype = c_void_p
        self.library.host_plan_list.restype = c_int64

    def plan(self, call: Call) -> Plan:
        """To be closed by the caller."""
        return Plan(self.library, call)

    def run(self, call: Call, *, order: str = "forward", splits: int | None = None) -> Call:
        """The call, its output filled and its arguments as they were passed; ``splits`` of a weight gradient."""
        kind, seed = ORDERS[order]
        self.library.host_set_order(ctypes.c_int(kind), ctypes.c_uint64(seed))
        untouched = _untouched(call)
        plan = self.plan(call)
        try:
            x = fill_arguments(call, plan, lambda t: t.address, lambda a: a.ctypes.data)
            x.values = call.values.address
            source = plan.list("source")
            permuted = np.empty(call.values.stored.nbytes, np.uint8)
            if call.op == "input":
                self._check(
                    self.library.host_permute_values(
                        c_void_p(call.values.address),
                        source.ctypes.data_as(c_void_p),
                        c_int64(source.nbytes // 4),
                        c_int32(TYPES[call.dtype]),
                        permuted.ctypes.data_as(c_void_p),
                    )
                )
                x.values = permuted.ctypes.data
            if call.op == "weight":
                rows = c_int32(splits or self.library.host_weight_splits(ctypes.byref(x)))
                error = self.library.host_weight_gradient(ctypes.byref(x), rows, c_void_p(call.out.address))
            else:
                error = self.library.host_gather(ctypes.byref(x))
            self._check(error)
            call.arguments = x
        finally:
            plan.close()
        for name, buffer, before in untouched:
            if (buffer != before).any():
                raise AssertionError(f"the kernel wrote into or beside {name}")
        return call

    def launches(self) -> int:
        """Launches since the last call."""
        six = np.zeros(6, np.uint64)
        self.library.host_take_statistics(six.ctypes.data_as(c_void_p))
        return int(six[0])

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error:
            raise RuntimeError(error.decode())


def _untouched(call: Call) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Memory that an op must leave alone: inputs, and what lies beside the output."""
    parts = [(name, getattr(call, name).buffer) for name in ("x", "gradient", "values")]
    parts += [("bias", call.bias.buffer)] if call.bias else []
    end = call.out.start + call.out.stored.nbytes
    parts += [("out", call.out.buffer[: call.out.start]), ("out", call.out.buffer[end:])]
    return [(name, buffer, buffer.copy()) for name, buffer in parts]


@functools.cache
def host_sparse() -> HostSparse:
    """The library, built and loaded once a process."""
    return HostSparse()
