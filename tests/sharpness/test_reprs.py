# SPDX-License-Identifier: Apache-2.0
"""What a newcomer sees who prints a result: figures with their errors, not tensors."""

from __future__ import annotations

import numpy as np
import torch

from curvlab.sharpness import Ascent, BatchSharpness, LossSlice


def test_results_print_their_figures() -> None:
    ascent = Ascent(0.25, 1.5, torch.tensor([0.3, 0.4]), (1.5, 1.6, 1.75), 3)
    assert repr(ascent) == "loss 1.5, 0.25 more at a distance of 0.5 (2 steps, 3 gradients)"
    found = BatchSharpness(torch.tensor([1.0, 3.0]).double(), torch.ones(2).double(), 32)
    assert repr(found) == "batch sharpness 2, standard error 1, over 2 batches of 32"
    axis = np.linspace(-1, 1, 3)
    line = LossSlice((axis,), np.array([2.0, 1.0, np.inf]), None)
    assert repr(line) == "line of 3 points, losses 1 to 2, 1 not finite"
    plane = LossSlice((axis, axis[:2]), np.arange(6.0).reshape(3, 2), None)
    assert repr(plane) == "plane of 3 x 2 points, losses 0 to 5"
    assert repr(LossSlice((axis,), np.full(3, np.nan), None)) == "line of 3 points, losses none finite"
