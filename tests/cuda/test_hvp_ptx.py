# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/hvp as nvcc compiles them, executed in a PTX simulator; skips where nvcc or the simulator is
missing. What this level finds and what it cannot: ``test_ptx.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest

from tests.cuda.harness import build, hvp_host, hvp_ptx, ptx_level
from tests.cuda.harness.hvp_host import ACTIVATIONS, TYPES, Call, Draw, assert_right, expected, host_hvp

ARCHS = ("compute_80", "compute_90")
FORWARD = {"b", "residual", "scale", "bias", "gain", "pre", "dot", "factor"}
BACKWARD = {"g2", "mask", "second", "scale", "gain", "gy", "gt", "bias_sum", "gain_sum", "t", "dot", "accumulate"}


@pytest.fixture(scope="module", autouse=True)
def simulator() -> None:
    ptx_level.require_simulator()
    jobs = [partial(build.ptx, f, arch) for f in build.HVP_LAUNCHERS for arch in ARCHS]
    build.in_parallel([*jobs, partial(build.ptx, build.HVP_LAUNCHERS[0], "compute_80", fuse=False), host_hvp])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 9, 10), (2, 70, 16), (1, 3, 1031)])
def test_every_term(shape: tuple[int, int, int], dtype: str, arch: str) -> None:
    for op, make, terms in (
        ("tangent_forward", hvp_host.forward_call, FORWARD),
        ("tangent_backward", hvp_host.backward_call, BACKWARD),
    ):
        call = make(Draw(1, dtype), shape, terms)
        want = expected(op, call)
        assert_right(op, hvp_ptx.tangent(op, call, arch=arch).take_back(), want)


@pytest.mark.parametrize("dtype", TYPES)
def test_flat_misaligned_and_in_place(dtype: str) -> None:
    for offset, terms in ((0, {"b", "mask", "in_place"}), (1, {"b", "mask", "pre"}), (0, {"residual", "factor"})):
        call = hvp_host.forward_call(Draw(2, dtype, offset=offset), (2, 60, 10), terms)
        want = expected("tangent_forward", call)
        assert_right("tangent_forward", hvp_ptx.tangent("tangent_forward", call).take_back(), want)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_as_on_the_host_and_in_any_order(dtype: str) -> None:
    for op, make, terms in (
        ("tangent_forward", hvp_host.forward_call, FORWARD),
        ("tangent_backward", hvp_host.backward_call, BACKWARD),
    ):
        outputs = [n for n in hvp_host.OUTPUTS if n in make(Draw(3, dtype), (2, 150, 16), terms)]
        host = host_hvp().run(op, make(Draw(3, dtype), (2, 150, 16), terms))
        for seed in (0, 1):
            call = make(Draw(3, dtype), (2, 150, 16), terms)
            hvp_ptx.tangent(op, call, fuse=False, seed=seed).take_back()
            for name in outputs:
                assert call[name].stored.tobytes() == host[name].stored.tobytes(), (op, name, seed)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_pooling(dtype: str, arch: str) -> None:
    shape = (2, 2, 9, 4, 10)
    calls: list[tuple[str, Call]] = [
        ("pool_gather", hvp_host.pool_call(Draw(4, dtype), shape, scatter=False)),
        ("pool_scatter", hvp_host.pool_call(Draw(5, dtype), shape, scatter=True)),
        ("pool_scatter", hvp_host.pool_call(Draw(6, dtype, offset=1), shape, scatter=True, unique=True)),
    ]
    for op, call in calls:
        want = expected(op, call)
        assert_right(op, hvp_ptx.pool(op, call, arch=arch).take_back(), want)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_softmax(dtype: str, arch: str) -> None:
    for shape in ((2, 9, 10), (1, 3, 70)):
        call = hvp_host.softmax_call(Draw(7, dtype), shape)
        call["out"] = call["u"]  # in place: a lane must not overwrite what another still reads
        want = expected("softmax_hessian", call)
        assert_right("softmax_hessian", hvp_ptx.softmax(call, arch=arch).take_back(), want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str, dtype: str) -> None:
    call = hvp_host.activation_call(Draw(8, dtype), kind, 700)
    want = expected("activation_factors", call)
    assert_right("activation_factors", hvp_ptx.activation(call).take_back(), want)


# ---- budgets -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Budget:
    """Thread instructions an element, at most: what was counted, and a tenth."""

    op: str
    dtype: str
    terms: frozenset[str]
    instructions: float
    moved: float  # bytes an element: what is read and written, shared factors shared by one direction


# An A100 issues 9.6 thread instructions while memory moves a byte (test_ptx.py): below that, memory is the limit.
ISSUED_PER_BYTE = 9.6
BUDGETS = (
    Budget("tangent_forward", "float32", frozenset({"b", "mask"}), 32.0, 13),
    Budget("tangent_forward", "float32", frozenset({"b", "bias", "scale", "mask"}), 32.6, 13),
    Budget("tangent_forward", "bfloat16", frozenset({"b", "mask"}), 43.6, 7),
    Budget("tangent_forward", "float64", frozenset({"b", "mask"}), 51.0, 25),
    Budget("tangent_backward", "float32", frozenset({"mask", "gy", "bias_sum"}), 36.3, 9),
    Budget(
        "tangent_backward",
        "float32",
        frozenset({"mask", "gy", "gt", "scale", "gain", "bias_sum", "gain_sum"}),
        53.0,
        21,
    ),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.op}-{b.dtype}-{'-'.join(sorted(b.terms))}")
@pytest.mark.parametrize("arch", ARCHS)
def test_budget(budget: Budget, arch: str) -> None:
    shape = (1, 4 * 64 * 64, 16)
    make = hvp_host.forward_call if budget.op == "tangent_forward" else hvp_host.backward_call
    call = make(Draw(9, budget.dtype), shape, set(budget.terms))
    run = hvp_ptx.tangent(budget.op, call, arch=arch)
    profile, elements = run.profiles[0], shape[1] * shape[2]
    spent = sum(profile.thread.values()) / elements
    assert spent <= budget.instructions, f"{spent:.1f} thread instructions an element"
    assert spent <= ISSUED_PER_BYTE * budget.moved
    for kind in ("global load", "global store"):
        assert profile.ideal[kind] >= 0.94 * profile.sectors[kind], kind  # arguments per channel are read one by one
    assert profile.sh_wave == profile.sh_min  # no bank conflicts
