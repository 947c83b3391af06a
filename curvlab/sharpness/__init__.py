# SPDX-License-Identifier: Apache-2.0
"""Sharpness: how fast a loss rises around its parameters, by every definition in use, with what each does not see."""

from curvlab.sharpness.ascent import Ascent, box_sharpness, sam_ascent, worst_case_sharpness
from curvlab.sharpness.batches import BatchSharpness, batch_sharpness
from curvlab.sharpness.directions import filter_normalized, random_directions, weight_scale
from curvlab.sharpness.evaluation import Evaluation, LossEvaluator, loss_and_gradient
from curvlab.sharpness.perturbation import Flatness, average_flatness
from curvlab.sharpness.slices import LossSlice, linear_barrier, loss_slice
from curvlab.sharpness.symmetries import SYMMETRIES, Transformed, transform

__all__ = [
    "SYMMETRIES",
    "Ascent",
    "BatchSharpness",
    "Evaluation",
    "Flatness",
    "LossEvaluator",
    "LossSlice",
    "Transformed",
    "average_flatness",
    "batch_sharpness",
    "box_sharpness",
    "filter_normalized",
    "linear_barrier",
    "loss_and_gradient",
    "loss_slice",
    "random_directions",
    "sam_ascent",
    "transform",
    "weight_scale",
    "worst_case_sharpness",
]
