# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from curvlab.spectra import EigenpairTracker, plot_density, plot_track, slq_density
from curvlab.training.callbacks import Callbacks, TrainState
from tests.spectra.known import generator, hessian_like, operator, symmetric

MATRIX = symmetric(hessian_like(60))


@dataclass
class State:
    step: int = 0
    epoch: int = 0


class Clock:
    """Each look takes ``tick`` seconds; training takes what ``pass_time`` says."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def grown(state: Any) -> Any:
    """A Hessian that grows with training; its leading eigenvectors stay."""
    return operator((1 + 0.1 * state.step) * MATRIX)


def drive(tracker: EigenpairTracker, steps: int, clock: Clock | None = None, *, start: int = 0) -> None:
    tracker.on_start(State(start))
    for step in range(start + 1, start + steps + 1):
        if clock is not None:
            clock.now += 1.0
        tracker.on_step(State(step, (step - 1) // 5))
        if step % 5 == 0:
            tracker.on_epoch(State(step, step // 5))
    tracker.on_end(State(start + steps, (start + steps) // 5))


def test_measures_at_its_turns_and_at_both_ends() -> None:
    for unit, every, want in (("steps", 4, [0, 4, 8, 12]), ("epochs", 1, [0, 5, 10, 12]), ("steps", 6, [0, 6, 12])):
        tracker = EigenpairTracker(grown, k=2, every=every, unit=unit)  # type: ignore[arg-type]
        drive(tracker, 12)
        assert [row["step"] for row in tracker.rows] == want
        for row in tracker.rows:
            factor = 1 + 0.1 * row["step"]
            for value, bound, exact in zip(row["values"], row["error_bounds"], (100.0, 70.0), strict=True):
                assert abs(value - factor * exact) <= bound + 1e-9
            assert row["converged"] and row["num_products"] > 0


def test_later_searches_start_from_the_last_vectors() -> None:
    tracker = EigenpairTracker(grown, k=3, every=1, unit="steps")
    drive(tracker, 3)
    assert tracker.vectors is not None and tracker.vectors.shape == (3, 60)
    first, *later = [row["num_products"] for row in tracker.rows]
    assert max(later) < first


def test_another_size_starts_cold() -> None:
    tracker = EigenpairTracker(lambda state: operator(MATRIX[: 60 - state.step, : 60 - state.step]), unit="steps")
    drive(tracker, 2)
    assert [row["converged"] for row in tracker.rows] == [True] * 3


def test_share_is_stated_and_bounded() -> None:
    """Every look at the clock costs 0.5 s, so a measurement costs about 1 s; training costs 1 s a step."""
    clock = Clock(tick=0.5)
    free = EigenpairTracker(grown, unit="steps", clock=clock)
    drive(free, 40, clock)
    assert len(free.rows) == 41 and free.share > 0.2
    clock = Clock(tick=0.5)
    bounded = EigenpairTracker(grown, unit="steps", budget_share=0.05, clock=clock)
    drive(bounded, 100, clock)
    assert bounded.num_skipped > 50 and len(bounded.rows) + bounded.num_skipped in (101, 102)
    assert bounded.rows[-1]["step"] == 100
    assert all(row["share"] <= 0.05 for row in bounded.rows[2:-1])


def test_state_goes_through_json() -> None:
    tracker = EigenpairTracker(grown, k=2, every=2, unit="steps")
    drive(tracker, 4)
    saved = json.loads(json.dumps(tracker.state_dict()))
    other = EigenpairTracker(grown, k=2, every=2, unit="steps")
    other.load_state_dict(saved)
    drive(other, 4, start=4)
    assert [row["step"] for row in other.rows] == [0, 2, 4, 6, 8]
    assert other.rows[:3] == tracker.rows and other.share > 0


def test_is_a_callback_of_the_training_loop() -> None:
    tracker = EigenpairTracker(grown)
    state = TrainState(torch.nn.Linear(1, 1), [], seed=0)
    calls = Callbacks([tracker], [state])
    calls.fire("on_start", state)
    assert len(tracker.rows) == 1 and calls.state_dict()[0][0]["rows"] == tracker.rows


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"unit": "hours"}, "unit must be 'steps' or 'epochs', got 'hours'"),
        ({"budget_share": 0.0}, "budget_share must be above 0 and at most 1, got 0.0"),
        ({"tol": -1.0}, "tol must be a finite number above 0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"EigenpairTracker: {message}"):
            EigenpairTracker(grown, **arguments)


def test_figures() -> None:
    tracker = EigenpairTracker(grown, k=2, every=2, unit="steps")
    drive(tracker, 6)
    axes = plot_track(tracker.rows, threshold=120.0)
    drawn = [line for line in axes.get_lines() if np.size(line.get_xdata()) == 4]
    for i in range(2):
        assert np.asarray(drawn[i].get_ydata()).tolist() == [row["values"][i] for row in tracker.rows]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["λ1", "λ2"]
    with pytest.raises(ValueError, match="plot_track: rows must hold at least one row with 'step', got 0 rows"):
        plot_track([])

    density = slq_density(operator(MATRIX), 4, 20, generator=generator())
    axes = density.plot(label="Hessian")
    (line,) = axes.get_lines()
    grid = torch.tensor(line.get_xdata(), dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(line.get_ydata()), density.density(grid).clamp(min=axes.get_ylim()[0]))
    assert len(axes.collections) == 1  # the band
    assert not plot_density(slq_density(operator(MATRIX), 1, 20, generator=generator())).collections
    axes.figure.canvas.draw()
