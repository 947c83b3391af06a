# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``csrc/sparse_conv`` as nvcc compiles them, in the PTX simulator (see ``ptx_level.py``).

Calls are those of ``sparse_host.py``; grids are laid out here a second time, independently of the launchers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.harness import build, ptx_level
from tests.cuda.harness.norms_host import Tensor
from tests.cuda.harness.sparse_host import Call, Gather, fill_arguments, host_sparse

BLOCK, IMAGES, BLOCK_CHANNELS, WARPS, DIRECT_TILE, FINISH_TAPS = 256, 32, 32, 8, 128, 32
STORAGE = {"float32": "f", "float64": "d", "bfloat16": "NS_12BFloat16BitsE"}  # as names are mangled; NS_: curvlab::


class Simulated:
    """One call in the simulator's memory; ``profiles`` keeps what each launch did, by the kernel's name.

    ``most_blocks`` limits the grid of the kernels that loop over their work.
    """

    def __init__(
        self,
        call: Call,
        *,
        arch: str = "compute_80",
        fuse: bool = True,
        check: bool = True,
        seed: int = 0,
        most_blocks: int = 1 << 30,
    ):
        module = ptx_level.require_simulator()
        self.call, self.check, self.seed, self.most_blocks = call, check, seed, most_blocks
        self.program = ptx_level.program(build.SPARSE_LAUNCHERS[0], arch, fuse)
        plan = host_sparse().plan(call)
        tensors = [t for t in (call.x, call.gradient, call.values, call.bias, call.out) if t is not None]
        lists = sum(plan.list(name).nbytes for name in ("phases", "order", "first", "offsets", "taps", "source"))
        need = 2 * sum(t.buffer.nbytes for t in tensors) + lists + (1 << 20)
        self.memory = module.Memory(-(-(need + self._splits(plan.arguments) * call.indices.size * 8) // 4096) * 4096)
        self.places: dict[int, int] = {}
        self.profiles: dict[str, Any] = {}
        self.arguments = fill_arguments(call, plan, self.place, self.place_list)
        self.source = np.array(plan.list("source"))
        plan.close()

    @staticmethod
    def _splits(x: Gather) -> int:
        return host_sparse().library.host_weight_splits(ctypes.byref(x))

    def place(self, t: Tensor) -> int:
        """Where the tensor lies: as far from a 64-byte boundary as on the host; nothing behind its end is valid."""
        if id(t) not in self.places:
            shift = t.address % 64
            start = self.memory.put(t.buffer[t.start - shift : t.start + t.stored.nbytes]) + shift
            self.places[id(t)] = start
        return self.places[id(t)]

    def place_list(self, data: NDArray[np.uint8]) -> int:
        """A copy of one of the plan's lists."""
        return self.memory.put(np.array(data)) if data.size else 0

    def launch(self, kernel: str, blocks: int, arguments: list[Any], shared: int = 0) -> None:
        if not blocks:  # the launchers return early
            return
        name = ptx_level._kernel(self.program, f"{kernel}I{STORAGE[self.call.dtype]}E")
        passed = [bytes(a) if isinstance(a, Gather) else a for a in arguments]
        self.profiles[kernel] = self.program.run(
            name,
            (blocks, 1, 1),
            BLOCK,
            passed,
            self.memory,
            smem=shared,
            seed=self.seed,
            profile=self.check,
            races=self.check,
        )

    def run(self) -> Simulated:
        """The op, as its launchers would run it."""
        if self.call.op == "weight":
            self._weight()
        else:
            self._gather()
        return self

    def _gather(self) -> None:
        call, x = self.call, self.arguments
        x.values = self.place(call.values)
        if call.op == "input":
            count = self.source.nbytes // 4
            permuted = self.memory.alloc(max(1, call.values.stored.nbytes))
            source = np.uint64(self.place_list(self.source))
            arguments = [np.uint64(x.values), source, np.int64(count), np.uint64(permuted)]
            self.launch("permute_values_kernel", -(-count // BLOCK), arguments)
            x.values = permuted
        steps, out = x.out_step, x.out
        phases = steps.h * steps.w
        if x.windowed:
            blocks = channel_tiles(x, BLOCK_CHANNELS) * image_blocks(x) * x.tiles.h * x.tiles.w * phases
            self.launch("gather_windows_kernel", min(blocks, self.most_blocks), [x], x.shared_bytes)
        else:
            positions = -(-out.h // steps.h) * -(-out.w // steps.w)
            blocks = channel_tiles(x, WARPS) * -(-x.images * positions // DIRECT_TILE) * phases
            self.launch("gather_direct_kernel", min(blocks, self.most_blocks), [x])

    def _weight(self) -> None:
        call, x = self.call, self.arguments
        splits = self._splits(x)
        size = 8 if call.dtype == "float64" else 4
        workspace = np.uint64(self.memory.alloc(splits * x.nonzeros * size))
        if x.windowed:
            blocks = channel_tiles(x, BLOCK_CHANNELS) * splits
            self.launch("weight_windows_kernel", blocks, [x, np.int32(splits), workspace], x.shared_bytes)
        else:
            blocks = x.groups * x.out_channels * splits
            self.launch("weight_direct_kernel", blocks, [x, np.int32(splits), workspace])
        out = np.uint64(self.place(call.out))
        arguments = [workspace, np.int32(splits), np.int64(x.nonzeros), out]
        self.launch("weight_finish_kernel", -(-x.nonzeros // FINISH_TAPS), arguments)

    def take_back(self) -> Call:
        """Copies the output from the simulator's memory."""
        out = self.call.out
        shift = out.address % 64
        whole = self.memory.get(self.place(out) - shift, np.uint8)
        out.stored[:] = whole[shift : shift + out.stored.nbytes].view(out.stored.dtype)
        return self.call


def channel_tiles(x: Gather, channels: int) -> int:
    """Tiles of output channels; no tile spans two groups."""
    return x.groups * -(-x.out_channels // channels)


def image_blocks(x: Gather) -> int:
    """Blocks of images."""
    return -(-x.images // IMAGES)
