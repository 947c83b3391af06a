# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, groups of networks trained together, checkpoints, seeds."""

from __future__ import annotations

from curvlab.training.callbacks import TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.grouped import train_group
from curvlab.training.loop import GroupResult, Recipe, TrainResult, evaluate, train
from curvlab.training.seeding import generator

__all__ = [
    "CheckpointFile",
    "GroupResult",
    "Recipe",
    "TrainResult",
    "TrainState",
    "evaluate",
    "generator",
    "train",
    "train_group",
]
