# SPDX-License-Identifier: Apache-2.0
"""Learning rates chosen before a comparison: every arm of it on the same grid, by training loss, at the same budget.

Tuning one side of a comparison alone decides it. So the arms share the grid, the network, the images, the number of
updates and the seed, which no result uses; and the chosen rates are held to the rows by a law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlab.runs.store import Row
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from experiments.base.settings import mean, seconds
from experiments.base.study import Law

SEED = 1000  # of tuning alone
UPDATES = 40
CHANNELS, IMAGES = 8, 1000  # at most: a larger network inherits the rates


@dataclass(frozen=True)
class Grid:
    """Rates of which each arm takes its best.

    Attributes:
        rates: learning rates.
        images: the first that many training images.
        batches: arm -> its batch size.
        chosen: arm -> the rate that the study trains it with.
        momentum: of all.
    """

    rates: tuple[float, ...]
    images: int
    batches: Mapping[str, int]
    chosen: Mapping[str, float]
    momentum: float

    def recipes(self) -> dict[tuple[str, float], Recipe]:
        """(arm, rate) -> how it trains: whole epochs, as near to :data:`UPDATES` as they come."""
        found = {}
        for arm, batch in self.batches.items():
            epochs = max(1, round(UPDATES / -(-self.images // batch)))
            found |= {(arm, lr): Recipe(epochs, batch, lr, self.momentum) for lr in self.rates}
        return found

    def losses(self, rows: Sequence[Row], arm: str) -> dict[float, float]:
        """Rate -> training loss (eval mode); a network that diverged has none."""
        found = {lr: mean(rows, "fit_loss", where(arm, lr)) for lr in self.rates}
        return {lr: loss.value for lr, loss in found.items() if loss is not None}

    def seconds(self, rows: Sequence[Row]) -> float:
        """What tuning cost."""
        return seconds(rows, [where(arm, lr) for arm, lr in self.recipes()])

    def laws(self, rows: Sequence[Row]) -> list[Law]:
        """The rate that an arm is trained with is the best of its row."""
        found = []
        for arm in self.batches:
            losses = self.losses(rows, arm)
            best = min(losses, key=lambda lr: losses[lr], default=None)
            shown = ", ".join(f"{lr:g}: {loss:.3g}" for lr, loss in losses.items())
            text = f"{arm} trains at the rate of its lowest training loss in tuning, {self.chosen[arm]:g} ({shown})"
            found.append(Law(text, best == self.chosen[arm]))
        return found

    def words(self, channels: int, images: int, updates: int) -> str:
        """How the arms got their rates, and what that does not cover of a network, images and updates of theirs."""
        tuned = min(channels, CHANNELS)
        words = (
            f"{' and '.join(self.batches)} take the best of the same {len(self.rates)} rates by training loss after "
            f"{UPDATES} updates of CNN({tuned}) on the first {self.images:,} images: the same budget for both, against "
            f"their {updates:,} updates here"
        )
        if tuned < channels or self.images < images:
            words += f", on a smaller network or fewer images than theirs (CNN({channels}), {images:,})"
        return f"{words}."

    def table(self, rows: Sequence[Row]) -> Table:
        """One row an arm, one column a rate."""
        recipes = self.recipes()
        lines = []
        for arm, batch in self.batches.items():
            losses, recipe = self.losses(rows, arm), recipes[arm, self.rates[0]]
            updates = recipe.epochs * recipe.steps_per_epoch(self.images)
            lines.append([arm, batch, updates, *(losses.get(lr) for lr in self.rates), self.chosen[arm]])
        columns = ["arm", "batch", "updates", *(f"lr {lr:g}" for lr in self.rates), "taken"]
        caption = (
            f"Training loss (nats, eval mode) after tuning on the first {self.images:,} images with seed {SEED}, which "
            "no result uses; the test images had no say."
        )
        return Table("Tuning", columns, lines, caption)


def tuning_arm(arm: str) -> str:
    """The name under which an arm is tuned."""
    return f"tune-{arm}"


def where(arm: str, lr: float) -> dict[str, object]:
    """The factor values that pick the rows of an arm's tuning at one rate."""
    return {"arm": tuning_arm(arm), "recipe.lr": lr}
