# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, groups trained together, stages that studies share, pruning levels, checkpoints, seeds."""

from __future__ import annotations

from curvlab.training.callbacks import TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.grouped import train_group
from curvlab.training.iterative_pruning import PruneLevel, TrainedLevel, prune_or_load
from curvlab.training.loop import GroupResult, Recipe, TrainResult, evaluate, train
from curvlab.training.seeding import generator
from curvlab.training.stages import Network, Samples, Trained, TrainStage, open_stage, train_or_load

__all__ = [
    "CheckpointFile",
    "GroupResult",
    "Network",
    "PruneLevel",
    "Recipe",
    "Samples",
    "TrainResult",
    "TrainStage",
    "TrainState",
    "Trained",
    "TrainedLevel",
    "evaluate",
    "generator",
    "open_stage",
    "prune_or_load",
    "train",
    "train_group",
    "train_or_load",
]
