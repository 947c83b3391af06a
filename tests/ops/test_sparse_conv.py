# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab import ops
from curvlab.ops import reference_sparse, sparse_conv
from tests.ops.sparse_conv_samples import Case, assert_right, layouts, tensors

SIZES = [
    *[Case(n=n, height=7, width=9) for n in (1, 15, 16, 17, 40)],
    *[Case(n=17, height=w, width=w) for w in (1, 7, 8, 31, 32)],
    Case(n=128, c_in=3, c_out=5, height=8, width=8, density=0.1),
]
GEOMETRIES = [
    Case(stride=(2, 2), height=9, width=17),
    Case(kernel=(3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=2, height=11, width=17),
    Case(kernel=(5, 1), stride=(1, 2), padding=(4, 0), dilation=(2, 3), groups=2, height=11, width=17),
    Case(kernel=(1, 1), stride=(3, 2), padding=(0, 3), groups=2, height=11, width=13, density=1.0),
    Case(padding=(5, 7), groups=6, c_in=6, height=5, width=6),
    Case(kernel=(2, 2), stride=(3, 3), padding=(0, 0), height=12, width=12),
    Case(kernel=(1, 1), stride=(5, 5), padding=(0, 0), height=4, width=4),
    Case(c_in=40, c_out=24, height=16, width=16, density=0.6),  # several blocks of source channels
]
DENSITIES = [Case(density=0.0), Case(density=1.0), Case(density=0.02), Case(c_in=6, c_out=9, empty_rows=True)]

# Planes cut into blocks, several to a register.
BLOCKS = [
    *[Case(n=n, c_in=17, c_out=19, height=32, width=32, density=0.1) for n in (1, 3)],
    *[Case(n=n, c_in=17, c_out=18, height=16, width=16, density=0.1) for n in (1, 5, 8)],
    *[Case(n=n, c_in=18, c_out=17, height=8, width=8) for n in (1, 6, 18)],
    *[Case(n=2, height=64, width=w) for w in (16, 64, 128)],
    *[Case(n=5, c_in=20, height=h, width=w) for h, w in ((28, 28), (20, 20), (14, 14), (12, 24), (4, 40), (16, 4))],
    Case(n=3, height=32, width=32, kernel=(5, 5), padding=(2, 2)),
    Case(n=3, height=32, width=32, kernel=(1, 1), padding=(0, 0)),
    Case(n=3, height=16, width=16, kernel=(3, 1), padding=(4, 0), dilation=(4, 1), groups=2),
    Case(n=6, height=16, width=16, padding=(9, 9), dilation=(9, 9)),  # halos wider than a block
    Case(n=3, height=16, width=16, padding=(0, 0)),  # results smaller than the planes: not cut
    Case(n=3, c_in=20, height=16, width=12, stride=(2, 2)),
    Case(n=2, height=15, width=16, stride=(2, 1)),
    Case(n=1, c_in=200, c_out=3, height=64, width=64, density=0.05),  # several strips of a block
]
# Layers of single positions: images in place of columns, channels a chunk at a time.
LINEAR = {"kernel": (1, 1), "padding": (0, 0), "height": 1, "width": 1, "density": 0.05}
CHUNKS = [
    *[Case(n=n, c_in=1100, c_out=40, **LINEAR) for n in (16, 128, 150, 300)],
    Case(n=128, c_in=40, c_out=700, **LINEAR),
    Case(n=128, c_in=1100, c_out=700, **LINEAR),
    Case(n=128, c_in=530, c_out=20, **(LINEAR | {"density": 0.9})),
]


def name(case: Any) -> str:
    return str(case) if isinstance(case, Case) else ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*SIZES, *GEOMETRIES, *DENSITIES], ids=name)
def test_results_are_those_of_the_twin(case: Case, dtype: torch.dtype) -> None:
    assert_right(case, dtype, "contiguous")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "part"])
@pytest.mark.parametrize("case", [*BLOCKS, *CHUNKS], ids=name)
def test_results_of_blocks_and_chunks(case: Case, layout: str) -> None:
    assert_right(case, torch.float32, layout)
    assert_right(case, torch.float64, layout)


@pytest.mark.parametrize("layout", [name for name in layouts() if name != "contiguous"])
@pytest.mark.parametrize(
    "case", [Case(n=17), Case(n=35, c_in=20, c_out=18, stride=(2, 1), height=9, width=18)], ids=name
)
def test_results_of_any_layout(case: Case, layout: str) -> None:
    assert_right(case, torch.float32, layout)
    assert_right(case, torch.float64, layout)


def test_more_than_32767_nonzeros_in_a_row() -> None:
    assert_right(Case(n=2, c_in=4100, c_out=2, height=2, width=2, density=1.0), torch.float32, "contiguous")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strips_that_32_bit_offsets_do_not_reach(dtype: torch.dtype) -> None:
    """A packed row of 2^27 columns: ATen's dense convolution computes."""
    far = 2**26
    case = Case(n=3, c_in=4, c_out=6, height=2, width=1, kernel=(2, 1), stride=(1, far), padding=(1, far), groups=2)
    assert_right(case, dtype, "contiguous")
    x, values, indices, _, _ = tensors(case, dtype)
    with pytest.raises(ValueError, match="indices must be strictly increasing"):
        sparse_conv.masked_conv2d(x, values, indices.flip(0), case.weight_shape, **case.options)


@pytest.mark.parametrize("empty", ["batch", "channels_in", "channels_out"])
def test_empty(empty: str) -> None:
    case = {
        "batch": Case(n=0),
        "channels_in": Case(c_in=0, density=0.0),
        "channels_out": Case(c_out=0, density=0.0),
    }[empty]
    x, values, indices, bias, _ = tensors(case, torch.float64)
    out = sparse_conv.masked_conv2d(x, values, indices, case.weight_shape, bias, **case.options)
    want = bias[None, :, None, None].expand(out.shape)
    torch.testing.assert_close(out, want)
    gx = sparse_conv.masked_conv2d_input(out, values, indices, case.weight_shape, x.shape, **case.options)
    gv = sparse_conv.masked_conv2d_weight(x, out, indices, case.weight_shape, **case.options)
    assert gx.shape == x.shape and not gx.any() and gv.shape == values.shape and not gv.any()


def test_linear_without_inputs_is_its_bias() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    out = sparse_conv.masked_linear(torch.zeros(2, 5, 0), torch.zeros(0), none, (3, 0), torch.arange(3.0))
    assert torch.equal(out, torch.arange(3.0).expand(2, 5, 3))


@pytest.mark.parametrize(
    "shape", [(0, 12), (1, 12), (5, 12), (16, 12), (33, 12), (3, 0, 12), (4, 5, 12), (12,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    indices = reference_sparse.nonzero_positions(torch.rand(7, 12, generator=generator) < 0.4)
    values = torch.randn(len(indices), generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(7, generator=generator, dtype=dtype, requires_grad=True)
    got = sparse_conv.masked_linear(x, values, indices, (7, 12), bias)
    want = reference_sparse.masked_linear(x, values, indices, (7, 12), bias)
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, generator=generator, dtype=dtype)
    leaves = (x, values, bias)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad))


@pytest.mark.parametrize(
    "case", [Case(n=70, c_in=20, c_out=24, height=16, width=16), Case(n=150, c_in=600, c_out=40, **LINEAR)], ids=name
)
def test_threads_give_equal_bits(case: Case) -> None:
    x, values, indices, bias, grad = tensors(case, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = sparse_conv.masked_conv2d(x, values, indices, case.weight_shape, bias, **case.options)
            both = torch.ops.curvlab.masked_conv2d_backward(x, grad, values, indices, *case.arguments)
            few = sparse_conv.masked_conv2d(x[:5], values, indices, case.weight_shape, bias, **case.options)
            results.append((out, few, *both))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_connected_outputs_see_an_infinity() -> None:
    x = torch.zeros(16, 2, 4, 4)
    x[:, 1] = torch.inf
    indices = torch.tensor([0])  # output 0 reads input 0 only, output 1 nothing
    out = sparse_conv.masked_conv2d(x, torch.ones(1), indices, (2, 2, 1, 1))
    assert torch.equal(out, torch.zeros_like(out))


# ---- plans
def test_a_mutated_index_tensor_gets_a_new_plan() -> None:
    x, values = torch.randn(16, 2, 4, 4), torch.ones(1)
    indices = torch.tensor([0])
    first = sparse_conv.masked_conv2d(x, values, indices, (1, 2, 1, 1))
    torch.testing.assert_close(first, x[:, :1])
    indices[0] = 1
    torch.testing.assert_close(sparse_conv.masked_conv2d(x, values, indices, (1, 2, 1, 1)), x[:, 1:])
    indices.data = torch.tensor([0])
    torch.testing.assert_close(sparse_conv.masked_conv2d(x, values, indices, (1, 2, 1, 1)), x[:, :1])


def test_reused_memory_never_finds_an_old_plan() -> None:
    x, values = torch.randn(16, 8, 3, 3), torch.ones(1)
    addresses = set()
    for round_ in range(40):
        indices = torch.tensor([round_ % 8])
        addresses.add(indices.data_ptr())
        out = sparse_conv.masked_conv2d(x, values, indices, (1, 8, 1, 1))
        assert torch.equal(out[:, 0], x[:, round_ % 8])
        del indices
    assert len(addresses) < 40  # else the trap was not laid


def test_inference_tensors_have_no_version_and_no_kept_plan() -> None:
    with torch.inference_mode():
        x, values, indices = torch.randn(16, 2, 4, 4), torch.ones(1), torch.tensor([0])
        torch.testing.assert_close(sparse_conv.masked_conv2d(x, values, indices, (1, 2, 1, 1)), x[:, :1])
        indices[0] = 1
        torch.testing.assert_close(sparse_conv.masked_conv2d(x, values, indices, (1, 2, 1, 1)), x[:, 1:])


def test_one_index_tensor_in_two_geometries() -> None:
    indices, values = torch.tensor([0, 4, 7]), torch.randn(3)
    for size, padding in ((5, 0), (6, 1), (5, 1), (5, 0)):
        x = torch.randn(17, 1, size, size)
        got = sparse_conv.masked_conv2d(x, values, indices, (1, 1, 3, 3), padding=padding)
        torch.testing.assert_close(
            got, reference_sparse.masked_conv2d(x, values, indices, (1, 1, 3, 3), padding=padding)
        )


# ---- refusals
def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "dtype": ({"x": torch.zeros(1, 2, 4, 4, dtype=torch.int32)}, TypeError, "masked_conv2d: x must be float32"),
        "bfloat16": (
            {"x": torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), "values": torch.zeros(2, dtype=torch.bfloat16)},
            NotImplementedError,
            "CPU kernels take float32 and float64, got bfloat16",
        ),
        "mixed": ({"values": torch.zeros(2, dtype=torch.float64)}, TypeError, "values must be float32 like x"),
        "channels": ({"x": torch.zeros(1, 3, 4, 4)}, ValueError, "C_in == 2 .*got \\[1, 3, 4, 4\\]"),
        "dims": ({"x": torch.zeros(2, 4, 4)}, ValueError, "x must be \\[N, C_in, H, W\\]"),
        "small": ({"x": torch.zeros(1, 2, 2, 4)}, ValueError, "x must be at least 3 high"),
        "count": ({"values": torch.zeros(3)}, ValueError, "values must be \\[2\\] like indices, got \\[3\\]"),
        "index dtype": ({"indices": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "indices must be int64"),
        "order": ({"indices": torch.tensor([3, 3])}, ValueError, "strictly increasing .*got 3 at \\[1\\] after 3"),
        "range": ({"indices": torch.tensor([3, 72])}, ValueError, "below 72 .*got 72 at \\[1\\]"),
        "negative": ({"indices": torch.tensor([-1, 2])}, ValueError, "got -1 at \\[0\\]"),
        "bias": ({"bias": torch.zeros(3)}, ValueError, "bias must be \\[4\\]"),
        "shape": ({"weight_shape": (4, 2, 3)}, ValueError, "weight_shape must be"),
        "shape number": ({"weight_shape": 3}, ValueError, "weight_shape must be \\[C_out, .* got 3"),
        "groups type": ({"groups": 1.5}, ValueError, "groups must be an integer >= 1, got 1.5"),
        "groups": ({"groups": 3}, ValueError, "groups must be >= 1 and divide C_out = 4, got 3"),
        "stride": ({"stride": 0}, ValueError, "stride must be two integers >= 1, got \\[0, 0\\]"),
        "padding": ({"padding": (1, 1, 1)}, ValueError, "padding must be an integer or two, got \\(1, 1, 1\\)"),
        "huge padding": ({"padding": 2**62}, ValueError, "padding must be two integers below 2\\^31, got"),
        "huge dilation": ({"dilation": 2**62}, ValueError, "dilation must be two integers below 2\\^31, got"),
        "huge weight": ({"weight_shape": (2**30, 2**30, 2, 4)}, ValueError, "weight_shape must have sizes below"),
        "padding name": ({"padding": "same"}, ValueError, "padding must be an integer or two, got 'same'"),
        "padding number": ({"padding": 1.0}, ValueError, "padding must be an integer or two, got 1.0"),
        "dilation numbers": ({"dilation": (1.0, 2)}, ValueError, "dilation must be an integer or two, got \\(1.0, 2"),
    }


@pytest.mark.parametrize("which", bad_calls())
def test_bad_input(which: str) -> None:
    change, error, message = bad_calls()[which]
    call: dict[str, Any] = {
        "x": torch.zeros(1, 2, 4, 4),
        "values": torch.zeros(2),
        "indices": torch.tensor([0, 5]),
        "weight_shape": (4, 2, 3, 3),
    }
    with pytest.raises(error, match=message):
        sparse_conv.masked_conv2d(**(call | change))


def test_bad_gradient_shape_and_linear() -> None:
    indices, values = torch.tensor([0]), torch.ones(1)
    with pytest.raises(ValueError, match=r"masked_conv2d_weight: grad must be \[1, 1, 4, 4\]"):
        sparse_conv.masked_conv2d_weight(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), indices, (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"masked_conv2d_input: input_size must be \[N, C_in, H, W\], got 7"):
        sparse_conv.masked_conv2d_input(torch.zeros(1, 1, 4, 4), values, indices, (1, 1, 1, 1), 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masked_linear: x must be \[..., in\] with in == 3"):
        sparse_conv.masked_linear(torch.zeros(2, 4), values, indices, (2, 3))
    with pytest.raises(ValueError, match=r"masked_linear: weight_shape must be \[out, in\]"):
        sparse_conv.masked_linear(torch.zeros(2, 4), values, indices, (2, 4, 1, 1))


# ---- every instruction set
CHECK = """
import torch
from tests.ops.sparse_conv_samples import Case, assert_right
from curvlab import ops
print(ops.cpu_capability())
for dtype in (torch.float32, torch.float64):
    for layout in ("contiguous", "channels_last", "strided"):
        assert_right(Case(n=19), dtype, layout)
        assert_right(Case(n=16, c_in=20, c_out=18, stride=(2, 1), height=9, width=18, density=0.6), dtype, layout)
        assert_right(Case(n=5, c_in=20, height=16, width=16), dtype, layout)
        assert_right(Case(n=34, c_in=20, c_out=18, kernel=(1, 1), padding=(0, 0), height=1, width=1), dtype, layout)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    order = ["default", "avx2", "avx512"]
    if order.index(capability) > order.index(ops.cpu_capability()):
        pytest.skip(f"this CPU lacks {capability}")
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"CURVLAB_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability]


def test_indices_of_a_mask() -> None:
    mask = torch.rand(3, 4, 2, 2) < 0.5
    positions: Tensor = reference_sparse.nonzero_positions(mask)
    values = torch.randn(len(positions))
    assert torch.equal(reference_sparse.dense_weight(values, positions, mask.shape)[mask], values)
