# SPDX-License-Identifier: Apache-2.0
"""Static gates on the machine code of csrc/sparse_conv for sm_80 and sm_90; what they mean: ``test_sass.py``."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.cuda.harness import build
from tests.cuda.test_sass import LIMITS, Kernel, compiled, named

BLOCK = 256
SOURCE = build.SPARSE_LAUNCHERS[0]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = compiled(build.SPARSE_LAUNCHERS)
    # For an architecture: the sum over a list and the weight gradient, windowed and direct, the permutation and the
    # second pass, in three types.
    assert Counter(kernel.arch for kernel in found) == dict.fromkeys(LIMITS, 6 * 3)
    return found


def constant(header: str, name: str) -> int:
    value = re.search(rf"\b{name} = (\d+)(?: \* (\d+))?", (build.SPARSE / header).read_text())
    assert value, f"{header} has no {name}"
    return int(value[1]) * int(value[2] or 1)


def test_nothing_is_spilled_or_in_local_memory(kernels: list[Kernel]) -> None:
    """64 registers hold sums: a spill would sit in the inner loop."""
    for kernel in kernels:
        assert len(kernel.opcodes) > 5, f"{kernel.name}: the listing was not read"
        assert (kernel.spilled, kernel.stack, kernel.count("LDL", "STL")) == (0, 0, 0), f"{kernel.name} {kernel.arch}"


def test_as_many_blocks_are_resident_as_the_kernels_ask_for(kernels: list[Kernel]) -> None:
    for part, header, name in (
        ("gather_windows_kernel", "masked_conv2d_kernel.cuh", "kWindowBlocksPerMultiprocessor"),
        ("gather_direct_kernel", "masked_conv2d_kernel.cuh", "kDirectBlocksPerMultiprocessor"),
        ("weight_windows_kernel", "masked_conv2d_weight_kernel.cuh", "kWeightBlocksPerMultiprocessor"),
        ("weight_direct_kernel", "masked_conv2d_weight_kernel.cuh", "kDirectWeightBlocksPerMultiprocessor"),
    ):
        wanted = constant(header, name)
        for kernel in named(kernels, part):
            blocks = kernel.resident_blocks(BLOCK)
            assert blocks >= wanted, f"{kernel.name} {kernel.arch}: {blocks} blocks ({kernel.registers} registers)"


def test_shared_memory_of_two_windowed_blocks_fits() -> None:
    """It is dynamic: the listing does not know it. 1 KiB of a block's is the system's."""
    largest = constant("geometry_cuda.h", "kSharedBytes")
    for _, _, _, shared_kib in LIMITS.values():
        assert 2 * (largest + 1024) <= shared_kib * 1024
    assert largest <= 99 * 1024  # what the smaller devices of compute capability 8.6 and 8.9 grant a block


def loops_of(arch: str, part: str) -> list[list[str]]:
    """The innermost loops of one kernel: from a label to the branch back to it, no other such branch between."""
    cubin, _ = build.cubin(SOURCE, arch)
    listing = build.run_checked([str(build.nvdisasm()), "-c", str(cubin)])
    sections = dict(re.findall(r"^\.text\.([\w$]+):\n(.*?)(?=^\t\.section|\Z)", listing, re.S | re.M))
    (text,) = [text for name, text in sections.items() if part in name]
    found, labels, body = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif op := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            body.append(op[1])
            back = re.search(r"(\.L_x_\d+)", op[2]) if op[1].startswith("BRA") else None
            if back and back[1] in labels:
                found.append(body[labels[back[1]] :])
                labels = {}
    return found


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("type_", ["f", "NS_12BFloat16BitsE"])
def test_the_inner_loop_is_held_by_shared_memory(arch: str, type_: str) -> None:
    """A tap is four 16-byte loads of shared memory, which hold the multiprocessor for 16 clocks, and 16 multiplications
    (four schedulers could issue 64 instructions meanwhile). Each of a warp's four channels has a loop of its own."""
    kernel = f"gather_windows_kernelI{type_}"
    walks = [Counter(op.split(".")[0] for op in loop) for loop in loops_of(arch, kernel) if "LDS.128" in loop]
    assert len(walks) == 4
    for walk in walks:
        assert (walk["LDS"], walk["FFMA"]) == (4, 16)
        assert sum(walk.values()) <= 44


def test_data_move_as_wide_as_claimed(kernels: list[Kernel]) -> None:
    for kernel in named(kernels, "gather_windows_kernel"):
        assert kernel.count("LDS", part=".128") == 16, f"{kernel.name} {kernel.arch}"  # 4 positions of 4 channels
        assert kernel.count("STS", part=".128") == 16, f"{kernel.name} {kernel.arch}"
    for kernel in named(kernels, "weight_windows_kernel"):
        taps = 4 if "kernelIdE" in kernel.name else 8
        assert kernel.count("LDS", part=".128") == 16 * (taps + 1), f"{kernel.name} {kernel.arch}"
    for part in ("gather_windows_kernel", "weight_windows_kernel"):
        for kernel in named(kernels, part):
            copies = kernel.count("LDGSTS")
            assert (copies == 0) == ("BFloat16" in kernel.name), f"{kernel.name} {kernel.arch}: {copies}"


def test_no_atomics(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG") == 0, f"{kernel.name} {kernel.arch}"
