# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors that every device must get right, and what right means."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.ops import norms, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 255, 4095, 4096, 4097, 8192, 12289, 70001)
TOLERANCE = {torch.float32: 1e-12, torch.float64: 1e-14, torch.bfloat16: 1e-12, torch.float16: 1e-12}


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(*shape, dtype=torch.float64, generator=generator)
    values[torch.rand(*shape, generator=generator) < 0.2] = 0  # zeros to count
    return values.to(dtype).to(device)


def layouts(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Pairs of lists with strange memory: every one must give what contiguous copies give."""

    def two(make) -> tuple[list[Tensor], list[Tensor]]:
        return [make(seed) for seed in (1, 2)], [make(seed) for seed in (3, 4)]

    def r(*shape: int, seed: int) -> Tensor:
        return random(*shape, dtype=dtype, device=device, seed=seed)

    plain, permuted = two(lambda s: r(6, 5, 4, 3, seed=s)), two(lambda s: r(6, 5, 4, 3, seed=s).permute(3, 1, 0, 2))
    return {
        "contiguous": plain,
        "0-d": two(lambda s: r(1, seed=s)[0]),
        "empty": two(lambda s: r(0, 3, seed=s)),
        "rows without elements": two(lambda s: r(3, 0, seed=s)),
        "transposed": two(lambda s: r(37, 53, seed=s).t()),
        "channels_last": two(lambda s: r(6, 5, 4, 3, seed=s).contiguous(memory_format=torch.channels_last)),
        "permuted": permuted,
        "every second": two(lambda s: r(4001, seed=s)[::2]),
        "columns": two(lambda s: r(41, 67, seed=s)[:, 3:50]),
        "expanded": two(lambda s: r(1, 29, seed=s).expand(7, 29)),
        "misaligned": two(lambda s: r(9001, seed=s)[1:]),
        "reference of another layout": (permuted[0], [t.contiguous() for t in permuted[1]]),
        "tensor of another layout": ([t.contiguous() for t in permuted[0]], permuted[1]),
        "reference misaligned otherwise": (
            [r(20_001, seed=5)[1:], r(20_003, seed=6)[3:]],
            [r(20_002, seed=7)[2:], r(20_000, seed=8)],
        ),
    }


def assert_norms_right(tensors: list[Tensor], references: list[Tensor], tolerance: float) -> None:
    """Against the float64 twin; the inner product relative to |x| |r|; counts and maxima exact."""
    got, want = norms.multi_tensor_norms(tensors, references).cpu(), reference.multi_tensor_norms(tensors, references)
    want = want.cpu()
    assert got.shape == want.shape == (len(tensors) + 1, 7)
    exact, inner = [2, 3], 5
    close = [0, 1, 4, 6] if references else [0, 1]
    torch.testing.assert_close(got[:, exact], want[:, exact], rtol=0, atol=0)
    torch.testing.assert_close(got[:, close], want[:, close], rtol=tolerance, atol=0)
    if references:
        assert ((got - want)[:, inner].abs() <= tolerance * want[:, 1] * want[:, 6]).all()
    else:
        assert got[:, 4:].isnan().all()


def assert_filter_norms_right(tensors: list[Tensor], tolerance: float) -> None:
    got, want = norms.filter_norms(tensors), reference.filter_norms(tensors)
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=tolerance, atol=0)
