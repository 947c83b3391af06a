# SPDX-License-Identifier: Apache-2.0
"""Run a study's units one after the other: skip what is finished, resume what is not, outlive what fails.

All state is on disk in the :class:`~curvlab.runs.store.RunStore`; this process may be killed at any time. A unit that
raises is reported and written down beside its run, and the others go on. Ctrl-C stops between two rows, never inside.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from curvlab.runs.journal import atomic_write
from curvlab.runs.store import Run, RunStore, RunStoreError
from curvlab.runs.tables import format_seconds
from experiments.base.study import StudyModule, Tools


@dataclass
class Outcome:
    """What became of a study's units."""

    runs: list[Run] = field(default_factory=list)
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""
        return not self.failures and not self.interrupted and all(run.finished for run in self.runs)


class Clock:
    """Forecast of the remaining time: seconds per unit of cost so far, over what is left.

    Costs and not counts, because the widest network takes a thousand times the narrowest's time.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.total = sum(costs)
        self.done = 0.0
        self.current = 0.0
        self._start = time.monotonic()

    def left(self) -> str:
        """``about 8 min left``, or nothing while there is nothing to extrapolate from."""
        done = self.done + self.current
        spent = time.monotonic() - self._start
        if done <= 0 or spent < 1.0:
            return ""
        return f"about {format_seconds(spent * (self.total - done) / done)} left"


class Board:
    """What the user sees: two bars in a terminal, one line a unit elsewhere."""

    def __init__(self, console: Console, name: str, costs: Sequence[float]) -> None:
        self.console, self.name, self.count = console, name, len(costs)
        self.clock = Clock(costs)
        self._bars: Progress | None = None
        self._unit_cost = 0.0

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the bars while the units run."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bars:
            self._bars = bars
            self._all = bars.add_task(self.name, total=max(self.clock.total, 1e-9), note="")
            self._one = bars.add_task("", total=1, note="", visible=False)
            yield
        self._bars = None

    def start(self, index: int, label: str, cost: float) -> None:
        """A unit begins."""
        self._unit_cost, self.clock.current = cost, 0.0
        if self._bars is not None:
            self._bars.update(self._one, description=f"[{index}/{self.count}] {label}", visible=True)
        self.step(0, 1)

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the unit are over; a study may name them (epochs)."""
        self.clock.current = self._unit_cost * done / max(total, 1)
        if self._bars is not None:
            note = f"{done}/{total}" if total > 1 else ""
            self._bars.update(self._one, completed=done, total=max(total, 1), note=note)
            self._bars.update(self._all, completed=self.clock.done + self.clock.current, note=self.clock.left())

    def end(self, index: int, label: str, words: str) -> None:
        """A unit is over: a line that stays."""
        self.clock.done, self.clock.current = self.clock.done + self._unit_cost, 0.0
        left = self.clock.left() if self._bars is None and index < self.count else ""
        self.console.print(f"[{index}/{self.count}] {label}: {words}" + (f"  ({left})" if left else ""), markup=False)


def open_runs(
    study: StudyModule, name: str, config: Any, *, store: RunStore, context: Callable[[Any], Mapping[str, str]]
) -> list[tuple[Any, Run]]:
    """Every unit of the configuration with its run on disk; ``context`` says what names a unit's run besides it."""
    return [(unit, store.open(name, unit, context=context(unit))) for unit in study.expand(config)]


def run_units(
    study: StudyModule, name: str, pairs: Sequence[tuple[Any, Run]], tools: Tools, console: Console
) -> Outcome:
    """Finish every run that is not finished; see the module's text."""
    outcome = Outcome(runs=[run for _, run in pairs])
    todo = [(unit, run) for unit, run in pairs if not run.finished]
    outcome.skipped = len(pairs) - len(todo)
    if outcome.skipped:
        console.print(f"{outcome.skipped} of {len(pairs)} units are finished already and are skipped", markup=False)
    board = Board(console, name, [study.cost(unit) for unit, _ in todo])
    tools.progress = board.step
    try:
        with board.live():
            for index, (unit, run) in enumerate(todo, start=1):
                board.start(index, str(unit), study.cost(unit))
                words = _run_one(study, unit, run, tools, outcome)
                board.end(index, str(unit), words)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        tools.progress = lambda done, total: None
    return outcome


def _run_one(study: StudyModule, unit: Any, run: Run, tools: Tools, outcome: Outcome) -> str:
    """Run one unit to its end; what to print about it."""
    try:
        with run.lock():
            if run.finished:  # another process was faster
                return "finished by another process"
            resumed = run.checkpoint_path.exists()
            summary = dict(study.run(unit, run, tools))
            run.finish(summary, environment=tools.environment())
            (run.path / "error.txt").unlink(missing_ok=True)  # of an earlier try
        _release_memory(tools)
        return f"{format_seconds(run.done['wall_seconds'])}" + (" (resumed)" if resumed else "")
    except Exception as error:  # a unit must never take the others down
        _release_memory(tools)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome.failures.append((str(unit), line))
        try:
            atomic_write(run.path / "error.txt", traceback.format_exc().encode())
            return f"FAILED: {line}\n    traceback: {run.path / 'error.txt'}"
        except RunStoreError:
            return f"FAILED: {line}"


def _release_memory(tools: Tools) -> None:
    if tools.device.type == "cuda":
        torch.cuda.empty_cache()
