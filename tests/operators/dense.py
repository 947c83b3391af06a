# SPDX-License-Identifier: Apache-2.0
"""Dense matrices by an independent route: PyTorch's own loss, and ``torch.func`` forward over reverse.

Nothing of ``curvlab`` is used but the names of the chosen parameters: no problem, no engine, no loss formula.  Matrices
are sums over batches, because BatchNorm may see them one by one.  With LayerNorm and with BatchNorm's batch statistics
column by column: there ``torch.func.hessian`` (that is, ``vmap``) is 2 to 10 % off finite differences in PyTorch 2.14.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.operators.params import select_names
from tests.operators.models import Case

_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d)


class Whole:
    """A case as functions of one flat vector theta ``[P]``: outputs of a batch, and the sum of losses of a batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.mode = case.options.get("batch_norm", "eval")
        self.model = copy.deepcopy(case.model).eval()
        names = select_names(self.model, case.options.get("params"), "Whole")
        params = dict(self.model.named_parameters())
        self.shapes = {name: params[name].shape for name in names}
        self.theta = torch.cat([params[name].detach().reshape(-1) for name in names])
        self.frozen_models: dict[int, nn.Module] = {}
        self.squared = case.loss is F.mse_loss or isinstance(case.loss, nn.MSELoss)
        self.batched = not any(
            isinstance(module, nn.LayerNorm) or (isinstance(module, _BatchNorm) and self.mode == "batch")
            for module in self.model.modules()
        )
        if self.mode == "batch":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.train().track_running_stats = False  # type: ignore[assignment]
        self.normalizer = 1.0 if case.options.get("reduction") == "sum" else sum(self.share(y) for _, y in case.batches)

    def outputs(self, theta: Tensor, x: Any) -> Tensor:
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        values = {n: piece.reshape(shape) for piece, (n, shape) in zip(pieces, self.shapes.items(), strict=True)}
        model = self.model
        if self.mode == "frozen":
            if id(x) not in self.frozen_models:
                self.frozen_models[id(x)] = self.frozen(x)
            model = self.frozen_models[id(x)]
        with sdpa_kernel(SDPBackend.MATH):
            if isinstance(x, dict):
                return functional_call(model, values, (), x)
            return functional_call(model, values, x if isinstance(x, tuple) else (x,))

    def frozen(self, x: Tensor) -> nn.Module:
        """Running statistics set by one training pass with momentum 1, and the unbiased variance taken back."""
        model = copy.deepcopy(self.model)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        counts: dict[nn.Module, float] = {}
        for module in norms:
            module.running_mean = torch.zeros(module.num_features, dtype=x.dtype)
            module.running_var = torch.ones(module.num_features, dtype=x.dtype)
            module.momentum, module.track_running_stats = 1.0, True
            module.train().register_forward_hook(
                lambda m, args, _: counts.__setitem__(m, args[0].numel() / args[0].shape[1])
            )
        with torch.no_grad():
            model(x)
        for module in norms:
            assert module.running_var is not None
            module.running_var *= (counts[module] - 1.0) / counts[module]
        return model.eval()

    def share(self, y: Tensor) -> float:
        """This batch's part of the normalizer of PyTorch's mean: the value of the sum over that of the mean."""
        loss = self.case.loss
        if self.squared:
            return float(y.numel())
        weight = getattr(loss, "weight", None)
        if y.is_floating_point() or not _is_cross_entropy(loss):
            return float(len(y))
        return float(sum((1.0 if weight is None else float(weight[i])) for i in y.reshape(-1).tolist() if i != -100))

    def total(self, outputs: Tensor, y: Tensor) -> Tensor:
        """PyTorch's mean over the batch, times the batch's share; forward mode of its ``mse_loss`` raises in 2.14."""
        if self.squared:
            return (outputs - y).square().sum()
        return self.case.loss(outputs, y) * self.share(y)


def _is_cross_entropy(loss: Any) -> bool:
    function = loss.func if isinstance(loss, functools.partial) else loss
    return isinstance(loss, nn.CrossEntropyLoss) or function is F.cross_entropy


def _summed(case: Case, part: Callable[[Whole, Any, Tensor], Tensor]) -> Tensor:
    whole = Whole(case)
    for x, _ in case.batches:
        whole.outputs(whole.theta, x)  # frozen statistics are taken outside of any transform
    parts = [part(whole, x, y) for x, y in case.batches]
    return torch.stack(parts).sum(0) / whole.normalizer


def jacobian_of(function: Callable[[Tensor], Tensor], at: Tensor, *, batched: bool = True) -> Tensor:
    """``[m, n]``, forward, all columns together unless told otherwise."""
    unit = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)

    def column(e: Tensor) -> Tensor:
        return jvp(function, (at,), (e,))[1].reshape(-1)

    return (vmap(column)(unit) if batched else torch.stack([column(e) for e in unit])).T.detach()


def hessian_of(function: Callable[[Tensor], Tensor], at: Tensor, *, batched: bool = True) -> Tensor:
    """``[n, n]`` of a scalar function, forward over reverse."""
    return jacobian_of(grad(function), at, batched=batched)


def dense_loss(case: Case) -> Tensor:
    """L, 0-d."""
    return _summed(case, lambda w, x, y: w.total(w.outputs(w.theta, x), y).detach())


def dense_gradient(case: Case) -> Tensor:
    """dL/dtheta ``[P]``, forward."""
    return _summed(case, lambda w, x, y: jacobian_of(lambda t: w.total(w.outputs(t, x), y), w.theta)[0])


def dense_hessian(case: Case) -> Tensor:
    """d2L/dtheta2 ``[P, P]``."""
    return _summed(case, lambda w, x, y: hessian_of(lambda t: w.total(w.outputs(t, x), y), w.theta, batched=w.batched))


def dense_jacobian(case: Case) -> Tensor:
    """d outputs / dtheta ``[M, P]``, batches one after another."""
    whole = Whole(case)
    for x, _ in case.batches:
        whole.outputs(whole.theta, x)
    return torch.cat([jacobian_of(lambda t, x=x: whole.outputs(t, x), whole.theta) for x, _ in case.batches])


def dense_ggn(case: Case) -> Tensor:
    """J^T (d2 total / d outputs2) J / Z ``[P, P]``."""

    def part(w: Whole, x: Any, y: Tensor) -> Tensor:
        f = w.outputs(w.theta, x).detach()
        j = jacobian_of(lambda t: w.outputs(t, x), w.theta)
        return j.T @ hessian_of(lambda o: w.total(o, y), f) @ j

    return _summed(case, part)


def dense_empirical_fisher(case: Case) -> Tensor:
    """sum_n g_n g_n^T / Z ``[P, P]``, g_n the gradient of the n-th sample's loss (its part of the total)."""

    def part(w: Whole, x: Any, y: Tensor) -> Tensor:
        f = w.outputs(w.theta, x).detach()
        j = jacobian_of(lambda t: w.outputs(t, x), w.theta).reshape(len(y), -1, len(w.theta))  # [N, D, P]
        delta = grad(lambda o: w.total(o, y))(f).reshape(len(y), -1)
        g = torch.einsum("nd,ndp->np", delta, j)
        return g.T @ g

    return _summed(case, part)
