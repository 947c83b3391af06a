# SPDX-License-Identifier: Apache-2.0
"""Masks, how to choose them, what to compare them with, and layers that hold the surviving weights alone.

    mask = global_magnitude(trained, 0.1)            # which weights survive, counted exactly
    ticket = sparsify(initial, mask)                 # layers that hold, train and multiply by only those
    update_mask(ticket, smaller, optimizer)          # another mask, the optimizer's state moved along

Importing this package registers the sparse layers' rules with the fused curvature engine.
"""

from __future__ import annotations

from curvlab.sparse import curvature as curvature  # registers
from curvlab.sparse.controls import reinitialize, shuffle_layerwise
from curvlab.sparse.criteria import global_magnitude, layerwise_magnitude, random_mask
from curvlab.sparse.fusion import BatchNormReLU, fuse
from curvlab.sparse.layers import MaskedConv2d, MaskedLinear
from curvlab.sparse.mask import Mask
from curvlab.sparse.prunable import prunable_weights
from curvlab.sparse.sensitivity import grasp, snip, synflow
from curvlab.sparse.sparsify import densify, sparsify, update_mask

__all__ = [
    "BatchNormReLU",
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "densify",
    "fuse",
    "global_magnitude",
    "grasp",
    "layerwise_magnitude",
    "prunable_weights",
    "random_mask",
    "reinitialize",
    "shuffle_layerwise",
    "snip",
    "sparsify",
    "synflow",
    "update_mask",
]
