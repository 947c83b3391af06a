# SPDX-License-Identifier: Apache-2.0
"""The head of a curvature program: what turns tangents of the outputs into signals, ``u`` to ``B u / Z``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlab.operators.curvatures import OuterProductCurvature, OutputCurvature, SoftmaxCurvature
from curvlab.operators.engines.steps import to_internal, to_natural
from curvlab.operators.losses import OutputLoss
from curvlab.ops import hvp

__all__ = ["Head", "make_head", "sampled_curvatures"]

Head = Callable[[Tensor], Tensor]


def make_head(curvature: OutputCurvature, rank: int, scale: float, dtype: torch.dtype) -> Head:
    """``u [K, n, ...]``, laid out, to ``scale B u``, laid out and in the dtype of u.

    Args:
        curvature: B of a chunk, in float64.
        rank: axes of the outputs, samples included; softmax rows ``[n, C]`` take one call.
        scale: 1/Z.
        dtype: in which B is applied.
    """
    if isinstance(curvature, SoftmaxCurvature) and rank == 2:
        p, label = curvature.probabilities.to(dtype).contiguous(), curvature.label.contiguous()
        weight = (curvature.weight * scale).to(dtype)

        def softmax(u: Tensor) -> Tensor:
            if u.dtype == dtype:
                return hvp.softmax_hessian_product(p, label, weight, u)
            return hvp.softmax_hessian_product(p, label, weight, u.to(dtype)).to(u.dtype)

        return softmax
    rounded = curvature.to(dtype) if isinstance(curvature, (SoftmaxCurvature, OuterProductCurvature)) else curvature
    return lambda u: to_internal(rounded(to_natural(u, 2).to(dtype)) * scale, 2).to(u.dtype)


def sampled_curvatures(
    loss: OutputLoss, parts: Sequence[tuple[Tensor, Tensor]], num_samples: int, generator: torch.Generator
) -> list[OutputCurvature]:
    """The Monte-Carlo estimate of one batch, drawn for the whole batch and cut into its ``(outputs, targets)`` parts.

    So the draws do not depend on how the batch is cut.
    """
    outputs, targets = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    curvature = loss.curvature(outputs, targets, "monte_carlo", num_samples=num_samples, generator=generator)
    if len(parts) == 1:
        return [curvature]
    assert isinstance(curvature, OuterProductCurvature)
    rows = curvature.vectors.shape[1] // len(outputs)
    pieces = curvature.vectors.split([len(part[0]) * rows for part in parts], 1)
    return [OuterProductCurvature(piece, classes_last=curvature.classes_last) for piece in pieces]
