# SPDX-License-Identifier: Apache-2.0
"""curvlab: curvature, sparsity and norms of neural networks, and a reproduced study of why they generalize.

Public names are listed in ``__all__`` and imported on first use, so that ``import curvlab`` costs nothing.
Kernels see tensors (``curvlab.ops``), operators see problems, experiments see numbers; data flows one way.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from curvlab import _build

_build.use_built_package(__path__)

if TYPE_CHECKING:
    from curvlab.models import CNN, MLP
    from curvlab.norms import NormRecorder, NormTable, ParameterNorms, filter_norms, parameter_norms, total_norm
    from curvlab.operators.ntk import empirical_ntk

__version__ = _build.VERSION

_HOME = {
    "CNN": "curvlab.models",
    "MLP": "curvlab.models",
    "NormRecorder": "curvlab.norms",
    "NormTable": "curvlab.norms",
    "ParameterNorms": "curvlab.norms",
    "empirical_ntk": "curvlab.operators.ntk",
    "filter_norms": "curvlab.norms",
    "parameter_norms": "curvlab.norms",
    "total_norm": "curvlab.norms",
}

__all__ = [
    "CNN",
    "MLP",
    "NormRecorder",
    "NormTable",
    "ParameterNorms",
    "empirical_ntk",
    "filter_norms",
    "parameter_norms",
    "total_norm",
]


_ROOMS = ("data", "models", "norms", "operators", "ops", "runs", "training")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"curvlab.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'curvlab' has no attribute {name!r}; its public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
