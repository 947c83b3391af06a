# SPDX-License-Identifier: Apache-2.0
r"""The Jacobian of all outputs in the parameters.

    J = d (f(x_1; theta), ..., f(x_N; theta)) / d theta      [M, P],   no 1/N

M counts all output elements: sample after sample, each in row-major order (outputs ``[N, C]``: row n C + c), batch
after batch.  With a process group the rows of process 0 come first, and every process gets the whole product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.operators.engines.pieces import pieces
from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import ProblemOperator

__all__ = ["JacobianOperator"]


class JacobianOperator(ProblemOperator):
    """``J`` ``[M, P]`` and its transpose ``J.T``; ``apply_rows``: ``[K, P]`` to ``[K, M]``.

    Arguments, errors and use as of ``HessianOperator``; the loss and the targets do not enter.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self._sizes = _output_elements(problem)
        super().__init__(
            problem,
            engine=engine,
            precision=precision,
            memory_budget=memory_budget,
            product="jacobian",
            shape=(sum(self._sizes), problem.num_params),
            is_symmetric=False,
        )

    def _apply(self, rows: Tensor) -> Tensor:
        product = self.engine.jacobian(rows)
        group = self.problem.process_group
        if group is None:
            return product
        # Gathered tensors must have one shape: padded to the longest, and cut again.
        padded = torch.nn.functional.pad(product, (0, max(self._sizes) - product.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in self._sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:, :size] for part, size in zip(parts, self._sizes, strict=True)], 1)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        group = self.problem.process_group
        if group is None:
            return self.engine.jacobian_transposed(rows)
        own = rows.split(self._sizes, 1)[torch.distributed.get_rank(group)]
        return self._reduced(self.engine.jacobian_transposed(own.contiguous()))


def _output_elements(problem: Problem) -> list[int]:
    """M of each process: elements of one sample's output, batch by batch, from a forward pass of two samples."""
    total = 0
    with torch.no_grad():
        for batch in pieces(problem):
            some = batch.head(2)
            outputs = problem.outputs(problem.params, some.inputs, statistics=some.statistics)
            total += outputs[0].numel() * len(batch)
    if problem.process_group is None:
        return [total]
    own = torch.tensor([total], device=problem.device)
    sizes = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(problem.process_group))]
    torch.distributed.all_gather(sizes, own, group=problem.process_group)
    return [int(size.item()) for size in sizes]
