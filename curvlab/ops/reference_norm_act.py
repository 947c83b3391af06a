# SPDX-License-Identifier: Apache-2.0
"""Batch normalization, ReLU and max pooling in plain PyTorch, one after another.

Same signature and results as ``curvlab.ops.norm_act``; differentiable in every route that PyTorch's own functions are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    """As ``curvlab.ops.norm_act.batch_norm_relu``."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).relu()
    return F.max_pool2d(out, 2) if pool else out
