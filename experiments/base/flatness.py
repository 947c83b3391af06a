# SPDX-License-Identifier: Apache-2.0
"""What the sharpness study measures of one trained network, as rows: spectrum's end, noise, landscape, symmetries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.operators.hessian import HessianOperator
from curvlab.operators.problem import Problem
from curvlab.sharpness import LossSlice, average_flatness, linear_barrier, loss_slice, transform
from curvlab.sharpness.measures import Gauge, measure
from curvlab.spectra import SpectralDensity, hutchinson_trace, power_iteration, slq_density
from curvlab.training.seeding import generator

MEASURES = {
    "sharpness": "λ_max",
    "relative_sharpness": "λ_max / loss",
    "norm_sharpness": "λ_max ‖θ‖²",
    "element_sharpness": "element-adaptive λ_max",
    "filter_sharpness": "filter-adaptive λ_max",
    "sam": "SAM ascent",
    "asam": "adaptive SAM ascent",
    "box": "Keskar's box (%)",
    "filter_flatness": "filter-relative noise, σ 0.1",
    "half_accuracy_noise": "σ50, filter-relative",
    "batch_sharpness": "batch sharpness",
}
"""Of ``curvlab.sharpness.MEASURES``; larger is sharper, but for ``half_accuracy_noise``."""

INVARIANCE = ("sharpness", "element_sharpness", "filter_sharpness", "block_sharpness")
SYMMETRIES = ("relu_rescaling", "bn_scale")

Rows = list[dict[str, Any]]


def problem_of(model: nn.Module, x: Tensor, y: Tensor) -> Problem:
    """Mean cross-entropy over these samples, eval mode, all parameters."""
    return Problem(model, nn.CrossEntropyLoss(), (x, y))


def measured(problem: Problem, *, probes: int, power_iterations: int) -> Rows:
    """Every measure of :data:`MEASURES`, λ_max's residual, the trace with its error, the paper's power iteration."""
    began = time.perf_counter(), time.process_time()
    gauge = Gauge(problem, num_probes=probes, num_draws=5)
    found = measure(gauge, MEASURES)
    trace = hutchinson_trace(gauge.hessian, probes, generator=generator(0, "probe"))
    top = gauge.top
    found |= {
        "lambda_residual": top.residuals[0].item(),
        "trace": trace.value,
        "trace_error": trace.standard_error,
        "hessian_loss": gauge.loss,
    }
    if power_iterations:
        found |= power(gauge.hessian, power_iterations)
    # As training's: of wall and processor time the smaller, since others may be using the machine.
    found["measure_seconds"] = min(time.perf_counter() - began[0], time.process_time() - began[1])
    return [{"metric": metric, "value": value} for metric, value in found.items()]


def power(hessian: HessianOperator, iterations: int) -> dict[str, float]:
    """The paper's protocol: the Rayleigh quotient after that many power iterations from a random vector."""
    pair = power_iteration(hessian, iterations, generator=generator(0, "power"))
    return {"power_lambda": pair.value, "power_residual": pair.residual}


def noise(problem: Problem, stds: Sequence[float], draws: int) -> Rows:
    """Mean increase of the loss under N(0, σ² I) on all parameters, absolute and in percent, at every σ."""
    found = average_flatness(problem, list(stds), num_draws=draws, generator=generator(0, "noise"))
    rows: Rows = [{"metric": "noise_base_loss", "value": found.base_loss}]
    for std, increase in zip(stds, found.increase.tolist(), strict=True):
        rows.append({"sigma": std, "metric": "noise_increase", "value": increase})
        rows.append({"sigma": std, "metric": "noise_percent", "value": 100 * increase / found.base_loss})
    return rows


# ------------------------------------------------------------------------------------------------ spectrum, landscape


def spectrum(problem: Problem, *, probes: int, steps: int) -> Rows:
    """Nodes and weights of stochastic Lanczos quadrature; :func:`density_of` puts them together again."""
    found = slq_density(HessianOperator(problem), probes, steps, generator=generator(0, "probe"))
    rows: Rows = [{"metric": "slq_size", "value": float(found.size)}]
    for probe, (nodes, weights) in enumerate(zip(found.nodes.tolist(), found.weights.tolist(), strict=True)):
        for index, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
            place = {"probe": probe, "index": index}
            rows.append(place | {"metric": "slq_node", "value": node})
            rows.append(place | {"metric": "slq_weight", "value": weight})
    return rows


def density_of(rows: Rows) -> SpectralDensity | None:
    """Back from the rows of :func:`spectrum` of one network."""
    found = {name: _grid(rows, name, "probe", "index") for name in ("slq_node", "slq_weight")}
    if any(values is None for values in found.values()):
        return None
    nodes, weights = (torch.from_numpy(values[2]) for values in found.values() if values is not None)
    size = next((int(row["value"]) for row in rows if row["metric"] == "slq_size"), 0)
    return SpectralDensity(nodes, weights, size, nodes.numel())


def landscape(problem: Problem, *, line_points: int, plane_points: int, extent: float) -> Iterator[Rows]:
    """Filter-normalized slices through the network: a line, then a plane (batch norm and biases stay, Li et al. 2018).

    The directions' signs and magnitudes are drawn once for all networks: every network sees the same random numbers,
    normalized to its own filters.
    """
    line = loss_slice(problem, 1, extent=extent, num_points=line_points, generator=generator(0, "line"))
    yield slice_rows(line, "line")
    plane = loss_slice(problem, 2, extent=extent, num_points=plane_points, generator=generator(0, "plane"))
    yield slice_rows(plane, "plane")


def barrier(first: Problem, second: Problem, num_points: int) -> Rows:
    """The straight line between two solutions; running statistics are interpolated with the parameters."""
    found = linear_barrier(first, second, num_points=num_points)
    return [*slice_rows(found, "between"), {"metric": "barrier", "value": found.barrier}]


def slice_rows(found: LossSlice, name: str) -> Rows:
    """A slice as rows, its coordinates as factors ``a`` and ``b``."""
    rows: Rows = []
    for place in np.ndindex(found.losses.shape):
        at = {key: float(axis[i]) for key, axis, i in zip("ab", found.coordinates, place, strict=False)}
        rows.append(at | {"metric": f"{name}_loss", "value": float(found.losses[place])})
        if found.accuracies is not None:
            rows.append(at | {"metric": f"{name}_accuracy", "value": float(found.accuracies[place])})
    return rows


def slice_of(rows: Rows, name: str) -> LossSlice | None:
    """Back from the rows of one slice."""
    keys = ("a", "b") if name == "plane" else ("a",)
    losses, shares = _grid(rows, f"{name}_loss", *keys), _grid(rows, f"{name}_accuracy", *keys)
    if losses is None:
        return None
    return LossSlice(tuple(losses[:-1]), losses[-1], None if shares is None else shares[-1])


def _grid(rows: Rows, metric: str, *keys: str) -> tuple[np.ndarray, ...] | None:
    """Values laid out by their coordinates: ``(axis, .., values)``; None where there are none."""
    found = [row for row in rows if row["metric"] == metric]
    if not found:
        return None
    axes = [np.array(sorted({row[key] for row in found})) for key in keys]
    values = np.full([len(axis) for axis in axes], np.nan)
    for row in found:
        values[tuple(int(np.searchsorted(axis, row[key])) for axis, key in zip(axes, keys, strict=True))] = row["value"]
    return (*axes, values)


# ------------------------------------------------------------------------------------------------ symmetries


def invariances(model: nn.Module, x: Tensor, y: Tensor, strength: float) -> Rows:
    """Measures of the same function at other parameters (float64), over those of the network itself.

    ``relu_rescaling``: weights of one layer times ``strength``, of the next divided by it (Dinh et al. 2017).
    ``bn_scale``: weights before batch normalization and its running statistics times ``strength``.
    """
    model, x = model.double(), x.double()
    before = measure(problem_of(model, x, y), INVARIANCE)
    rows: Rows = []
    for symmetry in SYMMETRIES:
        if symmetry == "bn_scale" and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            continue
        changed = transform(model, symmetry, strength=strength).model
        after = measure(problem_of(changed, x, y), INVARIANCE)
        rows += [
            {"symmetry": symmetry, "metric": f"moved_{name}", "value": after[name] / before[name]}
            for name in INVARIANCE
        ]
    return rows
