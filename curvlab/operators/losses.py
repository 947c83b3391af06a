# SPDX-License-Identifier: Apache-2.0
r"""Losses on the outputs of a network: value, gradient, and curvature as a product, with their digits kept.

The total of a batch is ``sum_n l(f_n, y_n)``; a problem divides the totals of all its batches by one normalizer Z, to
which each batch brings its ``weight``.  So nothing depends on how the samples are split into batches.

Softmax and cross entropy, logits z ``[R, C]`` (one row for each sample and position), label y, mass s and target masses
q with ``sum_c q_c = s`` (q = s e_y without smoothing):

    l = s log(1 + sum_{c != y} exp(z_c - z_y)) + sum_c q_c (z_y - z_c)
    delta_c = s p_c - q_c  (c != y),   delta_y = -sum_{c != y} delta_c
    B u = s (diag(p) - p p^T) u, centered at the label

On a trained network 1 - p_y is 1e-7 and ``p_y - 1`` would have one digit of float32 left: so no formula here subtracts
from one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlab.operators.curvatures import (
    AutogradCurvature,
    OuterProductCurvature,
    OutputCurvature,
    ScaledIdentityCurvature,
    SoftmaxCurvature,
)

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

Kind = Literal["loss", "monte_carlo", "empirical"]
"""Which B stands in J^T B J: the loss Hessian, its sampled estimate, or the outer products of the gradients."""


@runtime_checkable
class OutputLoss(Protocol):
    """What operators and engines need to know of a loss; outputs are ``[N, ...]``, the first axis counts samples."""

    is_convex: bool
    """Whether its Hessian in the outputs is positive semidefinite, so that the GGN is."""

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``sum_n l(f_n, y_n)``, 0-d, in the dtype of the outputs (at least float32); differentiable twice."""
        ...

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """This batch's share of Z; the outputs are not looked at and may be None."""
        ...

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of the total in the outputs, shaped as the outputs."""
        ...

    def curvature(
        self,
        outputs: Tensor,
        targets: Tensor,
        kind: str = "loss",
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> OutputCurvature:
        """The symmetric matrix B over the outputs, see :data:`Kind`."""
        ...


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"curvature: kind must be 'loss', 'monte_carlo' or 'empirical', got {kind!r}")


class SoftmaxCrossEntropy:
    r"""Softmax and cross entropy in PyTorch's conventions.

    Outputs ``[N, C]`` or ``[N, C, d_1, ...]``; targets are class indices ``[N, d_1, ...]`` or probabilities shaped as
    the outputs.  With class weights w and smoothing a: indices give q = (1 - a) w_y e_y + (a / C) w, Z = sum of w_y
    over the labels that are not ``ignore_index``; probabilities t give q = w ((1 - a) t + a / C), Z = number of rows.

    The curvature is s (diag p - p p^T) with s = sum_c q_c.  Its Monte-Carlo estimate draws labels from p, for each
    position on its own, and takes the outer products of sqrt(s) (p - e_label): unbiased for every option.

    Args:
        class_weights: w ``[C]``, non-negative; None: ones.
        ignore_index: label of rows that do not count.
        label_smoothing: a in [0, 1].
    """

    is_convex = True

    def __init__(
        self, class_weights: Tensor | None = None, *, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"SoftmaxCrossEntropy: label_smoothing must be in [0, 1], got {label_smoothing}")
        if class_weights is not None and (class_weights.ndim != 1 or bool((class_weights < 0).any())):
            raise ValueError("SoftmaxCrossEntropy: class_weights must be non-negative [C], got " + str(class_weights))
        self.class_weights = None if class_weights is None else class_weights.detach().clone()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def __repr__(self) -> str:
        options = [] if self.class_weights is None else [f"class_weights={self.class_weights.tolist()}"]
        options += [] if self.ignore_index == -100 else [f"ignore_index={self.ignore_index}"]
        options += [f"label_smoothing={self.label_smoothing}"] if self.label_smoothing else []
        return f"SoftmaxCrossEntropy({', '.join(options)})"

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(z [R, C], label [R], mass s [R], q [R, C] or None)``; None stands for q = s e_label.

        Raises:
            ValueError: outputs are not ``[N, C, ...]``, or targets do not fit them.
        """
        if outputs.ndim < 2:
            raise ValueError(f"SoftmaxCrossEntropy: outputs must be [N, C, ...], got {list(outputs.shape)}")
        classes = outputs.shape[1]
        z = outputs.movedim(1, -1).reshape(-1, classes)
        if z.dtype.itemsize < 4:
            z = z.float()
        weights = None if self.class_weights is None else self.class_weights.to(z)
        if weights is not None and len(weights) != classes:
            raise ValueError(
                f"SoftmaxCrossEntropy: class_weights must be [C] with C == {classes} (from outputs), "
                f"got {list(weights.shape)}"
            )
        if targets.is_floating_point():
            _check_shape("SoftmaxCrossEntropy", targets, outputs.shape, "class probabilities shaped as the outputs")
            q = targets.movedim(1, -1).reshape(-1, classes).to(z)
            if self.label_smoothing:
                q = (1.0 - self.label_smoothing) * q + self.label_smoothing / classes
            q = q if weights is None else q * weights
            return z, q.argmax(1), q.sum(1), q
        expected = outputs.shape[:1] + outputs.shape[2:]
        _check_shape("SoftmaxCrossEntropy", targets, expected, "class indices [N, ...] without the class axis")
        targets = targets.reshape(-1)
        kept = targets != self.ignore_index
        label = torch.where(kept, targets, 0).long()
        mass = kept.to(z.dtype) if weights is None else weights[label] * kept
        if not self.label_smoothing:
            return z, label, mass, None
        smooth = torch.ones(classes, dtype=z.dtype, device=z.device) if weights is None else weights
        smooth = kept.to(z.dtype).unsqueeze(1) * (smooth * (self.label_smoothing / classes))
        q = smooth + _one_hot(label, classes) * ((1.0 - self.label_smoothing) * mass).unsqueeze(1)
        return z, label, q.sum(1), q

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``sum_n l_n``; a loss of 1e-30 keeps its digits."""
        z, label, mass, q = self.rows(outputs, targets)
        if z.shape[1] == 1:
            return (z * 0.0).sum()
        centered = z - z.gather(1, label.unsqueeze(1))
        others = centered.masked_fill(_one_hot(label, z.shape[1]), float("-inf")).logsumexp(1)
        # softplus and its two derivatives keep the digits of a tiny loss; -logsigmoid(-x) has (1 - sigmoid) in its
        # second. Past the threshold it is linear: 1 + exp(-50) is 1 in float64 as well.
        loss = (mass * functional.softplus(others, threshold=50.0)).sum()
        return loss if q is None else loss - (q * centered).sum()

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """The sum of the weights of the labels that count; with probabilities the number of rows."""
        if targets.is_floating_point():
            if targets.ndim < 2:
                raise ValueError(
                    "SoftmaxCrossEntropy: targets must be class indices [N, ...] (integers) or class probabilities "
                    f"[N, C, ...], got {list(targets.shape)} of {targets.dtype}"
                )
            return float(targets.numel() // targets.shape[1]) if targets.numel() else 0.0
        kept = targets[targets != self.ignore_index]
        if self.class_weights is None:
            return float(kept.numel())
        return float(self.class_weights.to(kept.device)[kept].double().sum())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``delta``, shaped as the outputs; delta_y is minus the sum of the others, not ``p_y - 1``."""
        z, label, mass, q = self.rows(outputs.detach(), targets)
        _check_labels(label, z.shape[1])
        return _as_outputs(_softmax_minus(z, label, mass, q), outputs)

    def curvature(
        self,
        outputs: Tensor,
        targets: Tensor,
        kind: str = "loss",
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> OutputCurvature:
        """``s (diag p - p p^T)`` a row, its sampled estimate, or ``delta delta^T`` a sample."""
        _check_kind(kind)
        if kind == "empirical":
            return OuterProductCurvature(self.gradient(outputs, targets).flatten(1).unsqueeze(0), classes_last=False)
        z, label, mass, _ = self.rows(outputs.detach(), targets)
        _check_labels(label, z.shape[1])
        p = z.softmax(1)
        if kind == "loss":
            return SoftmaxCurvature(p, label, mass)
        if num_samples < 1:
            raise ValueError(f"curvature: num_samples must be at least 1, got {num_samples}")
        drawn = torch.multinomial(p, num_samples, replacement=True, generator=generator)
        root = mass.sqrt()
        vectors = [_softmax_minus(z, drawn[:, i], root, None) for i in range(num_samples)]
        return OuterProductCurvature(torch.stack(vectors), classes_last=True)


class SquaredError:
    """``sum_n |f_n - y_n|^2``, Z = number of output elements: PyTorch's ``mse_loss``. Curvature: 2 I.

    The Monte-Carlo estimate draws the gradient of a sample from N(0, 2 I), as if y were Gaussian around f.
    """

    is_convex = True

    def __repr__(self) -> str:
        return "SquaredError()"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the squares."""
        _check_shape("SquaredError", targets, outputs.shape, "shaped as the outputs")
        outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        return (outputs - targets).square().sum()

    def weight(self, outputs: Tensor | None, targets: Tensor) -> float:
        """Number of elements."""
        return float(targets.numel())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``2 (f - y)``."""
        _check_shape("SquaredError", targets, outputs.shape, "shaped as the outputs")
        return 2.0 * (outputs.detach() - targets)

    def curvature(
        self,
        outputs: Tensor,
        targets: Tensor,
        kind: str = "loss",
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> OutputCurvature:
        """``2 I``, its sampled estimate, or ``delta delta^T`` a sample."""
        _check_kind(kind)
        if kind == "empirical":
            return OuterProductCurvature(self.gradient(outputs, targets).flatten(1).unsqueeze(0), classes_last=False)
        if kind == "loss":
            return ScaledIdentityCurvature(2.0)
        if num_samples < 1:
            raise ValueError(f"curvature: num_samples must be at least 1, got {num_samples}")
        shape = (num_samples, *outputs.flatten(1).shape)
        draws = torch.randn(shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
        return OuterProductCurvature(draws * 2.0**0.5, classes_last=False)


class CustomLoss:
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

    def curvature(
        self,
        outputs: Tensor,
        targets: Tensor,
        kind: str = "loss",
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> OutputCurvature:
        """The loss Hessian by autograd, or ``delta delta^T`` a sample.

        Raises:
            ValueError: kind "monte_carlo".
        """
        _check_kind(kind)
        if kind == "monte_carlo":
            raise ValueError(
                "curvature: kind must be 'loss' or 'empirical' for a loss given as a callable (no known distribution "
                "of targets to draw from), got 'monte_carlo'"
            )
        if kind == "empirical":
            return OuterProductCurvature(self.gradient(outputs, targets).flatten(1).unsqueeze(0), classes_last=False)
        return AutogradCurvature(self.total, outputs, targets)


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


def _check_shape(owner: str, targets: Tensor, shape: tuple[int, ...], what: str) -> None:
    if targets.shape != shape:
        raise ValueError(f"{owner}: targets must be {what}, {list(shape)}, got {list(targets.shape)}")


def _check_labels(label: Tensor, classes: int) -> None:
    """A label that names no class is nobody's: the formulas would take it for an unlabeled row without a word."""
    if label.numel() and not bool(((label >= 0) & (label < classes)).all()):
        low, high = int(label.min()), int(label.max())
        raise ValueError(
            f"SoftmaxCrossEntropy: targets must be in [0, {classes}) (from outputs) or ignore_index, "
            f"got {low if low < 0 else high}"
        )


def _one_hot(label: Tensor, classes: int) -> Tensor:
    """Boolean ``[R, C]``; a comparison, because it batches under ``torch.func.vmap``."""
    return torch.arange(classes, device=label.device) == label.unsqueeze(1)


def _softmax_minus(z: Tensor, label: Tensor, mass: Tensor, q: Tensor | None) -> Tensor:
    """``mass softmax(z) - q`` ``[R, C]`` whose label entry is minus the sum of the others; q None: mass e_label."""
    at_label = _one_hot(label, z.shape[1])
    delta = mass.unsqueeze(1) * z.softmax(1)
    delta = (delta if q is None else delta - q).masked_fill(at_label, 0.0)
    return delta - at_label * delta.sum(1, keepdim=True)


def _as_outputs(rows: Tensor, outputs: Tensor) -> Tensor:
    """Rows ``[R, C]`` in the layout and dtype of ``outputs [N, C, ...]``."""
    shape = (outputs.shape[0], *outputs.shape[2:], outputs.shape[1])
    return rows.reshape(shape).movedim(-1, 1).to(outputs.dtype)
