# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``csrc/hvp`` as nvcc compiles them, in the PTX simulator (see ``ptx_level.py``).

Calls are those of ``hvp_host.py``; tiles and grids are laid out here a second time, independently of the launchers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.cuda.harness import build, hvp_host, ptx_level
from tests.cuda.harness.hvp_host import Call
from tests.cuda.harness.norms_host import Tensor

BLOCK = 256
ROWS_PER_THREAD, LEAST_CHUNKS = 16, 64
STORAGE = {"float32": "f", "float64": "d", "bfloat16": "NS_12BFloat16BitsE"}  # as names are mangled; NS_: curvlab::
PER_LOAD = {"float32": 4, "float64": 2, "bfloat16": 8}


class Tile(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("rows", "channels", "plane", "chunk_rows", "chunks")],
        *[(name, ctypes.c_int32) for name in ("columns", "column_tiles", "width")],
    ]


class Finish(ctypes.Structure):
    _fields_ = [
        ("partial", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("chunks", "directions", "channels")],
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("inv_std", ctypes.c_void_p),
        ("dot", hvp_host.ChannelRows),
        ("accumulate", ctypes.c_bool),
    ]


def tile(rows: int, channels: int, width: int, plane: int | None = None) -> Tile:
    """The tile of tile.h."""
    groups = -(-channels // width)
    columns = min(BLOCK, 1 << (groups - 1).bit_length())
    lanes = BLOCK // columns
    chunk = lanes * max(1, min(ROWS_PER_THREAD, rows // (lanes * LEAST_CHUNKS)))
    whole = rows * channels if plane is None else plane
    return Tile(rows, channels, whole, chunk, -(-rows // chunk), columns, -(-groups // columns), width)


class Simulated:
    """One call in the simulator's memory; ``profiles`` keeps what each launch did."""

    def __init__(self, source: str, call: Call, *, arch: str, fuse: bool, check: bool = True, seed: int = 0) -> None:
        module = ptx_level.require_simulator()
        self.call, self.check, self.seed = call, check, seed
        self.program = ptx_level.program(build.HVP / f"{source}_cuda.cu", arch, fuse)
        tensors = [t for t in call.values() if isinstance(t, Tensor)]
        need = sum(t.buffer.nbytes + 1024 for t in tensors) + (1 << 21)
        self.memory = module.Memory(-(-need // 4096) * 4096)
        self.places: dict[int, tuple[Tensor, int]] = {}
        self.profiles: list[Any] = []

    def place(self, t: Tensor) -> int:
        """Where the tensor lies: as far from a 64-byte boundary as on the host; nothing behind its end is valid."""
        if id(t) not in self.places:
            shift = t.address % 64
            start = self.memory.put(t.buffer[t.start - shift : t.start + t.stored.nbytes]) + shift
            self.places[id(t)] = (t, start)
        return self.places[id(t)][1]

    def launch(self, name: tuple[str, ...], grid: tuple[int, int, int], arguments: list[Any]) -> None:
        kernel = ptx_level._kernel(self.program, *name)
        passed = [bytes(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        profile = self.program.run(
            kernel, grid, BLOCK, passed, self.memory, seed=self.seed, profile=self.check, races=self.check
        )
        self.profiles.append(profile)

    def take_back(self) -> Call:
        """Copies every tensor from the simulator's memory."""
        for t, start in self.places.values():
            shift = t.address % 64
            whole = self.memory.get(start - shift, np.uint8)
            t.stored[:] = whole[shift : shift + t.stored.nbytes].view(t.stored.dtype)
        return self.call


def _flat_or_tiled(call: Call, per_channel: bool) -> Tile:
    _, r, c = call["shape"]
    per_load = PER_LOAD[call["dtype"]]
    aligned = all(
        t.address % (8 if t.dtype == "uint8" else 16) == 0
        for name, t in call.items()
        if isinstance(t, Tensor) and name not in ("scale", "bias", "gain", "dot", "inv_std", "bias_sum", "gain_sum")
    )
    length = c if per_channel else r * c
    width = per_load if aligned and length % per_load == 0 else 1
    if per_channel:
        return tile(r, c, width)
    return tile(-(-r * c // (BLOCK * width)), BLOCK * width, width, plane=r * c)


def _finish(run: Simulated, name: str, partial: int, chunks: int, *, gain: bool) -> None:
    call = run.call
    k, _, c = call["shape"]
    place = run.place
    moved = gain and call.get("dot") is not None
    dot = hvp_host.ChannelRows(place(call["dot"]) if moved else None, call["stride"])
    inv_std = place(call["inv_std"]) if "inv_std" in call else None
    arguments = Finish(
        partial, chunks, k, c, place(call[name]), call["stride"], inv_std, dot, call.get("accumulate", False)
    )
    acc = "d" if call["dtype"] == "float64" else "f"
    run.launch(("finish_sums_kernel", f"I{acc}E"), (-(-k * c // 32), 1, 1), [arguments])


def tangent(
    op: str, call: Call, *, arch: str = "compute_80", fuse: bool = True, check: bool = True, seed: int = 0
) -> Simulated:
    """One call of tangent_forward or tangent_backward."""
    run = Simulated("tangent", call, arch=arch, fuse=fuse, check=check, seed=seed)
    forward = op == "tangent_forward"
    struct = hvp_host.rows_struct(hvp_host.Forward if forward else hvp_host.Backward, call, run.place)
    wanted = [name for name in (("dot",) if forward else ("bias_sum", "gain_sum")) if name in call]
    channel_names = ("scale", "bias", "gain") if forward else ("scale", "gain")
    shape = _flat_or_tiled(call, bool(wanted) or any(name in call for name in channel_names))
    k, _, c = call["shape"]
    partials = {name: run.memory.alloc(8 * shape.chunks * k * c) for name in wanted}
    every = ("dot",) if forward else ("bias_sum", "gain_sum")
    addresses = [np.uint64(partials.get(name, 0)) for name in every]
    storage = STORAGE[call["dtype"]]
    grid = (shape.chunks, shape.column_tiles, k)
    run.launch((f"{op}_kernel", f"I{storage}Li{shape.width}E"), grid, [struct, shape, *addresses])
    for name in wanted:
        _finish(run, name, partials[name], shape.chunks, gain=name == "gain_sum")
    return run


def pool(op: str, call: Call, *, arch: str = "compute_80") -> Simulated:
    """One call of pool_gather or pool_scatter."""
    run = Simulated("pool", call, arch=arch, fuse=True)
    k, n, size, windows, c = call["shape"]
    struct, storage = hvp_host.pool_struct(call, run.place), STORAGE[call["dtype"]]
    shape = tile(windows, c, 1)
    grid = (shape.chunks, shape.column_tiles, k * n)
    if op == "pool_gather":
        run.launch(("pool_gather_kernel", f"I{storage}E"), grid, [struct, shape])
        return run
    rounded = call["dtype"] == "bfloat16" and not call["unique"]
    elements = k * n * size * c
    sums = run.memory.alloc(4 * elements) if rounded else struct.out
    width = 4 if rounded else call["out"].stored.itemsize
    run.launch(("pool_zero_kernel",), (2, 1, 1), [np.uint64(sums), np.int64(width * elements)])
    if call["unique"]:
        run.launch(("pool_scatter_unique_kernel", f"I{storage}E"), grid, [struct, shape])
        return run
    sum_type = "d" if call["dtype"] == "float64" else "f"
    run.launch(("pool_scatter_kernel", f"I{storage}{sum_type}E"), (2, 1, 1), [struct, np.uint64(sums)])
    if rounded:
        run.launch(("pool_round_kernel",), (2, 1, 1), [np.uint64(sums), np.int64(elements), np.uint64(struct.out)])
    return run


def softmax(call: Call, *, arch: str = "compute_80") -> Simulated:
    """One call of softmax_hessian_product."""
    run = Simulated("softmax_hessian", call, arch=arch, fuse=True)
    struct = hvp_host.softmax_struct(call, run.place)
    run.launch(("softmax_hessian_kernel", f"I{STORAGE[call['dtype']]}E"), (2, 1, 1), [struct])
    return run


def activation(call: Call, *, arch: str = "compute_80") -> Simulated:
    """One call of activation_factors."""
    run = Simulated("activation_factors", call, arch=arch, fuse=True)
    struct = hvp_host.activation_struct(call, run.place)
    kind = hvp_host.ACTIVATIONS.index(call["kind"])
    name = ("activation_factors_kernel", f"I{STORAGE[call['dtype']]}L", f"ActivationE{kind}E")
    run.launch(name, (2, 1, 1), [struct])
    return run
