# SPDX-License-Identifier: Apache-2.0
"""What a number needs beside it to be repeated: versions, processor, threads. No host, user or folder names."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cpu_model() -> str:
    """Processor name from ``/proc/cpuinfo``, or what ``platform`` knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu part", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def cpu_count() -> int:
    """Processors that this process may use: containers and ``taskset`` allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capture_environment(
    packages: Mapping[str, str] | None = None,
    *,
    threads: int | None = None,
    device: str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Facts of this process to store beside results.

    Args:
        packages: versions by package name, from the caller (this room imports no torch to ask).
        threads: compute threads in use (``torch.get_num_threads()``).
        device: accelerator or ``cpu``, in words.
        commit: revision of the code.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": cpu_count(),
        "threads": threads,
        "device": device,
        "commit": commit,
        "packages": {str(name): str(version) for name, version in sorted((packages or {}).items())},
    }
    return {key: value for key, value in facts.items() if value not in (None, {})}
