# SPDX-License-Identifier: Apache-2.0
"""Networks of one shape trained together, seed beside seed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from curvlab.data import Dataset
from curvlab.training.callbacks import CallbackSource
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.loop import GroupResult, PlainEngine, Progress, Recipe, check_inputs, drive

__all__ = ["train_group"]


def train_group(
    models: Sequence[nn.Module],
    data: Dataset,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    callbacks: CallbackSource = (),
    checkpoint: CheckpointFile | None = None,
    progress: Progress | None = None,
) -> GroupResult:
    """Train ``models`` in place, one network per seed; see :func:`curvlab.training.loop.train`."""
    check_inputs("train_group", models, data, seeds)
    engine = PlainEngine(models, data, recipe, seeds=seeds)
    return drive(engine, data, recipe, callbacks=callbacks, checkpoint=checkpoint, progress=progress)
