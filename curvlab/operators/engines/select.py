# SPDX-License-Identifier: Apache-2.0
"""Which engine multiplies: the fastest that takes the model, after its first product was compared with the judge's.

No silent fallback: an engine that cannot take a model says so by name before it starts, which is written into the
report; one that takes it and multiplies wrongly is an error.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.protocol import Engine, UnsupportedModel
from curvlab.operators.precision import check_precision, relative_error
from curvlab.operators.problem import Problem

__all__ = ["ENGINES", "EngineReport", "make_engine"]

ENGINES: dict[str, str] = {
    "fused": "curvlab.operators.engines.fused:FusedEngine",
    "linearized": "curvlab.operators.engines.linearized:LinearizedEngine",
    "autograd": "curvlab.operators.engines.autograd:AutogradEngine",
}
"""Name -> class, in the order in which ``"auto"`` asks."""

CHECK_SAMPLES = 2  # the judge convolves in float64, slowly: with 8 it cost ResNet-20 on 32 samples five products
BATCH_CHECK_SAMPLES = 8  # two samples, normalized by their own statistics, are +1 and -1

# A wrong formula is off by 0.1 to 1. float32 against float64 on few samples of a trained network is up to 3e-3 off for
# autograd itself, and one ReLU that switches by rounding adds as much; bfloat16 has 8 bits.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-2}
_LOW_TOLERANCE = {"bf16": 0.2, "tf32": 5e-2}


@dataclass(frozen=True)
class EngineReport:
    """What multiplies, and why.

    Attributes:
        engine: name of the picked engine.
        declined: name -> why it could not take the model (``"auto"`` alone asks more than one).
        check_error: relative error of the first product on ``check_samples`` samples against float64 ``autograd``; NaN
            if the judge itself is what was picked, in float64.
        check_samples: number of these samples.
        tolerance: above which the engine would have been refused.
        notes: what the engine says of itself (``engine.notes``, if it has any).
    """

    engine: str
    declined: dict[str, str] = field(default_factory=dict)
    check_error: float = float("nan")
    check_samples: int = 0
    tolerance: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for the engine, one for each that declined, one for each note."""
        checked = f"; {self.check_error:.1e} off float64 autograd on {self.check_samples} samples"
        lines = [f"engine {self.engine}" + (checked if self.check_samples else "")]
        lines += [f"not {name}: {why}" for name, why in self.declined.items()]
        return "\n".join([*lines, *self.notes])


def make_engine(
    problem: Problem,
    engine: str = "auto",
    precision: str | None = None,
    memory_budget: int | None = None,
    *,
    product: str = "hessian",
    **options: Any,
) -> tuple[Engine, EngineReport]:
    """The engine, and the report of how it was picked and checked.

    Args:
        problem: what is differentiated.
        engine: ``"auto"``, or a name of :data:`ENGINES`.
        precision: None (the problem's dtype), ``"bf16"`` or ``"tf32"``.
        memory_budget: bytes, as the engines take it.
        product: which product is compared with the judge's: ``"hessian"``, ``"ggn"`` or ``"jacobian"`` (with its
            transpose).
        options: passed to the engine.

    Raises:
        UnsupportedModel: the engine asked for by name cannot take the model.
        ValueError: unknown engine or precision, a budget too small.
        RuntimeError: the engine's product is not the judge's.
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"make_engine: engine must be 'auto' or one of {list(ENGINES)}, got {engine!r}")
    if product not in ("hessian", "ggn", "jacobian"):
        raise ValueError(f"make_engine: product must be 'hessian', 'ggn' or 'jacobian', got {product!r}")
    check_precision(precision, problem.dtype, problem.device, "make_engine")
    declined: dict[str, str] = {}
    few = _few_samples(problem)
    for name in ENGINES if engine == "auto" else [engine]:
        build = _load(name)
        arguments = {"memory_budget": memory_budget, "precision": precision, **options}
        try:
            picked = build(problem, **arguments)
            sample = build(few, precision=precision)
        except UnsupportedModel as error:
            if engine != "auto":
                raise
            declined[name] = str(error)
            continue
        error, tolerance = _check(few, sample, precision, product)
        notes = getattr(picked, "notes", ())
        report = EngineReport(
            engine=name,
            declined=declined,
            check_error=error,
            check_samples=0 if math.isnan(error) else few.num_samples,
            tolerance=tolerance,
            notes=tuple(f"{key}: {note}" for key, note in notes.items()) if isinstance(notes, dict) else tuple(notes),
        )
        if error > tolerance:
            raise RuntimeError(
                f"make_engine: the {product} product of engine {name!r} must be within {tolerance:.0e} of float64 "
                f"autograd on {report.check_samples} samples, got a relative error of {error:.1e}"
            )
        return picked, report
    raise UnsupportedModel("make_engine: no engine takes the model: " + "; ".join(map(": ".join, declined.items())))


def _load(name: str) -> Any:
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _few_samples(problem: Problem) -> Problem:
    if problem.batch_norm == "eval":
        return problem.subset(CHECK_SAMPLES)
    # A batch cut down to one sample has no variance: the first batch alone.
    return problem.subset(min(BATCH_CHECK_SAMPLES, len(next(iter(problem.data))[1])))


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative, but for what float32 cannot hold: a network fitted to 1e-40 has a Hessian of zero there."""
    if got.isfinite().all() and max(got.abs().max().item(), expected.abs().max().item()) < 1e-30:
        return 0.0
    return relative_error(got, expected)


def _check(problem: Problem, sample: Engine, precision: str | None, product: str) -> tuple[float, float]:
    """``(relative error, tolerance)`` of one product of the engine ``sample`` of ``problem``."""
    tolerance = _TOLERANCE.get(problem.dtype, 0.2) if precision is None else _LOW_TOLERANCE[precision]
    if type(sample) is AutogradEngine and problem.dtype == torch.float64:
        return float("nan"), tolerance
    judge = AutogradEngine(problem.to(torch.float64))
    generator = torch.Generator(problem.device).manual_seed(0)
    row = torch.randn(1, problem.num_params, dtype=torch.float64, device=problem.device, generator=generator)
    low = row.to(problem.dtype)
    if product != "jacobian":
        return _error(getattr(sample, product)(low), getattr(judge, product)(row)), tolerance
    expected = judge.jacobian(row)
    errors = [_error(sample.jacobian(low), expected)]
    u: Tensor = torch.randn(expected.shape, dtype=torch.float64, device=problem.device, generator=generator)
    errors.append(_error(sample.jacobian_transposed(u.to(problem.dtype)), judge.jacobian_transposed(u)))
    return max(errors), tolerance
