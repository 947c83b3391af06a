# SPDX-License-Identifier: Apache-2.0
"""One reduced smoke run, shared by the tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Two widths short of a power law, one arm short of all: what every path of the code needs, in about four seconds.
TINY = ("widths=8,16,32", "epochs=2", "num_train=256", "kernel_samples=12", "function_samples=20")


def command(*words: str, script: str | None = None) -> list[str]:
    start = [script] if script else ["-m", "experiments"]
    return [sys.executable, "-W", "ignore", *start, *words]


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*words: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*words, script=script), cwd=ROOT, capture_output=True, text=True, timeout=200)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """A store with a finished tiny run of ``ntk_width``."""
    out = tmp_path_factory.mktemp("finished")
    done = cli("run", "ntk_width", "--preset", "smoke", "--threads", "1", "--out", str(out), *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
