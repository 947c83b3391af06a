# SPDX-License-Identifier: Apache-2.0
"""The norm kernels as nvcc compiles them, in a PTX simulator.

The simulator is not part of this project: ``CURVLAB_PTX_TOOLS`` names the folder that holds ``ptxsim.py``. It runs all
threads of some blocks as vectors, stops on accesses out of bounds, misaligned or of memory that nobody wrote, on races
and on divergent barriers, with the source line, and counts what a GPU would do: instructions, 32-byte sectors, bank
conflicts. The kernels' parameters are laid out here a second time, independently of the launchers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.cuda.harness import build
from tests.cuda.harness.norms_host import COLUMNS, DTYPES, MODES, Tensor

CHUNK_BYTES = 65536
CHUNKS_PER_WARP = 256
BLOCK = 256
NORM_ENTRY = np.dtype([("x", "u8"), ("reference", "u8"), ("numel", "i8"), ("first_chunk", "u4"), ("type", "i4")])
FILTER_ENTRY = np.dtype(
    [("x", "u8"), ("rows", "i8"), ("row_numel", "i8"), ("first_row", "i8"), ("first_item", "i8"), ("type", "i8")]
)
ROWS_PER_ITEM, LONG_ROW = 8, 8192


def require_simulator() -> ModuleType:
    """The simulator's module; skips the test, with the reason, where it or nvcc is missing."""
    folder = os.environ.get("CURVLAB_PTX_TOOLS")
    if not folder:
        pytest.skip("CURVLAB_PTX_TOOLS is not set: no PTX simulator")
    path = Path(folder) / "ptxsim.py"
    if not path.is_file():
        pytest.skip(f"CURVLAB_PTX_TOOLS={folder} holds no ptxsim.py")
    if build.nvcc() is None:
        pytest.skip("nvcc was not found: nothing compiles the kernels to PTX")
    return _load(str(path))


@functools.cache
def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxsim", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxsim"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def program(source: Path, arch: str, fuse: bool = True) -> Any:
    """The parsed PTX of one .cu file."""
    module = require_simulator()
    parsed = module.Ptx(build.ptx(source, arch, fuse=fuse).read_text())
    plain_kernel = parsed.kernel

    @functools.cache
    def kernel(part: str) -> Any:
        result = plain_kernel(part)
        for instruction in result.ins:
            if instruction.op == "ld" and "param" in instruction.mods and "[%" in instruction.text:
                instruction.run = _indexed_parameter_load(module, result, instruction)
        return result

    parsed.kernel = kernel
    return parsed


def _indexed_parameter_load(module: ModuleType, kernel: Any, instruction: Any) -> Any:
    """A load from the kernel's parameters at an address that each thread computed (a table passed by value).

    The simulator as given reads it at the first thread's address for all; this also checks the bounds.
    """
    target, source = instruction.args
    kind = next(m for m in reversed(instruction.mods) if m in module.WIDTH)
    width = module.WIDTH[kind]
    registers = module.split_vec(target) if target.startswith("{") else [target]
    writers = [module.writer(kernel, register, kind) for register in registers]
    address = module.address(kernel, source)

    def run(state: Any, lanes: Any, ins: Any) -> None:
        count = state.T if lanes is None else len(lanes)
        start = np.broadcast_to(np.asarray(address(state, lanes)), count).astype(np.int64)
        outside = (start < 0) | (start + width * len(writers) > kernel.psize)
        if outside.any():
            state.fault(ins, lanes, int(np.argmax(outside)), "read outside of the kernel's parameters")
        for n, write in enumerate(writers):
            values = state.pb[(start + n * width)[:, None] + np.arange(width)]
            write(state, lanes, np.ascontiguousarray(values).view(module.DT[kind])[:, 0])

    return run


@dataclass(frozen=True)
class Launch:
    """What one launch left behind, and what it did."""

    out: NDArray[np.float64]
    ticket: int
    profile: Any

    @property
    def thread_instructions(self) -> int:
        """Instructions, summed over threads."""
        return sum(self.profile.thread.values())

    def efficiency(self, kind: str) -> float:
        """Least possible 32-byte sectors over those moved; ``kind`` is "global load", "global store"."""
        return self.profile.ideal[kind] / max(1, self.profile.sectors[kind])

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond one a request."""
        return self.profile.sh_wave - self.profile.sh_min


def multi_tensor_norms(
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor] | None = None,
    *,
    arch: str = "compute_80",
    mode: str | None = None,
    table: str = "small",
    blocks: int = 4,
    seed: int = 0,
    fuse: bool = True,
    check: bool = True,
) -> Launch:
    """One launch of the kernel; ``table`` is "small" or "large" (in the parameters) or "stored" (in memory)."""
    mode = mode or ("with_reference" if reference is not None else "norms")
    sim = program(build.NORMS / "multi_tensor_norms_cuda.cu", arch, fuse)
    memory = _memory([*tensors, *(reference or ())])
    entries = np.zeros(len(tensors), NORM_ENTRY)
    chunks, large = 0, False
    for i, t in enumerate(tensors):
        r = _put(memory, reference[i]) if reference is not None else 0
        entries[i] = (_put(memory, t), r, t.numel, chunks, DTYPES[t.dtype])
        count = -(-t.numel // (CHUNK_BYTES // t.stored.itemsize))
        chunks, large = chunks + count, large or count > CHUNKS_PER_WARP
    workspace = memory.alloc(8 * len(COLUMNS) * (len(tensors) + chunks))
    out, ticket = memory.alloc(8 * len(COLUMNS) * (len(tensors) + 1)), memory.put(np.zeros(1, np.uint32))
    rows = np.array([workspace + 8 * len(COLUMNS) * chunks, out, len(tensors)], np.int64).tobytes()
    arguments = [_table(memory, entries, table, (96, 1000)), np.int64(chunks), workspace, rows, np.bool_(large), ticket]
    name = _kernel(sim, "multi_tensor_norms_kernel", f"NormModeE{MODES[mode]}E", _table_name(table, (96, 1000)))
    profile = sim.run(name, blocks, BLOCK, arguments, memory, seed=seed, profile=check, races=check)
    table_out = memory.get(out, np.float64, (len(tensors) + 1, len(COLUMNS)))
    return Launch(table_out, int(memory.get(ticket, np.uint32)[0]), profile)


def filter_norms(
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    *,
    arch: str = "compute_80",
    table: str = "small",
    blocks: int = 4,
    seed: int = 0,
    fuse: bool = True,
) -> Launch:
    """One launch of the filter norms kernel."""
    sim = program(build.NORMS / "filter_norms_cuda.cu", arch, fuse)
    memory = _memory(tensors)
    entries = np.zeros(len(tensors), FILTER_ENTRY)
    first_row = items = 0
    for i, (t, r) in enumerate(zip(tensors, rows, strict=True)):
        length = t.numel // r if r else 1
        entries[i] = (_put(memory, t), r, length, first_row, items, DTYPES[t.dtype])
        first_row, items = first_row + r, items + (r if length >= LONG_ROW else -(-r // ROWS_PER_ITEM))
    out = memory.alloc(8 * first_row)
    arguments = [_table(memory, entries, table, (64, 640)), np.int32(len(tensors)), np.int64(items), out]
    name = _kernel(sim, "filter_norms_kernel", _table_name(table, (64, 640)))
    profile = sim.run(name, blocks, BLOCK, arguments, memory, seed=seed)
    return Launch(memory.get(out, np.float64), 0, profile)


def store_table(entries: NDArray[Any], capacity: int, source: str, *, arch: str = "compute_80") -> NDArray[Any]:
    """Entries as the kernel that stores a table leaves them in memory."""
    sim = program(build.NORMS / source, arch, True)
    memory = require_simulator().Memory(1 << 18)
    stored = memory.alloc(entries.nbytes)
    arguments = [_padded(entries, capacity), np.int32(len(entries)), stored]
    sim.run(_kernel(sim, "store_table_kernel"), 1, BLOCK, arguments, memory)
    return memory.get(stored, entries.dtype)


def _memory(tensors: Sequence[Tensor]) -> Any:
    need = sum(t.buffer.nbytes + 1024 for t in tensors) + 256 * len(tensors) + (1 << 18)
    return require_simulator().Memory(-(-need // 4096) * 4096)  # no more: the simulator shadows every word


def _put(memory: Any, t: Tensor) -> int:
    """Where the tensor lies: as far from a 64-byte boundary as on the host; nothing behind its end is valid."""
    shift = t.address % 64
    return memory.put(t.buffer[t.start - shift : t.start + t.stored.nbytes]) + shift


def _padded(entries: NDArray[Any], capacity: int) -> bytes:
    return entries.tobytes() + bytes((capacity - len(entries)) * entries.itemsize)


def _table(memory: Any, entries: NDArray[Any], table: str, capacities: tuple[int, int]) -> bytes:
    if table == "stored":
        return np.uint64(memory.put(entries)).tobytes()
    return _padded(entries, capacities[table == "large"])


def _table_name(table: str, capacities: tuple[int, int]) -> str:
    return "DeviceTable" if table == "stored" else f"ELi{capacities[table == 'large']}E"


def _kernel(sim: Any, *parts: str) -> str:
    names = [name for name in sim.kernels if all(part in name for part in parts)]
    if len(names) != 1:
        raise LookupError(f"{parts} name {len(names)} kernels of {list(sim.kernels)}")
    return names[0]
