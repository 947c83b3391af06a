# SPDX-License-Identifier: Apache-2.0
"""Curvature against its peers: products with the Hessian and the GGN, traces, eigenpairs, spectral densities.

Products are timed with everything kept that the engine keeps (graphs, activations, operators); traces, eigenpairs and
densities are timed from nothing. A peer counts where its product is within 1e-3 of float64, and its eigenpairs where
the largest residual, computed independently in float64, is at most 1e-3 of the eigenvalue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import curvature_algorithms as algorithms
from benchmarks import curvature_peers as peers
from benchmarks import peak_memory
from benchmarks.curvature_models import Setup, make_setup, product_flops, train
from benchmarks.harness import Case, Engine, alternate
from curvlab.operators import GGNOperator, HessianOperator, Problem
from curvlab.spectra import Eigenpairs, hutchinson_trace, slq_density, top_eigenpairs

TITLE = "Curvature: ours and peers"
ACCURACY = 1e-3  # relative error in float64 that a peer's product may have

# (samples, must hold / goal: hvp of one vector, of eight, GGN), as shares of the best peer's time
PRODUCTS: dict[str, tuple[int, tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "MLP": (512, (1.00, 0.90), (0.95, 0.85), (0.92, 0.85)),
    "CNN": (256, (0.88, 0.75), (0.75, 0.60), (0.65, 0.50)),
    "ResNet-20": (128, (0.75, 0.60), (0.65, 0.45), (0.70, 0.50)),
    "ResNet-20, width 8": (128, (0.75, 0.60), (0.65, 0.45), (0.70, 0.50)),
}
# (samples, steps trained before; must hold / goal: trace, eigenpairs, the same warm, density)
ALGORITHMS: dict[str, tuple[int, int, tuple[tuple[float, float], ...]]] = {
    "MLP": (64, 200, ((0.95, 0.80), (0.75, 0.50), (0.35, 0.20), (0.90, 0.75))),
    "CNN": (32, 100, ((0.75, 0.60), (0.60, 0.40), (0.30, 0.15), (0.80, 0.65))),
    "ResNet-20": (32, 60, ((0.70, 0.55), (0.60, 0.40), (0.30, 0.15), (0.75, 0.60))),
}
WARM_STEPS = 50
QUICK = ("MLP", "CNN")  # of the quick form; algorithms of the first alone


def problem_of(setup: Setup) -> Problem:
    """The mean cross-entropy over the samples of ``setup``."""
    return Problem(setup.model, nn.CrossEntropyLoss(), (setup.x, setup.y))


def ours(setup: Setup, rows: Tensor, *, precision: str | None = None) -> tuple[peers.Call, peers.Read]:
    """The fused engine as a user gets it."""
    operator = HessianOperator(problem_of(setup), precision=precision)
    return lambda: operator.apply_rows(rows), lambda found: found


def ggn_ours(setup: Setup, rows: Tensor) -> tuple[peers.Call, peers.Read]:
    """The same for the GGN."""
    operator = GGNOperator(problem_of(setup))
    return lambda: operator.apply_rows(rows), lambda found: found


def directions(setup: Setup, k: int) -> Tensor:
    """Gaussian rows ``[k, P]``."""
    size = sum(p.numel() for p in setup.params)
    return torch.randn(k, size, generator=torch.Generator().manual_seed(1))


def hessian_builders(setup: Setup, *, k: int = 8, quick: bool = False) -> dict[str, peers.Builder]:
    """All engines of the Hessian by name, ours first."""
    others = {} if quick else peers.BLOCK if k > 1 else peers.OTHERS  # what loses with one vector loses in a loop
    chosen = {**peers.STRONG, **others}
    return {"ours": ours, **peers.with_channels_last(chosen, setup)}


def ggn_builders(setup: Setup, *, quick: bool) -> dict[str, peers.Builder]:
    """All engines of the GGN by name, ours first."""
    chosen = {**peers.GGN, **({} if quick else peers.GGN_OTHERS)}
    return {"ours": ggn_ours, **peers.with_channels_last(chosen, setup)}


def warm_up(engine: str) -> None:
    """Run ``engine`` once on something small."""
    setup = make_setup("tiny MLP", 8)
    builders = hessian_builders(setup)
    name = engine.removesuffix(", channels-last")
    call, read = builders[name](setup, directions(setup, 2))
    read(call())


def machine_rates() -> tuple[float, float]:
    """FLOP a second of a matrix product (2048 cubed) and of a 3x3 convolution (64 to 64 channels, channels-last)."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x = torch.randn(64, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    engines: dict[str, Engine] = {"product": lambda: a @ b, "convolution": lambda: F.conv2d(x, w, padding=1)}
    timings = alternate(engines, rounds=7, seconds=0.1, budget=5.0)
    operations = {"product": 2.0 * 2048**3, "convolution": 2.0 * 64 * 64 * 64 * 9 * 256}
    product, convolution = (1e3 * operations[name] / timings[name].cpu_ms for name in engines)
    return product, convolution


def _product_case(
    setup: Setup,
    builders: dict[str, peers.Builder],
    k: int,
    what: str,
    bar: tuple[float, float] | None,
    *,
    ggn: bool = False,
    memory: dict[str, float] | None = None,
) -> Case:
    rows = directions(setup, k)
    reference = peers.reference_product(setup, rows[0], ggn=ggn)
    calls: dict[str, Engine] = {}
    errors: dict[str, float] = {}
    for name, build in builders.items():
        call, read = build(setup, rows)
        product = read(call())
        errors[name] = float((product[0].double() - reference).norm() / reference.norm())
        calls[name] = call
    if errors["ours"] > 1e-5:
        raise AssertionError(f"{setup.name}, {what}: our product is {errors['ours']:.1e} off float64")
    flops, rate = k * product_flops(setup)[ggn], max(machine_rates())
    return Case(
        f"{setup.name}, N={len(setup.x)}: {what}",
        calls.pop("ours"),
        calls,
        limit=flops / rate,
        limit_name="the product's operations with kept activations at the best rate measured in this run",
        note=f"{flops / 1e9:.2f} GFLOP at {rate / 1e9:.0f} GFLOP/s; our relative error {errors['ours']:.1e}",
        not_counted={n: f"relative error {e:.1e}" for n, e in errors.items() if n != "ours" and not e <= ACCURACY},
        bar=bar,
        memory=memory or {},
    )


def _memory(setup: Setup, k: int) -> dict[str, float]:
    names = ["ours", peers.KEPT, "func.linearize, vmap", "curvlinops"]
    return {name: peak_memory.of_engine(setup.name, len(setup.x), k, name) for name in names}


def product_cases(*, quick: bool) -> Iterator[Case]:
    """Products with one and eight vectors, GGN products, and what only some networks are asked for."""
    for name, (samples, one, eight, ggn) in PRODUCTS.items():
        if quick and name not in QUICK:
            continue
        setup = make_setup(name, samples)
        yield _product_case(setup, hessian_builders(setup, k=1, quick=quick), 1, "Hessian, one vector", one)
        builders = hessian_builders(setup, quick=quick)
        memory = _memory(setup, 8) if name == "CNN" and not quick else None
        yield _product_case(setup, builders, 8, "Hessian, eight vectors", eight, memory=memory)
        builders = ggn_builders(setup, quick=quick)
        yield _product_case(setup, builders, 1, "GGN, one vector", ggn, ggn=True)
        if name in ("MLP", "CNN"):
            yield _low_precision_case(setup)
    setup = make_setup("tiny MLP", 128)
    yield _product_case(setup, hessian_builders(setup, quick=quick), 8, "Hessian, eight vectors", (0.5, 0.4))
    if not quick:
        setup = make_setup("CNN", 256)
        chosen = {name: hessian_builders(setup)[name] for name in ("ours", peers.KEPT, "curvlinops")}
        memory = _memory(setup, 32)
        yield _product_case(setup, chosen, 32, "Hessian, 32 vectors", None, memory=memory)
        setup = make_setup("CNN(32)+BN", 1000)
        builders = hessian_builders(setup, k=1, quick=True)
        yield _product_case(setup, builders, 1, "Hessian, one vector", (0.88, 0.75))


def _low_precision_case(setup: Setup) -> Case:
    rows = directions(setup, 1)
    low, exact = ours(setup, rows, precision="bf16")[0], ours(setup, rows)[0]
    error = float((low().float() - exact()).norm() / exact().norm())
    note = f"relative error {error:.1e}"
    name = f"{setup.name}, N={len(setup.x)}: Hessian in bfloat16"
    return Case(name, low, {"our float32": exact}, note=note, bar=(1 / 1.5, 0.5))


def _pairs(setup: Setup) -> Any:
    return top_eigenpairs(HessianOperator(problem_of(setup)), algorithms.NUM_PAIRS, tol=algorithms.TOLERANCE)


def _warm_pairs(operator: HessianOperator, model: nn.Module, start: Eigenpairs) -> Any:
    """As along a training run: the operator moved to the present parameters, earlier eigenpairs to start from."""
    return top_eigenpairs(operator.at(model), algorithms.NUM_PAIRS, tol=algorithms.TOLERANCE, start=start)


def _eigenpair_case(
    setup: Setup,
    what: str,
    our_call: Callable[[], Any],
    chosen: dict[str, Callable[[Setup], algorithms.Pairs]],
    bar: tuple[float, float],
) -> Case:
    found = our_call()
    residual = algorithms.largest_residual(setup, (found.values, found.vectors))
    if residual > 1.05 * algorithms.TOLERANCE:
        raise AssertionError(f"{setup.name}, {what}: our largest residual is {residual:.1e}")
    residuals = {name: algorithms.largest_residual(setup, solve(setup)) for name, solve in chosen.items()}
    return Case(
        f"{setup.name}, N={len(setup.x)}: {what}",
        our_call,
        {name: partial(solve, setup) for name, solve in chosen.items()},
        note=f"{found.num_products} products and {found.num_rounded} in bfloat16, "
        f"largest residual {residual:.1e} of the eigenvalue",
        not_counted={
            name: f"largest residual {r:.1e}" for name, r in residuals.items() if not r <= algorithms.TOLERANCE
        },
        bar=bar,
    )


def algorithm_cases(*, quick: bool) -> Iterator[Case]:
    """Trace, top eigenpairs cold and warm, and spectral density."""
    for name, (samples, steps, (trace, cold, warm, density)) in ALGORITHMS.items():
        if quick and name not in QUICK[:1]:
            continue
        setup = make_setup(name, samples, steps=steps)
        title = f"{name}, N={samples}"
        generator = torch.Generator().manual_seed(0)
        yield Case(
            f"{title}: trace, {algorithms.NUM_PROBES} probes",
            lambda s=setup, g=generator: hutchinson_trace(
                HessianOperator(problem_of(s)), num_probes=algorithms.NUM_PROBES, generator=g
            ),
            {peer: partial(run, setup) for peer, run in algorithms.TRACES.items()},
            bar=trace,
        )
        runs = 2 * algorithms.NUM_STEPS
        without = "curvlinops (no reorthogonalization)"
        yield Case(
            f"{title}: density, {algorithms.NUM_RUNS} x {algorithms.NUM_STEPS} steps",
            lambda s=setup, g=generator: slq_density(
                HessianOperator(problem_of(s)),
                num_probes=algorithms.NUM_RUNS,
                num_steps=algorithms.NUM_STEPS,
                generator=g,
            ),
            {peer: partial(run, setup) for peer, run in algorithms.DENSITIES.items() if peer != without or not quick},
            note=f"{runs} products",
            not_counted={without: "less work: no reorthogonalization"},
            bar=density,
        )
        chosen = dict(algorithms.EIGENPAIRS)
        if quick:
            del chosen["PyHessian"]
        yield _eigenpair_case(setup, "five top eigenpairs", partial(_pairs, setup), chosen, cold)
        before: Eigenpairs = _pairs(setup)
        later = setup.with_model(copy.deepcopy(setup.model))
        train(later, WARM_STEPS, seed=1)
        for peer, make in algorithms.PRODUCTS.items():
            chosen[f"{peer}, SciPy eigsh, warm start"] = partial(algorithms.arpack, make=make, start=before.vectors)
        our_call = partial(_warm_pairs, HessianOperator(problem_of(setup)), later.model, before)
        what = f"the same {WARM_STEPS} training steps later, warm"
        yield _eigenpair_case(later, what, our_call, chosen, warm)


def cases(*, quick: bool) -> Iterator[Case]:
    """All of them; the quick form leaves out peers that never lead and the residual networks."""
    yield from product_cases(quick=quick)
    yield from algorithm_cases(quick=quick)
