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
    from curvlab.operators import (
        CustomLoss,
        EmpiricalFisherOperator,
        FisherOperator,
        GGNOperator,
        GradientCovarianceOperator,
        HessianOperator,
        JacobianOperator,
        NTKOperator,
        Problem,
    )
    from curvlab.operators.ntk import empirical_ntk
    from curvlab.sharpness import average_flatness, linear_barrier, loss_slice, worst_case_sharpness
    from curvlab.sparse import Mask, densify, global_magnitude, sparsify, update_mask
    from curvlab.spectra import (
        EigenpairTracker,
        diagonal,
        effective_dimension,
        hutchinson_trace,
        hutchpp_trace,
        log_determinant,
        slq_density,
        top_eigenpairs,
        xtrace,
    )

__version__ = _build.VERSION

_HOME = {
    "CNN": "curvlab.models",
    "CustomLoss": "curvlab.operators",
    "EigenpairTracker": "curvlab.spectra",
    "EmpiricalFisherOperator": "curvlab.operators",
    "FisherOperator": "curvlab.operators",
    "GGNOperator": "curvlab.operators",
    "GradientCovarianceOperator": "curvlab.operators",
    "HessianOperator": "curvlab.operators",
    "JacobianOperator": "curvlab.operators",
    "MLP": "curvlab.models",
    "Mask": "curvlab.sparse",
    "NTKOperator": "curvlab.operators",
    "NormRecorder": "curvlab.norms",
    "NormTable": "curvlab.norms",
    "ParameterNorms": "curvlab.norms",
    "Problem": "curvlab.operators",
    "average_flatness": "curvlab.sharpness",
    "densify": "curvlab.sparse",
    "diagonal": "curvlab.spectra",
    "effective_dimension": "curvlab.spectra",
    "empirical_ntk": "curvlab.operators.ntk",
    "filter_norms": "curvlab.norms",
    "global_magnitude": "curvlab.sparse",
    "hutchinson_trace": "curvlab.spectra",
    "hutchpp_trace": "curvlab.spectra",
    "linear_barrier": "curvlab.sharpness",
    "log_determinant": "curvlab.spectra",
    "loss_slice": "curvlab.sharpness",
    "parameter_norms": "curvlab.norms",
    "slq_density": "curvlab.spectra",
    "sparsify": "curvlab.sparse",
    "top_eigenpairs": "curvlab.spectra",
    "total_norm": "curvlab.norms",
    "update_mask": "curvlab.sparse",
    "worst_case_sharpness": "curvlab.sharpness",
    "xtrace": "curvlab.spectra",
}

__all__ = [
    "CNN",
    "MLP",
    "CustomLoss",
    "EigenpairTracker",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "JacobianOperator",
    "Mask",
    "NTKOperator",
    "NormRecorder",
    "NormTable",
    "ParameterNorms",
    "Problem",
    "average_flatness",
    "densify",
    "diagonal",
    "effective_dimension",
    "empirical_ntk",
    "filter_norms",
    "global_magnitude",
    "hutchinson_trace",
    "hutchpp_trace",
    "linear_barrier",
    "log_determinant",
    "loss_slice",
    "parameter_norms",
    "slq_density",
    "sparsify",
    "top_eigenpairs",
    "total_norm",
    "update_mask",
    "worst_case_sharpness",
    "xtrace",
]


_ROOMS = ("data", "models", "norms", "operators", "ops", "runs", "sharpness", "sparse", "spectra", "training")


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
