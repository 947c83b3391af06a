# SPDX-License-Identifier: Apache-2.0
"""The norm kernels as nvcc compiles them, executed in a PTX simulator; skips where nvcc or the simulator is missing.

Finds all that the host levels find and what only the compiler's output shows: reads of memory that nobody wrote, races
that the compiler made by moving a load, and the bits of the shipped code. Counts what a GPU would do, held against a
budget below. ``CURVLAB_PTX_TOOLS`` names the folder that holds ``ptxsim.py``. Limits: 1e7 thread instructions a second;
the fence rule between blocks is an approximation that serves ticket patterns; double fma is faithful, not exact; no
figure here is a time on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import pytest

from tests.cuda.harness import build, ptx_level
from tests.cuda.harness.norms_host import DTYPES, MODES, Tensor, host_norms, reference_norms, tensor

ARCHS = ("compute_80", "compute_90")
TOLERANCE = 1e-13


@pytest.fixture(scope="module", autouse=True)
def simulator() -> ModuleType:
    module = ptx_level.require_simulator()
    jobs = [partial(build.ptx, f, arch) for f in build.NORMS_LAUNCHERS for arch in ARCHS]
    jobs += [partial(build.ptx, f, "compute_80", fuse=False) for f in build.NORMS_LAUNCHERS]
    build.in_parallel([*jobs, partial(build.ptx, build.PLANTED / "planted.cu", "compute_80"), host_norms])
    return module


def draw(sizes: list[int], dtype: str, seed: int, *, offset: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [tensor(np.where(rng.random(n) < 0.1, 0.0, rng.standard_normal(n)), dtype, offset=offset) for n in sizes]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    scale = np.abs(want)
    scale[:, 5] = want[:, 1] * want[:, 6]  # the inner product cancels
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    same = (got == want) | np.isnan(want)
    assert (same | (np.abs(got - want) <= TOLERANCE * scale)).all(), f"{got}\ninstead of\n{want}"
    np.testing.assert_array_equal(got[:, 2:4], want[:, 2:4])  # linf and nonzeros


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", MODES)
def test_norms_of_every_type(arch: str, mode: str) -> None:
    x = [t for i, dtype in enumerate(DTYPES) for t in draw([1, 0, 37, 8193], dtype, i, offset=i % 2)]
    r = [t for i, dtype in enumerate(DTYPES) for t in draw([1, 0, 37, 8193], dtype, 9 + i, offset=i % 2)]
    reference = r if mode == "with_reference" else None
    got = ptx_level.multi_tensor_norms(x, reference, arch=arch, mode=mode)
    assert got.ticket == 0
    assert_close(got.out, reference_norms(x, reference, mode=mode))


def test_tensors_and_references_start_anywhere() -> None:
    x, r = [], []
    for dtype, per_load in (("float32", 4), ("float64", 2), ("bfloat16", 8), ("float16", 8)):
        for offset in range(per_load):
            x += draw([3, 211], dtype, offset, offset=offset) + draw([5, 211], dtype, offset, offset=offset)
            r += draw([3, 211], dtype, 50 + offset, offset=offset)
            r += draw([5, 211], dtype, 70 + offset, offset=(offset + 1) % per_load)
    assert_close(ptx_level.multi_tensor_norms(x, r).out, reference_norms(x, r))


@pytest.mark.parametrize(("table", "tensors"), [("large", 99), ("stored", 40)])
def test_larger_tables(table: str, tensors: int) -> None:
    x = draw([(5 * i) % 13 for i in range(tensors)], "float32", 3)
    assert_close(ptx_level.multi_tensor_norms(x, table=table, blocks=2).out, reference_norms(x))
    rows = [1] * tensors
    got = ptx_level.filter_norms(x, rows, table=table, blocks=2).out
    np.testing.assert_allclose(got, reference_norms(x)[:-1, 1], rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("source", "entry", "capacity"),
    [
        ("multi_tensor_norms_cuda.cu", ptx_level.NORM_ENTRY, 1000),
        ("filter_norms_cuda.cu", ptx_level.FILTER_ENTRY, 640),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_stored_tables(source: str, entry: np.dtype, capacity: int, arch: str) -> None:
    entries = np.frombuffer(np.random.default_rng(4).bytes(301 * entry.itemsize), entry).copy()
    if "rows" in (entry.names or ()):
        entries["type"] &= 0xFFFFFFFF  # four bytes of type, four of padding, which need not be copied
    stored = ptx_level.store_table(entries, capacity, source, arch=arch)
    if "rows" in (entry.names or ()):
        stored["type"] &= 0xFFFFFFFF
    np.testing.assert_array_equal(stored, entries)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_on_the_host_and_in_any_order(dtype: str) -> None:
    x, r = draw([1, 0, 16385, 40], dtype, 5), draw([1, 0, 16385, 40], dtype, 6)
    want = host_norms().multi_tensor_norms(x, r).tobytes()
    for blocks, seed in ((1, 0), (3, 0), (3, 1), (5, 2)):
        got = ptx_level.multi_tensor_norms(x, r, blocks=blocks, seed=seed, fuse=False)
        assert got.out.tobytes() == want, (blocks, seed)
    rows = [1, 0, 5, 4]
    want = host_norms().filter_norms(x, rows).tobytes()
    assert ptx_level.filter_norms(x, rows, fuse=False, seed=3).out.tobytes() == want


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_nan_and_inf_propagate(special: float) -> None:
    values = np.random.default_rng(7).standard_normal(600)
    values[77] = special
    x = [tensor(values), tensor(values[:50])]
    with np.errstate(invalid="ignore"):
        assert_close(ptx_level.multi_tensor_norms(x).out, reference_norms(x))


@pytest.mark.parametrize("arch", ARCHS)
def test_filter_norms_of_every_type(arch: str) -> None:
    shapes = [(7, 27), (0, 5), (1, 8193), (9, 1), (5, 0)]
    x = [t for i, d in enumerate(DTYPES) for t in draw([r * n for r, n in shapes], d, i, offset=1)]
    rows = [r for r, _ in shapes] * len(DTYPES)
    parts = [(t.values.reshape(r, -1) ** 2).sum(1) if t.numel else np.zeros(r) for t, r in zip(x, rows, strict=True)]
    got = ptx_level.filter_norms(x, rows, arch=arch).out
    np.testing.assert_allclose(got, np.sqrt(np.concatenate(parts)), rtol=TOLERANCE, atol=0)


# ---- budgets -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Budget:
    """Thread instructions an element, at most: what was counted, and a tenth."""

    dtype: str
    mode: str
    instructions: float
    reason: str


# Counted over four whole chunks, a block each, reductions included. An A100 issues 1.95e13 thread instructions a second
# (108 multiprocessors x 4 x 32 lanes x 1.41 GHz) while 2.04 TB/s arrive: 9.6 for every byte it reads. Kernels that stay
# below can run at memory speed; H100 has 9.9.
ISSUED_PER_BYTE = 9.6
BUDGETS = (
    Budget("float32", "norms", 20.0, "widen, |x| and its sum 4, square 1, maximum 2, nonzeros 5, copies, reductions"),
    Budget("float32", "l2_only", 6.8, "widen 1, square 1, copies 2, reductions 2"),
    Budget("float32", "with_reference", 29.0, "norms, and widen 1, subtract 1, three sums 3, copies 2, reductions 2"),
    Budget("float64", "norms", 28.0, "half as many elements share a reduction"),
    Budget("float64", "with_reference", 41.5, "half as many elements share a reduction"),
    Budget("bfloat16", "norms", 18.3, "float32 with a shift to unpack and half the reductions"),
    Budget("bfloat16", "with_reference", 27.2, "float32 with a shift to unpack and half the reductions"),
    Budget("float16", "norms", 18.7, "one conversion an element, as bfloat16's shift"),
    Budget("float16", "with_reference", 28.3, "one conversion an element, as bfloat16's shift"),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.dtype}-{b.mode}")
@pytest.mark.parametrize("arch", ARCHS)
def test_budget(budget: Budget, arch: str) -> None:
    size = tensor(np.zeros(1), budget.dtype).stored.itemsize
    elements = 4 * ptx_level.CHUNK_BYTES // size
    x = draw([elements], budget.dtype, 8)
    reference = draw([elements], budget.dtype, 9) if budget.mode == "with_reference" else None
    read = elements * size * (2 if reference else 1)

    launch = ptx_level.multi_tensor_norms(x, reference, arch=arch, mode=budget.mode)
    spent = launch.thread_instructions / elements
    assert spent <= budget.instructions, f"{spent:.1f} thread instructions an element; {budget.reason}"
    assert spent <= ISSUED_PER_BYTE * read / elements
    assert launch.efficiency("global load") >= 0.99  # of the 32-byte sectors that are moved
    assert launch.bank_conflicts == 0
    assert launch.profile.dram_bytes("global load") <= 1.01 * read  # every element once; partial sums besides
    assert launch.profile.req["global load"] <= read / (16 * 32) + 64  # 16 bytes a thread


def test_budget_of_filter_norms() -> None:
    for dtype, rows, length, instructions in (
        ("float32", 64, 1152, 12.0),  # a warp a row: a 128-channel 3x3 filter
        ("float32", 4, 16384, 12.0),  # a block a row
    ):
        launch = ptx_level.filter_norms(draw([rows * length], dtype, 10), [rows])
        spent = launch.thread_instructions / (rows * length)
        assert spent <= instructions, f"{rows} x {length}: {spent:.1f} thread instructions an element"
        assert launch.efficiency("global load") >= 0.99
        assert launch.bank_conflicts == 0
        assert launch.profile.req["global load"] <= rows * length * 4 / (16 * 32) + 64


# ---- planted faults ------------------------------------------------------------------------------------------------
def run_planted(module: ModuleType, fault: int, *, clean: bool = False) -> bool:
    """Runs the kernel that holds the fault (``clean``: its right form); True if the values are right."""
    sim = ptx_level.program(build.PLANTED / "planted.cu", "compute_80")
    rng, memory, kind = np.random.default_rng(10), module.Memory(1 << 18), 0 if clean else fault
    if fault in (1, 2, 3, 9):
        cols = 257 if fault == 9 else 260
        x = rng.standard_normal((3, cols), dtype=np.float32)
        y = memory.alloc(x.nbytes)
        sim.run(f"row_normalize_kernelILi{kind}E", 3, 128, [memory.put(x), y, np.int32(cols)], memory)
        got, want = memory.get(y, np.float32, x.shape), x / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    elif fault in (4, 5, 6):
        x = rng.standard_normal((21, 35), dtype=np.float32)
        g = memory.alloc(4 * 21 * 21)
        arguments = [memory.put(x), g, np.int32(21), np.int32(35)]
        sim.run(f"gram_kernelILi{kind}E", (2, 2), (16, 16), arguments, memory)
        got, want = memory.get(g, np.float32, (21, 21)), x.astype(np.float64) @ x.T
    elif fault in (13, 14, 15):
        x = rng.standard_normal((5, 150), dtype=np.float32)
        y = memory.alloc(4 * 150)
        sim.run(f"window_sum_kernelILi{kind}E", 3, 64, [memory.put(x), y, np.int32(5), np.int32(150)], memory)
        padded = np.pad(x.astype(np.float64).sum(0), 1)
        got, want = memory.get(y, np.float32), padded[:-2] + padded[1:-1] + padded[2:]
    else:
        x = rng.standard_normal(1003, dtype=np.float32)
        partial, ticket, total = memory.alloc(40), memory.put(np.zeros(1, np.uint32)), memory.alloc(8)
        arguments = [memory.put(x), np.int32(x.size), partial, ticket, total]
        sim.run(f"ticket_sum_kernelILi{kind}E", 5, 64, arguments, memory, smem=512)
        got, want = memory.get(total, np.float64), np.array([(x.astype(np.float64) ** 2).sum()])
    return bool(np.allclose(got, want, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("fault", [1, 4, 7, 13])  # one of each kernel
def test_planted_kernels_without_a_fault_pass(simulator: ModuleType, fault: int) -> None:
    assert run_planted(simulator, fault, clean=True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (1, "race in shared memory"),
        (2, "deadlock"),
        (3, "out of bounds"),
        (4, "never written"),
        (5, "race in shared memory"),
        (6, "have returned"),
        (7, "race in global memory"),
        (8, "race in global memory"),
        (9, "misaligned"),
        (10, "out of bounds"),
        (13, "race in shared memory"),
        (14, "race in shared memory"),
        (15, "out of bounds"),
    ],
)
def test_planted_faults_are_named(simulator: ModuleType, fault: int, words: str) -> None:
    with pytest.raises(simulator.Fault, match=words) as caught:
        run_planted(simulator, fault)
    text = str(caught.value)
    marked = [
        f"{path.name}:{i}"
        for path in sorted(build.PLANTED.glob("*.cuh"))
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"fault {fault}\b", line)
    ]
    if fault in (13, 15):  # the simulator names the line of the inline assembly, not its caller's
        marked.append("async_copy.cuh:")
    assert any(line in text for line in marked), f"{marked} not named in\n{text}"
