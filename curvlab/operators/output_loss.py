# SPDX-License-Identifier: Apache-2.0
"""What operators ask of a loss, and the three kinds of its curvature from a gradient, a Hessian and draws."""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from curvlab.operators.curvatures import OuterProductCurvature, OutputCurvature

__all__ = ["CurvedLoss", "Kind", "OutputLoss", "check_shape", "sample_rows"]

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


class CurvedLoss:
    """:meth:`OutputLoss.curvature` for a loss that writes ``gradient``, ``_hessian`` and ``_sampled``."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of the total in the outputs, shaped as the outputs."""
        raise NotImplementedError

    def curvature(
        self,
        outputs: Tensor,
        targets: Tensor,
        kind: str = "loss",
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> OutputCurvature:
        """The loss Hessian, its sampled estimate, or ``delta delta^T`` a sample; delta is :meth:`gradient`.

        Raises:
            ValueError: another kind, or "monte_carlo" of a loss that knows no distribution of the targets.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"curvature: kind must be 'loss', 'monte_carlo' or 'empirical', got {kind!r}")
        if kind == "loss":
            return self._hessian(outputs, targets)
        if kind == "empirical":
            return OuterProductCurvature(sample_rows(self.gradient(outputs, targets))[None], classes_last=False)
        if num_samples < 1:
            raise ValueError(f"curvature: num_samples must be at least 1, got {num_samples}")
        return self._sampled(outputs, targets, num_samples, generator)

    def _hessian(self, outputs: Tensor, targets: Tensor) -> OutputCurvature:
        raise NotImplementedError

    def _sampled(
        self, outputs: Tensor, targets: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> OutputCurvature:
        """Outer products of gradients at ``num_samples`` targets that the loss' own model draws."""
        raise NotImplementedError


def sample_rows(outputs: Tensor) -> Tensor:
    """``[N, D]``, all elements of a sample's output in a row; outputs may be ``[N]``."""
    return outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(1)


def check_shape(owner: str, targets: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Refuse targets of another shape.

    Raises:
        ValueError: ``owner: targets must be <what>``.
    """
    if targets.shape != shape:
        raise ValueError(f"{owner}: targets must be {what}, {list(shape)}, got {list(targets.shape)}")
