# SPDX-License-Identifier: Apache-2.0
"""The one place that knows lists of tensors <-> flat vectors.

A list of parameters ``[*shape_1], ..., [*shape_T]`` is the vector ``[P]``, P = sum of their sizes: each tensor in
row-major order, one after the other.  With a leading direction index the lists are ``[K, *shape]`` and the matrix is
``[P, K]``: columns are directions, as in ``A @ V``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["flatten", "num_elements", "unflatten"]


def num_elements(params: Iterable[Tensor]) -> int:
    """P, the number of elements of all tensors together."""
    return sum(param.numel() for param in params)


def flatten(tensors: Sequence[Tensor], *, batched: bool = False) -> Tensor:
    """The vector ``[P]`` of a list of tensors; with ``batched``, the matrix ``[P, K]`` of a list of ``[K, *shape]``.

    Raises:
        ValueError: empty list; differing dtype or device; differing K.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("flatten: tensors must hold at least one tensor, got an empty list")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"flatten: tensors must share dtype and device ({first.dtype}, {first.device}), "
                f"got {tensor.dtype}, {tensor.device} at {i}"
            )
        if batched and (tensor.ndim == 0 or tensor.shape[0] != first.shape[0]):
            raise ValueError(
                f"flatten: tensors must be [K, *shape] with K == {first.shape[0] if first.ndim else '?'} (from the "
                f"first), got {list(tensor.shape)} at {i}"
            )
    if batched:
        return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], 1).T
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors shaped as ``like`` whose :func:`flatten` is ``vector [P]``; ``[K, *shape]`` from ``[P, K]``.

    Views of ``vector`` where its layout allows it.

    Raises:
        ValueError: vector is not ``[P]`` or ``[P, K]`` with P the number of elements of ``like``.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.ndim not in (1, 2) or vector.shape[0] != sum(sizes):
        raise ValueError(
            f"unflatten: vector must be [P] or [P, K] with P == {sum(sizes)} (from like), got {list(vector.shape)}"
        )
    pieces = vector.split(sizes)
    if vector.ndim == 1:
        return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
    return [piece.T.reshape(vector.shape[1], *tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
