# SPDX-License-Identifier: Apache-2.0
"""Tests of the verification itself: fifteen faults planted in four kernels, and who must find each.

A fault that "values" finds gives a wrong result under at least one order; "report" is a message with the source line.
Faults 7, 8, 9 and 11 give right values on any sequential emulation: they are why the other levels exist. The kernels
without a fault must pass everywhere. Fault numbers: 1 no barrier between write and read; 2 lanes skip a shuffle whose
mask names them; 3 float4 loop one too far; 4 shared tile partly unwritten; 5 no barrier before a tile is
overwritten; 6 early return before a barrier; 7 no fence before the ticket; 8 plain update of a global by many threads;
9 misaligned float4; 10 write behind dynamic shared memory; 11 the fence comes after the ticket; 12 no wait for an
asynchronous copy; 13 no barrier before one overwrites what others read; 14 no warp barrier before another lane's number
is read; 15 an asynchronous copy from behind the row.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda.harness import build

ORDERS = {"forward": ("0", "0"), "reverse": ("1", "0"), "random 1": ("2", "1"), "random 2": ("2", "2")}
RIGHT, WRONG_VALUES, STOPPED, SANITIZER = 0, 3, 4, 66
FILES = {"row_normalize": (1, 2, 3, 9), "gram": (4, 5, 6), "ticket_sum": (7, 8, 10, 11), "window_sum": (12, 13, 14, 15)}


def run(fault: int, order: str, sanitizer: str = "") -> subprocess.CompletedProcess[str]:
    program = build.host_executable("planted_main", (build.PLANTED / "planted_main.cpp",), sanitizer)
    environment = os.environ | build.SANITIZER_ENVIRONMENT
    return subprocess.run([program, str(fault), *ORDERS[order]], capture_output=True, text=True, env=environment)


def source_of(fault: int) -> Path:
    name = next(name for name, faults in FILES.items() if fault in faults)
    return build.PLANTED / f"{name}.cuh"


def marked_lines(fault: int) -> set[str]:
    """``file.cuh:line`` of every line whose comment names the fault."""
    path = source_of(fault)
    lines = path.read_text().splitlines()
    marked = {f"{path.name}:{i}" for i, line in enumerate(lines, 1) if re.search(rf"fault {fault}\b", line)}
    assert marked
    return marked


def assert_reported(done: subprocess.CompletedProcess[str], fault: int, status: int, words: str) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == status, text
    assert words in text, text
    assert any(line in text for line in marked_lines(fault)), f"{marked_lines(fault)} not named in\n{text}"


# ---- plain ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
def test_no_fault_no_report(order: str) -> None:
    done = run(0, order)
    assert done.returncode == RIGHT, done.stdout + done.stderr


@pytest.mark.parametrize("fault", [1, 3, 4, 5, 10, 12, 13, 14, 15])
def test_wrong_values_show_in_some_order(fault: int) -> None:
    assert WRONG_VALUES in {run(fault, order).returncode for order in ORDERS}


@pytest.mark.parametrize("order", ORDERS)
def test_a_shuffle_that_named_lanes_skip_is_a_deadlock(order: str) -> None:
    done = run(2, order)
    assert done.returncode == STOPPED
    assert "deadlock" in done.stderr
    assert "__shfl_xor_sync at " in done.stderr
    assert any(line in done.stderr for line in marked_lines(2) | meeting_line())


def meeting_line() -> set[str]:
    lines = (build.PLANTED / "row_normalize.cuh").read_text().splitlines()
    return {f"row_normalize.cuh:{i}" for i, line in enumerate(lines, 1) if "__shfl_xor_sync" in line}


@pytest.mark.parametrize("order", ORDERS)
def test_an_early_return_before_a_barrier_is_named(order: str) -> None:
    assert_reported(run(6, order), 6, STOPPED, "__syncthreads at ")


@pytest.mark.parametrize("fault", [7, 8, 9, 11])
def test_what_only_the_other_levels_can_find(fault: int) -> None:
    """Should the plain level ever find these, the table in the docstring is out of date."""
    assert {run(fault, order).returncode for order in ORDERS} == {RIGHT}


def test_harness_without_its_own_switch() -> None:
    """The ucontext route, which macOS and aarch64 take, gives the same answers."""
    program = build.host_executable("planted_main_ucontext", (build.PLANTED / "planted_main_ucontext.cpp",))
    for fault, status in ((0, RIGHT), (1, WRONG_VALUES), (6, STOPPED)):
        for order in ("forward", "random 1"):
            done = subprocess.run([program, str(fault), *ORDERS[order]], capture_output=True, text=True)
            assert done.returncode == status, done.stdout + done.stderr


# ---- sanitizers ----------------------------------------------------------------------------------------------------
@pytest.mark.sanitizer
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_fault_no_report_under_sanitizers(sanitizer: str, order: str) -> None:
    done = run(0, order, sanitizer)
    assert done.returncode == RIGHT, done.stderr
    assert done.stderr == ""


@pytest.mark.sanitizer
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (3, "heap-buffer-overflow"),
        (9, "misaligned address"),
        (10, "heap-buffer-overflow"),
        (15, "heap-buffer-overflow"),
    ],
)
def test_asan_and_ubsan_name_bad_accesses(fault: int, words: str, order: str) -> None:
    assert_reported(run(fault, order, "address"), fault, SANITIZER, words)


@pytest.mark.sanitizer
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", [1, 5, 7, 8, 11, 13, 14])
def test_tsan_names_races(fault: int, order: str) -> None:
    assert_reported(run(fault, order, "thread"), fault, SANITIZER, "data race")


@pytest.mark.sanitizer
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("fault", [2, 6])
def test_stopped_launches_raise_no_false_alarm(fault: int, sanitizer: str) -> None:
    done = run(fault, "random 1", sanitizer)
    assert done.returncode == STOPPED, done.stderr
    assert done.stderr.startswith("FAULT ")
    assert len(done.stderr.splitlines()) == 1
