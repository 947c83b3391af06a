# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model may be pruned, and the choice of exactly so many of them by a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvlab.sparse.layers import MaskedLayer

__all__ = [
    "Selection",
    "check_density",
    "check_generator",
    "check_module",
    "keep_largest",
    "kept_count",
    "prunable_layers",
    "prunable_weights",
]

Selection = str | Iterable[str] | Callable[[str, Tensor], bool] | None
"""Names or glob patterns of weights, a predicate ``(name, weight) -> bool``, or None for all."""

# These read the weights of their children and never call them: such a layer cannot be put in another's place.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def check_module(model: nn.Module, owner: str) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be an nn.Module, got {type(model).__name__}")


def check_generator(generator: torch.Generator | None, owner: str) -> None:
    """Refuse what is no generator (a seed, say).

    Raises:
        TypeError: generator is neither a ``torch.Generator`` nor None.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{owner}: generator must be a torch.Generator or None, got {type(generator).__name__}")


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear | MaskedLayer]:
    """Name of the weight -> layer: convolutions in two dimensions, linear layers, and the sparse layers made of them.

    Each layer once, in the order of ``model.named_modules()``.  Left out: layers whose weight is no plain parameter
    (parametrized, or under ``torch.nn.utils.prune``), and those that attention reads without calling them.
    """
    found: dict[str, nn.Conv2d | nn.Linear | MaskedLayer] = {}
    read = {id(c) for m in model.modules() if isinstance(m, READS_WEIGHTS) for c in m.children()}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        dense = isinstance(module, (nn.Conv2d, nn.Linear)) and "weight" in module._parameters
        if (dense or isinstance(module, MaskedLayer)) and id(module) not in read:
            found[name] = module  # type: ignore[assignment]
    return found


def prunable_weights(model: nn.Module, params: Selection = None, owner: str = "prunable_weights") -> dict[str, Tensor]:
    """Name -> weight (detached; of a sparse layer, the dense one with its zeros) of what may be pruned.

    Args:
        model: dense or sparse.
        params: which of them, None: the weights of all Conv2d and Linear layers.  No biases, no normalizations.
        owner: function named in errors.

    Raises:
        TypeError: not a module; params of another type.
        ValueError: no such weights, a pattern that names none, lazy parameters.
    """
    check_module(model, owner)
    weights: dict[str, Tensor] = {}
    for name, layer in prunable_layers(model).items():
        weight = layer.to_dense() if isinstance(layer, MaskedLayer) else layer.weight
        if is_lazy(weight):
            raise ValueError(f"{owner}: model must be initialized, got a lazy parameter {name}: run it once")
        weights[name] = weight.detach()
    if params is None:
        chosen = set(weights)
    elif callable(params):
        chosen = {name for name, weight in weights.items() if params(name, weight)}
    else:
        chosen = set()
        patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, Iterable) else [params]
        for pattern in patterns:
            if not isinstance(pattern, str):
                got = type(pattern).__name__
                raise TypeError(f"{owner}: params must be names or patterns, a predicate or None, got {got}")
            matches = {name for name in weights if name == pattern or fnmatchcase(name, pattern)}
            if not matches:
                raise ValueError(
                    f"{owner}: params must name weights of Conv2d or Linear layers (say {list(weights)[:4]}), got "
                    f"{pattern!r}, which matches none"
                )
            chosen |= matches
    if not chosen:
        raise ValueError(f"{owner}: model must have weights of Conv2d or Linear layers to choose from, got none")
    return {name: weight for name, weight in weights.items() if name in chosen}


def check_density(density: float, owner: str) -> None:
    """Refuse what is no kept share.

    Raises:
        ValueError: density is not in [0, 1].
    """
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or not math.isfinite(density) or not 0 <= density <= 1:
        raise ValueError(f"{owner}: density must be a kept share in [0, 1], got {density!r}")


def kept_count(density: float, total: int) -> int:
    """Weights kept of ``total``: density * total to the nearest integer, halves up (1e-9 of a weight is rounding)."""
    return math.floor(density * total + 0.5 + 1e-9)


def keep_largest(
    scores: Mapping[str, Tensor], count: int, allowed: Mapping[str, Tensor] | None, owner: str
) -> dict[str, Tensor]:
    """Exactly ``count`` entries of all tensors together: those of the largest scores, ties to the lower position.

    Args:
        scores: finite, one tensor a weight, of one device.
        count: entries to keep.
        allowed: entries to choose from; None: all.
        owner: function named in errors.

    Raises:
        ValueError: a score that is not finite, or fewer allowed entries than ``count``.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{owner}: scores must be finite, got NaN or infinite ones for {name}")
    # float64 holds every float32 and bfloat16: no ties are made.
    flat = torch.cat([score.detach().reshape(-1).double() for score in scores.values()])
    open_to = flat.numel()
    if allowed is not None:
        choice = torch.cat([allowed[name].to(flat.device).reshape(-1) for name in scores])
        flat = flat.masked_fill(~choice, -math.inf)
        open_to = int(choice.sum())
    if count > open_to:
        raise ValueError(
            f"{owner}: density must not exceed that of mask ({open_to} of {flat.numel()} weights), got {count} weights"
        )
    keep = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if count:
        threshold = flat.kthvalue(flat.numel() - count + 1).values
        keep = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        keep[ties[: count - int(keep.sum())]] = True
    sizes = [score.numel() for score in scores.values()]
    return {n: part.view(scores[n].shape) for n, part in zip(scores, keep.split(sizes), strict=True)}
