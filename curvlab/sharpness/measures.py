# SPDX-License-Identifier: Apache-2.0
r"""Every measure of sharpness in one table, each with the changes of the network that it does not see.

A measure that moves when the function stays - weights of one layer times alpha, of the next divided by it - says
something of the parametrization too (Dinh et al. 2017). So each entry of :data:`MEASURES` declares under which of
``symmetries.SYMMETRIES`` it stays, and a test holds it to that, and to moving under the others. With H the Hessian of
L, G the generalized Gauss-Newton matrix, D a scale of ``directions``, lambda_1 the largest eigenvalue:

    sharpness            lambda_1(H)                              trace              tr H
    relative_sharpness   lambda_1(H) / L                          norm_sharpness     lambda_1(H) ||theta||^2
    block_sharpness      max_t lambda_1(H_tt) ||theta_t||^2       over tensors t
    element_sharpness    lambda_1(D H D), D = |theta|             element_trace      tr D H D
    filter_sharpness     lambda_1(D H D), D = filter norms        fisher_rao         theta^T G theta
    sam, asam            L(theta + eps) - L(theta) after the step of SAM, of ASAM (D = |theta|)
    worst_case           the same maximized over SAM's ball       box                Keskar's, in percent
    flatness, element_flatness, filter_flatness   E L(theta + sigma D xi) - L(theta)
    half_accuracy_noise  relative (filter) noise at which half of the accuracy above chance is lost; larger is flatter
    batch_sharpness      E_B g_B^T H_B g_B / ||g_B||^2
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvlab.operators.base import LinearOperator
from curvlab.operators.ggn import GGNOperator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.problem import Problem
from curvlab.sharpness.ascent import box_sharpness, sam_ascent, worst_case_sharpness
from curvlab.sharpness.batches import batch_sharpness
from curvlab.sharpness.directions import Scale, draw_normal, weight_scale
from curvlab.sharpness.evaluation import LossEvaluator, parameter_row
from curvlab.sharpness.perturbation import Flatness, average_flatness
from curvlab.spectra.top_eigenpairs import Eigenpairs, top_eigenpairs
from curvlab.spectra.trace import hutchinson_trace

__all__ = ["MEASURES", "DiagonallyScaledOperator", "Gauge", "Measure", "measure", "register", "sharpness"]


class DiagonallyScaledOperator(LinearOperator):
    """``D A D`` for a symmetric A and a diagonal D ``[P]``: curvature in units of D.

    Raises:
        ValueError: A is not symmetric, or the diagonal has another length, dtype or device.
    """

    def __init__(self, base: LinearOperator, diagonal: Tensor) -> None:
        if not base.is_symmetric:
            raise ValueError(f"DiagonallyScaledOperator: base must be symmetric, got {base!r}")
        if diagonal.shape != base.shape[:1] or diagonal.dtype != base.dtype or diagonal.device != base.device:
            raise ValueError(
                f"DiagonallyScaledOperator: diagonal must be [{base.shape[0]}] of {base.dtype} on {base.device}, "
                f"got {list(diagonal.shape)} of {diagonal.dtype} on {diagonal.device}"
            )
        self.base, self.diagonal = base, diagonal.detach()
        super().__init__(base.shape, base.dtype, base.device, is_symmetric=True, is_psd=base.is_psd, layout=base.layout)

    def _apply(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows(rows * self.diagonal) * self.diagonal


def sharpness(
    problem: Problem,
    k: int = 1,
    *,
    scale: Scale = "absolute",
    eta: float = 0.0,
    hessian: LinearOperator | None = None,
    tol: float = 1e-3,
    start: Tensor | Eigenpairs | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""The k largest eigenvalues of the Hessian, or of D H D: sharpness per unit of relative change of the weights.

    Args:
        problem: network, loss and data.
        k: how many; ``.values[0]`` is the sharpness.
        scale: D; ``"element"`` and ``"filter"`` give adaptive sharpness: to second order, the worst case in ASAM's ball
            ||eps / D|| <= rho raises the loss by rho^2 lambda_1(D H D) / 2 beside the gradient's part.
        eta: added to D.
        hessian: an operator to use in place of ``HessianOperator(problem)``.
        tol: relative residual of each pair.
        start: pairs of an earlier point to begin with, or rows.
        generator: for the first vector.

    Raises:
        ValueError: what ``top_eigenpairs`` and ``weight_scale`` raise.
    """
    operator = HessianOperator(problem) if hessian is None else hessian
    if scale != "absolute":
        operator = DiagonallyScaledOperator(operator, weight_scale(problem.params, scale, eta=eta))
    return top_eigenpairs(operator, k, tol=tol, start=start, generator=generator)


class Gauge:
    """One problem about to be measured: what several measures need is made once, and kept.

    Args:
        problem: network, loss and data.
        seed: every measure draws from its own generator of this seed: results do not depend on which others are taken.
        order: where each parameter came from, ``Transformed.order``: noise is permuted with the network.
        radius: rho of sam and worst_case; asam takes its tenfold, as Kwon et al. do (0.05 and 0.5).
        std: sigma of the flatness; relative noise is ``relative_std``.
        relative_std: sigma of element_flatness and filter_flatness.
        num_draws: noise draws.
        num_probes: trace probes; where they are P or more, the trace is exact.
        batch_size: of batch_sharpness; clipped to N.
        tol: relative residual of eigenvalues.
        engine: of the operators.
        memory_budget: bytes for the operators and for the points of a sweep.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        order: Tensor | None = None,
        radius: float = 0.05,
        std: float = 0.01,
        relative_std: float = 0.1,
        num_draws: int = 10,
        num_probes: int = 32,
        batch_size: int = 128,
        tol: float = 1e-3,
        engine: str = "auto",
        memory_budget: int = 1 << 30,
    ) -> None:
        self.problem, self.seed, self.order = problem, seed, order
        self.radius, self.std, self.relative_std, self.num_draws = radius, std, relative_std, num_draws
        self.num_probes, self.batch_size, self.tol = num_probes, batch_size, tol
        self.engine, self.memory_budget = engine, memory_budget

    def generator(self) -> torch.Generator:
        """A new stream of the seed, on the host."""
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def hessian(self) -> HessianOperator:
        """H."""
        return HessianOperator(self.problem, engine=self.engine, memory_budget=self.memory_budget)

    @cached_property
    def ggn(self) -> GGNOperator:
        """G."""
        return GGNOperator(self.problem, engine=self.engine, memory_budget=self.memory_budget)

    @cached_property
    def loss(self) -> float:
        """L(theta), in float64."""
        return LossEvaluator(self.problem, memory_budget=self.memory_budget).base().losses.item()

    @cached_property
    def top(self) -> Eigenpairs:
        """The largest eigenpair of H."""
        return self.largest(self.hessian)

    def scaled(self, scale: Scale) -> LinearOperator:
        """D H D."""
        return DiagonallyScaledOperator(self.hessian, weight_scale(self.problem.params, scale))

    def largest(self, operator: LinearOperator) -> Eigenpairs:
        """The largest eigenpair of an operator; a warning where it is not found to ``tol``, a lower bound then."""
        found = top_eigenpairs(operator, 1, tol=self.tol, generator=self.generator())
        if not found.converged:
            warnings.warn(
                f"Gauge: eigenvalue {found.values[0]:.4g} of {operator!r} is not found to {self.tol:g} of it, but to a "
                f"residual of {found.residuals[0]:.2g} after {found.num_products} products",
                stacklevel=2,
            )
        return found

    def trace(self, operator: LinearOperator) -> float:
        """By probes, or exactly where that costs no more."""
        if self.num_probes >= operator.shape[0]:
            return operator.to_dense().diagonal().sum().item()
        return hutchinson_trace(operator, self.num_probes, generator=self.generator()).value

    def noise(self) -> Tensor:
        """Draws ``[V, P]`` that follow the network through a permutation."""
        draws = draw_normal(self.num_draws, self.problem.num_params, self.problem, self.generator())
        return draws if self.order is None else draws[:, self.order.to(draws.device)]

    def flatness(self, std: float | list[float], scale: Scale) -> Flatness:
        """Losses under those draws."""
        return average_flatness(self.problem, std, scale=scale, draws=self.noise(), memory_budget=self.memory_budget)


@dataclass(frozen=True)
class Measure:
    """An entry of the table.

    Attributes:
        name: its key.
        formula: for tables.
        invariances: names of ``symmetries.SYMMETRIES`` that leave it as it is.
        compute: takes a :class:`Gauge`.
    """

    name: str
    formula: str
    invariances: frozenset[str]
    compute: Callable[[Gauge], float]


MEASURES: dict[str, Measure] = {}
"""Name -> measure; add to it by :func:`register`."""

_PERMUTATION = frozenset({"permutation"})
_LAYERS = _PERMUTATION | {"relu_rescaling", "bn_scale"}
_NEURONS = _LAYERS | {"neuron_rescaling"}


def register(
    name: str, formula: str, invariances: Iterable[str]
) -> Callable[[Callable[[Gauge], float]], Callable[[Gauge], float]]:
    """Decorator: the function becomes the measure ``name``.

    Raises:
        ValueError: the name is taken.
    """
    if name in MEASURES:
        raise ValueError(f"register: name must be new, got {name!r}")

    def add(compute: Callable[[Gauge], float]) -> Callable[[Gauge], float]:
        MEASURES[name] = Measure(name, formula, frozenset(invariances), compute)
        return compute

    return add


def measure(problem: Problem | Gauge, names: Iterable[str] | None = None, **options: object) -> dict[str, float]:
    """Measures by name; those that share an operator or an eigenvalue share it.

    Args:
        problem: what to measure, or a :class:`Gauge` of it.
        names: keys of :data:`MEASURES`; None: all.
        options: of the :class:`Gauge`.

    Raises:
        ValueError: an unknown name.
        TypeError: options beside a gauge.
    """
    if isinstance(problem, Gauge) and options:
        raise TypeError(f"measure: options must be given to the gauge, got {sorted(options)}")
    gauge = problem if isinstance(problem, Gauge) else Gauge(problem, **options)  # type: ignore[arg-type]
    wanted = list(MEASURES) if names is None else list(names)
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown:
        raise ValueError(f"measure: names must be among {', '.join(MEASURES)}, got {unknown[0]!r}")
    return {name: MEASURES[name].compute(gauge) for name in wanted}


@register("sharpness", "λ₁(H)", _PERMUTATION)
def _sharpness(gauge: Gauge) -> float:
    return gauge.top.values[0].item()


@register("trace", "tr H", _PERMUTATION)
def _trace(gauge: Gauge) -> float:
    return gauge.trace(gauge.hessian)


@register("relative_sharpness", "λ₁(H) / L", _PERMUTATION)
def _relative_sharpness(gauge: Gauge) -> float:
    return gauge.top.values[0].item() / gauge.loss if gauge.loss else math.nan


@register("norm_sharpness", "λ₁(H) ‖θ‖²", _PERMUTATION)
def _norm_sharpness(gauge: Gauge) -> float:
    return gauge.top.values[0].item() * parameter_row(gauge.problem).double().square().sum().item()


@register("block_sharpness", "max_t λ₁(H_tt) ‖θ_t‖²", _LAYERS)
def _block_sharpness(gauge: Gauge) -> float:
    sizes = {name: tensor.double().square().sum().item() for name, tensor in gauge.problem.params.items()}
    ceiling, best = gauge.top.values[0].item() + gauge.top.error_bounds[0].item(), -math.inf
    for name in sorted(sizes, key=lambda one: -sizes[one]):
        # Interlacing: no block's eigenvalue is above H's, so most blocks need no search (a trained CNN(4): 7 of 28 do).
        if ceiling * sizes[name] > best:
            block = gauge.hessian.restrict([name.replace("[", "[[]")])  # the name itself, not a pattern
            best = max(best, gauge.largest(block).values[0].item() * sizes[name])
    return best


@register("element_sharpness", "λ₁(DHD), D = |θ|", _NEURONS)
def _element_sharpness(gauge: Gauge) -> float:
    return gauge.largest(gauge.scaled("element")).values[0].item()


@register("filter_sharpness", "λ₁(DHD), D = ‖θ_f‖", _LAYERS)
def _filter_sharpness(gauge: Gauge) -> float:
    return gauge.largest(gauge.scaled("filter")).values[0].item()


@register("element_trace", "tr DHD, D = |θ|", _NEURONS)
def _element_trace(gauge: Gauge) -> float:
    return gauge.trace(gauge.scaled("element"))


@register("fisher_rao", "θᵀGθ", _NEURONS)
def _fisher_rao(gauge: Gauge) -> float:
    theta = parameter_row(gauge.problem)
    return (theta.double() * (gauge.ggn @ theta).double()).sum().item()


@register("sam", "L(θ + ρ g/‖g‖) − L", _PERMUTATION)
def _sam(gauge: Gauge) -> float:
    return sam_ascent(gauge.problem, gauge.radius).increase


@register("asam", "L(θ + ρ D²g/‖Dg‖) − L, D = |θ|", _NEURONS)
def _asam(gauge: Gauge) -> float:
    return sam_ascent(gauge.problem, 10.0 * gauge.radius, scale="element").increase


@register("worst_case", "max L(θ + ε) − L, ‖ε‖ ≤ ρ", _PERMUTATION)
def _worst_case(gauge: Gauge) -> float:
    return worst_case_sharpness(gauge.problem, gauge.radius, generator=gauge.generator()).increase


@register("box", "100 (max L(θ + z) − L)/(1 + L), |z| ≤ 10⁻³(|θ| + 1)", _PERMUTATION)
def _box(gauge: Gauge) -> float:
    return box_sharpness(gauge.problem)


@register("flatness", "E L(θ + σξ) − L", _PERMUTATION)
def _flatness(gauge: Gauge) -> float:
    return gauge.flatness(gauge.std, "absolute").increase[0].item()


@register("element_flatness", "E L(θ + σ|θ|ξ) − L", _NEURONS)
def _element_flatness(gauge: Gauge) -> float:
    return gauge.flatness(gauge.relative_std, "element").increase[0].item()


@register("filter_flatness", "E L(θ + σ rms(θ_f) ξ) − L", _LAYERS)
def _filter_flatness(gauge: Gauge) -> float:
    return gauge.flatness(gauge.relative_std, "filter").increase[0].item()


NOISE_LEVELS = [0.02 * 2.0 ** (i / 2) for i in range(17)]
"""Relative noise from 2 % to 512 %, by factors of the root of 2: where ``half_accuracy_noise`` looks."""


@register("half_accuracy_noise", "σ: accuracy(θ + σ rms(θ_f) ξ) half way to chance", _LAYERS | {"logit_scale"})
def _half_accuracy_noise(gauge: Gauge) -> float:
    return gauge.flatness(NOISE_LEVELS, "filter").half_accuracy_std


@register("batch_sharpness", "E_B g_BᵀH_B g_B / ‖g_B‖²", _PERMUTATION)
def _batch_sharpness(gauge: Gauge) -> float:
    size = min(gauge.batch_size, gauge.problem.num_samples)
    return batch_sharpness(gauge.problem, size, generator=gauge.generator()).value
