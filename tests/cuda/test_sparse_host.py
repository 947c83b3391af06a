# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/sparse_conv run on the CPU, thread by thread, against torch's dense convolution in float64.

Finds wrong lists, indices, tails and alignments, missing barriers and waits (asynchronous copies arrive at their wait,
shared memory starts as NaN), reads of workspace that nobody wrote, writes into inputs or beside outputs. What it does
not find: ``test_norms_host.py`` says.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.cuda.harness import sparse_host
from tests.cuda.harness.norms_host import ORDERS
from tests.cuda.harness.sparse_host import OPS, TYPES, Call, Conv, HostSparse, assert_right, expected, make_call

# Geometries of the windowed kernels: enough channels on both sides that forward and input gradient take them.
WINDOWED = {
    "one stage": Conv(32, 16, 16, (8, 8)),
    "several stages": Conv(32, 40, 34, (4, 8)),
    "last image block and tiles not full": Conv(33, 17, 35, (5, 11)),
    "rows of one": Conv(32, 16, 16, (1, 33), kernel=(1, 3), padding=(0, 1)),
    "columns of one": Conv(24, 16, 18, (33, 1), kernel=(3, 1), padding=(1, 0)),
    "stride": Conv(32, 18, 20, (11, 31), stride=(2, 2)),
    "unlike strides": Conv(32, 16, 16, (9, 13), kernel=(3, 2), stride=(3, 2), padding=(2, 0)),
    "dilation": Conv(32, 16, 16, (8, 9), dilation=(2, 3), padding=(2, 3)),
    "rectangular": Conv(22, 16, 16, (8, 12), kernel=(5, 2), padding=(2, 1)),
    "groups": Conv(32, 34, 36, (4, 8), groups=2),
    "no padding, 1 x 1": Conv(32, 20, 40, (4, 8), kernel=(1, 1), padding=(0, 0)),
    "stride over the kernel": Conv(32, 16, 16, (8, 16), kernel=(1, 2), stride=(2, 3), padding=(0, 0)),
    "padding over the kernel": Conv(32, 16, 16, (4, 6), kernel=(2, 2), padding=(3, 2)),
}
DIRECT = {
    "one number": Conv(1, 1, 1, (1, 1), kernel=(1, 1), padding=(0, 0)),
    "one image": Conv(1, 5, 9, (7, 6)),
    "a few images": Conv(15, 3, 17, (8, 5)),
    "width 31": Conv(2, 4, 8, (3, 31)),
    "stride and dilation": Conv(3, 4, 6, (11, 13), stride=(2, 3), dilation=(2, 1), padding=(3, 1)),
    "groups": Conv(2, 6, 8, (5, 6), kernel=(3, 2), groups=2),
    "depthwise": Conv(40, 5, 10, (6, 6), groups=5),
    "few channels": Conv(64, 3, 8, (6, 6)),
    "stride over the image": Conv(3, 2, 3, (4, 5), kernel=(3, 3), stride=(7, 9), padding=(2, 2)),
    "a kernel that no window holds": Conv(32, 17, 16, (24, 24), kernel=(2, 2), dilation=(20, 22), padding=(4, 5)),
    "linear": Conv(1, 70, 33, (1, 45), kernel=(1, 1), padding=(0, 0)),
}


@pytest.fixture(scope="module")
def host() -> HostSparse:
    return sparse_host.host_sparse()


def run(host: HostSparse, call: Call, order: str = "forward") -> Call:
    want = expected(call)
    host.run(call, order=order)
    assert_right(call, want)
    return call


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", WINDOWED)
def test_windowed(host: HostSparse, name: str, dtype: str) -> None:
    for op, order in zip(OPS, ("reverse", "random 1", "random 2"), strict=True):
        call = make_call(op, WINDOWED[name], dtype, bias=True, windows=True, offset=1)
        run(host, call, order)
        assert call.arguments.windowed, "the geometry went to the direct kernels"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", DIRECT)
def test_direct(host: HostSparse, name: str, dtype: str) -> None:
    for op, order in zip(OPS, ("reverse", "random 1", "random 2"), strict=True):
        call = run(host, make_call(op, DIRECT[name], dtype, bias=True, offset=1), order)
        assert not call.arguments.windowed


@pytest.mark.parametrize("images", [1, 15, 16, 17, 21, 22, 31, 32, 33, 64, 65])
def test_any_number_of_images(host: HostSparse, images: int) -> None:
    conv = Conv(images, 16, 16, (4, 8))
    fits = 3 * images >= 2 * (-(-images // 32) * 32)
    for op in OPS:
        assert run(host, make_call(op, conv)).arguments.windowed == fits


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("windows", [True, False])
def test_the_same_bits_in_any_order(host: HostSparse, op: str, windows: bool) -> None:
    """No value depends on how threads and blocks are scheduled."""
    conv = Conv(33, 24, 36, (5, 10))
    for dtype in TYPES:
        calls = [run(host, make_call(op, conv, dtype, windows=windows), order) for order in ORDERS]
        assert len({call.out.stored.tobytes() for call in calls}) == 1
        assert bool(calls[0].arguments.windowed) == windows


def masks(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    uneven = rng.random(shape) < np.linspace(0, 1, shape[0]).reshape(-1, 1, 1, 1) ** 3
    one = np.zeros(shape, bool)
    one[-1, -1, -1, -1] = True
    sparse = rng.random(shape) < 0.3
    empty_rows = sparse & (np.arange(shape[0]) % 3 == 0).reshape(-1, 1, 1, 1)
    empty_columns = sparse & (np.arange(shape[1]) % 2 == 0).reshape(1, -1, 1, 1)
    every = np.ones(shape, bool)
    named = {"none": ~every, "every": every, "one": one, "uneven": uneven}
    return named | {"empty_rows": empty_rows, "empty_columns": empty_columns}


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", masks((1, 1, 1, 1)))
def test_masks(host: HostSparse, name: str, op: str, windows: bool) -> None:
    conv = Conv(32, 18, 20, (4, 9))
    run(host, make_call(op, conv, mask=masks(conv.weight_shape)[name], bias=True, windows=windows))
    strided = replace(conv, stride=(2, 2), size=(8, 17))
    run(host, make_call(op, strided, mask=masks(conv.weight_shape)[name], windows=windows))


@pytest.mark.parametrize("op", OPS)
def test_rows_of_more_than_32767_nonzeros(host: HostSparse, op: str) -> None:
    conv = Conv(1, 40_000, 2, (1, 3), kernel=(1, 1), padding=(0, 0))
    assert (np.ones(conv.weight_shape).sum((1, 2, 3)) > 32_767).all()
    run(host, make_call(op, conv, density=1.1))
    if op == "weight":  # and in the windowed kernels, where a row is cut into stages
        wide = Conv(32, 3650, 16, (1, 16), padding=(1, 1))
        mask = np.zeros(wide.weight_shape, bool)
        mask[3] = True
        for of_wide in ("forward", "weight"):
            call = run(host, make_call(of_wide, wide, mask=mask))
            assert call.arguments.windowed
            assert call.indices.size > 32_767


def test_infinities_stay_where_they_are(host: HostSparse) -> None:
    """A number behind the last position of the result (stride 2, even size) is in windows, but in no product."""
    conv = Conv(32, 16, 16, (8, 16), kernel=(1, 1), stride=(2, 2), padding=(0, 0))
    call = make_call("weight", conv, density=1.1, windows=True)
    call.x.stored.reshape(32, 16, 8, 16)[:, :, 1::2, :] = np.inf
    call.x.stored.reshape(32, 16, 8, 16)[:, :, :, 1::2] = np.nan
    call.x.stored.reshape(32, 16, 8, 16)[:, :, 0::2, 0::2] = 1.0
    run(host, call)
    ragged = Conv(32, 16, 16, (4, 13), kernel=(1, 3), padding=(0, 0))  # tiles reach 5 columns beyond the result
    mask = np.zeros(ragged.weight_shape, bool)
    mask[..., 0] = True
    call = make_call("weight", ragged, mask=mask, windows=True)
    call.x.stored.reshape(32, 16, 4, 13)[..., 11:] = np.inf
    assert np.isfinite(expected(call)).all()
    assert run(host, call).arguments.windowed


def test_nan_of_one_image_stays_there(host: HostSparse) -> None:
    for images, windows in ((32, True), (4, False)):
        call = make_call("forward", Conv(images, 16, 16, (4, 8)), density=1.1, windows=windows)
        call.x.stored.reshape(images, -1)[2] = np.nan
        host.run(call)
        broken = np.isnan(call.out.values.reshape(images, -1)).any(1)
        np.testing.assert_array_equal(broken, np.arange(images) == 2)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_weight_gradient_over_several_slices_of_a_block(host: HostSparse, splits: int) -> None:
    """A block adds its later slices to its row of the workspace."""
    for windows in (True, False):
        for dtype in TYPES:
            call = make_call("weight", Conv(33, 17, 20, (7, 8)), dtype, windows=windows)
            want = expected(call)
            host.run(call, splits=splits, order="random 1")
            assert_right(call, want)


def test_nothing_is_launched_without_elements(host: HostSparse) -> None:
    host.launches()
    empty = Conv(0, 4, 5, (3, 3))
    for op in ("forward", "input"):
        host.run(make_call(op, empty, mask=np.zeros(empty.weight_shape, bool)))
    host.run(make_call("weight", Conv(2, 4, 5, (3, 3)), mask=np.zeros(empty.weight_shape, bool)))
    assert host.launches() == 0
    for sums_over_no_images in (empty, Conv(0, 16, 16, (8, 8))):
        run(host, make_call("weight", sums_over_no_images, density=1.1))
    linear = make_call("weight", Conv(1, 7, 3, (1, 0), kernel=(1, 1), padding=(0, 0)), density=1.1)
    assert (host.run(linear).out.values == 0).all()  # a linear layer of no rows: they are the width, and the plane is 0
    no_filters = make_call("input", Conv(32, 16, 0, (8, 8)))
    assert (host.run(no_filters).out.values == 0).all()


def test_indices_that_do_not_rise_are_refused(host: HostSparse) -> None:
    check = host.library.host_check_indices
    for indices, words in (
        ([0, 3, 7], None),
        ([], None),
        ([0, 0], b"strictly increasing"),
        ([5, 3], b"strictly increasing"),
        ([-1, 3], b"positions within weight_shape"),
        ([3, 8], b"positions within weight_shape"),
    ):
        array = np.array(indices, np.int64)
        found = check(
            array.ctypes.data_as(sparse_host.c_void_p), sparse_host.c_int64(array.size), sparse_host.c_int64(8)
        )
        assert found == words, indices
