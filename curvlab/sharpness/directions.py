# SPDX-License-Identifier: Apache-2.0
r"""Directions in parameter space, and the scales that make their length mean something.

A scale is a vector D ``[P]`` of positive lengths, one a parameter; a perturbation is eps = D * u with u of unit size:

    absolute   D_i = 1
    element    D_i = |w_i| + eta                                     (Kwon et al. 2021, "ASAM")
    filter     D_i = ||w_f|| + eta,  f the filter (slice along the first dimension) that holds i
    layer      D_i = ||w_t|| + eta,  t the tensor that holds i

With ``rms`` the norms are divided by the square root of the number of elements of the filter or tensor: eps then has,
for u of independent unit entries, the relative size sigma of its filter. A tensor with one dimension (bias,
normalization) has filters of one element.

Filter normalization of a direction d (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets"):
d_f <- d_f / ||d_f|| * ||w_f|| for filters of tensors with two dimensions or more; biases and normalization weights are
left where they are (d = 0), as the authors do for BatchNorm and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from curvlab.norms import filter_norms
from curvlab.operators.problem import Problem
from curvlab.sharpness.evaluation import check_row

__all__ = ["Scale", "draw_normal", "filter_normalized", "random_directions", "weight_scale"]

Scale = Literal["absolute", "element", "filter", "layer"]
SCALES = ("absolute", "element", "filter", "layer")


def draw_normal(count: int, size: int, problem: Problem, generator: torch.Generator | None) -> Tensor:
    """Standard normal rows ``[count, size]`` in the problem's dtype and device; those of the first process for all.

    Row by row: the numbers do not depend on how many are drawn at once.
    """
    where = generator.device if generator is not None else problem.device
    rows = torch.empty(count, size, dtype=problem.dtype, device=problem.device)
    for k in range(count):
        rows[k] = torch.randn(size, dtype=problem.dtype, device=where, generator=generator)
    if problem.process_group is not None:
        torch.distributed.broadcast(rows, group=problem.process_group, group_src=0)
    return rows


def _filter_rows(tensor: Tensor) -> Tensor:
    """The tensor as ``[filters, elements of one]``."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)


def weight_scale(params: Mapping[str, Tensor], scale: Scale, *, rms: bool = False, eta: float = 0.0) -> Tensor:
    """The vector D ``[P]`` of the module's table, in the dtype of ``params``.

    Args:
        params: named tensors, as ``problem.params``.
        scale: which.
        rms: divide norms by the root of the number of elements that they run over.
        eta: added to every entry but those of ``"absolute"``; with 0, zero weights stay where they are.

    Raises:
        ValueError: an unknown scale; eta negative.
    """
    if scale not in SCALES:
        raise ValueError(f"weight_scale: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if not eta >= 0:
        raise ValueError(f"weight_scale: eta must be 0 or more, got {eta!r}")
    tensors = [tensor.detach() for tensor in params.values()]
    if scale == "absolute":
        return torch.cat([torch.ones_like(tensor).reshape(-1) for tensor in tensors])
    if scale == "element":
        return torch.cat([tensor.abs().reshape(-1) for tensor in tensors]) + eta
    pieces = []
    for tensor, norms in zip(tensors, filter_norms(tensors), strict=True):
        rows = _filter_rows(tensor)
        if scale == "layer":
            norms = norms.square().sum().sqrt().expand(rows.shape[0])
        count = tensor.numel() if scale == "layer" else rows.shape[1]
        lengths = norms / max(1, count) ** 0.5 if rms else norms
        pieces.append(lengths.to(tensor.dtype)[:, None].expand_as(rows).reshape(-1))
    return torch.cat(pieces) + eta


def filter_normalized(
    directions: Tensor, params: Mapping[str, Tensor], *, one_dimensional: Literal["zero", "scale"] = "zero"
) -> Tensor:
    """Directions ``[P]`` or ``[K, P]`` with every filter as long as the network's filter (see the module).

    Args:
        directions: rows in the order of ``params``.
        params: the network, as ``problem.params``.
        one_dimensional: what becomes of biases and normalization weights: 0 (Li et al.), or scaled to |w_j| each.

    Returns:
        New rows of the same shape. A filter whose direction is zero stays zero (no 0/0), and so does one whose weights
        are.

    Raises:
        ValueError: rows of another length; an unknown ``one_dimensional``.
    """
    size = sum(tensor.numel() for tensor in params.values())
    if directions.ndim not in (1, 2) or directions.shape[-1] != size:
        raise ValueError(
            f"filter_normalized: directions must be [P] or [K, P] with P == {size} (from params), "
            f"got {list(directions.shape)}"
        )
    if one_dimensional not in ("zero", "scale"):
        raise ValueError(f"filter_normalized: one_dimensional must be 'zero' or 'scale', got {one_dimensional!r}")
    pieces = []
    for piece, tensor in zip(directions.split([t.numel() for t in params.values()], -1), params.values(), strict=True):
        weight = _filter_rows(tensor.detach()).to(directions.dtype)
        rows = piece.reshape(*directions.shape[:-1], *weight.shape)
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        wanted = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        factor = torch.where(lengths > 0, wanted / lengths.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)
        if tensor.ndim < 2 and one_dimensional == "zero":
            factor = torch.zeros_like(factor)
        pieces.append((rows * factor).reshape(*directions.shape[:-1], -1))
    return torch.cat(pieces, -1)


def random_directions(
    problem: Problem, count: int = 2, *, normalize: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Gaussian directions ``[count, P]``, filter-normalized unless ``normalize`` is False.

    Raises:
        ValueError: count below one.
    """
    if count < 1:
        raise ValueError(f"random_directions: count must be at least 1, got {count}")
    rows = draw_normal(count, problem.num_params, problem, generator)
    check_row("random_directions", "directions", rows, problem)
    return filter_normalized(rows, problem.params) if normalize else rows
