# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/sparse_conv as nvcc compiles them, executed in a PTX simulator; skips where nvcc or the simulator
is missing. What this level finds and what it cannot: ``test_ptx.py``. Asynchronous copies arrive at once here; the host
harness is the level that makes them late."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.cuda.harness import build, ptx_level
from tests.cuda.harness.sparse_host import OPS, TYPES, Conv, assert_right, expected, host_sparse, make_call
from tests.cuda.harness.sparse_ptx import Simulated
from tests.cuda.test_sparse_host import masks

ARCHS = ("compute_80", "compute_90")
# One that needs stages, two image blocks and tiles that are not full; one with phases; groups; direct ones.
SHAPES = {
    "stages": (Conv(33, 18, 20, (3, 8)), True),
    "stride, dilation": (Conv(32, 16, 16, (3, 15), kernel=(2, 3), stride=(2, 2), dilation=(1, 2)), True),
    "groups": (Conv(22, 32, 34, (2, 8), kernel=(1, 2), padding=(0, 1), groups=2), True),
    "direct": (Conv(3, 4, 9, (6, 7), stride=(2, 1), padding=(2, 1)), False),
    "direct, groups": (Conv(2, 6, 4, (5, 4), kernel=(3, 2), dilation=(1, 2), groups=2), False),
    "linear": (Conv(1, 40, 12, (1, 130), kernel=(1, 1), padding=(0, 0)), False),
}


@pytest.fixture(scope="module", autouse=True)
def simulator() -> None:
    ptx_level.require_simulator()
    source = build.SPARSE_LAUNCHERS[0]
    build.in_parallel([*(partial(build.ptx, source, arch) for arch in ARCHS), host_sparse])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name: str, op: str) -> None:
    """No access out of bounds or misaligned, no race, nothing read that nobody wrote; and the right numbers."""
    conv, windows = SHAPES[name]
    for i, dtype in enumerate(TYPES):
        call = make_call(op, conv, dtype, bias=True, windows=windows, density=0.15)
        want = expected(call)
        run = Simulated(call, arch=ARCHS[i % 2]).run()
        assert bool(run.arguments.windowed) == windows
        assert_right(run.take_back(), want)


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", masks((1, 1, 1, 1)))
def test_masks(name: str, op: str, windows: bool) -> None:
    """Empty rows and columns, no nonzeros, every weight kept, one image among the sizes."""
    conv = Conv(22, 16, 17, (2, 8), kernel=(1, 2), padding=(0, 1)) if windows else Conv(1, 3, 9, (5, 6), stride=(2, 1))
    call = make_call(op, conv, mask=masks(conv.weight_shape)[name], bias=True, windows=windows)
    want = expected(call)
    assert_right(Simulated(call).run().take_back(), want)
    assert bool(call.indices.size) == (name != "none")


@pytest.mark.parametrize("op", OPS)
def test_rows_of_more_than_32767_nonzeros(op: str) -> None:
    conv = Conv(1, 33_000, 1, (1, 2), kernel=(1, 1), padding=(0, 0))
    call = make_call(op, conv, density=1.1)
    want = expected(call)
    assert_right(Simulated(call, check=False).run().take_back(), want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("windows", [True, False])
def test_the_same_bits_as_on_the_host_and_in_any_order(op: str, windows: bool) -> None:
    """Every product is an fma in the source, so even a build that may fuse has the host's bits."""
    conv = Conv(32, 16, 16, (2, 9), padding=(2, 1))
    for dtype in TYPES:
        host = host_sparse().run(make_call(op, conv, dtype, windows=windows, density=0.1))
        assert bool(host.arguments.windowed) == windows
        for seed in (0, 1):
            call = make_call(op, conv, dtype, windows=windows, density=0.1)
            Simulated(call, seed=seed, check=False).run().take_back()
            assert call.out.stored.tobytes() == host.out.stored.tobytes(), (dtype, seed)


@pytest.mark.parametrize("windows", [True, False])
def test_a_grid_smaller_than_the_work(windows: bool) -> None:
    """As with more blocks than a grid can have: a block goes on to the next tile, its shared memory too."""
    call = make_call("forward", Conv(33, 16, 33, (3, 9)), windows=windows, density=0.1)
    want = expected(call)
    assert_right(Simulated(call, most_blocks=3).run().take_back(), want)


# ---- budgets -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Budget:
    """Of the windowed kernel of an op: what was counted, and a twentieth. A multiply is one of a nonzero with a number
    of its window (images x positions x nonzeros of them); `conflicts` are wavefronts beyond the least possible."""

    op: str
    instructions: float  # of threads, a multiply
    wavefronts: float  # of shared memory, 32 multiplies
    conflicts: int
    load_efficiency: float  # least 32-byte sectors over those moved
    store_efficiency: float


# 16 -> 32 channels, 8 x 32 positions, 10 % of the weights. Stores of the forward pass: nvcc's PTX cuts one in four of a
# warp's 16-byte stores to shared memory into scalars, which ptxas joins again (test_sparse_sass.py): no conflict on a
# device.
BUDGETS = (
    Budget("forward", 6.5, 1.36, 6144, 0.44, 1.0),
    Budget("input", 7.4, 1.40, 3072, 0.39, 1.0),
    Budget("weight", 8.35, 1.31, 0, 0.53, 0.65),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.op)
def test_budget(budget: Budget) -> None:
    call = make_call(budget.op, Conv(32, 16, 32, (8, 32)), windows=True, density=0.1)
    run = Simulated(call).run()
    profile = next(p for name, p in run.profiles.items() if "windows" in name)
    multiplies = 32 * 8 * 32 * call.indices.size
    spent = sum(profile.thread.values()) / multiplies
    assert spent <= budget.instructions, f"{spent:.2f} thread instructions a multiply"
    waves = profile.sh_wave / (multiplies / 32)
    assert waves <= budget.wavefronts, f"{waves:.3f} wavefronts of shared memory for 32 multiplies"
    assert profile.sh_wave - profile.sh_min <= budget.conflicts
    assert efficiency(profile, "global load") >= budget.load_efficiency
    assert efficiency(profile, "global store") >= budget.store_efficiency


def test_taps_are_summed_over_lanes_together() -> None:
    """9 shuffles for up to 8 taps, whose sums are stored at once; one by one they would take 40."""
    call = make_call("weight", Conv(32, 16, 32, (4, 8)), windows=True, density=0.2)
    run = Simulated(call).run()
    profile, x = run.profiles["weight_windows_kernel"], run.arguments
    warp_barriers = 2 * 32 * x.tiles.h * x.tiles.w  # two for every channel's gradient
    assert profile.warp["warp op"] - warp_barriers == 9 * profile.warp["store global"]


def efficiency(profile: Any, kind: str) -> float:
    return profile.ideal[kind] / profile.sectors[kind]


def test_shared_memory_is_the_limit_of_dense_lists() -> None:
    """With every weight kept, a multiply costs its one number of shared memory, and 4 % are staging and results."""
    call = make_call("forward", Conv(32, 16, 32, (2, 16)), windows=True, density=1.1)
    run = Simulated(call).run()
    profile = run.profiles["gather_windows_kernel"]
    multiplies = 32 * 2 * 16 * call.indices.size
    assert profile.sh_wave / (multiplies / 32) <= 1.04
    assert sum(profile.thread.values()) / multiplies <= 3.4
