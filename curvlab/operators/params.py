# SPDX-License-Identifier: Apache-2.0
"""The one place that knows lists of tensors <-> flat vectors.

A list of parameters ``[*shape_1], ..., [*shape_T]`` is the vector ``[P]``, P = sum of their sizes: each tensor in
row-major order, one after the other.  With a leading direction index the lists are ``[K, *shape]`` and the matrix is
``[P, K]``: columns are directions, as in ``A @ V``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["flatten", "num_elements", "select_names", "unflatten"]


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
        # Not reshape(K, -1), which has no answer for K = 0.
        return torch.cat([tensor.reshape(tensor.shape[0], tensor.shape[1:].numel()) for tensor in tensors], 1).T
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


def select_names(
    model: nn.Module, selection: str | Iterable[str] | Callable[[str, Tensor], bool] | None, owner: str
) -> list[str]:
    """Names of the chosen parameters, in the order of ``model.named_parameters()``, each parameter once.

    Args:
        model: whose parameters.
        selection: names or glob patterns (any of a shared parameter's names will do), a predicate
            ``(name, parameter) -> bool``, or None for all that require a gradient.
        owner: function named in errors.

    Raises:
        ValueError: nothing is chosen, or a pattern matches no name.
    """
    params = dict(model.named_parameters())
    if selection is None:
        chosen = {name for name, param in params.items() if param.requires_grad}
    elif callable(selection):
        chosen = {name for name, param in params.items() if selection(name, param)}
    else:
        first_name = {id(param): name for name, param in params.items()}
        every = [(name, first_name[id(param)]) for name, param in model.named_parameters(remove_duplicate=False)]
        chosen = set()
        for pattern in [selection] if isinstance(selection, str) else selection:
            found = {first for name, first in every if name == pattern or fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(
                    f"{owner}: params must name parameters of the model (say {list(params)[:4]}), got {pattern!r}, "
                    "which matches none"
                )
            chosen |= found
    if not chosen:
        raise ValueError(f"{owner}: params must choose at least one parameter of the model, got none")
    return [name for name in params if name in chosen]
