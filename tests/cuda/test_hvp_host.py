# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/hvp run on the CPU, thread by thread, against ``curvlab.ops.reference`` in float64.

Finds wrong indices, tails and alignments, missing barriers (orders disagree), barriers that not all threads reach,
reads of workspace that nobody wrote (NaN), writes into inputs or beside outputs. What it does not find:
``test_norms_host.py`` says.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.harness import hvp_host
from tests.cuda.harness.hvp_host import ACTIVATIONS, TYPES, Call, Draw, HostHvp, assert_right, expected
from tests.cuda.harness.norms_host import ORDERS

# K, R, C: single elements, scalar and 16-byte routes, one and several blocks of rows, two tiles of channels
SHAPES = [(1, 1, 1), (2, 7, 3), (3, 130, 10), (2, 700, 16), (1, 40, 64), (2, 9, 300), (1, 3, 2056), (2, 5, 1031)]
FORWARD = ("b", "residual", "scale", "bias", "gain", "pre", "dot", "in_place")
BACKWARD = ("g2", "second", "scale", "gain", "gy", "gt", "bias_sum", "gain_sum", "t", "dot", "accumulate")


@pytest.fixture(scope="module")
def host() -> HostHvp:
    return hvp_host.host_hvp()


def some_terms(rng: np.random.Generator, names: tuple[str, ...], first: str | None) -> set[str]:
    terms = {name for name in names if rng.random() < 0.5}
    return terms | ({first} if first else set())


def run(host: HostHvp, op: str, call: Call, **options: str | int) -> Call:
    want = expected(op, call)
    host.run(op, call, **options)  # pyright: ignore[reportArgumentType]
    assert_right(op, call, want)
    return call


@pytest.mark.parametrize("first", [None, "mask", "factor"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_terms(host: HostHvp, shape: tuple[int, int, int], dtype: str, first: str | None) -> None:
    rng = np.random.default_rng(sum(shape) + len(dtype))
    orders = list(ORDERS)
    for trial in range(4):
        draw = Draw(trial, dtype, offset=trial % 2)  # now and then nothing starts at 16 bytes
        call = hvp_host.forward_call(draw, shape, some_terms(rng, FORWARD, first))
        run(host, "tangent_forward", call, order=orders[trial])
        terms = some_terms(rng, BACKWARD, first) | {"gy"}
        run(host, "tangent_backward", hvp_host.backward_call(draw, shape, terms), order=orders[trial])


@pytest.mark.parametrize("dtype", TYPES)
def test_all_terms_and_the_same_bits_in_any_order(host: HostHvp, dtype: str) -> None:
    shape = (3, 1100, 16)  # several blocks whose sums are added up
    for op, make, terms in (
        ("tangent_forward", hvp_host.forward_call, {*FORWARD, "factor"} - {"in_place"}),
        ("tangent_backward", hvp_host.backward_call, {*BACKWARD, "mask"}),
    ):
        results = set()
        for order in ORDERS:
            call = run(host, op, make(Draw(5, dtype), shape, terms), order=order)
            results.add(b"".join(call[n].stored.tobytes() for n in hvp_host.OUTPUTS if n in call))
        assert len(results) == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 16, 4, 10), (3, 2, 9, 5, 33), (1, 2, 4, 1, 300)])
def test_pooling(host: HostHvp, shape: tuple[int, int, int, int, int], dtype: str, order: str) -> None:
    draw = Draw(1, dtype)
    run(host, "pool_gather", hvp_host.pool_call(draw, shape, scatter=False), order=order)
    run(host, "pool_scatter", hvp_host.pool_call(draw, shape, scatter=True), order=order)
    run(host, "pool_scatter", hvp_host.pool_call(draw, shape, scatter=True, unique=True), order=order)


def test_scattered_zeros_start_anywhere(host: HostHvp) -> None:
    for dtype in TYPES:
        for unique in (False, True):
            call = hvp_host.pool_call(Draw(2, dtype, offset=1), (1, 3, 5, 2, 7), scatter=True, unique=unique)
            run(host, "pool_scatter", call)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 10), (2, 5, 33), (1, 3, 1000)])
def test_softmax(host: HostHvp, shape: tuple[int, int, int], dtype: str) -> None:
    for order in ORDERS:
        run(host, "softmax_hessian", hvp_host.softmax_call(Draw(3, dtype), shape), order=order)
    call = hvp_host.softmax_call(Draw(4, dtype), shape)
    call["out"] = call["u"]
    run(host, "softmax_hessian", call, order="reverse")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(host: HostHvp, kind: str, dtype: str) -> None:
    run(host, "activation_factors", hvp_host.activation_call(Draw(5, dtype, offset=1), kind, 1500), multiprocessors=1)
    run(host, "activation_factors", hvp_host.activation_call(Draw(6, dtype), kind, 9, second=False), order="reverse")


def test_nan_passes_factors_and_stops_at_masks(host: HostHvp) -> None:
    call = hvp_host.forward_call(Draw(7, "float32"), (1, 4, 4), {"mask"})
    call["a"].stored[:] = np.nan
    call["first"].stored[:] = np.arange(16) % 2
    host.run("tangent_forward", call)
    np.testing.assert_array_equal(np.isnan(call["out"].values), np.arange(16) % 2 == 1)
    assert (call["out"].values[::2] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_is_launched_without_elements(host: HostHvp, shape: tuple[int, int, int]) -> None:
    host.launches()
    host.run("tangent_forward", hvp_host.forward_call(Draw(8, "float32"), shape, {"b", "mask"}))
    host.run("tangent_backward", hvp_host.backward_call(Draw(8, "float32"), shape, {"gy", "mask"}))
    host.run("softmax_hessian", hvp_host.softmax_call(Draw(8, "float32"), (shape[0], shape[1], 3 if shape[2] else 0)))
    k, n, c = shape
    host.run("pool_gather", hvp_host.pool_call(Draw(8, "float32"), (k, n, 4, 2, c), scatter=False))
    host.run("pool_scatter", hvp_host.pool_call(Draw(8, "float32"), (k, n, 4, 2, c), scatter=True))
    assert host.launches() == 0
    call = hvp_host.backward_call(Draw(9, "float32"), shape, {"gy", "bias_sum", "gain_sum", "dot"})
    run(host, "tangent_backward", call)  # sums over no rows are 0, with dot's part
