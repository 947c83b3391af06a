# SPDX-License-Identifier: Apache-2.0
"""What a ticket is compared with: the same counts at other places, and the same places with other weights.

A random mask with the layers' counts is :func:`shuffle_layerwise`; with the global count alone,
:func:`curvlab.sparse.random_mask`.  Both, and re-initialization, are the controls of Frankle et al. 2021, "Pruning
neural networks at initialization: why are we missing the mark?", section 5.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvlab.sparse.layers import MaskedLayer
from curvlab.sparse.mask import Mask
from curvlab.sparse.prunable import check_generator, check_module
from curvlab.sparse.sparsify import densify

__all__ = ["reinitialize", "shuffle_layerwise"]


def shuffle_layerwise(mask: Mask, generator: torch.Generator | None = None) -> Mask:
    """Each layer's mask permuted uniformly within the layer: all counts stay, the places are drawn anew.

    Args:
        mask: whose counts to keep.
        generator: of the permutations, on any device.

    Raises:
        TypeError: mask is no Mask, or generator no generator.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"shuffle_layerwise: mask must be a Mask, got {type(mask).__name__}")
    check_generator(generator, "shuffle_layerwise")

    def permuted(name: str, keep: Tensor) -> Tensor:
        del name
        device = keep.device if generator is None else generator.device
        order = torch.randperm(keep.numel(), generator=generator, device=device).to(keep.device)
        return keep.reshape(-1)[order].view(keep.shape)

    return mask.map(permuted)


def reinitialize(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """A copy of ``model`` with every parameter drawn anew by its layer's ``reset_parameters``, masks as they are.

    BatchNorm's statistics begin anew as well.  The draw is that of the dense model, made on the CPU: a sparse layer
    takes what it keeps of it, so that the result does not depend on device or mask.

    Args:
        model: dense or sparse.
        generator: gives the seed of the draw; None: the global generator.  The global generator's state is left as it
            was, but for that one number.

    Raises:
        TypeError: not a module, or generator no generator; a layer with parameters of its own that has no
            ``reset_parameters`` or one that leaves some of them (weight_norm, ``torch.nn.utils.prune``), or a linear or
            convolutional one with a forward of its own (whose draw would be another layer's): build such a model anew.
        ValueError: lazy parameters.
    """
    check_module(model, "reinitialize")
    check_generator(generator, "reinitialize")
    lazy = next((name for name, param in model.named_parameters() if is_lazy(param)), None)
    if lazy is not None:
        raise ValueError(f"reinitialize: model must be initialized, got a lazy parameter {lazy}: run it once")
    drawn = densify(model).cpu()
    for name, module in drawn.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        kind = next((kind for kind in (nn.Linear, nn.Conv2d) if isinstance(module, kind)), None)
        own_forward = kind is not None and type(module).forward is not kind.forward
        if own_forward or not callable(getattr(module, "reset_parameters", None)):
            raise TypeError(
                f"reinitialize: model must consist of layers with reset_parameters, got {type(module).__name__} "
                f"({name or 'the model itself'}); build the model anew instead"
            )
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for param in drawn.parameters():
            if param.is_floating_point():
                param.fill_(math.nan)
        for module in drawn.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    left = next((name for name, param in drawn.named_parameters() if bool(param.isnan().any())), None)
    if left is not None:
        raise TypeError(
            f"reinitialize: model must consist of layers whose reset_parameters draws all their parameters, got {left} "
            "undrawn; undo weight_norm and the like (and sparsify what is pruned), or build the model anew"
        )
    result = copy.deepcopy(model)
    fresh = dict(drawn.named_modules())
    with torch.no_grad():
        for name, module in result.named_modules():
            source = fresh[name]
            tensors = [*module._parameters.items(), *module._buffers.items()]
            for key, target in tensors:
                if target is None or (isinstance(module, MaskedLayer) and key == "indices"):
                    continue
                if isinstance(module, MaskedLayer) and key == "values":
                    target.copy_(source.weight.reshape(-1)[module.indices.cpu()])  # type: ignore[union-attr, operator]
                else:
                    target.copy_(getattr(source, key))
    return result
