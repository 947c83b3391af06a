# SPDX-License-Identifier: Apache-2.0
"""``python -m curvlab [--json]``: what a bug report needs.

Versions, build flags, CPU capability in use, CUDA kernels built or not and for which architectures, device, threads,
allocator settings. It names no host and no user.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import curvlab
from curvlab import ops
from curvlab.runs.environment import cpu_model

ALLOCATOR_VARIABLES = (
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
PACKAGES = ("numpy", "scipy", "matplotlib", "pyarrow", "safetensors", "scikit-learn", "tyro")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _set_variables(names: tuple[str, ...]) -> str:
    found = [f"{name}={os.path.basename(os.environ[name])}" for name in names if name in os.environ]
    return ", ".join(found) or "none set"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB" for p in found]


def collect() -> dict[str, dict[str, Any]]:
    """Facts by section, JSON-able."""
    facts = ops.build_facts()
    return {
        "versions": {
            "curvlab": curvlab.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
            "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
            **{package: _version_of(package) for package in PACKAGES},
        },
        "build": {
            "compiled against": f"torch {facts['torch']}",
            "compiler": facts["compiler"],
            "flags": facts["flags"],
            "CPU instruction sets": ", ".join(facts["instruction_sets"]),
            "CUDA kernels": (
                f"built with CUDA {facts['cuda']} for {facts['cuda_architectures']}" if facts["cuda"] else "not built"
            ),
            "CUDA module": ops.cuda_status(),
        },
        "machine": {
            "CPU": cpu_model(),
            "CPU capability in use": ops.cpu_capability(),
            "GPU": "; ".join(_gpus()) or "none",
        },
        "settings": {
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical cores, "
            f"{torch.get_num_interop_threads()} between operations",
            "thread variables": _set_variables(THREAD_VARIABLES),
            "allocator variables": _set_variables(ALLOCATOR_VARIABLES),
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the facts as text, or as JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m curvlab", description="Print what a bug report needs.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    sections = collect()
    if options.json:
        print(json.dumps(sections, indent=2))
        return 0
    for section, rows in sections.items():
        print(section)
        for key, value in rows.items():
            print(f"  {key:24}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
