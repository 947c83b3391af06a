# SPDX-License-Identifier: Apache-2.0
"""How to train, and what training reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["GroupResult", "Recipe", "TrainResult"]


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that changes the result besides network, data and seed.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples an update; the number of training samples or more makes it full-batch.
        lr: learning rate of the first epoch.
        momentum: of "sgd" and of the step that "sam" takes; "adam" ignores it (beta = 0.9, 0.999, epsilon = 1e-8).
        schedule: of the learning rate, epoch by epoch.
        optimizer: "sgd", "adam" (Kingma & Ba 2015) or "sam" (Foret et al. 2021, momentum SGD beneath).
        rho: radius of the ascent step of "sam", in units of theta.

    Raises:
        ValueError: epochs or batch_size below one, lr or rho not positive and finite, momentum outside [0, 1), an
            unknown schedule or optimizer.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["sgd", "adam", "sam"] = "sgd"
    rho: float = 0.05

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Recipe: {name} must be an int of at least 1, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"Recipe: lr must be positive and finite, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Recipe: momentum must be in [0, 1), got {self.momentum!r}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"Recipe: schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        if self.optimizer not in ("sgd", "adam", "sam"):
            raise ValueError(f"Recipe: optimizer must be 'sgd', 'adam' or 'sam', got {self.optimizer!r}")
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"Recipe: rho must be positive and finite, got {self.rho!r}")

    def learning_rate(self, epoch: int) -> float:
        """Lr of epoch e = 0 .. epochs-1 (``CosineAnnealingLR`` stepped once an epoch, to 0 after the last)."""
        if self.schedule == "constant":
            return self.lr
        return 0.5 * self.lr * (1.0 + math.cos(math.pi * epoch / self.epochs))

    def steps_per_epoch(self, num_train: int) -> int:
        """Updates an epoch: ceil(num_train / batch_size)."""
        return -(-num_train // self.batch_size)


@dataclass(frozen=True)
class TrainResult:
    """What a training run reports.

    Attributes:
        history: one row an epoch: ``{seed, epoch, step, train_loss, train_accuracy}``.  Loss (mean cross-entropy, nats)
            and accuracy (share in 0..1) are the running ones: measured on each batch before its update.
        diverged: an epoch's loss was NaN or infinite; training stopped there.
        engine: which engine ran.
        seconds: wall time of this call.
    """

    history: list[dict[str, Any]]
    diverged: bool
    engine: str
    seconds: float


@dataclass(frozen=True)
class GroupResult:
    """What a group reports: as :class:`TrainResult`, the rows of all networks together.

    Attributes:
        history: rows ``{seed, epoch, step, train_loss, train_accuracy}``, epoch by epoch, in the order of the seeds;
            a network that diverged has no rows after that epoch.
        diverged: one flag a network, in the order of the seeds.
        engine: "grouped" or "one-by-one", and why.
        seconds: wall time of this call, all networks together.
    """

    history: list[dict[str, Any]]
    diverged: tuple[bool, ...]
    engine: str
    seconds: float
