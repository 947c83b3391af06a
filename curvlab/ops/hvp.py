# SPDX-License-Identifier: Apache-2.0
"""Wrappers of csrc/hvp: the elementwise, pooling and softmax steps of batched Hessian-vector products."""

from curvlab.ops.reference import (
    activation_factors,
    pool_gather,
    pool_scatter,
    softmax_hessian_product,
    tangent_backward,
    tangent_forward,
)

__all__ = [
    "activation_factors",
    "pool_gather",
    "pool_scatter",
    "softmax_hessian_product",
    "tangent_backward",
    "tangent_forward",
]
