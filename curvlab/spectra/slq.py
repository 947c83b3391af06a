# SPDX-License-Identifier: Apache-2.0
r"""Spectral densities and traces of matrix functions by stochastic Lanczos quadrature (SLQ), with bands over probes.

A Lanczos run of n steps from a unit vector z gives nodes theta_j (eigenvalues of its tridiagonal T) and weights w_j
(the squared first components of T's eigenvectors): the Gauss quadrature of z^T f(A) z, exact for polynomials of degree
2 n - 1. Over random signs z / sqrt(P),

    tr f(A) = P E[ sum_j w_j f(theta_j) ],      density(t) = E[ sum_j w_j N(t; theta_j, sigma^2) ]

Runs go in lockstep, one block product a step; each reorthogonalizes in full (no copies of eigenvalues already found).
Sources: Golub and Meurant 1994; Ubaru, Chen, Saad 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.spectra import vectors as vec
from curvlab.spectra.lanczos import KrylovSpace

__all__ = ["SpectralDensity", "TraceFunction", "effective_dimension", "log_determinant", "slq_density"]

Grid = Tensor | np.ndarray | list[float]


@dataclass(frozen=True)
class TraceFunction:
    """tr f(A), estimated.

    Attributes:
        value: the estimate.
        standard_error: over probes; NaN with a single one.
        interval: 95 % interval by Student's t over probes, widened by the quadrature's error where that is known.
        samples: float64 ``[num_probes]``.
        num_products: products A v spent.
        quadrature_error: how far ``value`` can be from what infinitely many steps would give with these probes; NaN
            where no bound is known (:meth:`SpectralDensity.trace_of` a function of which nothing is known).
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    samples: Tensor
    num_products: int
    quadrature_error: float = math.nan

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"tr f(A) = {self.value:.6g}, standard error {self.standard_error:.2g}, 95 % interval [{low:.6g}, "
            f"{high:.6g}], n = {len(self.samples)}, {self.num_products} products"
        )


@dataclass(frozen=True)
class SpectralDensity:
    """The spectrum of a symmetric operator as seen by n probes.

    Attributes:
        nodes: float64 ``[num_probes, num_steps]``, ascending; a run that ended early is filled up with weight 0.
        weights: float64, same shape; rows sum to 1.
        size: P, the number of eigenvalues.
        num_products: products A v spent.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    num_products: int

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        return (
            f"density of {self.size} eigenvalues, seen between {self.nodes.min():.6g} and {self.nodes.max():.6g}: "
            f"{probes} probes of {steps} steps, {self.num_products} products"
        )

    @property
    def num_probes(self) -> int:
        """Number of probes, n."""
        return len(self.nodes)

    @property
    def support(self) -> tuple[float, float]:
        """Smallest and largest node: inside the spectrum, and close to its ends where these stand out."""
        seen = self.nodes[self.weights > 0]
        return float(seen.min()), float(seen.max())

    @property
    def default_sigma(self) -> float:
        """Width of the kernel where none is given: 1 % of the support (or of its magnitude where that is a point)."""
        low, high = self.support
        return 0.01 * (high - low) or 0.01 * abs(high) or 0.01

    def density(self, grid: Grid, sigma: float | None = None) -> Tensor:
        """Mean over probes of sum_j w_j N(grid; theta_j, sigma^2), float64 ``[G]``; integrates to 1.

        Raises:
            ValueError: grid is not one-dimensional and finite; sigma is not above 0.
        """
        return self._kernels(grid, sigma).mean(0)

    def band(self, grid: Grid, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """Ends of the 95 % interval of :meth:`density` at each point, by Student's t over probes, cut at 0.

        Raises:
            ValueError: as for :meth:`density`; fewer than 2 probes.
        """
        if self.num_probes < 2:
            raise ValueError(f"SpectralDensity.band: num_probes must be at least 2, got {self.num_probes}")
        samples = self._kernels(grid, sigma)
        half = vec.student_quantile(self.num_probes - 1) * samples.std(0) / math.sqrt(self.num_probes)
        return (samples.mean(0) - half).clamp(min=0), samples.mean(0) + half

    def cdf(self, grid: Grid) -> Tensor:
        """Share of eigenvalues at or below each point, float64 ``[G]``: mean over probes of the weights up to there.

        A node on the point counts half: between nodes a Gauss rule is off by at most the weights beside it, either way.

        Raises:
            ValueError: grid is not one-dimensional and finite.
        """
        points = _grid("cdf", grid)
        below = (self.nodes[..., None] < points).double() + 0.5 * (self.nodes[..., None] == points).double()
        shares, order = (self.weights[..., None] * below).sum(1).mean(0), points.argsort()
        # Never falling, though sums over different lanes round the same weights by an ulp either way.
        return torch.empty_like(shares).index_copy_(0, order, shares[order].cummax(0).values)

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> TraceFunction:
        """The trace of f(A), P mean_i sum_j w_ij f(theta_ij), for an elementwise ``function`` of float64 tensors.

        Raises:
            ValueError: f is not finite at a node.
        """
        samples = self._samples(function)
        mean, error, half = _student(samples)
        return TraceFunction(mean, error, (mean - half, mean + half), samples, self.num_products)

    def bracket(self, function: Callable[[Tensor], Tensor], lower: float = 0.0) -> TraceFunction:
        """The same between bounds, for f with negative even and positive odd derivatives (log is one) on A >= lower.

        For those the Gauss rule is never below the integral, and the Gauss-Radau rule with a node at ``lower`` never
        above (Golub and Meurant 1994): value and samples are the middle, the interval is that of both ends.

        Raises:
            ValueError: f is not finite at a node.
        """
        above = self._samples(function)
        rules = [
            (nodes, weights) if len(nodes) == self.size or not weights[-1] > 0 else _radau(nodes, weights, lower)
            for nodes, weights in zip(self.nodes, self.weights, strict=True)  # runs that ended early are exact
        ]
        radau = SpectralDensity(
            torch.stack([nodes for nodes, _ in rules]), torch.stack([w for _, w in rules]), self.size, self.num_products
        )
        below = torch.minimum(radau._samples(function), above)
        samples = (below + above) / 2
        (mean, error, _), (low, _, half_low), (high, _, half_high) = map(_student, (samples, below, above))
        interval = (low - half_low, high + half_high)
        return TraceFunction(mean, error, interval, samples, self.num_products, (high - low) / 2)

    def _samples(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """P sum_j w_ij f(theta_ij), float64 ``[num_probes]``."""
        terms = torch.where(self.weights > 0, self.weights * function(self.nodes), 0.0)
        samples = self.size * terms.sum(1)
        if not samples.isfinite().all():
            raise ValueError("SpectralDensity.trace_of: function must be finite at every node, got an infinity or NaN")
        return samples

    def plot(self, axes: Any = None, **options: Any) -> Any:
        """Draw it: :func:`curvlab.spectra.plots.plot_density`."""
        from curvlab.spectra.plots import plot_density

        return plot_density(self, axes, **options)

    def _kernels(self, grid: Grid, sigma: float | None) -> Tensor:
        vec.check_positive("SpectralDensity.density", sigma=sigma)
        points, width = _grid("density", grid), sigma or self.default_sigma
        out = torch.zeros(self.num_probes, len(points), dtype=torch.float64)
        for nodes, weights, row in zip(self.nodes, self.weights, out, strict=True):
            used = weights > 0
            distances = (points - nodes[used, None]) / width
            row += weights[used] @ torch.exp(-0.5 * distances.square())
        return out / (width * math.sqrt(2 * math.pi))


def _grid(owner: str, grid: Grid) -> Tensor:
    points = torch.as_tensor(grid, dtype=torch.float64)
    if points.ndim != 1 or not points.isfinite().all():
        raise ValueError(f"SpectralDensity.{owner}: grid must be one-dimensional and finite, got {list(points.shape)}")
    return points.cpu()


def _student(samples: Tensor) -> tuple[float, float, float]:
    """Mean, its standard error, and half of its 95 % interval; the last two NaN for a single sample."""
    n, mean = len(samples), float(samples.mean())
    error = float(samples.std()) / math.sqrt(n) if n > 1 else math.nan
    return mean, error, vec.student_quantile(n - 1) * error if n > 1 else math.nan


def _radau(nodes: Tensor, weights: Tensor, lower: float) -> tuple[Tensor, Tensor]:
    """The Gauss-Radau rule of as many nodes, one of them at ``lower`` (or at the lowest node, where that is below).

    T comes back from the Gauss rule by Lanczos on diag(nodes) from sqrt(weights); with T' = T without its last row and
    column and beta the coupling between, its last entry becomes lower + beta^2 [(T' - lower)^-1]_last,last (Golub
    1973).
    """
    theta, start = nodes.numpy(), weights.sqrt().numpy()
    n = len(theta)
    if n == 1:
        return nodes.clamp(max=lower), weights
    rows = np.zeros((n, n))
    rows[0] = start / np.linalg.norm(start)
    for j in range(1, n):
        new = theta * rows[j - 1]
        for _ in range(2):
            new -= rows[:j].T @ (rows[:j] @ new)
        length = np.linalg.norm(new)
        if length <= 1e-14 * np.abs(theta).max():
            return nodes, weights
        rows[j] = new / length
    T = (rows * theta) @ rows.T
    end, unit = min(lower, float(theta.min())), np.eye(n - 1)[-1]
    inner, beta = T[:-1, :-1] - end * np.eye(n - 1), T[-1, -2]
    T[-1, -1] = end + beta**2 * np.linalg.lstsq(inner, unit, rcond=None)[0][-1]
    T[-1, :-2] = T[:-2, -1] = 0
    values, columns = np.linalg.eigh((T + T.T) / 2)
    return torch.from_numpy(values), torch.from_numpy(columns[0] ** 2)


@torch.no_grad()
def slq_density(
    A: vec.Operator,
    num_probes: int = 10,
    num_steps: int = 50,
    *,
    memory_budget: int = 4 << 30,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    """The spectral density of a symmetric operator ``[P, P]`` from ``num_probes`` Lanczos runs of ``num_steps`` steps.

    Args:
        A: symmetric operator.
        num_probes: runs, each from independent random signs.
        num_steps: products a run, at most P of use. A run whose vectors are exhausted ends early, and exactly.
        memory_budget: bytes for the vectors kept, (num_steps + 1) P elements a run; runs that do not fit together go
            one group after the other.
        generator: of the probes (on the operator's device or the host).
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: num_probes or num_steps below 1; the budget holds not even one run; products not finite.
    """
    size = vec.check_operator("slq_density", A, symmetric=True)
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"slq_density: {name} must be an integer of at least 1, got {value!r}")
    steps = min(num_steps, size)
    run_bytes = (steps + 1) * size * A.dtype.itemsize
    if run_bytes > memory_budget:
        fit = max(0, memory_budget // (size * A.dtype.itemsize) - 1)
        raise ValueError(
            f"slq_density: memory_budget must be at least {run_bytes} bytes for one run of {steps} steps, got "
            f"{memory_budget}; {fit} steps would fit"
        )
    group = min(num_probes, memory_budget // run_bytes)
    nodes, weights, spent = torch.zeros(num_probes, steps).double(), torch.zeros(num_probes, steps).double(), 0
    with vec.progress_bar(progress, "density", num_probes * steps) as show:
        for first in range(0, num_probes, group):
            count = min(group, num_probes - first)
            runs = _Lockstep(A, count, steps, generator)
            while runs.step():
                show(spent + runs.num_products, "")
            spent += runs.num_products
            for i, space in enumerate(runs.spaces):
                space.clean()
                values, columns, _ = space.ritz()
                nodes[first + i] = float(values[-1])
                nodes[first + i, : len(values)] = torch.from_numpy(values)
                weights[first + i, : len(values)] = torch.from_numpy(columns[0] ** 2)
    return SpectralDensity(nodes, weights / weights.sum(1, keepdim=True), size, spent)


class _Lockstep:
    """Lanczos runs side by side: step j of all of them is one contiguous block, so that a product copies nothing."""

    def __init__(self, A: vec.Operator, count: int, steps: int, generator: torch.Generator | None) -> None:
        self.A, self.steps, self.num_products = A, steps, 0
        size = A.shape[0]
        # Not longer than the runs can get: memory is touched as they grow.
        self.buffer = torch.empty(steps + 1, count, size, dtype=A.dtype, device=A.device)
        self.spaces = []
        for i in range(count):
            space = KrylovSpace(steps + 1, size, dtype=A.dtype, device=A.device, buffer=self.buffer[:, i])
            space.add(vec.draw_signs(A, 1, generator))
            self.spaces.append(space)
        self.active = list(range(count))

    def step(self) -> bool:
        """One product for every run that has not ended; False when none is left."""
        m = max((self.spaces[i].num_multiplied for i in self.active), default=0)
        if m >= self.steps:
            return False
        rows = self.buffer[m] if len(self.active) == self.buffer.shape[1] else self.buffer[m, self.active]
        products = self.A.apply_rows(rows)
        self.num_products += len(rows)
        for product, i in zip(products, self.active, strict=True):
            self.spaces[i].take(product[None])
        self.active = [i for i in self.active if self.spaces[i].num_candidates]
        return bool(self.active)


def log_determinant(
    A: vec.Operator,
    shift: float,
    *,
    num_probes: int = 16,
    num_steps: int = 40,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceFunction:
    """Log-determinant of a PSD operator, log det(A + shift 1) = tr log(A + shift), in nats, by quadrature.

    Bracketed (:meth:`SpectralDensity.bracket`): where num_steps are too few for a small shift, the interval and
    ``quadrature_error`` say so.

    Args:
        A: symmetric positive semidefinite operator, such as a GGN. Nodes below 0 by rounding count as 0.
        shift: > 0.
        num_probes: runs.
        num_steps: products a run; the error of the quadrature falls like exp(-4 num_steps sqrt(shift / lambda_max)).
        generator: of the probes.
        progress: show a bar.

    Raises:
        TypeError: A is no operator, or not float32 or float64.
        ValueError: shift not above 0; A has an eigenvalue clearly below 0.
    """
    density = _psd_density("log_determinant", A, shift, num_probes, num_steps, generator, progress)
    return density.bracket(lambda nodes: torch.log(nodes.clamp(min=0) + shift))


def effective_dimension(
    A: vec.Operator,
    shift: float,
    *,
    num_probes: int = 16,
    num_steps: int = 40,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceFunction:
    """How many directions a PSD operator determines, tr A (A + shift 1)^-1 = sum_i lambda_i / (lambda_i + shift).

    Arguments and errors as for :func:`log_determinant`. Source: MacKay 1992.
    """
    density = _psd_density("effective_dimension", A, shift, num_probes, num_steps, generator, progress)
    return density.bracket(lambda nodes: nodes.clamp(min=0) / (nodes.clamp(min=0) + shift))


def _psd_density(
    owner: str,
    A: vec.Operator,
    shift: float,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator | None,
    progress: bool,
) -> SpectralDensity:
    vec.check_operator(owner, A)
    vec.check_positive(owner, shift=shift)
    density = slq_density(A, num_probes, num_steps, generator=generator, progress=progress)
    low, high = density.support
    if low < -1e3 * torch.finfo(A.dtype).eps * max(abs(low), abs(high)):
        raise ValueError(f"{owner}: A must be positive semidefinite, got an eigenvalue near {low:.3g}")
    return density
