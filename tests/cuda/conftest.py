# SPDX-License-Identifier: Apache-2.0
"""The levels of verification in this folder, from the quickest on:

1. ``test_norms_host.py``: the kernels' own source, compiled for the CPU and run with one fiber per CUDA thread.
2. ``test_sanitizers.py`` (marker ``sanitizer``): the same under ASan and UBSan, and under TSan.
3. ``test_ptx.py``: what nvcc makes of it, run in a PTX simulator (``CURVLAB_PTX_TOOLS``).
4. ``test_sass.py``: facts about the machine code (nvdisasm): spills, load widths, occupancy.

``test_planted.py`` plants faults and asks that levels 1 to 3 find them. Nothing here measures time on a GPU.
"""

from __future__ import annotations

import pytest

from tests.cuda.harness import build


@pytest.fixture(scope="session", autouse=True)
def host_compiler() -> str:
    compiler = build.cxx()
    if compiler is None:
        pytest.skip("no C++ compiler: the kernels cannot be run on the CPU")
    return compiler
