# SPDX-License-Identifier: Apache-2.0
"""Named random streams: one seed gives independent generators for the init, the order, the probes and so on.

``seed + 1`` for the next stream would make stream "order" of seed 0 equal to stream "init" of seed 1; hashing the
name with the seed does not.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(seed: int, stream: str) -> int:
    """First 63 bits of ``sha256("curvlab/<stream>/<seed>")``: a function of the two names alone, on every platform.

    (PyTorch's CPU generator uses the low 32 bits of it, so two of n streams collide with probability about n^2 / 2^33.)

    Raises:
        TypeError: seed is not an int, or stream not a string.
        ValueError: seed is negative, or stream empty.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"stream_seed: seed must be an int, got {type(seed).__name__}")
    if not isinstance(stream, str):
        raise TypeError(f"stream_seed: stream must be a string, got {type(stream).__name__}")
    if seed < 0:
        raise ValueError(f"stream_seed: seed must be 0 or more, got {seed}")
    if not stream:
        raise ValueError("stream_seed: stream must be a name such as 'init', got an empty string")
    digest = hashlib.sha256(f"curvlab/{stream}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, *, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of ``stream`` ("init", "order", "probe", ...) for ``seed``.

    The default is a CPU generator also when training runs on a GPU: drawn there and copied, an order of samples or an
    initial network is the same on every device.

    Raises:
        TypeError, ValueError: as :func:`stream_seed`.
    """
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream))
