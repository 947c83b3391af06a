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
# channels of a group times kernel).  CPU with AVX-512, one thread, float32, against the faster of dense NCHW and
# channels-last, batches of 4, 16 and 128: 3 -> 32 and 3 -> 64 channels (3x3) win by 1.6 to 2.3 with nothing pruned;
# 16 -> 16 to 64 -> 64 cross over at 0.7, 64 -> 128 at 0.62, 128 -> 256 at 0.6, 256 -> 256 at 0.57.
CONV_DENSITIES = ((128, 1.0), (768, 0.65), (1536, 0.57), (None, 0.55))
# Fewer results of a channel than these leave registers or tiles unfilled: one image of 16 x 16 crosses over below 0.2.
FEW_POSITIONS, FEW_POSITIONS_DENSITY = 1024, 0.15
# Rows from which, weights from which, kept share.  Of 128 rows 4096 -> 256 crosses over at 0.3, 784 -> 300 and
# 512 -> 512 at 0.27, 300 -> 100 at 0.16, 256 -> 10 never; of 60 and of 16 rows 784 -> 300 at 0.15 and 300 -> 100 below
# 0.02; of 4 rows 4096 -> 256 at 0.07.
LINEAR_DENSITIES = ((128, 2**17, 0.2), (128, 2**14, 0.1), (16, 2**17, 0.1), (1, 2**20, 0.02))


def check_kernels(kernels: str, owner: str) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: kernels is none of "auto", "sparse", "dense".
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"{owner}: kernels must be 'auto', 'sparse' or 'dense', got {kernels!r}")


def choose_path(
    kernels: Kernels, density: float, device: torch.device, weight_shape: Sequence[int], positions: int = 128 * 1024
) -> Path:
    """The path that ``kernels`` asks for; "auto" decides by kept share, shape of the weight, ``positions`` and device.

    On CUDA "auto" stays dense: unstructured kernels are expected to beat tensor cores only above about 95 % zeros, and
    no crossover was measured; ``kernels="sparse"`` is there for who measures.

    Args:
        kernels: "auto", "sparse" or "dense".
        density: kept share of the weights.
        device: of the weights.
        weight_shape: ``[C_out, C_in / groups, kH, kW]`` or ``[out, in]``.
        positions: results of one output channel: images times height times width, or rows of a linear layer; those of
            a batch as one trains unless given.
    """
    if kernels != "auto":
        return kernels
    if device.type != "cpu":
        return "dense"
    size = torch.Size(weight_shape[1:]).numel()
    if len(weight_shape) == 4:
        limit = next(share for most, share in CONV_DENSITIES if most is None or size < most)
        if positions < FEW_POSITIONS:
            limit = min(limit, FEW_POSITIONS_DENSITY)
    else:
        weights = size * weight_shape[0]
        fits = (share for rows, least, share in LINEAR_DENSITIES if positions >= rows and weights >= least)
        limit = next(fits, 0.0)
    return "sparse" if density <= limit else "dense"
