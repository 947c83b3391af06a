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

PRODUCTS = ("hessian", "ggn", "empirical", "jacobian")
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
        check_error: relative error of the first product on ``check_samples`` samples against :attr:`judge`; NaN if the
            judge itself is what was picked.
        check_samples: number of these samples.
        tolerance: above which the engine would have been refused.
        notes: what the engine says of itself (``engine.notes``, if it has any), after what the check has to say.
        judge: what the product was compared with: autograd in float64, unless the model runs in its own dtype only.
    """

    engine: str
    declined: dict[str, str] = field(default_factory=dict)
    check_error: float = float("nan")
    check_samples: int = 0
    tolerance: float = 0.0
    notes: tuple[str, ...] = ()
    judge: str = "float64 autograd"

    def __repr__(self) -> str:
        return f"<{str(self).replace(chr(10), '; ')}>"

    def __str__(self) -> str:
        """A line for the engine, one for each that declined, one for each note."""
        checked = f"; {self.check_error:.1e} off {self.judge} on {self.check_samples} samples"
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
        product: which product is compared with the judge's: ``"hessian"``, ``"ggn"``, ``"empirical"`` (the GGN's with
            the outer products of the gradients) or ``"jacobian"`` (with its transpose).
        options: passed to the engine.

    Raises:
        UnsupportedModel: the engine asked for by name cannot take the model.
        ValueError: unknown engine or precision, a budget too small.
        RuntimeError: the engine's product is not the judge's.
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"make_engine: engine must be 'auto' or one of {list(ENGINES)}, got {engine!r}")
    if product not in PRODUCTS:
        raise ValueError(f"make_engine: product must be one of {list(PRODUCTS)}, got {product!r}")
    check_precision(precision, problem.dtype, problem.device, "make_engine")
    declined: dict[str, str] = {}
    few = _few_samples(problem)
    generator = options.get("generator")
    start = None if generator is None else generator.get_state()
    for name in ENGINES if engine == "auto" else [engine]:
        build = _load(name)
        arguments = {"memory_budget": memory_budget, "precision": precision, **options}
        if generator is not None and start is not None:
            generator.set_state(start)  # an engine that declines has drawn nothing: all engines draw the same
        try:
            picked = build(problem, **arguments)
            sample = build(few, precision=precision)
        except UnsupportedModel as error:
            if engine != "auto":
                raise
            declined[name] = str(error)
            continue
        error, tolerance, judge, remarks = _check(few, sample, precision, product)
        # An engine that does its work at the first product has said nothing yet; the one that was checked has.
        notes = getattr(picked, "notes", ()) or getattr(sample, "notes", ())
        notes = [f"{key}: {note}" for key, note in notes.items()] if isinstance(notes, dict) else list(notes)
        report = EngineReport(
            engine=name,
            declined=declined,
            check_error=error,
            check_samples=0 if math.isnan(error) else few.num_samples,
            tolerance=tolerance,
            notes=(*remarks, *notes),
            judge=judge,
        )
        if error > tolerance:
            raise RuntimeError(
                f"make_engine: the {product} product of engine {name!r} must be within {tolerance:.0e} of {judge} "
                f"on {report.check_samples} samples, got a relative error of {error:.1e}"
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
    error = relative_error(got, expected)
    if error > 1e-3 and got.isfinite().all() and max(got.abs().max().item(), expected.abs().max().item()) < 1e-30:
        return 0.0
    return error


def _products(engine: Engine, product: str, row: Tensor, u: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
    """The engine's product with ``row``, and with ``u`` by the transposed Jacobian (drawn here unless given)."""
    if product == "empirical":
        return [engine.ggn(row, "empirical")], None
    if product != "jacobian":
        return [getattr(engine, product)(row)], None
    forward = engine.jacobian(row)
    if u is None:
        generator = torch.Generator(row.device).manual_seed(1)
        u = torch.randn(forward.shape, dtype=row.dtype, device=row.device, generator=generator)
    return [forward, engine.jacobian_transposed(u.to(forward.dtype))], u


def _check(
    problem: Problem, sample: Engine, precision: str | None, product: str
) -> tuple[float, float, str, list[str]]:
    """``(relative error, tolerance, judge, remarks)`` of one product of the engine ``sample`` of ``problem``."""
    tolerance = _TOLERANCE.get(problem.dtype, 0.2) if precision is None else _LOW_TOLERANCE[precision]
    judge = "float64 autograd"
    if type(sample) is AutogradEngine and problem.dtype == torch.float64:
        return float("nan"), tolerance, judge, []
    row, remarks = _gaussian_row(problem), []
    try:
        expected, u = _products(AutogradEngine(problem.to(torch.float64)), product, row)
    except RuntimeError as error:  # a forward pass that names a dtype runs in no other
        if problem.dtype == torch.float64:
            raise
        judge = f"{str(problem.dtype).removeprefix('torch.')} autograd"
        remarks.append(f"the model does not run in float64: {_first_line(error)}")
        if type(sample) is AutogradEngine and precision is None:
            return float("nan"), tolerance, judge, remarks
        expected, u = _products(AutogradEngine(problem), product, row.to(problem.dtype))
    got, _ = _products(sample, product, row.to(problem.dtype), u)
    error = max(_error(one, other) for one, other in zip(got, expected, strict=True))
    if error > tolerance and not remarks and _is_rounding(problem, product, got, expected):
        return 0.0, tolerance, judge, [f"the {product} product is zero but for rounding: no digits to check"]
    return error, tolerance, judge, remarks


def _is_rounding(problem: Problem, product: str, got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the products differ by no more than the rounding of the same product over *all* parameters.

    A bias in front of batch statistics has a Hessian of exactly zero, of which every engine gives another 1e-9.
    """
    whole = problem.to(torch.float64)
    whole = whole._with(params={**whole.params, **whole.fixed}, fixed={})
    scales, _ = _products(AutogradEngine(whole), product, _gaussian_row(whole))
    bound = 10.0 * torch.finfo(problem.dtype).eps
    pairs = zip(got, expected, scales, strict=True)
    return all(bool((a.double() - b).norm() <= bound * scale.norm()) for a, b, scale in pairs)


def _gaussian_row(problem: Problem) -> Tensor:
    generator = torch.Generator(problem.device).manual_seed(0)
    # Drawn in float32, four times faster, and equal in every precision that compares with it.
    row = torch.randn(1, problem.num_params, dtype=torch.float32, device=problem.device, generator=generator)
    return row.double()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
