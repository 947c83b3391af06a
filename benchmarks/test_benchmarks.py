# SPDX-License-Identifier: Apache-2.0
"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-only [--benchmark-json FILE]``."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks.__main__ import load, names
from benchmarks.harness import Engine


def _engines() -> list[Any]:
    found = []
    for name in names():
        for case in load(name).cases(quick=True):
            engines: dict[str, Engine] = {"ours": case.ours, **case.peers}
            if case.limit:
                engines[f"limit: {case.limit_name}"] = case.limit
            group = f"{name}: {case.name}"
            found += [pytest.param(group, run, id=f"{group}-{who}") for who, run in engines.items()]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Build the cases only where they are asked for: they hold gigabytes."""
    if "engine" in metafunc.fixturenames:
        skipped = metafunc.config.getoption("--benchmark-skip") or metafunc.config.getoption("--benchmark-disable")
        metafunc.parametrize(("group", "engine"), [] if skipped else _engines())


def test_case(benchmark: Any, group: str, engine: Engine) -> None:
    """Time one engine; engines of one case share a group."""
    benchmark.group = group
    benchmark._timer = time.process_time
    benchmark.pedantic(engine, warmup_rounds=1, rounds=7)
