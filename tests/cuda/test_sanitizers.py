# SPDX-License-Identifier: Apache-2.0
"""The kernels on the CPU under sanitizers; run with ``pytest -m sanitizer tests/cuda`` (or ``make sanitize``).

ASan and UBSan find accesses outside of a tensor, of the workspace or of shared memory, misaligned vector loads,
overflow and bad shifts, each with its source line. TSan finds races within a block and between blocks by
happens-before, whatever order ran: every CUDA thread is a thread to it, and only the kernel's barriers, fences and
atomics order them. Limits: small sizes (at most 29 blocks of 256 threads a launch under TSan), reads of memory that
nobody wrote show as NaN only, and a race is found on the paths that the input takes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda.harness import build

pytestmark = pytest.mark.sanitizer

ORDERS = {"forward": ("0", "0"), "reverse": ("1", "0"), "random": ("2", "7")}
CASES = {"address": 31, "thread": 19}


@pytest.mark.parametrize(
    ("sanitizer", "order"),
    [("address", "forward"), ("address", "reverse"), ("address", "random"), ("thread", "random")],
)
def test_norm_kernels_are_clean(sanitizer: str, order: str) -> None:
    sources = (*build.NORMS_LAUNCHERS, build.HARNESS / "norms_main.cpp")
    run_clean(build.host_executable("norms_main", sources, sanitizer), order, CASES[sanitizer])


@pytest.mark.parametrize(
    ("sanitizer", "order"),
    [("address", "forward"), ("address", "reverse"), ("address", "random"), ("thread", "random")],
)
def test_hvp_kernels_are_clean(sanitizer: str, order: str) -> None:
    sources = (*build.HVP_LAUNCHERS, build.HARNESS / "hvp_main.cpp")
    run_clean(build.host_executable("hvp_main", sources, sanitizer), order, 3 * 8)


@pytest.mark.parametrize(
    ("sanitizer", "order"),
    [("address", "forward"), ("address", "reverse"), ("address", "random"), ("thread", "random")],
)
def test_masked_convolution_kernels_are_clean(sanitizer: str, order: str) -> None:
    sources = (*build.SPARSE_LAUNCHERS, build.HARNESS / "sparse_main.cpp")
    run_clean(build.host_executable("sparse_main", sources, sanitizer), order, 3 * 5)


def run_clean(program: Path, order: str, cases: int) -> None:
    environment = os.environ | build.SANITIZER_ENVIRONMENT
    done = subprocess.run([program, *ORDERS[order]], capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == cases
    assert all(line.endswith("right") for line in lines)
