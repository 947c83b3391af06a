# SPDX-License-Identifier: Apache-2.0
"""How the comparisons are timed.

The engines of a case alternate within one process, in a new order every round, so that a busy machine, a warm cache or
a sinking clock meets them all alike. Reported are medians over rounds of processor time per call (summed over threads;
at one thread the headline) with wall time beside them. Ratios are peer / ours of medians: above 1, ours is faster.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Engine = Callable[[], Any]

# An engine that takes 0.3 seconds and this many times the fastest peer is timed once: it decides nothing.
SLOW = 1.3

# glibc hands fresh, zeroed pages to every large result by default, which hides everything else (a 32 MiB relu: 16 ms
# with them, 3 ms without). With these, freed pages are kept: the fairer setting to peers that allocate results.
KEPT_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


@dataclass(frozen=True)
class Case:
    """One comparison: ``ours`` against each of ``peers``; ``limit`` is a floor of the machine, not a competitor.

    Args:
        name: what is compared.
        ours: this project's engine.
        peers: the others.
        limit: an engine that shows a floor of the machine, or its seconds a call where they were computed.
        limit_name: what the floor is.
        note: a line under the table.
        not_counted: peers that are shown but are no standard, with the reason (a wrong result, less work).
        bar: (must hold, goal) of our share of the best counted peer's time.
        memory: peak resident MB over model and data, of ``"ours"`` and of peers.
    """

    name: str
    ours: Engine
    peers: Mapping[str, Engine]
    limit: Engine | float | None = None
    limit_name: str = ""
    note: str = ""
    not_counted: Mapping[str, str] = field(default_factory=dict)
    bar: tuple[float, float] | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Timing:
    """Seconds per call of one engine, one entry a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def cpu_ms(self) -> float:
        """Median processor time per call in milliseconds."""
        return 1e3 * statistics.median(self.cpu)

    @property
    def wall_ms(self) -> float:
        """Median wall time per call in milliseconds."""
        return 1e3 * statistics.median(self.wall)


def keep_pages() -> None:
    """Start this process again under ``KEPT_PAGES``, unless the user has set the allocator."""
    if any(name in os.environ for name in KEPT_PAGES) or not sys.platform.startswith("linux"):
        return
    arguments = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **KEPT_PAGES})


def allocator_settings() -> str:
    """The allocator settings in force, for the heading of a table."""
    found = [f"{name}={os.environ[name]}" for name in KEPT_PAGES if name in os.environ]
    return ", ".join(found) or "the C library's defaults (large results get fresh pages)"


def _seconds_per_call(engine: Engine) -> tuple[float, float]:
    """Wall and processor seconds of the second call; of the first, where that takes seconds."""
    for _ in range(2):  # the first call allocates, and may build tables or compile
        start, cpu = time.perf_counter(), time.process_time()
        engine()
        wall, spent = time.perf_counter() - start, time.process_time() - cpu
        if wall > 3.0:
            break
    return max(wall, 1e-7), spent


def alternate(
    engines: Mapping[str, Engine], *, rounds: int, seconds: float, budget: float, seed: int = 0
) -> dict[str, Timing]:
    """Time ``engines`` in turns.

    Args:
        engines: what to call, by name.
        rounds: how often each is timed, at most; the medians are over rounds.
        seconds: how long one engine is called in one round, about (at least one call).
        budget: seconds for all rounds, about: slow engines get fewer rounds, but at least three.
        seed: of the order within each round.

    Returns:
        Timings by name.
    """
    once, spent = {}, {}
    for name, engine in engines.items():
        once[name], spent[name] = _seconds_per_call(engine)
    calls = {name: max(1, round(seconds / once[name])) for name in engines}
    fastest = min((once[name] for name in engines if name.startswith("peer ")), default=0.0)
    slow = {name for name in engines if name.startswith("peer ") and once[name] > max(SLOW * fastest, 0.3)}
    rounds = max(3, min(rounds, int(budget / sum(once[name] * calls[name] for name in engines if name not in slow))))
    timings = {name: Timing() for name in engines}
    order, shuffle = [name for name in engines if name not in slow], random.Random(seed)
    for name in slow:
        timings[name] = Timing(cpu=[spent[name]], wall=[once[name]])
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            engine, count = engines[name], calls[name]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                engine()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            timings[name].cpu.append(cpu / count)
            timings[name].wall.append(wall / count)
    return timings


def measure(case: Case, *, rounds: int, seconds: float, budget: float) -> list[dict[str, Any]]:
    """Rows ``{case, ours_ms, peer, peer_ms, ratio, …}``, one a peer; times are processor milliseconds a call."""
    engines: dict[str, Engine] = {"ours": case.ours, **{f"peer {name}": peer for name, peer in case.peers.items()}}
    if callable(case.limit):
        engines["limit"] = case.limit
    timings = alternate(engines, rounds=rounds, seconds=seconds, budget=budget)
    ours = timings["ours"]
    limit_ms = 1e3 * case.limit if isinstance(case.limit, float) else None
    if "limit" in timings:
        limit_ms = timings["limit"].cpu_ms
    return [
        {
            "case": case.name,
            "ours_ms": ours.cpu_ms,
            "peer": name,
            "peer_ms": timings[f"peer {name}"].cpu_ms,
            "ratio": timings[f"peer {name}"].cpu_ms / ours.cpu_ms,
            "ours_wall_ms": ours.wall_ms,
            "peer_wall_ms": timings[f"peer {name}"].wall_ms,
            "wall_ratio": timings[f"peer {name}"].wall_ms / ours.wall_ms,
            "limit": case.limit_name or None,
            "limit_ms": limit_ms,
            "times_limit": ours.cpu_ms / limit_ms if limit_ms else None,
            "rounds": len(timings[f"peer {name}"].cpu),
            "note": case.note,
            "not_counted": case.not_counted.get(name),
            "must": case.bar[0] if case.bar else None,
            "goal": case.bar[1] if case.bar else None,
            "ours_mb": case.memory.get("ours"),
            "peer_mb": case.memory.get(name),
        }
        for name in case.peers
    ]


def shares(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per case with a bar: ``{case, best, share, must, goal}``, share = our time / the best counted peer's.

    Processor time at one thread; wall time at several, where the processor's is a sum that waiting threads add to.
    """
    found = []
    for name in dict.fromkeys(row["case"] for row in rows if row["must"] is not None):
        counted = [row for row in rows if row["case"] == name and row["not_counted"] is None]
        if counted:
            clock = "wall_ms" if counted[0].get("threads", 1) > 1 else "ms"
            best = min(counted, key=lambda row: row[f"peer_{clock}"])
            share = best[f"ours_{clock}"] / best[f"peer_{clock}"]
            found.append({"case": name, "best": best["peer"], "share": share, **{k: best[k] for k in ("must", "goal")}})
    return found
