# SPDX-License-Identifier: Apache-2.0
"""Symmetric matrices B over the outputs of one batch, as products with K directions: ``u [K, *outputs.shape]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlab.ops import reference

__all__ = [
    "AutogradCurvature",
    "OuterProductCurvature",
    "OutputCurvature",
    "ScaledIdentityCurvature",
    "SoftmaxCurvature",
]


class OutputCurvature:
    """A symmetric matrix over the output elements of a batch; block-diagonal in the samples."""

    def __call__(self, u: Tensor) -> Tensor:
        """``B u`` for each of the K leading entries, shaped as ``u [K, *outputs.shape]``."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> OutputCurvature:
        """The same matrix with its factors rounded to ``dtype``."""
        raise NotImplementedError


class SoftmaxCurvature(OutputCurvature):
    """``w_r (diag(p_r) - p_r p_r^T)`` in each row r (sample and position), centered at the label.

    Attributes:
        probabilities: p ``[R, C]``.
        label: ``[R]``, int64; any class may serve, the likely one keeps the digits.
        weight: w ``[R]``.
    """

    def __init__(self, probabilities: Tensor, label: Tensor, weight: Tensor) -> None:
        self.probabilities, self.label, self.weight = probabilities, label, weight

    def __call__(self, u: Tensor) -> Tensor:
        """``B u``, shaped as ``u [K, N, C, ...]``."""
        rows = u.movedim(2, -1)
        flat = rows.reshape(u.shape[0], *self.probabilities.shape).to(self.probabilities.dtype).contiguous()
        product = reference.softmax_hessian_product(self.probabilities, self.label, self.weight, flat)
        return product.reshape(rows.shape).movedim(-1, 2).to(u.dtype)

    def to(self, dtype: torch.dtype) -> SoftmaxCurvature:
        """The same matrix with p and w rounded to ``dtype``."""
        return SoftmaxCurvature(self.probabilities.to(dtype), self.label, self.weight.to(dtype))


class ScaledIdentityCurvature(OutputCurvature):
    """``scale I``."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, u: Tensor) -> Tensor:
        """``scale u``."""
        return self.scale * u

    def to(self, dtype: torch.dtype) -> ScaledIdentityCurvature:
        """Itself: a Python number has no dtype."""
        return self


class OuterProductCurvature(OutputCurvature):
    """``(1/S) sum_s g_sr g_sr^T`` in each row r.

    Attributes:
        vectors: g ``[S, R, D]``.
        classes_last: rows are (sample, position) and D is the class axis 1 of the outputs; otherwise rows are samples
            and D all elements of one sample's output.
    """

    def __init__(self, vectors: Tensor, *, classes_last: bool) -> None:
        self.vectors, self.classes_last = vectors, classes_last

    def __call__(self, u: Tensor) -> Tensor:
        """``B u``, shaped as ``u [K, N, ...]``."""
        rows = u.movedim(2, -1) if self.classes_last else u
        flat = rows.reshape(u.shape[0], *self.vectors.shape[1:]).to(self.vectors.dtype)
        dots = torch.einsum("srd,krd->ksr", self.vectors, flat) / len(self.vectors)
        product = torch.einsum("ksr,srd->krd", dots, self.vectors).reshape(rows.shape).to(u.dtype)
        return product.movedim(-1, 2) if self.classes_last else product

    def to(self, dtype: torch.dtype) -> OuterProductCurvature:
        """The same matrix with g rounded to ``dtype``."""
        return OuterProductCurvature(self.vectors.to(dtype), classes_last=self.classes_last)


class AutogradCurvature(OutputCurvature):
    """The Hessian of any ``total(outputs, targets)`` in the outputs, by a kept gradient graph."""

    def __init__(self, total: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> None:
        self._total, self._targets = total, targets
        with torch.enable_grad():
            self._outputs = outputs.detach().requires_grad_()
            self._gradient = torch.autograd.grad(total(self._outputs, targets), self._outputs, create_graph=True)[0]

    def __call__(self, u: Tensor) -> Tensor:
        """``B u``, shaped as ``u [K, *outputs.shape]``."""
        if not self._gradient.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(u)
        products = [
            torch.autograd.grad(
                self._gradient, self._outputs, v.to(self._gradient), retain_graph=True, materialize_grads=True
            )[0]
            for v in u
        ]
        return torch.stack(products).to(u.dtype) if products else torch.zeros_like(u)

    def to(self, dtype: torch.dtype) -> AutogradCurvature:
        """The Hessian at the outputs rounded to ``dtype``."""
        targets = self._targets.to(dtype) if self._targets.is_floating_point() else self._targets
        return AutogradCurvature(self._total, self._outputs.to(dtype), targets)
