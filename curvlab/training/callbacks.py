# SPDX-License-Identifier: Apache-2.0
"""What the training loop shows to the outside: the live state, and the calls to whoever watches.

A callback is any object with some of the methods ``on_start(state)``, ``on_step(state)``, ``on_epoch(state)`` and
``on_end(state)``.  The loop is closed to features: measuring, pruning or tracking curvature enters this way.  One that
keeps something across epochs may have ``state_dict() -> dict`` (JSON) and ``load_state_dict(dict)``: then a checkpoint
holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["CallbackSource", "Callbacks", "TrainState"]

CallbackSource = Sequence[object] | Callable[[int], Sequence[object]]
"""Callbacks of one network, or a function ``seed -> callbacks`` that makes them for each network of a group."""

EVENTS = ("on_start", "on_step", "on_epoch", "on_end")


@dataclass
class TrainState:
    """One network in training, live: read it inside a callback, clone what you keep.

    Attributes:
        model: the network; its parameters are the ones that train, so it can be evaluated at any time.
        params: its live parameter tensors (in ``model.parameters()`` order).
        seed: the seed that names the network within its group.
        index: its position in the group.
        epoch: finished epochs (0 in ``on_start``; while an epoch runs, the epochs before it).
        step: finished updates.
        lr: learning rate of the last update.
        history: this network's rows so far, one per epoch.
        diverged: a non-finite training loss was seen at the end of an epoch.
    """

    model: nn.Module
    params: list[Tensor]
    seed: int
    index: int = 0
    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    diverged: bool = False


class Callbacks:
    """The callbacks of all networks of a group, with the bound methods looked up once.

    Raises:
        TypeError: a callback has none of the four methods (a class was passed for an instance, a name is misspelled).
        ValueError: one sequence was given for a group of several networks where each needs its own.
    """

    def __init__(self, source: CallbackSource, states: Sequence[TrainState]) -> None:
        if callable(source):
            self.per_state = [list(source(state.seed)) for state in states]
        else:
            if len(source) and len(states) > 1:
                raise ValueError(
                    f"train_group: callbacks must be a function seed -> callbacks for {len(states)} networks "
                    "(one shared object would mix their measurements), got a sequence"
                )
            self.per_state = [list(source) for _ in states]
        for callback in (one for row in self.per_state for one in row):
            if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
                raise TypeError(
                    f"train: a callback must be an object with one of {', '.join(EVENTS)}, got {callback!r}"
                )
        self._calls = {
            event: [
                [getattr(one, event) for one in row if callable(getattr(one, event, None))] for row in self.per_state
            ]
            for event in EVENTS
        }
        self.watches_steps = any(self._calls["on_step"])

    def fire(self, event: str, state: TrainState) -> None:
        """Call ``event`` of every callback of ``state``'s network, in the order given."""
        for call in self._calls[event][state.index]:
            call(state)

    def state_dict(self) -> list[list[Any]]:
        """What the callbacks keep, network by network; ``None`` for one that keeps nothing."""
        return [[one.state_dict() if hasattr(one, "state_dict") else None for one in row] for row in self.per_state]  # type: ignore[attr-defined]

    def load_state_dict(self, saved: list[list[Any]]) -> None:
        """Give the callbacks back what :meth:`state_dict` held.

        Raises:
            ValueError: the number of callbacks differs from the one saved.
        """
        if [len(row) for row in saved] != [len(row) for row in self.per_state]:
            raise ValueError(
                f"train: callbacks must be the ones of the checkpoint ({[len(row) for row in saved]} per network), "
                f"got {[len(row) for row in self.per_state]}"
            )
        for row, values in zip(self.per_state, saved, strict=True):
            for one, value in zip(row, values, strict=True):
                if value is not None and hasattr(one, "load_state_dict"):
                    one.load_state_dict(value)  # type: ignore[attr-defined]
