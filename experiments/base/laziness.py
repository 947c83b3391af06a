# SPDX-License-Identifier: Apache-2.0
"""What lazy means, and how it is measured.

A network trains lazily when it stays the linear model of its start: small kernel drift ‖K_T − K_0‖_F/‖K_0‖_F and small
linearization error ‖f_T − f_lin‖/‖f_T − f_0‖ (Chizat, Oyallon, Bach 2019; Lee et al. 2019). Movement ‖θ_T − θ_0‖, with
or without the denominator ‖θ_0‖, is neither.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvlab.norms import NormRecorder
from curvlab.operators.ntk import empirical_ntk, kernel_drift, linearization_error
from curvlab.training.callbacks import TrainState

MEASURES = {
    "relative_movement": "relative movement ‖θ_T−θ_0‖/‖θ_0‖",
    "absolute_movement": "absolute movement ‖θ_T−θ_0‖",
    "initial_norm": "initial norm ‖θ_0‖",
    "kernel_drift": "kernel drift ‖K_T−K_0‖/‖K_0‖",
    "linearization_error": "linearization error ‖f_T−f_lin‖/‖f_T−f_0‖",
}


class Stopwatch:
    """Training seconds of a unit, over all sessions that worked on it: the checkpoint holds what is in its epochs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def on_start(self, state: TrainState) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_epoch(self, state: TrainState) -> None:
        """Add an epoch."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        """From the checkpoint."""
        self.seconds, self._since = float(saved["seconds"]), time.perf_counter()


def movement_rows(recorder: NormRecorder, steps_per_epoch: int) -> list[dict[str, Any]]:
    """Rows of a recorder with ``reference="start"``, one an epoch and measure; epoch 0 is the start."""
    names = {"relative_movement": "relative_movement", "distance": "absolute_movement", "reference_l2": "initial_norm"}
    return [
        {"epoch": row["step"] // steps_per_epoch, "metric": metric, "value": row[column]}
        for row in recorder.rows()
        for column, metric in names.items()
    ]


def measure(model: nn.Module, start: nn.Module, inputs: Tensor, held_out: Tensor) -> dict[str, float]:
    """Kernel drift on ``inputs`` and linearization error on ``held_out`` of a trained network against its own start."""
    began = time.perf_counter()
    before, after = empirical_ntk(start, inputs), empirical_ntk(model, inputs)
    norms = before.double().norm().item(), after.double().norm().item()
    return {
        "kernel_drift": kernel_drift(after, before),
        "kernel_growth": norms[1] / norms[0],
        "kernel_alignment": (before.double() * after.double()).sum().item() / (norms[0] * norms[1]),
        "linearization_error": linearization_error(model, list(start.parameters()), held_out),
        "measure_seconds": time.perf_counter() - began,
    }
