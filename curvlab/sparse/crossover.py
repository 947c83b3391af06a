# SPDX-License-Identifier: Apache-2.0
"""Where a sparse kernel is faster than the library's dense one: what ``kernels="auto"`` goes by."""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = ["Kernels", "Path", "check_kernels", "choose_path"]

Kernels = Literal["auto", "sparse", "dense"]
Path = Literal["sparse", "dense"]

# Kept share up to which the sparse kernels win, forward and backward together (CPU, batch 128, 3x3, one thread, against
# the faster of dense NCHW and channels-last): convolutions cross over at 0.65 to 0.7, linear layers at 0.3 to 0.35.
CONV_DENSITY = 0.6
LINEAR_DENSITY = 0.3


def check_kernels(kernels: str, owner: str) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: kernels is none of "auto", "sparse", "dense".
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"{owner}: kernels must be 'auto', 'sparse' or 'dense', got {kernels!r}")


def choose_path(kernels: Kernels, density: float, device: torch.device, *, convolution: bool) -> Path:
    """The path that ``kernels`` asks for; "auto" decides by kept share and device.

    On CUDA "auto" stays dense: unstructured kernels are expected to beat tensor cores only above about 95 % zeros, and
    no crossover was measured; ``kernels="sparse"`` is there for who measures.
    """
    if kernels != "auto":
        return kernels
    if device.type != "cpu":
        return "dense"
    return "sparse" if density <= (CONV_DENSITY if convolution else LINEAR_DENSITY) else "dense"
