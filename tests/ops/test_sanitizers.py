# SPDX-License-Identifier: Apache-2.0
"""CPU kernels under ASan and UBSan, for every instruction set; run with ``pytest -m sanitizer tests/ops``.

What the threads of a call share is read only, or theirs alone by construction (a strip, a partial sum), so there is no
race for TSan to find; that results do not depend on their number is a test of its own.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from curvlab import ops
from tests.cuda.harness import build

pytestmark = pytest.mark.sanitizer

MAIN = build.ROOT / "tests" / "ops" / "sanitized" / "strips_main.cpp"
SOURCES = (MAIN, build.SPARSE / "batch_parts.cpp", build.SPARSE / "strip_plan.cpp")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {"default": (), "avx2": AVX2, "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")}
CASES = 13 * 5 * 2


@pytest.mark.parametrize("capability", FLAGS)
def test_masked_convolutions_are_clean(capability: str) -> None:
    order = list(FLAGS)
    if order.index(capability) > order.index(ops.cpu_capability()):
        pytest.skip(f"this CPU lacks {capability}")
    name = capability.upper()
    flags = (
        f"-DCURVLAB_CPU_CAPABILITY={name}",
        f"-DCURVLAB_CPU_CAPABILITY_{name}",
        "-Wno-psabi",
        *FLAGS[capability],
        "-O1",
    )
    program = build.host_executable(f"strips_{capability}", SOURCES, "address", flags=flags)
    environment = os.environ | build.SANITIZER_ENVIRONMENT
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == CASES
    assert all(line.endswith("right") for line in lines)
