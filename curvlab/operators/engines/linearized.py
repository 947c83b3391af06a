# SPDX-License-Identifier: Apache-2.0
r"""The ``linearized`` engine: any model, its derivative taken once at theta, then applied to K vectors.

For each batch the map (v -> H v, v -> J v, ...) is recorded as a list of tensor operations with everything that does
not depend on v kept (``tape.py``), and replayed a direction at a time; where the operations are tiny, eight directions
at a time.  The Hessian is recorded as the derivative of the gradient along v (forward over reverse); a model without
forward derivatives gets the double backward recorded instead, and one that cannot be recorded keeps its autograd
graph.  :attr:`LinearizedEngine.routes` says which it was and why.

Measured, one thread, CPU ms for one product, best of 3 or more: kept graph and one ``autograd.grad`` / this engine
(float32, channels-last where there are convolutions; the machine was shared):

    MLP 784-1024-1024-10, N=512        53.2 /  54.1
    CNN 3 conv, 2 fc, N=256             412 /   263
    ResNet-20, BatchNorm eval, N=32     282 /   191
    MLP 784-32-32-32-10, N=128         0.72 /  0.64; eight at a time 0.25 each
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvlab.operators.curvatures import OutputCurvature
from curvlab.operators.engines.derivatives import Derivatives, directions
from curvlab.operators.engines.pieces import Piece, default_budget, pieces
from curvlab.operators.engines.protocol import batch_generator, draw_seed
from curvlab.operators.engines.schedule import BLOCK, Product, Schedule
from curvlab.operators.precision import check_precision, math_mode
from curvlab.operators.problem import Problem

__all__ = ["LinearizedEngine"]


class LinearizedEngine:
    """The ``linearized`` engine (see ``protocol.py`` for the products).

    Args:
        problem: what curvature is taken of.
        memory_budget: bytes for what is kept and for the temporaries of one product, not counting theta, the vectors
            and the results.  Maps of batches that do not fit beside those already kept are built anew in each product;
            a batch that does not fit at all is taken in parts where the samples are independent of each other
            (cross entropy and squared error; BatchNorm in mode "eval" or "frozen").  None: 4 GiB, on CUDA half of the
            free memory.
        precision: None; ``"bf16"``: the network, its masks and softmax in float32, then all that a product multiplies
            rounded (4 to 7 times more accurate than a network in bfloat16); ``"tf32"`` (CUDA).
        num_samples: draws a row of ``kind="monte_carlo"``.
        generator: where those draws come from; None: one fixed stream.

    Attributes:
        routes: map -> how it is carried out.

    Raises:
        ValueError: a precision that the problem cannot have; at the first product: a budget that does not hold one
            sample, saying what would.
    """

    name = "linearized"

    def __init__(
        self,
        problem: Problem,
        *,
        memory_budget: int | None = None,
        precision: str | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        check_precision(precision, problem.dtype, problem.device, "LinearizedEngine")
        if memory_budget is not None and memory_budget <= 0:
            raise ValueError(f"LinearizedEngine: memory_budget must be positive (bytes), got {memory_budget}")
        if num_samples < 1:
            raise ValueError(f"LinearizedEngine: num_samples must be at least 1, got {num_samples}")
        self.problem, self.precision = problem, precision
        self.memory_budget = default_budget(problem.device) if memory_budget is None else memory_budget
        self._rounded = torch.bfloat16 if precision == "bf16" else None
        self._tensors = list(problem.params.values())
        self._schedules: dict[str, Schedule] = {}
        # Not a bound method: an engine in a circle with its maps would keep their memory until the collector runs.
        curvature = functools.partial(_curvature, problem, num_samples, draw_seed(generator))
        self._derivatives = {
            last: Derivatives(problem, channels_last=last, curvature=curvature) for last in (False, True)
        }

    @property
    def routes(self) -> dict[str, str]:
        """Map -> how it is carried out, and why not in the ways that come before; for the maps used so far."""
        return {kind: "; ".join([str(s.route), *s.notes]) for kind, s in self._schedules.items()}

    @property
    def notes(self) -> list[str]:
        """:attr:`routes`, for a report."""
        return [f"{kind}: {route}" for kind, route in self.routes.items()]

    # The protocol

    def loss(self) -> float:
        """L(theta), summed over the batches in float64."""
        total = 0.0
        with torch.no_grad(), math_mode(self.precision, self.problem.device):
            for piece in pieces(self.problem):
                total += self._derivatives[False].loss(self.problem.params, piece).double().item()
        return total

    def gradient(self) -> Tensor:
        """dL/dtheta, ``[P]``."""
        result = torch.zeros(self.problem.num_params, dtype=self.problem.dtype, device=self.problem.device)
        with math_mode(self.precision, self.problem.device):
            for piece in pieces(self.problem):
                _write(result, self._derivatives[False].gradient(piece), self._tensors, first=False)
        return result

    def hessian(self, rows: Tensor) -> Tensor:
        """d2L/dtheta2 v for each row v: ``[K, P]`` to ``[K, P]``."""
        return self._square("hessian", rows)

    def ggn(self, rows: Tensor, kind: str = "loss") -> Tensor:
        """J^T B J v / Z for each row v; the draws of ``"monte_carlo"`` are made once an engine."""
        return self._square(f"ggn:{kind}", rows)

    def jacobian(self, rows: Tensor) -> Tensor:
        """J v for each row v: ``[K, P]`` to ``[K, M]``."""
        with torch.no_grad(), math_mode(self.precision, self.problem.device):
            columns = [
                torch.stack([self._outputs(product, v) for v in directions(rows, self._tensors)])
                for product in self._products("jacobian")
            ]
        return torch.cat(columns, 1).to(rows.dtype)

    def jacobian_transposed(self, outputs: Tensor) -> Tensor:
        """J^T u for each row u: ``[K, M]`` to ``[K, P]``.

        Raises:
            ValueError: M is not the number of output elements of all samples.
        """
        result = outputs.new_empty(len(outputs), self.problem.num_params)
        start = 0
        with torch.no_grad(), math_mode(self.precision, self.problem.device):
            for number, product in enumerate(self._products("transposed")):
                stop = start + product.shape.numel()
                if stop <= outputs.shape[1]:
                    for row, u in zip(result, outputs[:, start:stop], strict=True):
                        _write(row, product.apply(u.reshape(product.shape)), self._tensors, first=number == 0)
                start = stop
        if start != outputs.shape[1]:
            raise ValueError(
                f"jacobian_transposed: outputs must be [K, M] with M == {start}, got {list(outputs.shape)}"
            )
        return result

    # How

    def _outputs(self, product: Product, v: list[Tensor]) -> Tensor:
        """J v of one piece, flat; zeros where no chosen parameter reaches the outputs."""
        (result,) = product.apply(*v)
        if result is None:
            return torch.zeros(product.outputs, dtype=self.problem.dtype, device=self.problem.device)
        return result.reshape(-1)

    def _square(self, kind: str, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        with torch.no_grad(), math_mode(self.precision, self.problem.device):
            for number, product in enumerate(self._products(kind)):
                self._multiply(product, rows, result, first=number == 0)
        return result

    def _multiply(self, product: Product, rows: Tensor, result: Tensor, *, first: bool) -> None:
        """Write (``first``) or add the product of one piece with all rows."""
        done = 0
        block = product.block(self._tensors, self._spare()) if len(rows) >= BLOCK else None
        if block is not None:
            sizes = [tensor.numel() for tensor in self._tensors]
            for start in range(0, len(rows) - BLOCK + 1, BLOCK):
                parts = rows[start : start + BLOCK].split(sizes, 1)
                shaped = [part.reshape(BLOCK, *t.shape) for part, t in zip(parts, self._tensors, strict=True)]
                _write(result[start : start + BLOCK], block(*shaped), self._tensors, first=first)
                done = start + BLOCK
        for row, v in zip(result[done:], directions(rows[done:], self._tensors), strict=True):
            _write(row, product.apply(*v), self._tensors, first=first)

    def _products(self, kind: str) -> Iterator[Product]:
        if kind not in self._schedules:
            self._schedules[kind] = Schedule(
                self.problem, self._derivatives.__getitem__, kind, self.memory_budget, self._rounded
            )
        schedule = self._schedules[kind]
        others = [other for other in self._schedules.values() if other is not schedule]
        if not schedule.is_complete and self._spare() < schedule.wanted_bytes:
            for other in others:
                other.drop()
        return schedule.products(self.memory_budget - sum(other.kept_bytes for other in others))

    def _spare(self) -> int:
        return self.memory_budget - sum(schedule.kept_bytes for schedule in self._schedules.values())


def _curvature(
    problem: Problem, num_samples: int, seed: int, piece: Piece, outputs: Tensor, kind: str
) -> OutputCurvature:
    generator = None
    if kind == "monte_carlo":
        # The stream of a batch is that of every engine; parts after the first have streams of their own.
        generator = batch_generator(seed + piece.part, piece.batch, outputs.device)
    return problem.loss.curvature(outputs, piece.targets, kind, num_samples=num_samples, generator=generator)


def _write(result: Tensor, parts: Sequence[Tensor | None], like: Sequence[Tensor], *, first: bool) -> None:
    """Put the tensors of one product into ``[P]`` (or those of a block into ``[K, P]``), or add them."""
    for part, target in zip(parts, result.split([t.numel() for t in like], -1), strict=True):
        if part is None:
            if first:
                target.zero_()
            continue
        shaped = target.view(part.shape)
        if first:
            shaped.copy_(part)
        else:
            shaped.add_(part)
