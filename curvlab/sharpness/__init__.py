# SPDX-License-Identifier: Apache-2.0
"""Sharpness: how fast a loss rises around its parameters, by every definition in use, with what each does not see."""

from curvlab.sharpness.ascent import Ascent, box_sharpness, sam_ascent, worst_case_sharpness
from curvlab.sharpness.batches import BatchSharpness, batch_sharpness
from curvlab.sharpness.directions import filter_normalized, random_directions, weight_scale
from curvlab.sharpness.evaluation import Evaluation, LossEvaluator, loss_and_gradient
from curvlab.sharpness.measures import MEASURES, Gauge, Measure, measure, register, sharpness
from curvlab.sharpness.perturbation import Flatness, average_flatness
from curvlab.sharpness.slices import LossSlice, linear_barrier, loss_slice
from curvlab.sharpness.symmetries import SYMMETRIES, Transformed, transform

__all__ = [
    "MEASURES",
    "SYMMETRIES",
    "Ascent",
    "BatchSharpness",
    "Evaluation",
    "Flatness",
    "Gauge",
    "LossEvaluator",
    "LossSlice",
    "Measure",
    "Transformed",
    "average_flatness",
    "batch_sharpness",
    "box_sharpness",
    "filter_normalized",
    "linear_barrier",
    "loss_and_gradient",
    "loss_slice",
    "measure",
    "random_directions",
    "register",
    "sam_ascent",
    "sharpness",
    "transform",
    "weight_scale",
    "worst_case_sharpness",
]
