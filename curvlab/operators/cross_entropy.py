# SPDX-License-Identifier: Apache-2.0
r"""Softmax and cross entropy with their digits kept.

Logits z ``[R, C]`` (one row for each sample and position), label y, mass s and target masses
q with ``sum_c q_c = s`` (q = s e_y without smoothing):

    l = s log(1 + sum_{c != y} exp(z_c - z_y)) + sum_c q_c (z_y - z_c)
    delta_c = s p_c - q_c  (c != y),   delta_y = -sum_{c != y} delta_c
    B u = s (diag(p) - p p^T) u, centered at the label

On a trained network 1 - p_y is 1e-7 and ``p_y - 1`` would have one digit of float32 left: so no formula here subtracts
from one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from curvlab.operators.curvatures import OuterProductCurvature, SoftmaxCurvature
from curvlab.operators.output_loss import CurvedLoss, check_shape

__all__ = ["SoftmaxCrossEntropy"]


class SoftmaxCrossEntropy(CurvedLoss):
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
            check_shape("SoftmaxCrossEntropy", targets, outputs.shape, "class probabilities shaped as the outputs")
            q = targets.movedim(1, -1).reshape(-1, classes).to(z)
            if self.label_smoothing:
                q = (1.0 - self.label_smoothing) * q + self.label_smoothing / classes
            q = q if weights is None else q * weights
            return z, q.argmax(1), q.sum(1), q
        expected = outputs.shape[:1] + outputs.shape[2:]
        check_shape("SoftmaxCrossEntropy", targets, expected, "class indices [N, ...] without the class axis")
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
        """The sum of the weights of the labels that count; with probabilities the number of rows.

        Raises:
            ValueError: negative labels beside ``ignore_index``, or labels for which there is no class weight.
        """
        if targets.is_floating_point():
            if targets.ndim < 2:
                raise ValueError(
                    "SoftmaxCrossEntropy: targets must be class indices [N, ...] (integers) or class probabilities "
                    f"[N, C, ...], got {list(targets.shape)} of {targets.dtype}"
                )
            return float(targets.numel() // targets.shape[1]) if targets.numel() else 0.0
        kept = targets[targets != self.ignore_index]
        # Here and not in total: a label past the end ends a CUDA context, and -1 would be the weight of the last class.
        _check_labels(kept, None if self.class_weights is None else len(self.class_weights))
        if self.class_weights is None:
            return float(kept.numel())
        return float(self.class_weights.to(kept.device)[kept.long()].double().sum())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``delta``, shaped as the outputs; delta_y is minus the sum of the others, not ``p_y - 1``."""
        z, label, mass, q = self.rows(outputs.detach(), targets)
        _check_labels(label, z.shape[1])
        return _as_outputs(_softmax_minus(z, label, mass, q), outputs)

    def _hessian(self, outputs: Tensor, targets: Tensor) -> SoftmaxCurvature:
        z, label, mass, _ = self.rows(outputs.detach(), targets)
        _check_labels(label, z.shape[1])
        return SoftmaxCurvature(z.softmax(1), label, mass)

    def _sampled(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> OuterProductCurvature:
        z, label, mass, _ = self.rows(outputs.detach(), targets)
        _check_labels(label, z.shape[1])
        drawn = torch.multinomial(z.softmax(1), num_samples, replacement=True, generator=generator)
        root = mass.sqrt()
        vectors = [_softmax_minus(z, drawn[:, i], root, None) for i in range(num_samples)]
        return OuterProductCurvature(torch.stack(vectors), classes_last=True)


def _check_labels(label: Tensor, classes: int | None) -> None:
    """A label that names no class is nobody's: the formulas would take it for an unlabeled row without a word."""
    if not label.numel():
        return
    low, high = int(label.min()), int(label.max())
    if low < 0 or (classes is not None and high >= classes):
        bound = "C" if classes is None else classes
        raise ValueError(
            f"SoftmaxCrossEntropy: targets must be in [0, {bound}) (classes) or ignore_index, "
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
