# SPDX-License-Identifier: Apache-2.0
"""The norm kernels run on the CPU, thread by thread, against numpy in extended precision.

Finds: wrong indices, tails and alignments, missing barriers (orders disagree), barriers that not all threads reach,
reads of shared memory or workspace that nobody wrote (NaN), a ticket that is not left at zero. Does not find: races
whose sequential outcome is right, and reads a few bytes out of bounds whose value does not matter
(``test_sanitizers.py``); what the compiler does to the source (``test_ptx.py``). About 1e8 thread instructions a
second, and 1e7 barrier or shuffle arrivals.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.cuda.harness.norms_host import (
    COLUMNS,
    DTYPES,
    MODES,
    ORDERS,
    HostNorms,
    Tensor,
    host_norms,
    reference_norms,
    tensor,
)

TOLERANCE = 1e-13  # sums are in double and compensated; products of two float32 are exact there


@pytest.fixture(scope="module")
def host() -> HostNorms:
    return host_norms()


def draw(sizes: list[int], dtype: str, seed: int, *, offset: int = 0) -> list[Tensor]:
    """Normal numbers with some zeros, ``offset`` elements after a 64-byte boundary."""
    rng = np.random.default_rng(seed)
    result = []
    for n in sizes:
        values = rng.standard_normal(n)
        values[rng.random(n) < 0.1] = 0.0
        result.append(tensor(values, dtype, offset=offset))
    return result


def assert_norms(got: NDArray[np.float64], want: NDArray[np.float64], *, tolerance: float = TOLERANCE) -> None:
    for i, name in enumerate(COLUMNS):
        scale = np.abs(want[:, i])
        if name == "inner":  # cancels: relative to the two norms
            scale = want[:, COLUMNS.index("l2")] * want[:, COLUMNS.index("reference_l2")]
        if name in ("linf", "nonzeros"):
            np.testing.assert_array_equal(got[:, i], want[:, i], err_msg=name)
            continue
        assert (np.isnan(got[:, i]) == np.isnan(want[:, i])).all(), name
        special = ~np.isfinite(want[:, i])
        np.testing.assert_array_equal(got[special, i], want[special, i], err_msg=name)
        with np.errstate(invalid="ignore"):
            error = np.abs(got[:, i] - want[:, i])[~special]
        assert (error <= tolerance * scale[~special]).all(), f"{name}: {got[:, i]} instead of {want[:, i]}"


# 16,384 float32 make a chunk of 64 KB; 8,192 float64; 32,768 of the 16-bit types.
SIZES = [1, 0, 3, 16384, 5, 8193, 0, 16385, 1000, 40001, 31, 0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_quantities_in_every_order(host: HostNorms, dtype: str, order: str) -> None:
    x, r = draw(SIZES, dtype, 0), draw(SIZES, dtype, 1)
    assert_norms(host.multi_tensor_norms(x, r, order=order), reference_norms(x, r))


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_order_or_grid(host: HostNorms, mode: str) -> None:
    x, r = draw(SIZES, "float32", 2), draw(SIZES, "float32", 3)
    reference = r if mode == "with_reference" else None
    first = host.multi_tensor_norms(x, reference, mode=mode)
    assert_norms(first, reference_norms(x, reference, mode=mode))
    for order in ORDERS:
        for multiprocessors in (1, 3, 200):
            again = host.multi_tensor_norms(x, reference, mode=mode, order=order, multiprocessors=multiprocessors)
            assert again.tobytes() == first.tobytes(), (order, multiprocessors)


def test_grid_follows_the_multiprocessors(host: HostNorms) -> None:
    x = draw([20 * 16384 + 7], "float32", 4)  # 21 chunks
    host.statistics()
    seen = []
    for multiprocessors in (1, 2, 100):
        host.multi_tensor_norms(x, multiprocessors=multiprocessors)
        seen.append(host.statistics())
    one, two, many = seen
    assert 1 <= one["blocks"] <= 8  # what a multiprocessor can hold
    assert two["blocks"] == 2 * one["blocks"]
    assert many["blocks"] == 21
    assert all(s["launches"] == 1 and s["threads"] == 256 * s["blocks"] for s in seen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_pointers(host: HostNorms, dtype: str) -> None:
    per_load = {"float32": 4, "float64": 2, "bfloat16": 8, "float16": 8}[dtype]
    x, r = [], []
    for offset in range(per_load):
        sizes = [1, 2, per_load, 3 * per_load + 1, 9001]
        x += draw(sizes, dtype, 5 + offset, offset=offset)
        r += draw(sizes, dtype, 50 + offset, offset=offset)  # as far from a boundary: wide loads after a head
        x += draw(sizes, dtype, 90 + offset, offset=offset)
        r += draw(sizes, dtype, 130 + offset, offset=(offset + 1) % per_load)  # not so: element by element
    want = reference_norms(x, r)
    assert_norms(host.multi_tensor_norms(x, r), want)
    assert_norms(host.multi_tensor_norms(x, r, order="random 1", multiprocessors=1), want)
    assert_norms(host.multi_tensor_norms(x), reference_norms(x))


def test_types_mix_in_one_list(host: HostNorms) -> None:
    x = [draw([1001], dtype, i)[0] for i, dtype in enumerate(DTYPES)]
    r = [draw([1001], dtype, 9 + i)[0] for i, dtype in enumerate(DTYPES)]
    assert_norms(host.multi_tensor_norms(x, r, order="reverse"), reference_norms(x, r))


# Up to 96 entries in a small parameter block, up to 1000 in a large one, more in a table that small launches store.
@pytest.mark.parametrize(("tensors", "launches"), [(96, 1), (97, 1), (1000, 1), (1001, 3), (2050, 4)])
def test_every_route_of_the_table(host: HostNorms, tensors: int, launches: int) -> None:
    sizes = [(7 * i) % 41 for i in range(tensors)]
    x, r = draw(sizes, "float32", 6), draw(sizes, "float32", 7)
    host.statistics()
    got = host.multi_tensor_norms(x, r, multiprocessors=1)
    assert host.statistics()["launches"] == launches
    assert_norms(got, reference_norms(x, r))
    order = "random 2" if tensors <= 1001 else "reverse"
    assert host.multi_tensor_norms(x, r, order=order, multiprocessors=2).tobytes() == got.tobytes()


def test_tensors_of_many_chunks(host: HostNorms) -> None:
    # 8 chunks are finished by a thread, 256 by a warp, more by the block.
    sizes = [8 * 16384, 8 * 16384 + 1, 256 * 16384, 256 * 16384 + 1, 5]
    x, r = draw(sizes, "float32", 8), draw(sizes, "float32", 9)
    got = host.multi_tensor_norms(x, r, multiprocessors=1)
    assert_norms(got, reference_norms(x, r))
    assert host.multi_tensor_norms(x, r, order="random 1", multiprocessors=7).tobytes() == got.tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [0, 1, 0]])
def test_empty_tensors(host: HostNorms, sizes: list[int], mode: str) -> None:
    x = draw(sizes, "float64", 10)
    r = draw(sizes, "float64", 11) if mode == "with_reference" else None
    assert_norms(host.multi_tensor_norms(x, r, mode=mode), reference_norms(x, r, mode=mode))


def test_ticket_is_zero_again_and_serves_the_next_launch(host: HostNorms) -> None:
    x = draw([100_000, 3], "float32", 12)
    ticket = np.zeros(1, np.uint32)
    results = set()
    for order in ORDERS:
        for multiprocessors in (1, 2, 100):
            got = host.multi_tensor_norms(x, order=order, multiprocessors=multiprocessors, ticket=ticket)
            assert ticket[0] == 0
            results.add(got.tobytes())
    assert len(results) == 1
    assert_norms(got, reference_norms(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 1, 16384, 33000, 40000])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_propagate(host: HostNorms, special: float, where: int, dtype: str) -> None:
    rng = np.random.default_rng(13)
    values = [rng.standard_normal(40001), rng.standard_normal(50)]
    values[0][where] = special
    x = [tensor(v, dtype) for v in values]
    with np.errstate(invalid="ignore"):
        got, want = host.multi_tensor_norms(x, order="reverse"), reference_norms(x)
    assert_norms(got, want)
    assert np.isnan(got[[0, 2], :3]).all() if np.isnan(special) else np.isinf(got[[0, 2], :3]).all()
    assert np.isfinite(got[1, :4]).all()
    # in the reference only: distance, inner and reference_l2 know it, the others do not
    with np.errstate(invalid="ignore"):
        got = host.multi_tensor_norms([x[1], x[1]], [x[1], tensor(np.append(values[1][1:], special), dtype)])
    assert np.isfinite(got[:, :4]).all()
    assert not np.isfinite(got[1:, 4:]).any()
    assert np.isfinite(got[0, 4:]).all()


def test_float64_cancellation_and_range(host: HostNorms) -> None:
    big = np.full(100_003, 1e150)
    big[::3] = 1e-150
    x, r = [tensor(big, "float64")], [tensor(-big, "float64")]
    assert_norms(host.multi_tensor_norms(x, r), reference_norms(x, r))
    near = np.random.default_rng(14).standard_normal(50_000)
    x, r = [tensor(near, "float64")], [tensor(near * (1 + 1e-9), "float64")]
    assert_norms(host.multi_tensor_norms(x, r), reference_norms(x, r))


def test_subnormals_count(host: HostNorms) -> None:
    half = tensor(np.array([2.0**-24, -(2.0**-24), 0.0, -0.0, 2.0**-15]), "float16")
    single = tensor(np.array([2.0**-149, 0.0, -0.0]), "float32")
    got = host.multi_tensor_norms([half, single])
    np.testing.assert_array_equal(got[:, 3], [3, 1, 4])
    np.testing.assert_array_equal(got[:2, 2], [2.0**-15, 2.0**-149])
    assert_norms(got, reference_norms([half, single]))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # signaling NaN patterns, in numpy
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern(host: HostNorms, dtype: str) -> None:
    x = tensor(np.zeros(65536), dtype)
    x.stored[:] = np.arange(65536, dtype=np.uint16).view(x.stored.dtype)
    one_by_one = host.filter_norms([x], [65536])  # rows of one element: sqrt(x^2) is |x| to the bit
    np.testing.assert_array_equal(one_by_one, np.abs(x.values))
    finite = tensor(np.zeros(int(np.isfinite(x.values).sum())), dtype)
    finite.stored[:] = x.stored[np.isfinite(x.values)]
    assert_norms(host.multi_tensor_norms([finite]), reference_norms([finite]))  # through 16-byte loads


# ---- filter_norms --------------------------------------------------------------------------------------------------
def reference_filter_norms(tensors: list[Tensor], rows: list[int]) -> NDArray[np.float64]:
    parts = [
        np.sqrt((t.values.astype(np.longdouble).reshape(r, -1) ** 2).sum(1)) if t.numel else np.zeros(r)
        for t, r in zip(tensors, rows, strict=True)
        if r
    ]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)


# rows x elements a row: one warp a row up to 8191 elements, a block from 8192 on
SHAPES = [(1, 1), (7, 27), (8, 9), (0, 5), (6, 8193), (9, 1), (5, 0), (17, 33), (2, 8191), (1, 20001), (1, 0)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_norms_in_every_order(host: HostNorms, dtype: str, order: str) -> None:
    rows = [r for r, _ in SHAPES]
    x = draw([r * n for r, n in SHAPES], dtype, 20, offset=1)  # rows of odd length start anywhere
    got = host.filter_norms(x, rows, order=order)
    np.testing.assert_allclose(got, reference_filter_norms(x, rows), rtol=TOLERANCE, atol=0)
    for multiprocessors in (1, 50):
        assert host.filter_norms(x, rows, order=order, multiprocessors=multiprocessors).tobytes() == got.tobytes()


@pytest.mark.parametrize(("tensors", "launches"), [(64, 1), (65, 1), (640, 1), (641, 3), (1500, 4)])
def test_filter_norms_every_route_of_the_table(host: HostNorms, tensors: int, launches: int) -> None:
    shapes = [(i % 5, (3 * i) % 19) for i in range(tensors)]
    rows = [r for r, _ in shapes]
    x = draw([r * n for r, n in shapes], "float32", 21)
    host.statistics()
    got = host.filter_norms(x, rows, order="reverse", multiprocessors=1)
    assert host.statistics()["launches"] == launches
    want = reference_filter_norms(x, rows)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=0)


def test_filter_norms_nan_inf_and_nothing(host: HostNorms) -> None:
    values = np.ones((4, 50))
    values[1, 49], values[2, 0] = np.nan, -np.inf
    got = host.filter_norms([tensor(values)], [4])
    np.testing.assert_array_equal(got, [np.sqrt(50), np.nan, np.inf, np.sqrt(50)])
    host.statistics()
    assert host.filter_norms([tensor(np.zeros(0))], [0]).size == 0
    assert host.statistics()["launches"] == 0  # no rows: nothing is launched
