# SPDX-License-Identifier: Apache-2.0
"""Curvature as matrices that only multiply; parameters as vectors, the neural tangent kernel, linearized networks."""

from __future__ import annotations

from curvlab.operators.base import DenseOperator, LinearOperator
from curvlab.operators.covariance import GradientCovarianceOperator
from curvlab.operators.engines.protocol import UnsupportedModel
from curvlab.operators.engines.select import EngineReport, make_engine
from curvlab.operators.fisher import EmpiricalFisherOperator, FisherOperator
from curvlab.operators.ggn import GGNOperator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.losses import CustomLoss, SoftmaxCrossEntropy, SquaredError
from curvlab.operators.ntk import empirical_ntk, kernel_drift, linearization_error, linearized_outputs
from curvlab.operators.ntk_operator import NTKOperator
from curvlab.operators.params import flatten, unflatten
from curvlab.operators.problem import Problem

__all__ = [
    "CustomLoss",
    "DenseOperator",
    "EmpiricalFisherOperator",
    "EngineReport",
    "FisherOperator",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "NTKOperator",
    "Problem",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "UnsupportedModel",
    "empirical_ntk",
    "flatten",
    "kernel_drift",
    "linearization_error",
    "linearized_outputs",
    "make_engine",
    "unflatten",
]
