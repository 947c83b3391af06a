# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the masked convolutions' own kernels: a line of a header is taken away or changed, and the host
harness must give wrong numbers under some order. Without a change it passes: ``test_sanitizers.py``."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.cuda.harness import build

pytestmark = pytest.mark.sanitizer  # each is a build of half a minute

RIGHT, WRONG_VALUES = 0, 3
ORDERS = (("0", "0"), ("1", "0"), ("2", "7"))
WEIGHT = "masked_conv2d_weight_kernel.cuh"
FAULTS = {
    "a window is read before its copies have arrived": ("window.cuh", "wait_for_copies<1>();", ""),
    "the wait leaves the group that is needed": ("window.cuh", "wait_for_copies<1>();", "wait_for_copies<2>();"),
    "a window is read before others have staged it": (
        "window.cuh",
        "wait_for_copies<1>();\n    __syncthreads();",
        "wait_for_copies<1>();",
    ),
    "a window is overwritten while others read it": (
        "window.cuh",
        "__syncthreads();  // nobody reads",
        "// nobody reads",
    ),
    "scratch is read before its warp has written it": (
        "window.cuh",
        "store_shared(own(t), sums[t]);\n    __syncwarp();",
        "store_shared(own(t), sums[t]);",
    ),
    "scratch becomes a window too early": (
        WEIGHT,
        "__syncthreads();  // the scratch becomes",
        "// the scratch becomes",
    ),
    "a later slice replaces the earlier one": (WEIGHT, "is_first ? sum : *place + sum", "sum"),
    "rows are added up before they are there": (WEIGHT, "= total;\n    __syncthreads();", "= total;"),
    "the last tap of a list twice": ("masked_conv2d_kernel.cuh", "k < end; ++k", "k <= end; ++k"),
    "images behind the last": (
        "window.cuh",
        "inside && i < tile.images) {\n        stage_one",
        "inside) {\n        stage_one",
    ),
}


def with_fault(name: str) -> Path:
    """A folder with the changed header alone."""
    header, found, put = FAULTS[name]
    text = (build.SPARSE / header).read_text()
    assert text.count(found) == 1, f"{header} has {text.count(found)} times {found!r}"
    changed = text.replace(found, put)
    folder = build.build_folder() / f"planted-{hashlib.sha256(changed.encode()).hexdigest()[:16]}" / "sparse_conv"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / header).write_text(changed)
    return folder.parent


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    sources = (*build.SPARSE_LAUNCHERS, build.HARNESS / "sparse_main.cpp")
    headers = with_fault(name)
    needs_asan = name == "images behind the last"
    program = build.host_executable("sparse_fault", sources, "address" if needs_asan else "", headers=headers)
    done = [subprocess.run([program, *order], capture_output=True, text=True, timeout=250) for order in ORDERS]
    statuses = {d.returncode for d in done}
    if needs_asan:
        assert statuses - {RIGHT, WRONG_VALUES}
        assert any("heap-buffer-overflow" in d.stderr for d in done)
    else:
        assert statuses - {RIGHT} == {WRONG_VALUES}, [d.stderr for d in done]
