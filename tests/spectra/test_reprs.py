# SPDX-License-Identifier: Apache-2.0
"""What a newcomer sees who prints a result: figures with their errors, not tensors."""

from __future__ import annotations

import torch

from curvlab.operators import DenseOperator
from curvlab.spectra import diagonal, hutchinson_trace, log_determinant, power_iteration, slq_density, top_eigenpairs


def operator() -> DenseOperator:
    return DenseOperator(torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64)))


def test_results_print_their_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = repr(top_eigenpairs(operator(), 2, tol=1e-8, generator=generator)).splitlines()
    assert pairs[0].startswith("2 eigenpairs, ") and pairs[0].endswith(" products, converged")
    assert pairs[1].startswith("  40  (residual ") and pairs[2].startswith("  39  (residual ")
    trace = repr(hutchinson_trace(operator(), num_probes=4, generator=generator))
    assert trace == "trace 820, standard error 0, 95 % interval [820, 820], n = 4, 4 products"
    density = repr(slq_density(operator(), num_probes=2, num_steps=40, generator=generator))
    assert density == "density of 40 eigenvalues, seen between 1 and 40: 2 probes of 40 steps, 80 products"
    assert repr(diagonal(operator(), 3, generator=generator)) == (
        "diagonal of 40 entries, relative error 0, 3 products"
    )
    assert repr(power_iteration(operator(), 5, generator=generator)).startswith("Rayleigh quotient 3")
    assert repr(log_determinant(operator(), 1.0, num_probes=2, num_steps=40)).startswith("tr f(A) = 11")
