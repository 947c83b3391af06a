# SPDX-License-Identifier: Apache-2.0
"""The bfloat16 twin of a fused float32 engine: the same program over the same primal pass, its factors rounded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.engines import graph_capture
from curvlab.operators.engines.fused import FusedEngine
from curvlab.operators.engines.layer_rules.activation import ActivationStep, AddStep
from curvlab.operators.engines.layer_rules.affine import AffineStep
from curvlab.operators.engines.layer_rules.first_conv import FirstConvStep
from curvlab.operators.engines.layer_rules.pool import AveragePoolStep, MaxPoolStep, MeanStep
from curvlab.operators.engines.layer_rules.shape import CatStep, ReshapeStep, TransposeStep

__all__ = ["pays", "rounded_twin"]

_KNOWN = (
    AffineStep,
    ActivationStep,
    AddStep,
    MaxPoolStep,
    AveragePoolStep,
    MeanStep,
    ReshapeStep,
    TransposeStep,
    CatStep,
)
"""Steps of which every floating-point factor is kept in the dtype of the products (or float32: FirstConvStep)."""


def pays(engine: Any) -> bool:
    """Whether bfloat16 products are much faster here: a CPU with tile products, and more factors than parameters.

    Where parameters outweigh what is kept of the samples, a product is a pass over them and precision saves little:
    7.8 and 4.9 ms for the MLP of 1.9 M parameters and 64 samples; 24 and 10 ms for a CNN of 0.6 M and 32 images.
    """
    if type(engine) is not FusedEngine or engine.precision is not None or engine.memory_budget is not None:
        return False
    if engine.problem.device.type != "cpu" or engine.dtype != torch.float32 or not torch.cpu._is_amx_tile_supported():
        return False
    known = all(isinstance(step, _KNOWN) for step in engine.steps)
    return known and engine.plan.kept >= engine.dtype.itemsize * engine.problem.num_params


def rounded_twin(engine: FusedEngine, *, second: bool) -> FusedEngine:
    """An engine of precision "bf16" that keeps the factors of ``engine`` rounded; no primal pass of its own.

    Args:
        engine: float32, of a program of :data:`_KNOWN` steps.
        second: whether second-order terms are in (the Hessian's products) or not (the GGN's).
    """
    engine._prepare(second)
    twin = copy.copy(engine)
    twin.precision, twin.compute = "bf16", torch.bfloat16
    twin.steps = copy.deepcopy(engine.steps)
    for step in twin.steps:
        if isinstance(step, AffineStep):
            step.set_theta(twin.theta, twin.dtype, twin.compute)
    twin._chunks = []
    for chunk in engine._chunks:
        own = copy.copy(chunk)
        seen: dict[int, Tensor] = {}
        own.kept = [
            kept if isinstance(step, FirstConvStep) else _rounded(kept, seen)
            for step, kept in zip(engine.steps, chunk.kept, strict=True)
        ]
        own.signal = _rounded(chunk.signal, seen)
        twin._chunks.append(own)
    twin._heads = {}
    twin._replays = graph_capture.Replays(engine.problem.device)
    return twin


def _rounded(kept: Any, seen: dict[int, Tensor]) -> Any:
    """The same with float32 tensors in bfloat16; one that several steps share stays shared."""
    if isinstance(kept, (list, tuple)):
        return type(kept)(_rounded(part, seen) for part in kept)
    if not isinstance(kept, Tensor) or kept.dtype != torch.float32:
        return kept
    if id(kept) not in seen:
        seen[id(kept)] = kept.to(torch.bfloat16)
    return seen[id(kept)]
