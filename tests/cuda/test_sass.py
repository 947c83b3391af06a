# SPDX-License-Identifier: Apache-2.0
"""Static gates on the machine code of the norm kernels for sm_80 and sm_90; nothing runs here.

Reads what ptxas reports and what nvdisasm shows (dev extra ``nvidia-cuda-nvdisasm``); skips, and says so, where nvcc or
nvdisasm is missing. Finds spills, arrays that went to local memory (invisible to the spill count), loads that are
narrower than claimed, and registers or shared memory that keep fewer blocks resident than the launcher counts on.
Limit: a good figure here is necessary for speed, not sufficient; no time was measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.cuda.harness import build

# A multiprocessor's registers, threads, blocks and KiB of shared memory (compute capability tables, CUDA C guide).
LIMITS = {"sm_80": (65536, 2048, 32, 164), "sm_90": (65536, 2048, 32, 228)}


@dataclass(frozen=True)
class Kernel:
    """Facts about one compiled kernel."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    shared: int
    opcodes: Counter[str]

    def count(self, *mnemonics: str, part: str = "") -> int:
        """Instructions with one of the mnemonics and ``part`` among the modifiers."""
        return sum(n for op, n in self.opcodes.items() if op.split(".")[0] in mnemonics and part in op)

    def resident_blocks(self, threads: int) -> int:
        """Blocks of so many threads that a multiprocessor holds at once (NVIDIA's occupancy rules)."""
        registers, max_threads, max_blocks, shared_kib = LIMITS[self.arch]
        warps = -(-threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are given out by 256 to a warp
        by_registers = registers // per_warp // 4 * 4 // warps  # and warps by four, to the four schedulers
        by_shared = shared_kib * 1024 // (-(-self.shared // 128) * 128 + 1024)  # 1 KiB of a block's is the system's
        return min(max_threads // (warps * 32), max_blocks, by_registers, by_shared)


def read_kernels(source: Path, arch: str) -> list[Kernel]:
    """All kernels of one .cu file."""
    cubin, log = build.cubin(source, arch)
    listing = build.run_checked([str(build.nvdisasm()), "-c", str(cubin)])
    opcodes = {
        m[1]: Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", m[2], re.M))
        for m in re.finditer(r"^\.text\.([\w$]+):\n(.*?)(?=^\t\.section|\Z)", listing, re.S | re.M)
    }
    facts = re.compile(
        r"Compiling entry function '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    kernels = []
    for name, stack, stores, loads, registers, rest in facts.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name=name,
                arch=arch,
                registers=int(registers),
                stack=int(stack),
                spilled=int(stores) + int(loads),
                shared=int(shared[1]) if shared else 0,
                opcodes=opcodes[name],
            )
        )
    return kernels


def compiled(launchers: Sequence[Path]) -> list[Kernel]:
    """All kernels of the files, for both architectures; skips, saying why, without the tools."""
    if build.nvcc() is None:
        pytest.skip("nvcc was not found: nothing compiles the kernels to machine code")
    if build.nvdisasm() is None:
        pytest.skip("nvdisasm was not found: pip install 'curvlab[dev]'")
    targets = [(source, arch) for source in launchers for arch in LIMITS]
    build.in_parallel(partial(build.cubin, *target) for target in targets)
    return [kernel for target in targets for kernel in read_kernels(*target)]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = compiled(build.NORMS_LAUNCHERS)
    # For an architecture: three modes and three filters, each with two tables in its parameters and one in memory;
    # two kernels that store a table.
    assert Counter(kernel.arch for kernel in found) == dict.fromkeys(LIMITS, 3 * 3 + 3 + 2)
    return found


def named(kernels: list[Kernel], part: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if part in kernel.name]
    assert found
    return found


def constant(header: Path, name: str) -> int:
    """A constant that the launcher counts on, from the source."""
    value = re.search(rf"\b{name} = (\d+)", header.read_text())
    assert value, f"{header} has no {name}"
    return int(value[1])


def test_nothing_is_spilled_or_in_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert len(kernel.opcodes) > 5, f"{kernel.name}: the listing was not read"
        assert (kernel.spilled, kernel.stack, kernel.count("LDL", "STL")) == (0, 0, 0), f"{kernel.name} {kernel.arch}"


def test_norms_load_16_bytes(kernels: list[Kernel]) -> None:
    for kernel in named(kernels, "multi_tensor_norms_kernel"):
        # four types, each with four loads in flight and one in the loop over the rest; as many of the reference
        least = 4 * (4 + 1) * (2 if "NormModeE1E" in kernel.name else 1)
        assert kernel.count("LDG", part=".128") >= least, f"{kernel.name} {kernel.arch}"


def test_filter_norms_load_16_bytes(kernels: list[Kernel]) -> None:
    for kernel in named(kernels, "filter_norms_kernel"):
        assert kernel.count("LDG", part=".128") >= 4 * 2, f"{kernel.name} {kernel.arch}"  # four types; warp, block


def test_as_many_blocks_are_resident_as_the_launchers_count_on(kernels: list[Kernel]) -> None:
    for part, header, name in (
        ("multi_tensor_norms_kernel", "multi_tensor_norms_kernel.cuh", "kNormsBlocksPerMultiprocessor"),
        ("filter_norms_kernel", "filter_norms_kernel.cuh", "kFilterBlocksPerMultiprocessor"),
    ):
        wanted = constant(build.NORMS / header, name)
        assert wanted * 256 >= 768, f"{name}: {wanted} blocks are less than three eighths of the threads"
        for kernel in named(kernels, part):
            blocks = kernel.resident_blocks(256)
            assert blocks >= wanted, f"{kernel.name} {kernel.arch}: {blocks} blocks ({kernel.registers} registers)"


def test_one_ticket_and_no_atomics_on_values(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        tickets = 1 if "multi_tensor_norms_kernel" in kernel.name else 0
        assert kernel.count("ATOM", "ATOMG", "RED", "REDG") == tickets, f"{kernel.name} {kernel.arch}"


def test_occupancy_rules() -> None:
    """Against figures of NVIDIA's occupancy calculator."""

    def blocks(registers: int, shared: int, threads: int, arch: str = "sm_80") -> int:
        return Kernel("", arch, registers, 0, 0, shared, Counter()).resident_blocks(threads)

    assert blocks(32, 0, 256) == 8
    assert blocks(33, 0, 256) == 6  # 40 registers a thread are given: 51 warps, 48 by fours
    assert blocks(64, 0, 256) == 4
    assert blocks(65, 0, 256) == 3
    assert blocks(16, 0, 32) == 32
    assert blocks(16, 48 * 1024, 64) == 3
    assert blocks(16, 48 * 1024, 64, "sm_90") == 4
    assert blocks(255, 0, 1024) == 0
