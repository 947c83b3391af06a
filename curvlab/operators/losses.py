# SPDX-License-Identifier: Apache-2.0
"""Losses on the outputs of a network: value, gradient, and curvature as a product.

The total of a batch is ``sum_n l(f_n, y_n)``; a problem divides the totals of all its batches by one normalizer Z, to
which each batch brings its ``weight``.  So nothing depends on how the samples are split into batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.cross_entropy import SoftmaxCrossEntropy
from curvlab.operators.curvatures import (
    AutogradCurvature,
    OuterProductCurvature,
    OutputCurvature,
    ScaledIdentityCurvature,
)
from curvlab.operators.output_loss import CurvedLoss, Kind, OutputLoss, check_shape, sample_rows

__all__ = [
    "CustomLoss",
    "Kind",
    "NegativeLogLikelihood",
    "OutputCurvature",
    "OutputLoss",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "as_loss",
    "loss_reduction",
]


class SquaredError(CurvedLoss):
    """``sum_n |f_n - y_n|^2``, Z = number of output elements: PyTorch's ``mse_loss``. Curvature: 2 I.

    The Monte-Carlo estimate draws the gradient of a sample from N(0, 2 I), as if y were Gaussian around f.
    """

    is_convex = True

    def __repr__(self) -> str:
        return "SquaredError()"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the squares."""
        check_shape("SquaredError", targets, outputs.shape, "shaped as the outputs")
        outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        return (outputs - targets).square().sum()

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """Number of elements."""
        return float(targets.numel())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``2 (f - y)``."""
        check_shape("SquaredError", targets, outputs.shape, "shaped as the outputs")
        return 2.0 * (outputs.detach() - targets)

    def _hessian(self, outputs: Tensor, targets: Tensor) -> ScaledIdentityCurvature:
        return ScaledIdentityCurvature(2.0)

    def _sampled(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> OuterProductCurvature:
        shape = (num_samples, *sample_rows(outputs).shape)
        draws = torch.randn(shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
        return OuterProductCurvature(draws * 2.0**0.5, classes_last=False)


class CustomLoss(CurvedLoss):
    """Any callable ``(outputs, targets) -> 0-d tensor``: the mean over the samples of a batch, or their sum; Z = N.

    Its Hessian in the outputs is taken by double backward; there is no model of the targets to draw labels from.

    Args:
        function: the callable.
        reduction: what it returns of a batch, ``"mean"`` or ``"sum"``.
    """

    is_convex = False

    def __init__(self, function: Callable[..., Any], reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"CustomLoss: reduction must be 'mean' or 'sum', got {reduction!r}")
        self.function, self.reduction = function, reduction

    def __repr__(self) -> str:
        return f"CustomLoss({getattr(self.function, '__name__', self.function)}, {self.reduction!r})"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean times the number of samples, or the sum."""
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"CustomLoss: the loss must return a 0-d tensor (the mean over the batch), got {got}")
        return value if self.reduction == "sum" else value * outputs.shape[0]

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """Number of samples."""
        return float(targets.shape[0])

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of the total in the outputs, by autograd."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.total(leaf, targets), leaf)[0]

    def _hessian(self, outputs: Tensor, targets: Tensor) -> AutogradCurvature:
        return AutogradCurvature(self.total, outputs, targets)

    def _sampled(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> OutputCurvature:
        raise ValueError(
            "curvature: kind must be 'loss' or 'empirical' for a loss given as a callable (no known distribution "
            "of targets to draw from), got 'monte_carlo'"
        )


class NegativeLogLikelihood(CustomLoss):
    """``nn.NLLLoss``: outputs are log-probabilities ``[N, C, ...]``; Z = sum of the class weights of labels that count.

    Args:
        class_weights: w ``[C]``; None: ones.
        ignore_index: label of positions that do not count.
    """

    def __init__(self, class_weights: Tensor | None = None, *, ignore_index: int = -100) -> None:
        self._labels = SoftmaxCrossEntropy(class_weights, ignore_index=ignore_index)
        super().__init__(self._sum, "sum")

    def __repr__(self) -> str:
        return repr(self._labels).replace("SoftmaxCrossEntropy", "NegativeLogLikelihood")

    def _sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = None if self._labels.class_weights is None else self._labels.class_weights.to(outputs)
        ignored = self._labels.ignore_index
        return functional.nll_loss(outputs, targets, weights, ignore_index=ignored, reduction="sum")

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """The sum of the weights of the labels that count."""
        return self._labels.weight(outputs, targets)


def as_loss(loss: Any) -> OutputLoss:
    """The :class:`OutputLoss` that PyTorch's loss module or function, or a callable, stands for.

    ``functools.partial(F.cross_entropy, label_smoothing=0.1)`` is understood too.  A subclass of a PyTorch loss may
    compute anything, so it is taken as a callable, with the ``reduction`` that it names.

    Raises:
        TypeError: not callable.
        ValueError: ``reduction="none"``, or options of ``F.cross_entropy`` that have no meaning here.
    """
    if isinstance(loss, OutputLoss):
        return loss
    reduction = loss_reduction(loss)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"as_loss: loss must have reduction 'mean' or 'sum', got {reduction!r}")
    if type(loss) is nn.CrossEntropyLoss:
        return SoftmaxCrossEntropy(
            loss.weight, ignore_index=loss.ignore_index, label_smoothing=float(loss.label_smoothing)
        )
    if type(loss) is nn.MSELoss:
        return SquaredError()
    if type(loss) is nn.NLLLoss:
        return NegativeLogLikelihood(loss.weight, ignore_index=loss.ignore_index)
    function, options = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, options = loss.func, {name: value for name, value in loss.keywords.items() if name != "reduction"}
    if function is functional.cross_entropy and options.keys() <= {"weight", "ignore_index", "label_smoothing"}:
        return SoftmaxCrossEntropy(options.pop("weight", None), **options)
    if function is functional.nll_loss and options.keys() <= {"weight", "ignore_index"}:
        return NegativeLogLikelihood(options.pop("weight", None), **options)
    if function is functional.mse_loss and not options:
        return SquaredError()
    if not callable(loss):
        raise TypeError(f"as_loss: loss must be a PyTorch loss or a callable, got {type(loss).__name__}")
    return CustomLoss(loss, reduction)


def loss_reduction(loss: Any) -> str:
    """The reduction that a loss module, or a ``functools.partial`` of a function, names; "mean" if none."""
    own = loss.keywords.get("reduction") if isinstance(loss, functools.partial) else None
    return getattr(loss, "reduction", "mean") if own is None else own
