# SPDX-License-Identifier: Apache-2.0
"""Curvature of a trained network as rows: λ_max with its residual, the trace with its standard error, the loss."""

from __future__ import annotations

import time

from torch import Tensor, nn

from curvlab.operators.hessian import HessianOperator
from curvlab.operators.problem import Problem
from curvlab.spectra import hutchinson_trace, top_eigenpairs
from curvlab.training.seeding import generator


def curvature_of(model: nn.Module, x: Tensor, y: Tensor, *, probes: int, seed: int = 0) -> dict[str, float]:
    """λ_max and trace of the Hessian H of the mean cross-entropy over ``(x, y)``, in eval mode, all parameters.

    ``lambda_max`` and ``lambda_residual`` ‖Hv − λv‖ (Lanczos, tolerance 10⁻³ λ); ``trace`` and ``trace_error`` (its
    standard error over ``probes`` random sign vectors); ``curvature_loss``, the loss on these samples;
    ``curvature_products``; ``measure_seconds``, of wall and processor time the smaller. ``seed`` names the starting
    vectors, not the network.
    """
    began = time.perf_counter(), time.process_time()
    problem = Problem(model, nn.CrossEntropyLoss(), (x, y))
    hessian = HessianOperator(problem)
    top = top_eigenpairs(hessian, generator=generator(seed, "lanczos"))
    trace = hutchinson_trace(hessian, probes, generator=generator(seed, "probe"))
    return {
        "lambda_max": top.values[0].item(),
        "lambda_residual": top.residuals[0].item(),
        "trace": trace.value,
        "trace_error": trace.standard_error,
        "curvature_loss": hessian.engine.loss(),
        "curvature_products": float(top.num_products + trace.num_products),
        "measure_seconds": min(time.perf_counter() - began[0], time.process_time() - began[1]),
    }
