# SPDX-License-Identifier: Apache-2.0
"""The sharpness study's rows read as two batch sizes compared: values by seed, ratios over common seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvlab.runs.stats import Estimate, geometric_mean_interval, log_ratio_interval
from curvlab.runs.store import Row
from experiments.base.rows import by_seed, paired_ratio
from experiments.base.settings import Setting, values

Key = tuple[str, int, str]


@dataclass(frozen=True)
class Flatness:
    """A study's rows as two batch sizes compared.

    Attributes:
        rows: long rows.
        settings: (arm, batch, point) -> the factor values that pick its rows.
        small: the flatter batch, as the paper has it.
        large: the other.
        faithful: networks and measurements are the paper's.
        is_cifar: of the paper's data set, whatever its size: a direction can be compared.
        sigmas: noise levels.
        loss_mark: where networks are compared at equal loss: the first epoch whose training loss is at most this.
    """

    rows: Sequence[Row]
    settings: Mapping[Key, Setting]
    small: int
    large: int
    faithful: bool
    is_cifar: bool
    sigmas: Sequence[float]
    loss_mark: float = 0.01

    def values(
        self, metric: str, batch: int, *, arm: str = "as-written", point: str = "last", **more: object
    ) -> list[float]:
        """One a seed; empty where the setting was not run."""
        setting = self.settings.get((arm, batch, point))
        return [] if setting is None else values(self.rows, metric, {**setting, **more})

    def ratio(
        self,
        metric: str,
        *,
        arm: str = "as-written",
        point: str = "last",
        inverse: bool = False,
        is_paired: bool = True,
        **more: object,
    ) -> Estimate | None:
        """Large over small batch (``inverse``: small over large), geometric mean over the seeds that both have.

        Seeds are common (same initial weights, same order of the data), so the interval is of the logs' differences
        seed by seed; Welch's, of all networks (``is_paired`` false), is for the note.

        Returns:
            None where the batches share no seed or a value is not positive.
        """
        sides = [self._by_seed(metric, b, arm=arm, point=point, **more) for b in (self.large, self.small)]
        above, below = reversed(sides) if inverse else sides
        if is_paired:
            return paired_ratio(above, below)
        if not set(above) & set(below) or min(*above.values(), *below.values()) <= 0:
            return None
        return log_ratio_interval(list(above.values()), list(below.values()))

    def _by_seed(self, metric: str, batch: int, *, arm: str, point: str, **more: object) -> dict[int, float]:
        setting = self.settings.get((arm, batch, point))
        return {} if setting is None else by_seed(self.rows, metric, **{**setting, **more})

    def unpaired(self, metric: str, **where: Any) -> str:
        """For the note: the same ratio by Welch's interval, which takes the seeds as if they were not common."""
        found = self.ratio(metric, is_paired=False, **where)
        return f"Welch on logs: {found}" if found is not None and found.has_interval else ""

    def mean(self, metric: str, batch: int, **more: object) -> Estimate | None:
        """Geometric mean over seeds; None where a value is not positive."""
        found = self.values(metric, batch, **more)  # type: ignore[arg-type]
        return geometric_mean_interval(found) if found and min(found) > 0 else None

    @property
    def seconds(self) -> float:
        """What measuring (and training, where it was needed) took."""
        return sum(row["value"] for row in self.rows if row["metric"] in ("measure_seconds", "train_seconds"))
