# SPDX-License-Identifier: Apache-2.0
r"""Changes of a network that leave its function as it is, to hold measures against.

For a chain of affine layers W_1, ..., W_L with ReLU between them (pooling, flattening and BatchNorm in evaluation mode
may stand in between), with positive factors alpha:

    relu_rescaling     W_l, b_l -> alpha W_l, alpha b_l    and W_{l+1} -> W_{l+1} / alpha     (Dinh et al. 2017)
    neuron_rescaling   the same with a factor for every hidden unit of its own
    bn_scale           W_l, b_l -> alpha W_l, alpha b_l before BatchNorm; mu -> alpha mu,
                       var -> alpha^2 (var + eps) - eps:   exact, also with eps
    permutation        hidden units of each layer in another order
    logit_scale        W_L, b_L -> c W_L, c b_L:           the same predictions, another loss

The first four leave f(x) unchanged, the last its argmax. All but the permutation are theta -> S theta with a positive
diagonal S; H then becomes S^-1 H S^-1, which is why lambda_max changes and that of D H D with D = |theta| does not.
With BatchNorm after a layer, its output does not follow a rescaling, so relu_rescaling acts on the normalization's
weight and bias instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

__all__ = ["SYMMETRIES", "Symmetry", "Transformed", "transform"]

Symmetry = Literal["relu_rescaling", "neuron_rescaling", "bn_scale", "permutation", "logit_scale"]
SYMMETRIES: tuple[str, ...] = get_args(Symmetry)

_Affine = nn.Linear | nn.Conv2d
_BatchNorm = nn.modules.batchnorm._BatchNorm
_NEUTRAL = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Transformed:
    """A network after a transformation.

    Attributes:
        model: a changed copy.
        order: where each entry of the new parameter vector came from, int64 ``[P]`` (in the order of
            ``model.parameters()``): new = old[order] but for factors. The identity for all but the permutation.
    """

    model: nn.Module
    order: Tensor


@dataclass
class _Unit:
    """An affine layer and the BatchNorm that follows it, if any."""

    affine: _Affine
    norm: _BatchNorm | None = None


def transform(
    model: nn.Module,
    symmetry: Symmetry,
    *,
    strength: float = 10.0,
    generator: torch.Generator | None = None,
    inputs: Tensor | None = None,
) -> Transformed:
    """A copy of ``model`` with the same function (for ``"logit_scale"``: the same predictions) at other parameters.

    Args:
        model: a chain whose ``modules()`` come in the order of execution, with nothing but ReLU, pooling, flattening,
            dropout and BatchNorm between its Linear and Conv2d layers (``curvlab.models`` are such chains).
        symmetry: which.
        strength: the factor: alpha = strength and 1/strength for every other layer (relu_rescaling), drawn
            log-uniformly from [1/strength, strength] for each unit (neuron_rescaling); for BatchNorm strength at each
            layer; c = strength for the logits.
        generator: source of factors and permutations.
        inputs: a few samples on which the function is compared: the copy is refused where it computes something else,
            as it does for a network that is no chain.

    Raises:
        ValueError: an unknown symmetry; strength not above 1; a layer that does not fit; no layer to act on; a function
            that changed on ``inputs``.
    """
    if symmetry not in SYMMETRIES:
        raise ValueError(f"transform: symmetry must be one of {', '.join(SYMMETRIES)}, got {symmetry!r}")
    if not 1.0 < strength < float("inf"):
        raise ValueError(f"transform: strength must be above 1 and finite, got {strength!r}")
    changed = copy.deepcopy(model)
    markers = copy.deepcopy(model)
    size = sum(param.numel() for param in model.parameters())
    # A twin whose parameters are their own positions goes through the permutation and says where each one went.
    numbers = torch.arange(size, dtype=torch.float64).split([param.numel() for param in model.parameters()])
    for param, piece in zip(markers.parameters(), numbers, strict=True):
        param.data = piece.reshape(param.shape)
    act = _ACTIONS[symmetry]
    with torch.no_grad():
        if symmetry == "permutation":
            seed = torch.randint(2**62, (), generator=generator).item()
            for network in (changed, markers):
                act(_chain(network), strength, torch.Generator().manual_seed(int(seed)))
        else:
            act(_chain(changed), strength, generator)
        order = torch.cat([param.reshape(-1) for param in markers.parameters()]).round().long()
        if inputs is not None:
            _compare(model, changed, symmetry, strength, inputs)
    return Transformed(changed, order)


def _chain(model: nn.Module) -> list[_Unit]:
    """Affine layers in order, each with its BatchNorm."""
    units: list[_Unit] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            units.append(_Unit(module))
        elif isinstance(module, _BatchNorm):
            if not units or units[-1].norm is not None:
                raise ValueError(f"transform: model must have an affine layer before each BatchNorm, got {name}")
            units[-1].norm = module
        elif not list(module.children()) and not isinstance(module, _NEUTRAL):
            raise ValueError(
                f"transform: model must be a chain of Linear, Conv2d, BatchNorm, ReLU and pooling layers, got "
                f"{type(module).__name__} at {name or 'the top'}"
            )
    if len(units) < 2:
        raise ValueError(f"transform: model must have at least two affine layers, got {len(units)}")
    return units


def _spread(unit: _Unit, values: Tensor, following: _Affine) -> Tensor:
    """Values of the units ``[C]`` for each input feature of the next layer: a flattened image repeats its channels."""
    wanted = following.in_features if isinstance(following, nn.Linear) else following.in_channels
    channels = unit.affine.weight.shape[0]
    if wanted % channels or (isinstance(following, nn.Conv2d) and (wanted != channels or following.groups != 1)):
        raise ValueError(
            f"transform: model must feed each layer's {channels} outputs to the next layer, got one that takes {wanted}"
        )
    return values.repeat_interleave(wanted // channels)


def _scale_rows(layer: _Affine | _BatchNorm, factors: Tensor) -> None:
    layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


def _rescale(units: list[_Unit], draw: Callable[[int, Tensor], Tensor]) -> None:
    for i, (unit, following) in enumerate(pairwise(units)):
        factors = draw(i, unit.affine.weight)
        target = unit.affine if unit.norm is None else unit.norm
        if target.weight is None:
            raise ValueError("transform: model must have BatchNorm with weight and bias, got one without")
        _scale_rows(cast("_Affine", target), factors)
        spread = _spread(unit, factors, following.affine)
        following.affine.weight.div_(spread.reshape(1, -1, *[1] * (following.affine.weight.ndim - 2)))


def _relu_rescaling(units: list[_Unit], strength: float, generator: torch.Generator | None) -> None:
    _rescale(units, lambda i, w: w.new_full((len(w),), strength if i % 2 == 0 else 1.0 / strength))


def _neuron_rescaling(units: list[_Unit], strength: float, generator: torch.Generator | None) -> None:
    _rescale(
        units, lambda _, w: strength ** (2.0 * torch.rand(len(w), dtype=torch.float64, generator=generator) - 1.0).to(w)
    )


def _bn_scale(units: list[_Unit], strength: float, generator: torch.Generator | None) -> None:
    normed = [unit for unit in units if unit.norm is not None]
    if not normed:
        raise ValueError("transform: model must have BatchNorm after a layer for bn_scale, got none")
    for unit in normed:
        norm = cast("_BatchNorm", unit.norm)
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("transform: model must have BatchNorm with running statistics, got one without")
        _scale_rows(unit.affine, unit.affine.weight.new_full((len(unit.affine.weight),), strength))
        norm.running_mean.mul_(strength)
        norm.running_var.add_(norm.eps).mul_(strength**2).sub_(norm.eps)


def _permutation(units: list[_Unit], strength: float, generator: torch.Generator | None) -> None:
    for unit, following in pairwise(units):
        count = unit.affine.weight.shape[0]
        order = torch.randperm(count, generator=generator)
        for layer in (unit.affine, unit.norm):
            for tensor in () if layer is None else (*layer.parameters(), *layer.buffers()):
                if tensor.ndim:
                    tensor.copy_(tensor[order].clone())
        weight = following.affine.weight
        size = weight.shape[1] // count if weight.shape[1] % count == 0 else 0
        _spread(unit, order, following.affine)  # refuses what does not fit
        columns = (order[:, None] * size + torch.arange(size)).reshape(-1)
        weight.copy_(weight[:, columns].clone())


def _logit_scale(units: list[_Unit], strength: float, generator: torch.Generator | None) -> None:
    last = units[-1]
    target = last.affine if last.norm is None else last.norm
    _scale_rows(cast("_Affine", target), target.weight.new_full((len(target.weight),), strength))


_ACTIONS: dict[str, Callable[[list[_Unit], float, torch.Generator | None], None]] = {
    "relu_rescaling": _relu_rescaling,
    "neuron_rescaling": _neuron_rescaling,
    "bn_scale": _bn_scale,
    "permutation": _permutation,
    "logit_scale": _logit_scale,
}


def _compare(model: nn.Module, changed: nn.Module, symmetry: str, strength: float, inputs: Tensor) -> None:
    """Refuses a copy that computes something else, in evaluation mode on ``inputs``."""
    modes = {module: module.training for network in (model, changed) for module in network.modules()}
    try:
        before, after = model.eval()(inputs), changed.eval()(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    expected = before * strength if symmetry == "logit_scale" else before
    error = (after - expected).abs().max() / expected.abs().max()
    if not error <= 1e3 * torch.finfo(before.dtype).eps:
        raise ValueError(
            f"transform: model must be a chain in the order of its modules, got outputs that changed by {error:.1e} "
            f"under {symmetry}"
        )
