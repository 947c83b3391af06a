# SPDX-License-Identifier: Apache-2.0
"""Lower precision on request, with its error stated - and full float32 where it was not requested.

PyTorch lets cuDNN's convolutions round float32 to TF32 (10 bits of mantissa) unless told otherwise: a Hessian that is
"float32" would then be 1e-3 off.  Every engine multiplies inside :func:`math_mode`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["Precision", "check_precision", "math_mode", "relative_error"]

Precision = Literal["bf16", "tf32"]


def check_precision(precision: str | None, dtype: torch.dtype, device: torch.device, owner: str) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an unknown precision; a problem that is not float32; "tf32" without CUDA.
    """
    if precision is None:
        return
    if precision not in get_args(Precision):
        raise ValueError(f"{owner}: precision must be None, 'bf16' or 'tf32', got {precision!r}")
    if dtype != torch.float32:
        raise ValueError(f"{owner}: precision must be None for a problem in {dtype} (float32 only), got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"{owner}: precision must be None or 'bf16' on {device.type} (CUDA alone has tf32), got 'tf32'"
        )


@contextlib.contextmanager
def math_mode(precision: str | None, device: torch.device) -> Iterator[None]:
    """TF32 in matrix products and convolutions on CUDA if, and only if, ``precision`` is "tf32"."""
    if device.type != "cuda":
        yield
        return
    # Not by ``allow_tf32``, which PyTorch raises on reading once a caller has set ``fp32_precision``.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    conv = cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in float64; 0 where both are zero, infinite where only ``expected`` is.

    NaN or an infinity in ``got`` alone gives infinity; where the expected value is not finite either, any will do.
    """
    got, expected = got.detach().reshape(-1), expected.detach().double().reshape(-1)
    error, size = (expected - got).norm().item(), expected.norm().item()
    if math.isfinite(error) and math.isfinite(size):  # the rule: three passes, not ten
        return error / size if size > 0.0 else 0.0 if error == 0.0 else float("inf")
    got = got.double()
    finite = expected.isfinite()
    if not bool(got[finite].isfinite().all()):
        return float("inf")
    error, size = (got - expected)[finite].norm().item(), expected[finite].norm().item()
    return error / size if size > 0.0 else 0.0 if error == 0.0 else float("inf")
