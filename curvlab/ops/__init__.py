# SPDX-License-Identifier: Apache-2.0
"""Entry to the compiled kernels: the only room that touches ``torch.ops.curvlab``.

Importing it loads ``_C`` (CPU kernels, always there) and, where it was built and loads, ``_C_cuda``. One file per csrc
family holds the public wrappers; ``reference`` holds the same functions in plain PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before ours)

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


def _load_cuda() -> str:
    if importlib.util.find_spec("curvlab._C_cuda") is None:
        return "not built"
    try:
        importlib.import_module("curvlab._C_cuda")
    except ImportError as error:
        return f"built, but does not load: {str(error).splitlines()[0]}"
    return "loaded"


_CUDA_STATUS = _load_cuda()


def build_facts() -> dict[str, Any]:
    """What this build was made with: torch, compiler, flags, instruction sets, CUDA and its architectures."""
    return json.loads(_host.build_facts())


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
