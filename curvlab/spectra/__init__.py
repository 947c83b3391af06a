# SPDX-License-Identifier: Apache-2.0
"""Spectra of matrices that only multiply: eigenpairs with residuals, densities with bands, traces with errors.

Solvers see :class:`curvlab.operators.base.LinearOperator` alone, through ``apply_rows``, shape, dtype and device. All
randomness comes from a ``torch.Generator``; every estimate carries its error.
"""

from curvlab.spectra.diagonal import DiagonalEstimate, diagonal
from curvlab.spectra.plots import plot_density, plot_track
from curvlab.spectra.power import PowerIteration, power_iteration
from curvlab.spectra.slq import SpectralDensity, TraceFunction, effective_dimension, log_determinant, slq_density
from curvlab.spectra.top_eigenpairs import Eigenpairs, EigenvalueInterval, eigenvalue_interval, top_eigenpairs
from curvlab.spectra.trace import TraceEstimate, hutchinson_trace, hutchpp_trace, xtrace
from curvlab.spectra.tracking import EigenpairTracker

__all__ = [
    "DiagonalEstimate",
    "EigenpairTracker",
    "Eigenpairs",
    "EigenvalueInterval",
    "PowerIteration",
    "SpectralDensity",
    "TraceEstimate",
    "TraceFunction",
    "diagonal",
    "effective_dimension",
    "eigenvalue_interval",
    "hutchinson_trace",
    "hutchpp_trace",
    "log_determinant",
    "plot_density",
    "plot_track",
    "power_iteration",
    "slq_density",
    "top_eigenpairs",
    "xtrace",
]
