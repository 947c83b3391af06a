# SPDX-License-Identifier: Apache-2.0
"""The double descent study's rows read as sweeps over network sizes and over numbers of random features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlab.runs.stats import (
    Estimate,
    geometric_mean_interval,
    loglog_slope,
    mean_interval,
    pooled_log_sd,
    pooled_sd,
)
from curvlab.runs.store import Row
from experiments.base.peaks import Peak, interior_peak
from experiments.base.rows import by_seed, groups
from experiments.base.study import Law

PEAK_WIDTH = 0.15  # of n: how far from N = n the peak of the random features may stand

Groups = dict[float, list[float]]


@dataclass(frozen=True)
class Features:
    """The random features' rows: values by N/n."""

    rows: Sequence[Row]
    num_samples: int

    def groups(self, metric: str, labels: str) -> Groups:
        """By N/n, one value a seed; ``labels`` is clean, noisy, or both for what does not depend on them."""
        found: Groups = {}
        for line in self.by_seed(metric, labels).values():
            for ratio, value in line.items():
                found.setdefault(ratio, []).append(value)
        return dict(sorted(found.items()))

    def by_seed(self, metric: str, labels: str) -> dict[int, dict[float, float]]:
        """Seed -> N/n -> value."""
        found: dict[int, dict[float, float]] = {}
        for row in self.rows:
            if row["metric"] == f"feature_{metric}" and row.get("labels") == labels and row["features"]:
                found.setdefault(row["seed"], {})[row["features"] / self.num_samples] = row["value"]
        return dict(sorted(found.items()))

    def peaks(self, labels: str) -> list[float]:
        """N/n of the largest test error (squared), one a seed."""
        return [max(line, key=lambda ratio: line[ratio]) for line in self.by_seed("test_mse", labels).values()]

    def laws(self) -> list[Law]:
        """What theory leaves no choice about."""
        peaks = [*self.peaks("clean"), *self.peaks("noisy")]
        fits = [v for r, values in self.groups("train_mse", "noisy").items() if r >= 1 for v in values]
        if not peaks or not fits:
            return []
        listed = ", ".join(f"{peak:g}" for peak in peaks)
        return [
            Law(f"random features peak at N/n = 1 ± {PEAK_WIDTH}: {listed}",
                all(abs(peak - 1) <= PEAK_WIDTH for peak in peaks)),
            Law(f"they interpolate noisy labels from N = n on: largest training error {max(fits):.1e}",
                max(fits) < 1e-6),
        ]  # fmt: skip


@dataclass(frozen=True)
class Sweeps:
    """A study's rows as functions of the network's size.

    Attributes:
        rows: long rows.
        noise: shares of wrong labels in the control arms.
        as_written: network -> whether its arm as written follows the paper's protocol.
        num_samples: network -> training samples.
        features: the random features.
    """

    rows: Sequence[Row]
    noise: Sequence[float]
    as_written: Mapping[str, bool]
    num_samples: Mapping[str, int]
    features: Features

    @property
    def most_noise(self) -> float:
        """The arm that the verdicts on label noise are about."""
        return max(self.noise, default=0.0)

    def arms(self) -> dict[str, dict[str, object]]:
        """Label -> factor values, in the order of tables and legends."""
        found: dict[str, dict[str, object]] = {}
        for network in ("mlp", "cnn"):
            for with_bn in (False, True):
                for share in (0.0, *self.noise):
                    where = {"network": network, "batch_norm": with_bn, "label_noise": share}
                    if groups(self.rows, "collapsed", "size", **where):
                        words = [
                            network.upper(),
                            *(["BN"] if with_bn else []),
                            *([f"{100 * share:g} % noise"] * (share > 0)),
                        ]
                        found[", ".join(words) if len(words) > 1 else f"{words[0]}, as written"] = where
        return found

    def groups(self, metric: str, network: str, *, noise: float = 0.0, batch_norm: bool = False) -> Groups:
        """Last-epoch values by size, collapsed networks left out; ``test_error`` (%) and ratios are made here."""
        where = {"network": network, "label_noise": noise, "batch_norm": batch_norm}
        if metric == "test_error":
            found = groups(self.rows, "test_accuracy", "size", **where)
            return {size: [100 * (1 - value) for value in values] for size, values in found.items()}
        if metric in ("lambda_over_loss", "trace_over_loss"):
            above = groups(self.rows, "lambda_max" if metric == "lambda_over_loss" else "trace", "size", **where)
            below = groups(self.rows, "curvature_loss", "size", **where)
            return {s: [a / b for a, b in zip(above[s], below[s], strict=True)] for s in above}
        return groups(self.rows, metric, "size", **where)

    def by_seed(self, metric: str, network: str, size: float, *, batch_norm: bool = False) -> dict[int, float]:
        """Seed -> last-epoch value at one size without wrong labels, collapsed networks left out."""
        where = {"network": network, "label_noise": 0.0, "batch_norm": batch_norm, "size": size}
        return by_seed(self.rows, metric, **where)

    def loss_slope(self, metric: str, network: str, *, noise: float = 0.0) -> Estimate | None:
        """Slope of the metric's log on that of the loss it is taken at, over all sizes and seeds of an arm."""
        above, below = (self.groups(m, network, noise=noise) for m in (metric, "curvature_loss"))
        pairs = [(x, y) for size in below for x, y in zip(below[size], above.get(size, []), strict=True)]
        if len(pairs) < 3 or min(min(pair) for pair in pairs) <= 0 or len({x for x, _ in pairs}) < 2:
            return None
        return loglog_slope(*zip(*pairs, strict=True))

    def peak(
        self, metric: str, network: str, *, log: bool = False, noise: float, batch_norm: bool = False
    ) -> Peak | None:
        """The interior peak of a metric; with ``log`` of its decimal logarithm, None where a value is not positive."""
        found = self.groups(metric, network, noise=noise, batch_norm=batch_norm)
        if log:
            if any(value <= 0 for values in found.values() for value in values):
                return None
            found = {size: [math.log10(value) for value in values] for size, values in found.items()}
        return interior_peak(found)

    def seconds(self, network: str) -> float:
        """What all arms of a network cost."""
        spent = ("train_seconds", "measure_seconds")
        return sum(row["value"] for row in self.rows if row["metric"] in spent and row.get("network") == network)


def pooled_means(found: Groups, *, geometric: bool = False) -> dict[float, Estimate]:
    """Means by size with the (geometric: relative) spread pooled over the sizes: two seeds alone say little."""
    spread = (pooled_log_sd if geometric else pooled_sd)(found) if found else None
    average = geometric_mean_interval if geometric else mean_interval
    if spread is None or spread.df == 0:
        return {size: average(values) for size, values in found.items()}
    return {size: average(values, pooled_sd=spread.sd, df=spread.df) for size, values in found.items()}
