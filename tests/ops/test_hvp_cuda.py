# SPDX-License-Identifier: Apache-2.0
"""The contracts of test_hvp.py on a GPU, and what only a GPU has: graphs, streams, no synchronization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlab.ops import hvp
from tests import contracts
from tests.ops import hvp_samples
from tests.ops.hvp_samples import DTYPES, SHAPES, Draw

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70_000, 64)])
def test_tangents(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    hvp_samples.check_forward(Draw(seed, dtype, "cuda"), shape)
    hvp_samples.check_backward(Draw(seed + 100, dtype, "cuda"), shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_softmax_activations(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1, 1, 1), (2, 3, 16, 4, 10), (3, 2, 9, 12, 33), (2, 64, 64, 16, 70)):
        hvp_samples.check_pooling(Draw(0, dtype, "cuda"), shape)
    for rows in ((1, 1, 1), (3, 20, 10), (2, 7, 33), (1, 5, 1000)):
        hvp_samples.check_softmax(Draw(0, dtype, "cuda"), rows)
    for kind in hvp.KINDS:
        hvp_samples.check_activation(Draw(0, dtype, "cuda"), kind)


def step(a: Tensor, mask: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    hvp.tangent_forward(a, bias=bias, first=mask, out=out)
    _, _, total, _ = hvp.tangent_backward(out, first=mask, want_bias=True)
    assert total is not None
    return total


def test_a_graph_replays_new_values_and_nothing_synchronizes() -> None:
    draw = Draw(1, torch.float32, "cuda")
    a, mask, bias, out = draw.data(4, 1000, 16), draw.mask(1000, 16), draw.rows(4, 16), draw.data(4, 1000, 16)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(a, mask, bias, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step(a, mask, bias, out)
    for factor in (1.0, 2.0, 3.0):
        a.mul_(factor)
        graph.replay()
        contracts.assert_same_bits(total.double(), step(a, mask, bias, out.clone()).double())


def test_registration_and_devices() -> None:
    a, mask = torch.randn(2, 3, 4, device="cuda"), torch.ones(3, 4, dtype=torch.uint8, device="cuda")
    arguments = (a, None, None, None, None, None, None, mask, None, torch.empty_like(a), None, None)
    torch.library.opcheck(torch.ops.curvlab.tangent_forward.default, arguments)
    with pytest.raises(ValueError, match="first must be on cuda:0 like a, got cpu"):
        hvp.tangent_forward(a, first=mask.cpu())
