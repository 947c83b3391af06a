# SPDX-License-Identifier: Apache-2.0
"""Static gates on the machine code of csrc/hvp for sm_80 and sm_90; what they mean: ``test_sass.py``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cuda.harness import build
from tests.cuda.test_sass import LIMITS, Kernel, compiled, constant, named

BLOCK = 256


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = compiled(build.HVP_LAUNCHERS)
    # For an architecture: forward and backward in three types and two widths, two that finish sums; three pools in
    # three types, zeros and rounding; softmax in three types; eight activations in three types.
    assert Counter(kernel.arch for kernel in found) == dict.fromkeys(LIMITS, 2 * 6 + 2 + 9 + 2 + 3 + 24)
    return found


def test_nothing_is_spilled_or_in_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert len(kernel.opcodes) > 5, f"{kernel.name}: the listing was not read"
        assert (kernel.spilled, kernel.stack, kernel.count("LDL", "STL")) == (0, 0, 0), f"{kernel.name} {kernel.arch}"


@pytest.mark.parametrize(("op", "loads", "stores"), [("tangent_forward", 6, 2), ("tangent_backward", 8, 2)])
def test_data_move_by_16_bytes(kernels: list[Kernel], op: str, loads: int, stores: int) -> None:
    """a, b, delta, centered, residual, first; g, g2, first, second, pre, delta, centered, t."""
    wide = [k for k in named(kernels, f"{op}_kernel") if "Li1E" not in k.name]
    assert len(wide) == 3 * len(LIMITS)
    for kernel in wide:
        assert kernel.count("LDG", part=".128") >= loads, f"{kernel.name} {kernel.arch}"
        assert kernel.count("STG", part=".128") >= stores, f"{kernel.name} {kernel.arch}"


def test_as_many_blocks_are_resident_as_the_kernels_ask_for(kernels: list[Kernel]) -> None:
    for part, header, name in (
        ("tangent_forward_kernel", "tangent_forward_kernel.cuh", "kForwardBlocksPerMultiprocessor"),
        ("tangent_backward_kernel", "tangent_backward_kernel.cuh", "kBackwardBlocksPerMultiprocessor"),
        ("pool_gather_kernel", "pool_kernel.cuh", "kPoolBlocksPerMultiprocessor"),
        ("pool_scatter", "pool_kernel.cuh", "kPoolBlocksPerMultiprocessor"),
        ("softmax_hessian_kernel", "softmax_hessian_kernel.cuh", "kSoftmaxBlocksPerMultiprocessor"),
        ("activation_factors_kernel", "activation_factors_kernel.cuh", "kActivationBlocksPerMultiprocessor"),
    ):
        wanted = constant(build.HVP / header, name)
        for kernel in named(kernels, part):
            blocks = kernel.resident_blocks(BLOCK)
            assert blocks >= wanted, f"{kernel.name} {kernel.arch}: {blocks} blocks ({kernel.registers} registers)"


def test_the_usual_type_has_half_of_the_threads(kernels: list[Kernel]) -> None:
    for part in ("tangent_forward_kernelIfLi4E", "tangent_backward_kernelIfLi4E"):
        for kernel in named(kernels, part):
            assert kernel.resident_blocks(BLOCK) >= 4, f"{kernel.name} {kernel.arch}"


def test_no_atomics(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG") == 0, f"{kernel.name} {kernel.arch}"
