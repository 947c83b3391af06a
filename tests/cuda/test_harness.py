# SPDX-License-Identifier: Apache-2.0
"""The host harness itself: what it says CUDA's words mean, and how it keeps what it built."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda.harness import build


def test_words_of_cuda_mean_what_the_guide_says() -> None:
    program = build.host_executable("self_check", (build.HARNESS / "self_check.cpp",))
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_plain_shared_arrays_do_not_compile(tmp_path: Path) -> None:
    """They would be neither poisoned nor guarded: the error says what to write."""
    source = tmp_path / "plain.cpp"
    source.write_text(
        '#include "common/device.cuh"\n__global__ void k() { __shared__ int a[4]; a[0] = 1; }\nint main() {}\n'
    )
    with pytest.raises(build.BuildError, match="write_CURVLAB_SHARED"):
        build.host_executable("plain", (source,))


def test_builds_are_kept_and_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_TEST_BUILD", str(tmp_path / "kept"))
    build.build_folder.cache_clear()
    try:
        source = tmp_path / "one.cpp"
        source.write_text("int main() { return 0; }\n")
        first = build.host_executable("one", (source,))
        stamp = first.stat().st_mtime_ns
        assert first.parent == tmp_path / "kept"
        assert build.host_executable("one", (source,)) == first
        assert first.stat().st_mtime_ns == stamp
        source.write_text("int main() { return wrong; }\n")
        with pytest.raises(build.BuildError, match="wrong"):
            build.host_executable("two", (source,))
        assert not [p for p in first.parent.iterdir() if p.name.startswith(("two", "partial")) and p.suffix != ".lock"]
    finally:
        build.build_folder.cache_clear()
