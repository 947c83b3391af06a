# SPDX-License-Identifier: Apache-2.0
"""The paper's convolutional networks at several batch sizes: configuration, arms, one network.

``batch_size`` trains them and ``sharpness`` measures them; a network that one study has trained is found by the other
under the name of its training stage, so both take protocol and arms from here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curvlab.training.recipe import Recipe
from curvlab.training.stages import Network, Samples, TrainStage
from experiments.base import paper

COMMON = ("dataset", "num_train", "channels", "momentum")  # what all networks of a configuration share


@dataclass(frozen=True)
class BatchGrid:
    """Which networks: the paper's protocol; a study's ``Config`` adds what it asks of them."""

    dataset: Literal["cifar10", "digits"] = "cifar10"
    num_train: int = 50_000
    """The first that many training images, in the order of the file."""
    channels: int = 32
    batches: tuple[int, ...] = tuple(paper.BATCH_LR)
    lrs: tuple[float, ...] = tuple(paper.BATCH_LR.values())
    """As written, one a batch."""
    reference: int = 128
    """The batch of ``batches`` whose lr/batch and number of updates the control arms give to all."""
    epochs: int = 80
    seeds: int = 10
    """Seeds 0 .. seeds-1; each draws its own network and its own orders."""
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if len(self.batches) < 2 or len(set(self.batches)) != len(self.batches) or len(self.lrs) != len(self.batches):
            raise ValueError(
                f"Config: batches must be two or more, different, with one lr each, got {self.batches} and {self.lrs}"
            )
        if self.reference not in self.batches:
            raise ValueError(f"Config: reference must be one of batches {self.batches}, got {self.reference}")
        if min(self.seeds, self.num_train, self.channels) < 1:
            raise ValueError(f"Config: seeds, num_train and channels must be at least 1, got {self}")
        for batch, lr in zip(self.batches, self.lrs, strict=True):
            Recipe(self.epochs, batch, lr, self.momentum)

    @property
    def common(self) -> dict[str, Any]:
        """The fields of every :class:`Net`."""
        return {name: getattr(self, name) for name in COMMON}

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest batch."""
        return min(self.batches), max(self.batches)

    @property
    def has_papers_rates(self) -> bool:
        """Whether data, batches and rates are the paper's, so that a direction can be compared with its own."""
        rates = zip(self.batches, self.lrs, strict=True)
        return self.dataset == "cifar10" and all(paper.BATCH_LR.get(batch) == lr for batch, lr in rates)

    @property
    def trains_as_written(self) -> bool:
        """Whether the arm ``as-written`` follows the paper's protocol (its batches and seeds may be fewer)."""
        papers = BatchGrid()
        return self.has_papers_rates and self.common == papers.common and self.epochs == papers.epochs

    def steps_per_epoch(self, batch: int) -> int:
        """Updates an epoch."""
        return -(-self.num_train // batch)


@dataclass(frozen=True)
class Cell:
    """One way to train: the factor values that pick its rows."""

    batch_size: int
    lr: float
    epochs: int

    @property
    def where(self) -> dict[str, Any]:
        """For ``groups(rows, ..., **where)``."""
        return {"batch_size": self.batch_size, "lr": self.lr, "epochs": self.epochs}


def train_cells(config: BatchGrid, arms: Sequence[str]) -> dict[str, dict[int, Cell]]:
    """Every arm's way to train each batch size, batches ascending.

    ``as-written``: the rates of the configuration, equal epochs. ``equal-ratio``: the reference's rate times
    B/reference, equal epochs. ``equal-updates``: the rates of the configuration, and as many updates as the reference
    makes, to the nearest epoch.
    """
    lrs = dict(zip(config.batches, config.lrs, strict=True))
    target = config.epochs * config.steps_per_epoch(config.reference)
    found: dict[str, dict[int, Cell]] = {arm: {} for arm in arms}
    for arm, by_batch in found.items():
        for batch in sorted(config.batches):
            lr, epochs = lrs[batch], config.epochs
            if arm == "equal-ratio":
                lr = float(f"{lrs[config.reference] * batch / config.reference:.12g}")
            if arm == "equal-updates":
                epochs = max(1, round(target / config.steps_per_epoch(batch)))
            by_batch[batch] = Cell(batch, lr, epochs)
    return found


@dataclass(frozen=True)
class Net:
    """One trained network; the fields that are no defaults are part of a run's name."""

    batch_size: int
    lr: float
    epochs: int
    seed: int
    dataset: str = "cifar10"
    num_train: int = 50_000
    channels: int = 32
    momentum: float = 0.9

    @property
    def stage(self) -> TrainStage:
        """The training stage, under whose name every study finds the network."""
        recipe = Recipe(self.epochs, self.batch_size, self.lr, self.momentum)
        return TrainStage(Network("cnn", self.channels), Samples(self.dataset, self.num_train), recipe, self.seed)

    def __str__(self) -> str:
        return f"batch {self.batch_size}, lr {self.lr:g}, {self.epochs} epochs, seed {self.seed}"


def published(batch: int) -> float:
    """Test accuracy in %: mean of the paper's three seeds."""
    return statistics.mean(paper.BATCH_ACCURACY[batch])


def published_gap(small: int, large: int) -> float | None:
    """The paper's for this pair, None where it did not train both."""
    return published(small) - published(large) if {small, large} <= set(paper.BATCH_ACCURACY) else None
