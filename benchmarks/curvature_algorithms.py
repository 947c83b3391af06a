# SPDX-License-Identifier: Apache-2.0
"""Traces, eigenpairs and spectral densities as peers compute them, from nothing: graphs and operators are built inside.

Every function takes a :class:`~benchmarks.curvature_models.Setup`; those of eigenpairs return ``(values, rows)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import curvature_peers as peers
from benchmarks.curvature_models import Setup

Product = Callable[[Tensor], Tensor]  # [P] -> [P]
Pairs = tuple[Tensor, Tensor]

NUM_PROBES, NUM_PAIRS, NUM_RUNS, NUM_STEPS, TOLERANCE = 32, 5, 2, 50, 1e-3


def kept_product(setup: Setup) -> Product:
    """One flat product over a kept graph."""
    params, gradient = peers.kept_gradient(setup)
    sizes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        pieces = [piece.view(p.shape) for piece, p in zip(v.split(sizes), params, strict=True)]
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(gradient, params, pieces, retain_graph=True)])

    return product


def linearized_product(setup: Setup) -> Product:
    """One flat product of ``torch.func.linearize``, channels-last for images."""
    setup = peers.channels_last(setup) if setup.is_convolutional else setup
    params = {name: p.detach() for name, p in setup.model.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def loss(p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(setup.model, p, (setup.x,)), setup.y)

    linear = peers.quiet_linearize(torch.func.grad(loss), params)

    def product(v: Tensor) -> Tensor:
        pieces = v.split(sizes)
        named = {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return torch.cat([h.reshape(-1) for h in linear(named).values()])

    return product


PRODUCTS: dict[str, Callable[[Setup], Product]] = {peers.KEPT: kept_product, peers.LINEARIZE: linearized_product}


def _size(setup: Setup) -> int:
    return sum(p.numel() for p in setup.params)


def loop_trace(setup: Setup, make: Callable[[Setup], Product]) -> float:
    """Hutchinson's estimate with Rademacher probes, in a loop."""
    product, size = make(setup), _size(setup)
    total = 0.0
    for _ in range(NUM_PROBES):
        v = torch.randint(0, 2, (size,), dtype=torch.float32).mul_(2).sub_(1)
        total += float(product(v) @ v)
    return total / NUM_PROBES


def pyhessian_trace(setup: Setup) -> float:
    """The ``trace`` of PyHessian made to take all its probes: at tolerance 0 a negative running mean stops it."""
    found = peers.pyhessian_object(setup)
    return float(np.mean(found.trace(maxIter=NUM_PROBES, tol=float("-inf"))))


def curvlinops_trace(setup: Setup) -> float:
    """The ``hutchinson_trace`` of curvlinops."""
    from curvlinops import hutchinson_trace

    return float(hutchinson_trace(peers.curvlinops_hessian(setup), NUM_PROBES))


def eigenthings_trace(setup: Setup) -> float:
    """hessian-eigenthings' ``trace``."""
    from hessian_eigenthings import trace

    operator = peers.eigenthings_hessian(setup)
    return trace(operator, num_matvecs=NUM_PROBES, method="hutchinson", seed=0).estimate


TRACES: dict[str, Callable[[Setup], float]] = {
    **{name: (lambda setup, make=make: loop_trace(setup, make)) for name, make in PRODUCTS.items()},
    "PyHessian": pyhessian_trace,
    "curvlinops": curvlinops_trace,
    "hessian-eigenthings": eigenthings_trace,
}


def arpack(setup: Setup, make: Callable[[Setup], Product], start: Tensor | None = None) -> Pairs:
    """SciPy's ``eigsh`` over a product."""
    from scipy.sparse.linalg import LinearOperator

    product, size = make(setup), _size(setup)

    def matvec(v: Any) -> Any:
        return product(torch.from_numpy(np.ascontiguousarray(v.reshape(-1)))).numpy()

    make_operator: Any = LinearOperator  # its stub has the signature of the class, not of this constructor
    operator = make_operator((size, size), matvec=matvec, dtype=np.float32)
    return _eigsh(operator, None if start is None else start.sum(0).numpy())


def _eigsh(operator: Any, first: Any = None) -> Pairs:
    from scipy.sparse.linalg import eigsh

    solve: Any = eigsh  # its stub has an integer tol
    values, vectors = solve(operator, k=NUM_PAIRS, which="LA", tol=TOLERANCE, v0=first)
    return torch.from_numpy(values), torch.from_numpy(vectors).T


def curvlinops_pairs(setup: Setup) -> Pairs:
    """SciPy's ``eigsh`` over curvlinops' ``to_scipy``."""
    return _eigsh(peers.curvlinops_hessian(setup).to_scipy())


def eigenthings_pairs(setup: Setup) -> Pairs:
    """hessian-eigenthings' Lanczos; it has no stopping rule, so 40 steps are given to it."""
    from hessian_eigenthings import lanczos

    found: Any = lanczos(peers.eigenthings_hessian(setup), k=NUM_PAIRS, max_iter=40, which="LA", seed=0)
    return found.eigenvalues.detach(), torch.as_tensor(found.eigenvectors).detach()


def pyhessian_pairs(setup: Setup) -> Pairs:
    """PyHessian's power iteration with deflation, at a tolerance a hundred times under its default."""
    found = peers.pyhessian_object(setup)
    values, vectors = found.eigenvalues(maxIter=100, tol=1e-5, top_n=NUM_PAIRS)
    return torch.tensor(values), peers.join(vectors)


EIGENPAIRS: dict[str, Callable[[Setup], Pairs]] = {
    **{f"{name}, SciPy eigsh": (lambda setup, make=make: arpack(setup, make)) for name, make in PRODUCTS.items()},
    "curvlinops, SciPy eigsh": curvlinops_pairs,
    "hessian-eigenthings": eigenthings_pairs,
    "PyHessian": pyhessian_pairs,
}


def largest_residual(setup: Setup, pairs: Pairs) -> float:
    """max_i ‖H v_i - λ_i v_i‖ / (|λ_i| ‖v_i‖), every product in float64 by :func:`reference_product`."""
    worst = 0.0
    for value, row in zip(pairs[0].double(), pairs[1].double(), strict=True):
        residual = (peers.reference_product(setup, row) - value * row).norm() / row.norm()
        worst = max(worst, float(residual / value.abs()))
    return worst


def loop_density(setup: Setup, make: Callable[[Setup], Product]) -> Tensor:
    """Lanczos with full reorthogonalization (twice), as a careful user writes it: one run after another."""
    product, size = make(setup), _size(setup)
    nodes = []
    for _ in range(NUM_RUNS):
        basis = torch.empty(NUM_STEPS, size)
        alphas, betas = [], []
        v = torch.randn(size)
        v /= v.norm()
        for j in range(NUM_STEPS):
            basis[j] = v
            w = product(v)
            alphas.append(float(w @ v))
            for _ in range(2):
                w -= basis[: j + 1].T @ (basis[: j + 1] @ w)
            betas.append(float(w.norm()))
            v = w / betas[-1]
        off = torch.tensor(betas[:-1])
        nodes.append(torch.linalg.eigvalsh(torch.diag(torch.tensor(alphas)) + torch.diag(off, 1) + torch.diag(off, -1)))
    return torch.stack(nodes)


def eigenthings_density(setup: Setup) -> Tensor:
    """hessian-eigenthings' ``spectral_density``."""
    from hessian_eigenthings import spectral_density

    operator = peers.eigenthings_hessian(setup)
    return spectral_density(operator, num_runs=NUM_RUNS, lanczos_steps=NUM_STEPS, seed=0).raw_eigenvalues


def curvlinops_density(setup: Setup) -> Tensor:
    """The ``fast_lanczos`` of curvlinops: without reorthogonalization, so less work than the others do."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = peers.curvlinops_hessian(setup)
    return torch.stack([fast_lanczos(operator, NUM_STEPS)[0] for _ in range(NUM_RUNS)])


DENSITIES: dict[str, Callable[[Setup], Tensor]] = {
    **{name: (lambda setup, make=make: loop_density(setup, make)) for name, make in PRODUCTS.items()},
    "hessian-eigenthings": eigenthings_density,
    "curvlinops (no reorthogonalization)": curvlinops_density,
}
