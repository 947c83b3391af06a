# SPDX-License-Identifier: Apache-2.0
"""The contracts of test_norms.py on a GPU, and what only a GPU has: streams, graphs, long tables."""

from __future__ import annotations

import math

import pytest
import torch

from curvlab.ops import norms
from tests import contracts
from tests.ops.norm_samples import (
    DTYPES,
    SIZES,
    TOLERANCE,
    assert_filter_norms_right,
    assert_norms_right,
    layouts,
    random,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_odd_sizes(dtype: torch.dtype, with_reference: bool) -> None:
    tensors = [random(n, dtype=dtype, device="cuda") for n in (*SIZES, 16384, 16385, 300_007)]
    references = [t.flip(0) for t in tensors] if with_reference else []
    assert_norms_right(tensors, references, TOLERANCE[dtype])


@pytest.mark.parametrize("name", layouts("cpu"))
def test_norms_of_any_layout(name: str) -> None:
    tensors, references = layouts("cuda")[name]
    assert_norms_right(tensors, references, 1e-12)
    assert_norms_right(tensors, [], 1e-12)
    assert_filter_norms_right(tensors, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).cuda()
    got = norms.filter_norms([values])
    torch.testing.assert_close(got, values.double().abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(50_001, dtype=dtype, device="cuda")
    x[33_333] = bad
    out = norms.multi_tensor_norms([x, x[:100]], [x, x[:100]]).cpu()
    for row in (0, 2):
        torch.testing.assert_close(out[row, :3], torch.full((3,), bad, dtype=torch.float64), equal_nan=True)
        assert out[row, 4].isnan()
    assert out[0, 3] == 50_001 and out[1].isfinite().all()


@pytest.mark.parametrize("count", [96, 97, 1000, 1001, 2500])
def test_tables_of_every_length(count: int) -> None:
    tensors = [random(1 + i % 37, device="cuda", seed=i) for i in range(count)]
    assert_norms_right(tensors, [t * 0.5 for t in tensors], 1e-12)
    assert_filter_norms_right(tensors, 1e-12)


def test_constant_data_keeps_its_digits() -> None:
    n = 30_000_001
    for dtype in (torch.float32, torch.float64):
        x = torch.full((n,), 0.1, dtype=dtype, device="cuda")
        value, out = x[0].item(), norms.multi_tensor_norms([x], [x])[0].cpu()
        want = torch.tensor([n * value, math.sqrt(n) * value, value, n, 0, n * value**2, math.sqrt(n) * value])
        torch.testing.assert_close(out, want.double(), rtol=1e-7 if dtype == torch.float32 else 1e-14, atol=0)


def test_same_bits_every_time_and_on_any_stream() -> None:
    tensors = [random(n, device="cuda") for n in (1_000_003, 5, 0, 70_001)]
    want = norms.multi_tensor_norms(tensors, tensors)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(50):  # both streams busy at once: a shared ticket would end a sum too early
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(norms.multi_tensor_norms(tensors, tensors))
    torch.cuda.synchronize()
    for result in results:
        contracts.assert_same_bits(want, result)


@pytest.mark.parametrize("count", [3, 1500])
def test_a_graph_replays_new_values(count: int) -> None:
    tensors = [random(1000 + i, device="cuda", seed=i) for i in range(count)]
    norms.multi_tensor_norms(tensors, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, filters = norms.multi_tensor_norms(tensors, tensors), norms.filter_norms(tensors)
    for scale in (1.0, 2.0, 3.0):
        for tensor in tensors:
            tensor.mul_(scale)
        graph.replay()
        contracts.assert_same_bits(out, norms.multi_tensor_norms(tensors, tensors))
        contracts.assert_same_bits(filters, norms.filter_norms(tensors))


def test_the_graphs_of_torch_compile() -> None:
    """They warm up uncaptured with all allocations in their own pool: nothing of that run may stay in it."""
    tensors = [random(5000, device="cuda"), random(33, 7, device="cuda")]
    compiled = torch.compile(lambda x: norms.multi_tensor_norms(x) * 2, mode="reduce-overhead", fullgraph=True)
    for scale in (1.0, 2.0, 3.0, 0.5):  # warm-up, recording, replays
        for tensor in tensors:
            tensor.mul_(scale)
        torch.compiler.cudagraph_mark_step_begin()
        contracts.assert_same_bits(compiled(tensors), norms.multi_tensor_norms(tensors) * 2)


def test_no_synchronization() -> None:
    tensors = [random(10_000, device="cuda"), random(33, device="cuda")]
    prepared = norms.PreparedNorms(tensors, tensors)
    try:
        torch.cuda.set_sync_debug_mode("error")
        norms.multi_tensor_norms(tensors, tensors)
        norms.filter_norms(tensors)
        prepared()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cpu_tensors_among_cuda_ones_are_refused() -> None:
    cuda, cpu = torch.ones(3, device="cuda"), torch.ones(3)
    for tensors, references in (([cuda, cpu], []), ([cpu, cuda], []), ([cuda], [cpu]), ([cpu], [cuda])):
        with pytest.raises(ValueError, match=r"multi_tensor_norms: .* must be on .* like tensors"):
            norms.multi_tensor_norms(tensors, references)
        if not references:
            with pytest.raises(ValueError, match=r"filter_norms: .* must be on .* like tensors"):
                norms.filter_norms(tensors)
    with pytest.raises(ValueError, match="reference must have 0 tensors like tensors, got 1"):
        norms.multi_tensor_norms([], [cuda])


def test_registration_and_compilation() -> None:
    tensors = [random(5, 3, device="cuda"), random(7, device="cuda")]
    contracts.assert_registered_well(torch.ops.curvlab.multi_tensor_norms.default, (tensors, tensors, False))
    contracts.assert_registered_well(torch.ops.curvlab.filter_norms.default, (tensors,))
    contracts.assert_compiles(lambda x: norms.multi_tensor_norms(x) * 2, tensors)
    contracts.assert_refuses_derivatives(norms.multi_tensor_norms, "cuda")
