# SPDX-License-Identifier: Apache-2.0
"""Entry to the compiled kernels: the only room that touches ``torch.ops.curvlab``.

Importing it loads ``_C`` (CPU kernels, always there) and, where it was built and loads, ``_C_cuda``. One file per csrc
family holds the public wrappers; ``reference`` holds the same functions in plain PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from typing import Any

import torch  # its libraries must be loaded before ours

from curvlab import _build

try:
    import curvlab._C  # noqa: F401
    from curvlab import _host
except ImportError as error:
    raise ImportError(
        f"curvlab's compiled kernels do not load: {error}. They fit only the torch that they were built with; "
        f"{_build.HOW_TO_BUILD}",
        name="curvlab._C",
    ) from error


def build_facts() -> dict[str, Any]:
    """What this build was made with: torch, compiler, flags, instruction sets, CUDA and its architectures."""
    return json.loads(_host.build_facts())


def _same_abi(built: str, running: str) -> bool:
    """Whether two versions of torch share a C++ interface: equal major.minor, both with CUDA or both without."""

    def kind(version: str) -> tuple[list[str], bool]:
        release, _, local = version.partition("+")
        return release.split(".")[:2], local.startswith("cu")

    return kind(built) == kind(running)


def _check_torch() -> None:
    # Loading is no proof: with another torch the modules may load and then read its objects wrongly.
    built = build_facts()["torch"]
    if not _same_abi(built, torch.__version__):
        raise ImportError(
            f"curvlab was built with torch {built}, but this is torch {torch.__version__}: their C++ ABIs differ; "
            "build it anew: pip install .",
            name="curvlab._C",
        )


_check_torch()


def _without_folders(text: str) -> str:
    """Paths cut to their last part, spaces in folder names included: a bug report need not name home and user."""
    return re.sub(r"""[^\s:'"`(]*/(?:[^:\n]*/)?""", "", text)


def _load_cuda() -> str:
    if importlib.util.find_spec("curvlab._C_cuda") is None:
        return "not built"
    try:
        importlib.import_module("curvlab._C_cuda")
    except ImportError as error:
        return f"built, but does not load: {_without_folders(str(error).splitlines()[0])}"
    return "loaded"


_CUDA_STATUS = _load_cuda()


def cpu_capability() -> str:
    """Instruction set whose CPU kernels run: ``default``, ``avx2`` or ``avx512``.

    The best that the CPU has, or what the environment variable ``CURVLAB_CPU_CAPABILITY`` says.

    Raises:
        ValueError: the variable names something else, or what this CPU lacks.
    """
    return _host.cpu_capability()


def cuda_status() -> str:
    """State of the CUDA kernels: ``loaded``, ``not built`` or ``built, but does not load: <reason>``."""
    return _CUDA_STATUS
