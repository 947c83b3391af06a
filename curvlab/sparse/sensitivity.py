# SPDX-License-Identifier: Apache-2.0
r"""Criteria that ask derivatives, for pruning at initialization: SNIP, GraSP and SynFlow.

With g = dL/dw (L: the mean loss of the given data, over the chosen weights), H the Hessian over the same weights:

    SNIP     |g w|                   connection sensitivity: |dL/dc| at c = 1 where the network uses c w
    GraSP    w (H g)                 minus the change of ||g||^2 / 2 to first order when w is removed
    SynFlow  w dR/dw                 R = sum of outputs of the network of absolute values on an input of ones

All keep the largest scores.  Each is evaluated on a dense copy, so running statistics do not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.sparse.criteria import present_mask
from curvlab.sparse.mask import Mask
from curvlab.sparse.prunable import Selection, check_density, keep_largest, kept_count, prunable_weights
from curvlab.sparse.sparsify import densify

__all__ = ["grasp", "snip", "synflow"]

Data = tuple[Any, Tensor] | Sequence[Any] | Iterable[tuple[Any, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


class _Network:
    """A dense copy at its masked weights, with the chosen weights as leaves."""

    def __init__(self, model: nn.Module, mask: Mask | None, params: Selection, density: float, owner: str) -> None:
        check_density(density, owner)
        self.owner = owner
        weights = prunable_weights(model, params, owner)
        self.allowed = present_mask(model, weights, mask, owner)
        self.total = sum(weight.numel() for weight in weights.values())
        self.model = densify(model)
        Mask(self.allowed).apply_(self.model)
        found = dict(self.model.named_parameters(remove_duplicate=False))
        self.weights = {name: found[name].detach() for name in weights}

    def keep(self, scores: dict[str, Tensor], density: float) -> Mask:
        return Mask(keep_largest(scores, kept_count(density, self.total), self.allowed, self.owner))

    def gradients(self, loss: Loss, batches: list[tuple[Any, Tensor]], *, create_graph: bool) -> Iterable[Any]:
        """Batch by batch: leaves, and the gradients of the batch's share of the mean loss."""
        samples = sum(len(y) for _, y in batches)
        for x, y in batches:
            leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
            with torch.enable_grad():
                value = loss(functional_call(self.model, leaves, (x,)), y) * (len(y) / samples)
                if value.ndim:
                    raise ValueError(f"{self.owner}: loss must give the mean over a batch, got {list(value.shape)}")
                grads = torch.autograd.grad(
                    value, list(leaves.values()), create_graph=create_graph, materialize_grads=True
                )
            yield leaves, dict(zip(leaves, grads, strict=True))


def _batches(data: Data, owner: str) -> list[tuple[Any, Tensor]]:
    if not isinstance(data, Iterable):
        raise TypeError(f"{owner}: data must be (x, y) or such pairs, got {type(data).__name__}")
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor)
    batches: list[Any] = [tuple(data)] if pair else list(data)  # type: ignore[arg-type]
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise TypeError(f"{owner}: data must be (x, y) or such pairs, got {type(batch).__name__}")
    if not sum(len(y) for _, y in batches):
        raise ValueError(f"{owner}: data must hold at least one sample, got none")
    return [(x, y) for x, y in batches]


def snip(
    model: nn.Module,
    density: float,
    data: Data,
    *,
    loss: Loss = F.cross_entropy,
    mask: Mask | None = None,
    params: Selection = None,
) -> Mask:
    """Connection sensitivity ``|w dL/dw|`` (Lee, Ajanthan & Torr 2019, equations 4 to 6), one shot.

    Args:
        model: dense or sparse; in training mode BatchNorm sees its batch, as in the source.
        density: kept share of all chosen weights, in [0, 1].
        data: ``(x, y)`` or such pairs, each a batch; on the model's device.
        loss: ``(outputs, targets) ->`` mean over a batch.
        mask: the present mask; the result is nested in it.
        params: which weights.

    Raises:
        TypeError: data of another form.
        ValueError: no samples; density outside [0, 1] or above that of ``mask``; gradients that are not finite.
    """
    network = _Network(model, mask, params, density, "snip")
    sums = {name: torch.zeros_like(weight) for name, weight in network.weights.items()}
    for _, grads in network.gradients(loss, _batches(data, "snip"), create_graph=False):
        for name, grad in grads.items():
            sums[name] += grad
    return network.keep({name: (total * network.weights[name]).abs() for name, total in sums.items()}, density)


def grasp(
    model: nn.Module,
    density: float,
    data: Data,
    *,
    loss: Loss = F.cross_entropy,
    temperature: float = 200.0,
    mask: Mask | None = None,
    params: Selection = None,
) -> Mask:
    """Gradient signal preservation (Wang, Zhang & Grosse 2020, section 4.2): keeps the largest ``w (H g)``.

    Their score S = -w (H g) is what removing w changes in ||g||^2, to first order and up to the factor 2; the weights
    of largest S are removed.  g and H are over the chosen weights.

    Args:
        model: dense or sparse; in training mode BatchNorm sees its batch.
        density: kept share of all chosen weights, in [0, 1].
        data: ``(x, y)`` or such pairs, each a batch; on the model's device.
        loss: ``(outputs, targets) ->`` mean over a batch.
        temperature: outputs are divided by it, so that the softmax is far from saturation (200 in the authors' code).
        mask: the present mask; the result is nested in it.
        params: which weights.

    Raises:
        TypeError: data of another form.
        ValueError: no samples; temperature not positive; density outside [0, 1] or above that of ``mask``; derivatives
            that are not finite.
    """
    if not isinstance(temperature, (int, float)) or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"grasp: temperature must be positive, got {temperature!r}")
    network, batches = _Network(model, mask, params, density, "grasp"), _batches(data, "grasp")

    def cooled(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss(outputs / temperature, targets)

    whole = {name: torch.zeros_like(weight) for name, weight in network.weights.items()}
    for _, grads in network.gradients(cooled, batches, create_graph=False):
        for name, grad in grads.items():
            whole[name] += grad * network.allowed[name]  # a pruned weight carries no gradient flow
    curved = {name: torch.zeros_like(weight) for name, weight in network.weights.items()}
    for leaves, grads in network.gradients(cooled, batches, create_graph=True):
        inner = sum((grads[name] * whole[name]).sum() for name in leaves)
        if isinstance(inner, Tensor) and inner.requires_grad:  # a linear network has H = 0
            parts = torch.autograd.grad(inner, list(leaves.values()), materialize_grads=True)
            for name, part in zip(leaves, parts, strict=True):
                curved[name] += part
    return network.keep({name: curved[name] * weight for name, weight in network.weights.items()}, density)


def synflow(
    model: nn.Module,
    density: float,
    inputs: Tensor,
    *,
    rounds: int = 100,
    mask: Mask | None = None,
    params: Selection = None,
) -> Mask:
    """Iterative synaptic flow pruning (Tanaka, Kunin, Yamins & Ganguli 2020, algorithm 1): no data, no collapse.

    Round r = 1 .. rounds keeps ``density^(r / rounds)``, scored anew at the mask of the round before: w dR/dw with
    R the sum of the outputs on an input of ones, all parameters replaced by their absolute values, BatchNorm at
    statistics (0, 1), evaluation mode, float64 (R grows with depth beyond float32).  As in the authors' code biases
    take part, with their absolute values.  The theory supposes activations with f(x) = f'(x) x, such as ReLU.

    Args:
        model: dense or sparse.
        density: kept share of all chosen weights, in [0, 1].
        inputs: any batch ``[N, ...]``: its shape alone counts.
        rounds: 1 is the one-shot score.
        mask: the present mask; the result is nested in it.
        params: which weights.

    Raises:
        ValueError: rounds below one; inputs that are no batch; density outside [0, 1] or above that of ``mask``; scores
            that are not finite.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"synflow: rounds must be an int of at least 1, got {rounds!r}")
    if not isinstance(inputs, Tensor) or not inputs.ndim or not len(inputs):
        got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"synflow: inputs must be a batch [N, ...] of at least one sample, got {got}")
    network = _Network(model, mask, params, density, "synflow")
    absolute = network.model.double().eval()
    with torch.no_grad():
        for param in absolute.parameters():
            param.abs_()
        for module in absolute.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
                assert module.running_var is not None
                module.running_var.fill_(1.0)
    ones = torch.ones_like(inputs[:1], dtype=torch.float64, device=next(absolute.parameters()).device)
    kept = Mask(network.allowed)
    for number in range(1, rounds + 1):
        kept.apply_(absolute)
        values = dict(absolute.named_parameters(remove_duplicate=False))
        leaves = {name: values[name].detach().clone().requires_grad_() for name in network.weights}
        with torch.enable_grad():
            flow = functional_call(absolute, leaves, (ones,)).sum()
            grads = torch.autograd.grad(flow, list(leaves.values()), materialize_grads=True)
        scores = {n: (g * leaves[n]).detach() for n, g in zip(leaves, grads, strict=True)}
        count = kept_count(density ** (number / rounds), network.total)
        if number < rounds:  # the mask that came in may already be below the first rounds' share
            count = min(count, kept.num_kept)
        kept = Mask(keep_largest(scores, count, dict(kept), "synflow"))
    return kept
