# SPDX-License-Identifier: Apache-2.0
"""Where a sparse kernel is faster than the library's dense one: what ``kernels="auto"`` goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

__all__ = ["Kernels", "Path", "check_kernels", "choose_path"]

Kernels = Literal["auto", "sparse", "dense"]
Path = Literal["sparse", "dense"]

# Kept share up to which the sparse path is faster, forward and backward together, by the weights of one filter (input
# channels of a group times kernel).  CPU with AVX-512, one thread, batch 128, float32, against the faster of dense NCHW
# and channels-last: 3 -> 32 and 8 -> 16 channels (3x3) win by 1.3 with nothing pruned; 16 -> 16 crosses over at 0.9,
# 32 -> 32 and 32 -> 64 at 0.8, 64 -> 128 at 0.7, 128 -> 256 at 0.6.  Batches below 16 cross over at less.
CONV_DENSITIES = ((128, 1.0), (512, 0.8), (None, 0.6))
# 4096 -> 256 crosses over at 0.03, 784 -> 300 at 0.06.
LINEAR_DENSITY = 0.05


def check_kernels(kernels: str, owner: str) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: kernels is none of "auto", "sparse", "dense".
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"{owner}: kernels must be 'auto', 'sparse' or 'dense', got {kernels!r}")


def choose_path(kernels: Kernels, density: float, device: torch.device, weight_shape: Sequence[int]) -> Path:
    """The path that ``kernels`` asks for; "auto" decides by kept share, shape of the weight and device.

    On CUDA "auto" stays dense: unstructured kernels are expected to beat tensor cores only above about 95 % zeros, and
    no crossover was measured; ``kernels="sparse"`` is there for who measures.
    """
    if kernels != "auto":
        return kernels
    if device.type != "cpu":
        return "dense"
    limit = LINEAR_DENSITY
    if len(weight_shape) == 4:
        filter_size = torch.Size(weight_shape[1:]).numel()
        limit = next(share for size, share in CONV_DENSITIES if size is None or filter_size < size)
    return "sparse" if density <= limit else "dense"
