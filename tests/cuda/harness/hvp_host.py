# SPDX-License-Identifier: Apache-2.0
"""The CUDA launchers of ``csrc/hvp`` on numpy arrays: their argument structs, the host harness, and the reference.

A call is a dict of named tensors and numbers; ``structs`` lays it out for the kernels, with addresses that a level of
verification chooses (host memory here, the simulator's in ``hvp_ptx.py``).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_bool, c_double, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curvlab.ops import reference
from tests.cuda.harness import build
from tests.cuda.harness.norms_host import ORDERS, Tensor, tensor

TYPES = {"float32": 0, "float64": 1, "bfloat16": 2}
TOLERANCE = {"float32": 2e-6, "float64": 1e-13, "bfloat16": 2e-2}
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "softplus", "gelu", "gelu_tanh", "silu")
OUTPUTS = ("out", "pre", "dot", "gy", "gt", "bias_sum", "gain_sum", "first_out", "second_out")
Call = dict[str, Any]
Place = Callable[[Tensor], int]


class ChannelRows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Rows(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("directions", "rows", "channels")],
        *[(name, c_int32) for name in ("type", "first_is_mask")],
    ]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Rows),
        *_pointers("a", "b", "residual", "centered", "first", "delta", "scale"),
        *[("bias", ChannelRows), ("gain", ChannelRows)],
        *_pointers("out", "pre"),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Rows),
        *_pointers("g", "g2", "pre", "t", "first", "second", "centered", "delta", "scale", "inv_std"),
        ("gain", ChannelRows),
        *_pointers("gy", "gt"),
    ]


class Pool(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("directions", "samples", "size", "windows", "channels")],
        ("type", c_int32),
        ("unique", c_bool),
        *_pointers("index", "in", "out"),
    ]


class Softmax(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("directions", "samples", "classes")],
        ("type", c_int32),
        *_pointers("p", "label", "weight", "u", "out"),
    ]


class Activation(ctypes.Structure):
    _fields_ = [
        ("elements", c_int64),
        *[(name, c_int32) for name in ("type", "kind")],
        *[(name, c_double) for name in ("slope", "beta", "threshold")],
        *_pointers("z", "delta", "first", "second"),
    ]


def accumulation(dtype: str) -> str:
    """The dtype of arguments per channel and of sums."""
    return "float64" if dtype == "float64" else "float32"


def rows_struct(kind: type[Forward] | type[Backward], call: Call, place: Place) -> Any:
    """``Forward`` or ``Backward`` of a call; ``call["shape"]`` is (K, R, C), rows of [K, C] are ``stride`` apart."""
    x = kind()
    k, r, c = call["shape"]
    first = call.get("first")
    x.shape = Rows(k, r, c, TYPES[call["dtype"]], first is not None and first.dtype == "uint8")
    fields: list[tuple[str, Any]] = list(kind._fields_[1:])  # pyright: ignore[reportAssignmentType]
    for name, field in fields:
        given = call.get(name)
        if given is None:
            continue
        setattr(x, name, place(given) if field is c_void_p else ChannelRows(place(given), call["stride"]))
    return x


def sums_struct(call: Call, name: str, place: Place) -> ChannelRows:
    given = call.get(name)
    return ChannelRows(None if given is None else place(given), call["stride"])


def pool_struct(call: Call, place: Place) -> Pool:
    pointers = [place(call[name]) for name in ("index", "in", "out")]
    return Pool(*call["shape"], TYPES[call["dtype"]], call.get("unique", False), *pointers)


def softmax_struct(call: Call, place: Place) -> Softmax:
    pointers = [place(call[name]) for name in ("p", "label", "weight", "u", "out")]
    return Softmax(*call["shape"], TYPES[call["dtype"]], *pointers)


def activation_struct(call: Call, place: Place) -> Activation:
    optional = [None if call.get(n) is None else place(call[n]) for n in ("delta", "first_out", "second_out")]
    kind = ACTIVATIONS.index(call["kind"])
    numbers = (call["slope"], call["beta"], call["threshold"])
    return Activation(call["z"].numel, TYPES[call["dtype"]], kind, *numbers, place(call["z"]), *optional)


class HostHvp:
    """The library of all launchers; each function runs a call in place and checks that nothing else was written."""

    def __init__(self) -> None:
        sources = (*build.HVP_LAUNCHERS, build.HARNESS / "hvp_binding.cpp")
        self._library = ctypes.CDLL(str(build.host_library("hvp_host", sources)))
        for name in ("tangent_forward", "tangent_backward", "pool_gather", "pool_scatter", "softmax_hessian"):
            getattr(self._library, f"host_{name}").restype = ctypes.c_char_p
        self._library.host_activation_factors.restype = ctypes.c_char_p

    def run(self, op: str, call: Call, *, order: str = "forward", multiprocessors: int = 2) -> Call:
        """The call, its outputs filled."""
        place: Place = lambda t: t.address  # noqa: E731
        if op == "tangent_forward":
            arguments = (rows_struct(Forward, call, place), sums_struct(call, "dot", place))
        elif op == "tangent_backward":
            sums = [sums_struct(call, name, place) for name in ("bias_sum", "gain_sum", "dot")]
            arguments = (rows_struct(Backward, call, place), *sums, int(call.get("accumulate", False)))
        elif op in ("pool_gather", "pool_scatter"):
            arguments = (pool_struct(call, place),)
        else:
            make = softmax_struct if op == "softmax_hessian" else activation_struct
            arguments = (make(call, place),)
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else c_int32(a) for a in arguments]
        if op in ("pool_scatter", "softmax_hessian", "activation_factors"):
            passed.append(c_int32(multiprocessors))
        untouched = _untouched(op, call)
        kind, seed = ORDERS[order]
        self._library.host_set_order(ctypes.c_int(kind), ctypes.c_uint64(seed))
        if error := getattr(self._library, f"host_{op}")(*passed):
            raise RuntimeError(error.decode())
        for name, buffer, before in untouched:
            if (buffer != before).any():
                raise AssertionError(f"the kernel wrote into or beside {name}")
        return call

    def launches(self) -> int:
        """Launches since the last call."""
        six = np.zeros(6, np.uint64)
        self._library.host_take_statistics(six.ctypes.data_as(c_void_p))
        return int(six[0])


def _untouched(op: str, call: Call) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Memory that the op must leave alone: inputs, and what lies beside an output."""
    outputs = set(OUTPUTS) - ({"dot", "pre"} if op == "tangent_backward" else set())
    written = {id(call[name]) for name in outputs if isinstance(call.get(name), Tensor)}
    parts = []
    for name, t in call.items():
        if not isinstance(t, Tensor):
            continue
        if id(t) not in written:
            parts.append((name, t.buffer))
        elif name in outputs:
            end = t.start + t.stored.nbytes
            parts += [(name, t.buffer[: t.start]), (name, t.buffer[end:])]
    return [(name, buffer, buffer.copy()) for name, buffer in parts]


@functools.cache
def host_hvp() -> HostHvp:
    """The library, built and loaded once a process."""
    return HostHvp()


# ---- calls and what they must give -----------------------------------------------------------------------------------
class Draw:
    """Makes the tensors of calls from one seed."""

    def __init__(self, seed: int, dtype: str, *, offset: int = 0) -> None:
        self.rng, self.dtype, self.offset = np.random.default_rng(seed), dtype, offset

    def data(self, *shape: int) -> Tensor:
        """Normal numbers of the call's dtype."""
        return tensor(self.rng.standard_normal(shape), self.dtype, offset=self.offset)

    def channels(self, *shape: int) -> Tensor:
        """Normal numbers of the accumulation dtype."""
        return tensor(self.rng.standard_normal(shape), accumulation(self.dtype), offset=self.offset)

    def mask(self, *shape: int) -> Tensor:
        """Zeros and ones."""
        return tensor(self.rng.integers(0, 2, shape), "uint8", offset=self.offset * 4)

    def empty(self, *shape: int, dtype: str | None = None) -> Tensor:
        """An output: 7 where nothing was written."""
        return tensor(np.full(shape, 7.0), dtype or self.dtype, offset=self.offset)


def forward_call(draw: Draw, shape: tuple[int, int, int], terms: set[str]) -> Call:
    """A call of tangent_forward with these of b, residual, scale, bias, gain, mask, factor, pre, dot, in_place."""
    k, r, c = shape
    call: Call = {"shape": shape, "dtype": draw.dtype, "stride": c + 3, "a": draw.data(k, r, c)}
    call |= {name: draw.data(k, r, c) for name in ("b", "residual") if name in terms}
    call |= {name: draw.channels(k, c + 3) for name in ("bias", "gain") if name in terms}
    call |= {"scale": draw.channels(c)} if "scale" in terms else {}
    call |= {"centered": draw.data(r, c)} if "gain" in terms else {}
    call |= {"first": draw.mask(r, c)} if "mask" in terms else {}
    call |= {"first": draw.data(r, c)} if "factor" in terms else {}
    call |= {"pre": draw.empty(k, r, c)} if "pre" in terms else {}
    if "dot" in terms:
        call |= {"delta": draw.data(r, c), "dot": draw.empty(k, c + 3, dtype=accumulation(draw.dtype))}
    return call | {"out": call["a"] if "in_place" in terms else draw.empty(k, r, c)}


def backward_call(draw: Draw, shape: tuple[int, int, int], terms: set[str]) -> Call:
    """A call of tangent_backward with these of g2, mask, factor, second, scale, gain, gy, gt, bias_sum, gain_sum, t,
    dot, accumulate."""
    k, r, c = shape
    call: Call = {"shape": shape, "dtype": draw.dtype, "stride": c + 3, "g": draw.data(k, r, c)}
    call |= {"accumulate": "accumulate" in terms, "delta": draw.data(r, c), "inv_std": draw.channels(c)}
    call |= {"g2": draw.data(k, r, c)} if "g2" in terms else {}
    call |= {"first": draw.mask(r, c)} if "mask" in terms else {}
    call |= {"first": draw.data(r, c)} if "factor" in terms else {}
    call |= {"second": draw.data(r, c), "pre": draw.data(k, r, c)} if "second" in terms else {}
    call |= {"scale": draw.channels(c)} if "scale" in terms else {}
    call |= {name: draw.channels(k, c + 3) for name in ("gain", "dot") if name in terms}
    call |= {"centered": draw.data(r, c)} if "gain_sum" in terms else {}
    call |= {"t": draw.data(k, r, c)} if "t" in terms else {}
    call |= {name: draw.channels(k, c + 3) for name in ("bias_sum", "gain_sum") if name in terms}
    return call | {name: draw.empty(k, r, c) for name in ("gy", "gt") if name in terms}


def pool_call(draw: Draw, shape: tuple[int, int, int, int, int], *, scatter: bool, unique: bool = False) -> Call:
    """A call of pool_gather or pool_scatter; shape is (K, N, HW, R, C)."""
    k, n, size, windows, c = shape
    if unique:
        order = np.argsort(draw.rng.random((n, size, c)), 1)[:, :windows]
        index = np.where(draw.rng.random((n, windows, c)) < 0.2, -1, order)
    else:
        index = draw.rng.integers(-1, size, (n, windows, c))
    wide, pooled = (k, n, size, c), (k, n, windows, c)
    source, target = (pooled, wide) if scatter else (wide, pooled)
    numbers = {"shape": (k, n, size, windows, c), "dtype": draw.dtype, "unique": unique}
    return numbers | {"index": tensor(index, "int32"), "in": draw.data(*source), "out": draw.empty(*target)}


def softmax_call(draw: Draw, shape: tuple[int, int, int]) -> Call:
    """A call of softmax_hessian; labels lie outside of the classes and weights are 0 now and then."""
    k, n, c = shape
    logits = 3 * draw.rng.standard_normal((n, c))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weight = draw.rng.random(n) * (draw.rng.random(n) < 0.8)
    acc = accumulation(draw.dtype)
    call: Call = {"shape": shape, "dtype": draw.dtype, "p": tensor(p, acc), "weight": tensor(weight, acc)}
    call |= {"label": tensor(draw.rng.integers(-1, c, n), "int64"), "u": draw.data(k, n, c)}
    return call | {"out": draw.empty(k, n, c)}


def activation_call(draw: Draw, kind: str, elements: int, *, second: bool = True) -> Call:
    """A call of activation_factors with numbers in and out of saturation."""
    z = draw.rng.standard_normal(elements) * draw.rng.choice([0.01, 1.0, 5.0, 30.0], elements)
    z[:1] = 0.0
    call: Call = {"dtype": draw.dtype, "kind": kind, "slope": 0.1, "beta": 1.5, "threshold": 4.0}
    call |= {"z": tensor(z, draw.dtype, offset=draw.offset)}
    call |= {"first_out": draw.empty(elements, dtype="uint8" if kind == "relu" else None)}
    if second and kind != "relu":
        call |= {"delta": draw.data(elements), "second_out": draw.empty(elements)}
    return call


def expected(op: str, call: Call) -> dict[str, NDArray[np.float64]]:
    """What the outputs must hold, by ``curvlab.ops.reference`` in float64. To be asked before the call runs."""
    shapes = _shapes(op, call)
    x = {
        n: torch.from_numpy(t.values.reshape(shapes[n]))
        for n, t in call.items()
        if isinstance(t, Tensor) and n in shapes
    }
    if op in ("tangent_forward", "tangent_backward"):
        return _expected_rows(op, call, x)
    if op == "pool_gather":
        return {"out": reference.pool_gather(x["in"], x["index"].int()).numpy().ravel()}
    if op == "pool_scatter":
        return {"out": reference.pool_scatter(x["in"], x["index"].int(), call["shape"][2]).numpy().ravel()}
    if op == "softmax_hessian":
        out = reference.softmax_hessian_product(x["p"], x["label"].long(), x["weight"], x["u"])
        return {"out": out.numpy().ravel()}
    numbers = {name: call[name] for name in ("slope", "beta", "threshold")}
    first, second = reference.activation_factors(x["z"], x.get("delta"), call["kind"], **numbers)
    result = {"first_out": first.double().numpy()}
    if "second_out" in call:
        result["second_out"] = np.zeros(first.numel()) if second is None else second.numpy()
    return result


def _expected_rows(op: str, call: Call, x: dict[str, torch.Tensor]) -> dict[str, NDArray[np.float64]]:
    c = call["shape"][2]
    x = {n: t[:, :c] if n in ("bias", "gain", "dot", "bias_sum", "gain_sum") else t for n, t in x.items()}
    if "first" in x and call["first"].dtype == "uint8":
        x["first"] = x["first"].to(torch.uint8)
    if op == "tangent_forward":
        names = ("b", "bias", "scale", "gain", "centered", "residual", "first", "delta")
        dot = torch.zeros(call["shape"][0], c, dtype=torch.float64)
        out, pre = reference.tangent_forward(
            x["a"], **{n: x[n] for n in names if n in x}, keep_pre=True, dot=dot if "dot" in call else None
        )
        found = {"out": out, "pre": pre, "dot": dot}
    else:
        names = ("g2", "first", "second", "pre", "scale", "gain", "delta", "centered", "t", "dot", "inv_std")
        arguments: dict[str, Any] = {n: x[n] for n in names if n in x}
        arguments |= {f"out_{n}": x[f"{n}_sum"].clone() for n in ("bias", "gain") if f"{n}_sum" in x}
        gy, gt, bias, gain = reference.tangent_backward(x["g"], **arguments, accumulate=call["accumulate"])
        found = {"gy": gy, "gt": gt, "bias_sum": bias, "gain_sum": gain}
    return {n: t.numpy().ravel() for n, t in found.items() if t is not None and n in call}


def _shapes(op: str, call: Call) -> dict[str, tuple[int, ...]]:
    if op in ("tangent_forward", "tangent_backward"):
        k, r, c = call["shape"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("a", "b", "residual", "g", "g2", "pre", "t"), (k, r, c))
        shapes |= dict.fromkeys(("centered", "first", "second", "delta"), (r, c))
        shapes |= dict.fromkeys(("bias", "gain", "dot", "bias_sum", "gain_sum"), (k, call["stride"]))
        return shapes | dict.fromkeys(("scale", "inv_std"), (c,))
    if op in ("pool_gather", "pool_scatter"):
        k, n, size, windows, c = call["shape"]
        source = (k, n, size, c) if op == "pool_gather" else (k, n, windows, c)
        return {"in": source, "index": (n, windows, c)}
    if op == "softmax_hessian":
        k, n, c = call["shape"]
        return {"p": (n, c), "label": (n,), "weight": (n,), "u": (k, n, c)}
    return dict.fromkeys(("z", "delta"), (call["z"].numel,))


def got(call: Call, name: str) -> NDArray[np.float64]:
    """An output's numbers; of sums the channels without what lies between the rows."""
    values = call[name].values
    if name in ("dot", "bias_sum", "gain_sum"):
        return values.reshape(-1, call["stride"])[:, : call["shape"][2]].ravel()
    return values


def assert_right(op: str, call: Call, want: dict[str, NDArray[np.float64]]) -> None:
    """Every output within the dtype's tolerance, relative to its largest number (sums: to what is summed)."""
    tolerance = TOLERANCE[call["dtype"]]
    assert want
    for name, values in want.items():
        found = got(call, name)
        scale = max(1.0, float(np.abs(values).max(initial=0.0)))
        if name in ("dot", "bias_sum", "gain_sum"):
            scale += 10 * np.sqrt(call["shape"][1])
            if call["dtype"] == "bfloat16":
                tolerance = 1e-5  # sums are made of the float32 numbers, before they are rounded
        np.testing.assert_array_equal(np.isnan(found), np.isnan(values), err_msg=f"{op}: {name}")
        error = np.abs(found - values).max(initial=0.0)
        assert error <= tolerance * scale, f"{op}: {name} is off by {error} at scale {scale}"
