# SPDX-License-Identifier: Apache-2.0
r"""The judge: double backward, batch by batch, one direction at a time, nothing kept between products.

For each batch b: ``g_b = d total_b / d theta`` with its graph, then ``H_b v = d <g_b, v> / d theta`` for every row v
(the graph of one batch serves all rows); ``J v`` by the double-backward trick, ``J v = d (J^T w) / d w . v`` at any w,
because ``J^T w`` is linear in w.  The slowest engine and the plainest: the others are checked against it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.curvatures import OutputCurvature
from curvlab.operators.engines.derivatives import check_twice_differentiable
from curvlab.operators.engines.protocol import batch_generator, draw_seed
from curvlab.operators.precision import check_precision, math_mode
from curvlab.operators.problem import Problem

__all__ = ["AutogradEngine"]


class AutogradEngine:
    """Double backward on any model that autograd takes.

    Args:
        problem: what is differentiated.
        memory_budget: bytes for graph and temporaries of one piece of a batch; batches are cut into pieces that fit
            (measured on two samples). None: batches as they are.
        precision: "bf16" runs the network in bfloat16 and sums in float32; "tf32" on CUDA.
        num_samples: draws a sample of the curvature ``"monte_carlo"``.
        generator: source of these draws (made once).

    Raises:
        ValueError: the budget does not hold one sample, or BatchNorm sees batches, which then cannot be cut.
        UnsupportedModel: on a product, if the model runs a function whose backward is marked ``once_differentiable``:
            PyTorch would leave out its part without a word.
    """

    name = "autograd"

    def __init__(
        self,
        problem: Problem,
        *,
        memory_budget: int | None = None,
        precision: str | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        check_precision(precision, problem.dtype, problem.device, "AutogradEngine")
        self.precision, self.dtype = precision, problem.dtype
        self.problem = problem.to(torch.bfloat16) if precision == "bf16" else problem
        self.num_samples, self._seed = num_samples, draw_seed(generator)
        self._piece = None if memory_budget is None else _samples_that_fit(self.problem, memory_budget)

    def loss(self) -> float:
        """L(theta), summed in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.problem.device)
        with torch.no_grad(), self._math():
            for _, inputs, targets in self._pieces():
                outputs = self.problem.outputs(self.problem.params, inputs)
                total += self.problem.loss.total(outputs, targets).double()
        return total.item() / self.problem.normalizer

    def gradient(self) -> Tensor:
        """dL/dtheta ``[P]``."""
        result = torch.zeros(self.problem.num_params, dtype=self.dtype, device=self.problem.device)
        with torch.enable_grad(), self._math():
            for _, inputs, targets in self._pieces():
                theta, outputs = self._forward(inputs)
                self._add(result, self._grad(self.problem.loss.total(outputs, targets), theta))
        return result / self.problem.normalizer

    def hessian(self, rows: Tensor) -> Tensor:
        """``H v`` for each row, ``[K, P]``."""
        result = torch.zeros_like(rows)
        with torch.enable_grad(), self._math():
            for _, inputs, targets in self._pieces():
                theta, outputs = self._forward(inputs)
                total = self.problem.loss.total(outputs, targets)
                gradient = self._grad(total, theta, create_graph=True)
                check_twice_differentiable(gradient)
                for row, out in zip(rows, result, strict=True):
                    self._add(out, self._grad(gradient, theta, self._as_params(row), retain_graph=True))
        return result / self.problem.normalizer

    def ggn(self, rows: Tensor, kind: str = "loss") -> Tensor:
        """``J^T B J v / Z`` for each row, ``[K, P]``; draws are made anew from one seed: always the same ones."""
        result = torch.zeros_like(rows)
        with torch.enable_grad(), self._math():
            for index, inputs, targets in self._pieces():
                theta, outputs = self._forward(inputs)
                curvature = self._curvature(index, outputs, targets, kind)
                weight, transposed = self._transposed(outputs, theta)
                for row, out in zip(rows, result, strict=True):
                    tangent = self._tangent(weight, transposed, row)
                    pulled = curvature(tangent.unsqueeze(0))[0]
                    self._add(out, self._grad(outputs, theta, pulled, retain_graph=True))
        return result / self.problem.normalizer

    def jacobian(self, rows: Tensor) -> Tensor:
        """``J v`` for each row, ``[K, M]``."""
        parts = []
        with torch.enable_grad(), self._math():
            for _, inputs, _ in self._pieces():
                theta, outputs = self._forward(inputs)
                weight, transposed = self._transposed(outputs, theta)
                parts.append(torch.stack([self._tangent(weight, transposed, row).reshape(-1) for row in rows]))
        return torch.cat(parts, 1).to(self.dtype)

    def jacobian_transposed(self, outputs: Tensor) -> Tensor:
        """``J^T u`` for each row u ``[K, M]``, ``[K, P]``.

        Raises:
            ValueError: M is not the number of output elements.
        """
        result = torch.zeros(len(outputs), self.problem.num_params, dtype=self.dtype, device=self.problem.device)
        start = 0
        with torch.enable_grad(), self._math():
            for _, inputs, _ in self._pieces():
                theta, values = self._forward(inputs)
                part = outputs[:, start : start + values.numel()]
                start += values.numel()
                if part.shape[1] != values.numel():
                    break
                for row, out in zip(part, result, strict=True):
                    pulled = row.reshape(values.shape).to(values.dtype)
                    self._add(out, self._grad(values, theta, pulled, retain_graph=True))
        if start != outputs.shape[1]:
            raise ValueError(
                f"jacobian_transposed: outputs must be [K, M], M the number of all output elements, "
                f"got {list(outputs.shape)}"
            )
        return result

    # Pieces of data

    def _pieces(self) -> Iterator[tuple[int, Any, Tensor]]:
        """``(index, inputs, targets)``, batches cut to the budget."""
        index = 0
        for inputs, targets in self.problem.batches():
            size = len(targets)
            for piece in _cut((inputs, targets), size, self._piece or max(size, 1)):
                yield index, piece[0], piece[1]
                index += 1

    def _curvature(self, index: int, outputs: Tensor, targets: Tensor, kind: str) -> OutputCurvature:
        generator = batch_generator(self._seed, index, outputs.device) if kind == "monte_carlo" else None
        return self.problem.loss.curvature(
            outputs.detach(), targets, kind, num_samples=self.num_samples, generator=generator
        )

    # Differentiation

    def _forward(self, inputs: Any) -> tuple[list[Tensor], Tensor]:
        theta = {name: value.detach().requires_grad_() for name, value in self.problem.params.items()}
        return list(theta.values()), self.problem.outputs(theta, inputs)

    def _grad(self, outputs: Any, inputs: list[Tensor], weights: Any = None, **options: bool) -> list[Tensor]:
        """Zeros where nothing depends on a parameter: an unused one has a zero row, it is no error."""
        outputs, weights = _differentiable(outputs, weights)
        if not outputs:
            return [torch.zeros_like(tensor) for tensor in inputs]
        return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True, materialize_grads=True, **options))

    def _transposed(self, outputs: Tensor, theta: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``(w, J^T w)`` with a graph in w, which is zero: only the derivative in w is used."""
        weight = torch.zeros_like(outputs).requires_grad_()
        transposed = self._grad(outputs, theta, weight, create_graph=True)
        check_twice_differentiable(transposed)
        return weight, transposed

    def _tangent(self, weight: Tensor, transposed: list[Tensor], row: Tensor) -> Tensor:
        return self._grad(transposed, [weight], self._as_params(row), retain_graph=True)[0]

    def _as_params(self, row: Tensor) -> list[Tensor]:
        return list(self.problem.rows_to_params(row.to(self.problem.dtype)).values())

    def _add(self, result: Tensor, pieces: list[Tensor]) -> None:
        result += torch.cat([piece.reshape(-1) for piece in pieces]).to(result.dtype)

    def _math(self) -> Any:
        return math_mode(self.precision, self.problem.device)


def _differentiable(outputs: Any, weights: Any) -> tuple[list[Tensor], list[Tensor] | None]:
    """The outputs that depend on anything, with their weights."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if weights is None:
        return [output for output in outputs if output.requires_grad], None
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    pairs = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    return [output for output, _ in pairs], [weight for _, weight in pairs]


def _cut(value: Any, size: int, piece: int) -> list[Any]:
    """Pieces of ``piece`` samples of a nest of tensors; what has no sample axis goes whole into each."""
    starts = range(0, max(size, 1), piece)
    if piece >= size:
        return [value]
    if isinstance(value, Tensor):
        return list(value.split(piece)) if value.ndim and len(value) == size else [value] * len(starts)
    if isinstance(value, dict):
        parts = [_cut(item, size, piece) for item in value.values()]
        return [dict(zip(value, items, strict=True)) for items in zip(*parts, strict=True)]
    if isinstance(value, (tuple, list)):
        return list(zip(*[_cut(item, size, piece) for item in value], strict=True))
    return [value] * len(starts)


def _samples_that_fit(problem: Problem, budget: int) -> int:
    """How many samples' graphs (forward, backward, double backward: three times what forward saves) fit."""
    fixed = 3 * problem.num_params * problem.dtype.itemsize
    # Two samples, because BatchNorm in mode "batch" takes no single one.
    inputs, targets = next(iter(problem.subset(2).batches()))
    seen: dict[int, int] = {}
    known = {value.untyped_storage().data_ptr() for value in problem.params.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    theta = {name: value.detach().requires_grad_() for name, value in problem.params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.loss.total(problem.outputs(theta, inputs), targets)
    sample = 3 * max(sum(seen.values()) // len(targets), 1)
    # BatchNorm that looks at its batch would look at pieces instead.
    least = 1 if problem.batch_norm == "eval" else max(len(targets) for _, targets in problem.batches())
    if fixed + least * sample > budget:
        raise ValueError(
            f"AutogradEngine: memory_budget must be at least {fixed + least * sample} bytes for {least} sample(s) and "
            f"one direction, got {budget}"
        )
    return max((budget - fixed) // sample, least)
