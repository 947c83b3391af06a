# SPDX-License-Identifier: Apache-2.0
r"""The linear maps of one piece of the data, by plain autograd on a kept graph.

    hessian       v -> (1/Z) d2 total / d theta2 v            double backward of the loss
    forward       the same, as the derivative of the gradient along v (forward over reverse)
    jacobian      v -> J v                                     double backward: J^T w is linear in w, its transpose is J
    transposed    u -> J^T u                                   backward
    ggn           v -> (1/Z) J^T B J v                         the two above on one graph

Each takes and returns lists of tensors; None in a result stands for zeros.  The graph is of tensors that nobody else
holds (theta is a snapshot, the inputs are copied), so nothing outside can break it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from curvlab.operators.engines.pieces import Piece
from curvlab.operators.engines.protocol import UnsupportedModel
from curvlab.operators.losses import OutputCurvature
from curvlab.operators.problem import Problem

__all__ = ["Derivatives", "LinearMap", "check_twice_differentiable", "directions", "wants_channels_last"]

LinearMap = Callable[..., Sequence["Tensor | None"]]


def wants_channels_last(problem: Problem) -> bool:
    """Whether convolutions run on the CPU, where they are faster channels-last.

    Recorded product, one thread, forward over reverse: CNN at N=256 350 ms channels-first, 260 ms channels-last;
    ResNet-20 at N=32 212 and 173 ms.
    """
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in problem.model.modules())
    return has_convolutions and problem.device.type == "cpu"


class Derivatives:
    """Builds the maps of a piece.

    Args:
        problem: what is differentiated.
        channels_last: hold 4-d parameters and inputs that way; results come back in any memory format.
        curvature: ``(piece, outputs, kind) -> B``.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        channels_last: bool,
        curvature: Callable[[Piece, Tensor, str], OutputCurvature],
    ) -> None:
        self.problem, self.curvature = problem, curvature
        self.channels_last = channels_last
        self.theta = {name: self._laid_out(value) for name, value in problem.params.items()}

    def _laid_out(self, value: Tensor) -> Tensor:
        if self.channels_last and value.ndim == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def _leaves(self) -> dict[str, Tensor]:
        return {name: value.detach().requires_grad_() for name, value in self.theta.items()}

    def outputs(self, params: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """``f(x; params)`` of the piece, differentiable."""
        inputs = piece.inputs
        if isinstance(inputs, Tensor):
            inputs = self._laid_out(inputs)
        return self.problem.outputs(params, inputs, statistics=piece.statistics)

    def loss(self, params: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """The piece's part of L, 0-d."""
        return self.problem.loss.total(self.outputs(params, piece), piece.targets) / self.problem.normalizer

    def gradient(self, piece: Piece) -> list[Tensor]:
        """The piece's part of dL/dtheta."""
        with torch.enable_grad():
            leaves = self._leaves()
            value = self.loss(leaves, piece)
            if not value.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves.values()]
            return list(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True))

    def build(self, kind: str, piece: Piece) -> tuple[LinearMap, list[Tensor]]:
        """The map named ``kind`` (see the top of this file; a GGN as ``"ggn:loss"`` and so on), and arguments for it.

        Its graph is kept as long as the map is.
        """
        with torch.enable_grad():
            zeros = [torch.zeros_like(value, memory_format=torch.contiguous_format) for value in self.theta.values()]
            if kind == "hessian":
                return self._hessian(piece), zeros
            if kind == "forward":
                return self._forward(piece), zeros
            leaves = self._leaves()
            outputs = self.outputs(leaves, piece)
            params = list(leaves.values())
            if kind == "transposed":
                return lambda u: _backward([outputs], params, [u]), [torch.zeros_like(outputs)]
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pullback = _backward([outputs], params, [dummy], create_graph=True)
            if kind == "jacobian":
                return lambda *rows: [self._pushed(pullback, dummy, rows)], zeros
            curvature = self.curvature(piece, outputs.detach(), kind.partition(":")[2])

            def ggn(*rows: Tensor) -> Sequence[Tensor | None]:
                pushed = self._pushed(pullback, dummy, rows)
                return _backward([outputs], params, [curvature(pushed.unsqueeze(0))[0] / self.problem.normalizer])

            return ggn, zeros

    def _pushed(self, pullback: Sequence[Tensor | None], dummy: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """J v: the derivative of ``w -> <J^T w, v>``."""
        moved = _backward(pullback, [dummy], [self._laid_out(row) for row in rows])[0]
        return torch.zeros_like(dummy).detach() if moved is None else moved

    def _hessian(self, piece: Piece) -> LinearMap:
        leaves = self._leaves()
        params = list(leaves.values())
        gradient = _backward([self.loss(leaves, piece)], params, None, create_graph=True)
        return lambda *rows: _backward(gradient, params, [self._laid_out(row) for row in rows])

    def _forward(self, piece: Piece) -> LinearMap:
        _load_forward_mode()

        def product(*rows: Tensor) -> Sequence[Tensor | None]:
            leaves = self._leaves()
            with torch.enable_grad(), forward_ad.dual_level():
                duals = {
                    name: forward_ad.make_dual(leaf, self._laid_out(row))
                    for (name, leaf), row in zip(leaves.items(), rows, strict=True)
                }
                outputs = self.outputs(duals, piece)
                f, moved = forward_ad.unpack_dual(outputs)
                if moved is None:  # outputs that no chosen parameter reaches
                    return [None] * len(duals)
                f, moved = f.detach(), moved.detach()
                # The signal and its derivative by the loss' own formulas: fewer operations than its autograd, and the
                # digits of a saturated softmax are kept.
                signal = self.problem.loss.gradient(f, piece.targets) / self.problem.normalizer
                change = self.curvature(piece, f, "loss")(moved.unsqueeze(0))[0] / self.problem.normalizer
                gradient = _backward([outputs], list(duals.values()), [forward_ad.make_dual(signal, change)])
                return [None if part is None else forward_ad.unpack_dual(part).tangent for part in gradient]

        return product


@functools.cache
def _load_forward_mode() -> None:
    # The first dual tensor loads this module, which warns of the end of torch.jit.script (PyTorch 2.14).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _backward(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` with a kept graph; outputs that reach no input (a linear loss) bring nothing."""
    weights = [None] * len(outputs) if cotangents is None else cotangents
    pairs = [(out, w) for out, w in zip(outputs, weights, strict=True) if out is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    with torch.enable_grad() if create_graph else contextlib.nullcontext():
        results = torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            None if cotangents is None else [w for _, w in pairs if w is not None],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    if create_graph:
        check_twice_differentiable(results)
    return results


def check_twice_differentiable(gradients: Sequence[Tensor | None]) -> None:
    """Refuse a gradient graph that goes through a function marked ``once_differentiable``.

    PyTorch puts a node there that raises when it is reached, but ``torch.autograd.grad(outputs, inputs)`` never reaches
    a node that leads to no input: the second derivative comes out without that function's part, and without an error.

    Raises:
        UnsupportedModel: there is such a node.
    """
    seen: set[Any] = set()
    stack = [tensor.grad_fn for tensor in gradients if tensor is not None and tensor.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            raise UnsupportedModel(
                "model must be differentiable twice, got a torch.autograd.Function whose backward is marked "
                "once_differentiable"
            )
        stack += [following for following, _ in node.next_functions if following is not None]


def directions(rows: Tensor, like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each of ``rows [K, P]`` as a list of views shaped as ``like``."""
    sizes = [tensor.numel() for tensor in like]
    for row in rows:
        yield [part.view(tensor.shape) for part, tensor in zip(row.split(sizes), like, strict=True)]
