# SPDX-License-Identifier: Apache-2.0
"""From dense models to sparse ones and back, and from one mask to another while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from curvlab.sparse.crossover import Kernels, check_kernels
from curvlab.sparse.layers import MaskedConv2d, MaskedLayer, MaskedLinear, moved
from curvlab.sparse.mask import Mask
from curvlab.sparse.prunable import check_module, prunable_layers

__all__ = ["copied_model", "densify", "sparsify", "update_mask"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def sparsify(model: nn.Module, mask: Mask, *, kernels: Kernels = "auto") -> nn.Module:
    """A copy of ``model`` whose masked Conv2d and Linear layers hold only the surviving weights.

    Each becomes a :class:`MaskedConv2d` or :class:`MaskedLinear`; all else is copied as it is, and what the mask does
    not name stays dense.  A layer that stands in several places is replaced in all of them.  Pruning of
    ``torch.nn.utils.prune`` is made permanent in the copies of the layers that the mask names, and stays elsewhere.

    Args:
        model: dense, or sparse (then the mask may name its sparse layers too: survivors keep their values).
        mask: names weights of Conv2d and Linear layers.
        kernels: "auto" chooses the sparse or the dense path layer by layer, by the densities where they were measured
            to cross over; "sparse" and "dense" force one.

    Raises:
        TypeError: model or mask of another type; a layer with a forward of its own.
        ValueError: a name that is no such weight, another shape, a weight that two layers share, hooks on a layer,
            unknown kernels.
    """
    check_kernels(kernels, "sparsify")
    if not isinstance(mask, Mask):
        raise TypeError(f"sparsify: mask must be a Mask, got {type(mask).__name__}")
    copied = copied_model(model, "sparsify")
    owners = {name.rpartition(".")[0] for name in mask}
    for prefix, module in copied.named_modules(remove_duplicate=False):
        if prefix in owners:  # of other layers it goes on holding zeros at zero
            for name in [h._tensor_name for h in module._forward_pre_hooks.values() if _is_pruning(h)]:
                prune.remove(module, name)
    layers = prunable_layers(copied)
    holders = _holders(copied)
    made: dict[int, nn.Module] = {}
    for name, keep in mask.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"sparsify: mask must name weights of Conv2d or Linear layers, {_why_not(copied, name)}")
        if isinstance(layer, MaskedLayer):
            layer.kernels = kernels
            layer.set_mask(keep)
            continue
        if is_lazy(layer.weight):
            raise ValueError(f"sparsify: model must be initialized, got a lazy parameter {name}: run it once")
        if parametrize.is_parametrized(layer):  # of its bias, which the sparse layer would take as it is now
            raise ValueError(f"sparsify: mask must name weights of Conv2d or Linear layers, {_why_not(copied, name)}")
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            raise ValueError(f"sparsify: model must have no hooks on the layers to replace, got one on that of {name}")
        if holders[id(layer.weight)] > 1:
            raise ValueError(f"sparsify: mask must name weights of one layer each, got {name}, which layers share")
        kind = MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedLinear
        made[id(layer)] = kind(layer, keep, kernels=kernels)  # type: ignore[arg-type]
    return _replaced(copied, made)


def densify(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with ``nn.Conv2d`` and ``nn.Linear`` in place of its sparse layers, zero where pruned.

    Raises:
        TypeError: not a module.
    """
    copied = copied_model(model, "densify")
    made = {id(m): m.dense_layer() for m in copied.modules() if isinstance(m, (MaskedConv2d, MaskedLinear))}
    return _replaced(copied, made)


def update_mask(model: nn.Module, mask: Mask, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give the sparse layers of ``model`` another mask, in place, and move the optimizer's state along.

    Surviving weights keep their values, their gradients and, position by position, every state tensor of their shape
    (momentum, ``exp_avg``, ``exp_avg_sq``, ...).  Grown weights begin at zero, with state zero, as in RigL (Evci et al.
    2020, section 3).  Scalar state (step counts) is the layer's and stays.  Each changed layer's ``values`` is a new
    parameter: the optimizer's is exchanged here, any other reference to it is the caller's to renew.

    Args:
        model: with sparse layers.
        mask: names the sparse layers to change; those it does not name stay as they are.
        optimizer: one that holds these layers' ``values``; None: none does.

    Raises:
        TypeError: model, mask or optimizer of another type.
        ValueError: a name that is no sparse layer of the model, another shape, an optimizer that holds none of these
            layers' values (made for another model, or before their last update), or a state of another shape
            (L-BFGS); then nothing was changed.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"update_mask: mask must be a Mask, got {type(mask).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"update_mask: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_module(model, "update_mask")
    layers = prunable_layers(model)
    chosen: list[tuple[MaskedLayer, Tensor]] = []
    for name, keep in mask.items():
        layer = layers.get(name)
        if not isinstance(layer, MaskedLayer):
            raise ValueError(
                f"update_mask: mask must name sparse layers of the model, got {name!r}; sparsify makes them"
            )
        if tuple(keep.shape) != layer.weight_shape:
            raise ValueError(
                f"update_mask: mask must have shape {list(layer.weight_shape)} for {name}, got {list(keep.shape)}"
            )
        if optimizer is not None:
            _check_state(name, optimizer.state.get(layer.values, {}), layer.values)
        chosen.append((layer, keep))
    if optimizer is not None:
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if not any(id(layer.values) in held for layer, _ in chosen):
            raise ValueError(
                f"update_mask: optimizer must hold values of the layers in mask (say {next(iter(mask))}), got one with "
                "none of them: it would go on training parameters that the model no longer has"
            )
    for layer, keep in chosen:
        old = layer.values
        source = layer.set_mask(keep)
        if optimizer is not None:
            _exchange(optimizer, old, layer.values, source)


def _check_state(name: str, state: Mapping[str, Any], values: Tensor) -> None:
    for key, value in state.items():
        nested = isinstance(value, (list, tuple, dict))
        if nested or (isinstance(value, Tensor) and value.ndim and value.shape != values.shape):
            got = type(value).__name__ if nested else list(value.shape)
            raise ValueError(
                f"update_mask: optimizer must keep state of the shape of its parameter ({list(values.shape)} for "
                f"{name}) or scalars, got {key!r}: {got}"
            )


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, source: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if param is old else param for param in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        # Not by shape alone: the step count of a layer with one weight left is a scalar, its momentum a vector.
        optimizer.state[new] = {
            key: moved(value, source) if isinstance(value, Tensor) and value.ndim else value
            for key, value in state.items()
        }


def _is_pruning(hook: Any) -> bool:
    return isinstance(hook, prune.BasePruningMethod)


def copied_model(model: ModuleT, owner: str) -> ModuleT:
    """A deep copy, also where ``torch.nn.utils.prune`` left tensors that deepcopy refuses."""
    check_module(model, owner)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _holders(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    count: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            count[id(param)] = count.get(id(param), 0) + 1
    return count


def _why_not(model: nn.Module, name: str) -> str:
    """What stands where a weight was expected."""
    prefix, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return f"got {name!r}, which is no parameter of {type(model).__name__}"
    if parametrize.is_parametrized(module):
        return f"got {name!r} of a parametrized {type(module).__name__} (remove_parametrizations first)"
    first = next((n for n, m in prunable_layers(model).items() if m is module), None)
    if last == "weight" and first is not None:
        return f"got {name!r}, which is another name of {first}"
    if last == "weight" and last not in module._parameters and isinstance(getattr(module, last, None), Tensor):
        return f"got {name!r}, which {type(module).__name__} computes (weight_norm, spectral_norm: remove it first)"
    what = "" if last == "weight" else f" ({last!r} cannot be pruned)"
    return f"got {name!r} of {type(module).__name__}{what}"


def _replaced(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """``model`` with modules exchanged by identity, wherever they stand."""
    if id(model) in made:
        return made[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in made:
                module._modules[name] = made[id(child)]
                # What was also set as a plain attribute cannot be: nn.Module.__setattr__ registers every module.
    return model
