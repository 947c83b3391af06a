# SPDX-License-Identifier: Apache-2.0
"""Curvature as matrices: parameters as vectors, the neural tangent kernel, linearized networks."""

from __future__ import annotations

from curvlab.operators.ntk import empirical_ntk, kernel_drift, linearization_error, linearized_outputs
from curvlab.operators.params import flatten, unflatten

__all__ = [
    "empirical_ntk",
    "flatten",
    "kernel_drift",
    "linearization_error",
    "linearized_outputs",
    "unflatten",
]
