# SPDX-License-Identifier: Apache-2.0
r"""Which weights to keep: by magnitude, at random, or by what the loss says of them at initialization.

Every criterion is ``f(model, density, ..., mask=None, params=None) -> Mask``: it keeps exactly ``density * N`` (to the
nearest integer, halves up) of the N weights of all Conv2d and Linear layers - no biases, no normalizations - those of
the largest score, ties to the lower position.  ``mask``: the present one, in which the new one is nested (a sparse
model brings its own).  The model is never modified.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from curvlab.sparse.layers import MaskedLayer
from curvlab.sparse.mask import Mask
from curvlab.sparse.prunable import (
    Selection,
    check_density,
    check_generator,
    keep_largest,
    kept_count,
    prunable_layers,
    prunable_weights,
)

__all__ = ["global_magnitude", "layerwise_magnitude", "present_mask", "random_mask"]


def present_mask(model: nn.Module, weights: Mapping[str, Tensor], mask: Mask | None, owner: str) -> dict[str, Tensor]:
    """Where weights may be kept: name -> boolean, what ``mask`` and the model's sparse layers both keep.

    Raises:
        TypeError: mask is no Mask.
        ValueError: mask is of other shapes, or names a weight that was not chosen.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"{owner}: mask must be a Mask or None, got {type(mask).__name__}")
    allowed = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for name, layer in prunable_layers(model).items():
        if name in allowed and isinstance(layer, MaskedLayer):
            allowed[name] &= layer.mask
    for name, keep in (mask or {}).items():
        if name not in allowed or keep.shape != allowed[name].shape:
            got = f"{list(keep.shape)} for {name!r}"
            raise ValueError(f"{owner}: mask must be of the chosen weights (say {list(allowed)[:3]}), got {got}")
        allowed[name] &= keep.to(allowed[name].device)
    return allowed


def global_magnitude(model: nn.Module, density: float, *, mask: Mask | None = None, params: Selection = None) -> Mask:
    """The largest ``|w|`` of all layers together: one threshold (Han et al. 2015; Frankle & Carbin 2019, section 3).

    Args:
        model: dense or sparse.
        density: kept share of all chosen weights, pruned ones counted, in [0, 1].
        mask: the present mask; the result is nested in it.
        params: which weights (:data:`curvlab.sparse.prunable.Selection`).

    Raises:
        ValueError: density outside [0, 1] or above that of ``mask``; weights that are not finite; no such weights.
    """
    check_density(density, "global_magnitude")
    weights = prunable_weights(model, params, "global_magnitude")
    allowed = present_mask(model, weights, mask, "global_magnitude")
    count = kept_count(density, sum(weight.numel() for weight in weights.values()))
    return Mask(keep_largest({n: w.abs() for n, w in weights.items()}, count, allowed, "global_magnitude"))


def layerwise_magnitude(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    mask: Mask | None = None,
    params: Selection = None,
) -> Mask:
    """The largest ``|w|`` of each layer by itself, the same share of all (or a share by name).

    Args:
        model: dense or sparse.
        density: kept share of each layer's weights, or name -> share for all chosen weights.
        mask: the present mask; the result is nested in it.
        params: which weights; with a mapping, None means those it names.

    Raises:
        ValueError: a density outside [0, 1] or above that of ``mask`` in a layer; names that are not the chosen ones.
    """
    owner = "layerwise_magnitude"
    if isinstance(density, Mapping) and params is None:
        params = list(density)
    weights = prunable_weights(model, params, owner)
    shares = _shares(density, weights, owner)
    allowed = present_mask(model, weights, mask, owner)
    keep: dict[str, Tensor] = {}
    for name, weight in weights.items():
        count = kept_count(shares[name], weight.numel())
        keep |= keep_largest({name: weight.abs()}, count, {name: allowed[name]}, f"{owner} ({name})")
    return Mask(keep)


def _shares(density: float | Mapping[str, float], weights: Mapping[str, Tensor], owner: str) -> dict[str, float]:
    shares: dict[str, float] = dict(density) if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    if shares.keys() != weights.keys():
        odd = sorted(shares.keys() ^ weights.keys())
        raise ValueError(
            f"{owner}: density must have a share for each chosen weight and no other, got {odd[0]!r} amiss"
        )
    for share in shares.values():
        check_density(share, owner)
    return shares


def random_mask(
    model: nn.Module,
    density: float | None = None,
    *,
    like: Mask | None = None,
    mask: Mask | None = None,
    params: Selection = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """Weights drawn uniformly without replacement: of all layers together, or with the counts of another mask.

    Args:
        model: dense or sparse.
        density: kept share of all chosen weights together; per-layer counts are then random as well.
        like: in place of ``density``, draw each layer by itself with this mask's count.
        mask: the present mask; the result is nested in it.
        params: which weights; with ``like``, None means those it names.
        generator: of the draw; on any device (drawn there, then moved).

    Raises:
        TypeError: like or mask is no Mask, generator no generator.
        ValueError: neither or both of density and like; a density outside [0, 1] or above that of ``mask``.
    """
    owner = "random_mask"
    if (density is None) == (like is None):
        raise ValueError(
            "random_mask: one of density and like must be given, got " + ("none" if like is None else "both")
        )
    if like is not None and not isinstance(like, Mask):
        raise TypeError(f"random_mask: like must be a Mask or None, got {type(like).__name__}")
    check_generator(generator, owner)
    if like is not None and params is None:
        params = list(like)
    weights = prunable_weights(model, params, owner)
    allowed = present_mask(model, weights, mask, owner)
    scores = {name: _uniform(weight, generator) for name, weight in weights.items()}
    if like is None:
        assert density is not None
        check_density(density, owner)
        count = kept_count(density, sum(weight.numel() for weight in weights.values()))
        return Mask(keep_largest(scores, count, allowed, owner))
    if like.sizes != {name: weight.numel() for name, weight in weights.items()}:
        raise ValueError(f"random_mask: like must be of the chosen weights {list(weights)[:4]}, got {like!r}")
    keep: dict[str, Tensor] = {}
    for name, score in scores.items():
        keep |= keep_largest({name: score}, like.counts[name], {name: allowed[name]}, f"{owner} ({name})")
    return Mask(keep)


def _uniform(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    # float64: 2^53 values, so that ties, which go by position, do not bias the draw.
    device = weight.device if generator is None else generator.device
    return torch.rand(weight.shape, dtype=torch.float64, device=device, generator=generator).to(weight.device)
