# SPDX-License-Identifier: Apache-2.0
"""What all matrices of a problem share: an engine, the sum over processes, checks before the first product."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from curvlab.operators.base import LinearOperator
from curvlab.operators.cross_entropy import SoftmaxCrossEntropy
from curvlab.operators.engines.protocol import Engine
from curvlab.operators.engines.select import make_engine
from curvlab.operators.modes import check_records, own_dtypes, watch_attention
from curvlab.operators.precision import relative_error
from curvlab.operators.problem import Problem

__all__ = ["ProblemOperator", "check_deterministic", "engine_like"]

_CHECK_SAMPLES = 4


class ProblemOperator(LinearOperator):
    """A matrix over a problem's parameters; subclasses write ``_product(rows)``, of this process' batches alone.

    Args:
        problem: model, loss, parameters, data.
        engine: ``"auto"``, ``"fused"``, ``"linearized"`` or ``"autograd"``.
        precision: None: the problem's dtype; ``"bf16"``, ``"tf32"``: lower, with :attr:`precision_error`.
        memory_budget: bytes for an engine's factors and temporaries.
        product: what :func:`make_engine` compares with the judge.
        is_psd: as declared.
        shape: ``(P, P)`` by default.
        is_symmetric: True by default.
        options: passed to the engine.

    Attributes:
        problem: as given.
        engine: what multiplies.
        report: how it was picked, and its error on a few samples.

    Raises:
        ValueError: a model that is not deterministic, and what :func:`make_engine` refuses.
        RuntimeError: the engine multiplies wrongly; inside ``torch.inference_mode``, which records no derivative.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        engine: str = "auto",
        precision: str | None = None,
        memory_budget: int | None = None,
        product: str = "hessian",
        is_psd: bool = False,
        shape: tuple[int, int] | None = None,
        is_symmetric: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"{type(self).__name__}: problem must be a Problem, got {type(problem).__name__}")
        check_records(type(self).__name__)
        check_deterministic(problem, type(self).__name__)
        self.problem = problem
        generator = options.get("generator")
        self._generator_state = None if generator is None else generator.get_state()
        with own_dtypes(problem.device):
            made = make_engine(problem, engine, precision, memory_budget, product=product, **options)
        self.engine, self.report = made
        self._precision, self._precision_error = precision, None
        self._options = {"memory_budget": memory_budget, **options}
        size = problem.num_params
        layout = {name: param.shape for name, param in problem.params.items()}
        super().__init__(
            (size, size) if shape is None else shape,
            problem.dtype,
            problem.device,
            is_symmetric=is_symmetric,
            is_psd=is_psd,
            layout=layout,
        )
        if shape is not None:
            self.output_layout = None  # outputs of the network, even if there are P of them

    def at(self, model: nn.Module) -> Self:
        """The same matrix at the present values of ``model``, as along a training run; this one stays as it is.

        The engine that was picked and checked at the first parameters is built for the new ones without another check:
        where products are few (a warm start), the check costs more than they do.

        Raises:
            ValueError: a model whose parameters or buffers are not the problem's.
        """
        check_records(type(self).__name__)
        moved = copy.copy(self)
        moved.problem = self.problem.at(model)
        with own_dtypes(self.device):
            moved.engine = engine_like(self, moved.problem, self._precision)
        moved.num_products = 0
        moved._forget()
        return moved

    def _forget(self) -> None:
        """Drop what was computed at other parameters."""
        self._precision_error = None

    def _checked(self, rows: Tensor, size: int, result_size: int, *, transposed: bool) -> Tensor:
        check_records(type(self).__name__)
        with own_dtypes(self.device):
            return super()._checked(rows, size, result_size, transposed=transposed)

    def _product(self, rows: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def _apply(self, rows: Tensor) -> Tensor:
        return self._reduced(self._product(rows))

    def _reduced(self, product: Tensor) -> Tensor:
        """The sum over the processes of the problem's group; every process gets it."""
        if self.problem.process_group is not None:
            product = product.contiguous()
            torch.distributed.all_reduce(product, group=self.problem.process_group)
        return product

    @property
    def precision_error(self) -> float:
        """``||A_p v - A v|| / ||A v||`` for one Gaussian v, A in float32 on all data; 0 if no precision was asked for.

        Costs one product in float32 on first use; a collective call where there is a process group.
        """
        if self._precision is None:
            return 0.0
        if self._precision_error is None:
            generator = torch.Generator(self.device).manual_seed(0)
            row = torch.randn(1, self.shape[1], dtype=self.dtype, device=self.device, generator=generator)
            low, full = self._apply(row), engine_like(self, self.problem, None)
            engine, self.engine = self.engine, full
            try:
                self._precision_error = relative_error(low, self._apply(row))
            finally:
                self.engine = engine
        return self._precision_error


def engine_like(operator: ProblemOperator, problem: Problem, precision: str | None) -> Engine:
    """The operator's kind of engine, with the same draws."""
    build: Any = type(operator.engine)
    options = dict(operator._options)
    if operator._generator_state is not None:
        options["generator"] = torch.Generator().set_state(operator._generator_state)
    return build(problem, precision=precision, **options)


def check_deterministic(problem: Problem, owner: str) -> None:
    """Two forward passes of a few samples must agree; says once where attention takes its math path.

    Raises:
        ValueError: they differ (dropout that ``eval`` does not switch off, noise in the forward pass), or the loss does
            not take the outputs.
    """
    inputs, targets = next(iter(problem.subset(_CHECK_SAMPLES).batches()))
    with torch.no_grad(), watch_attention(owner):
        first = problem.outputs(problem.params, inputs)
    with torch.no_grad():
        second = problem.outputs(problem.params, inputs)
        if first.ndim == 0 or len(first) != len(targets):
            raise ValueError(
                f"{owner}: model must return [N, ...] with N == {len(targets)} (from the targets), "
                f"got {list(first.shape)}"
            )
        if isinstance(problem.loss, SoftmaxCrossEntropy):  # its total may not look at labels, this says which is wrong
            problem.loss.gradient(first, targets)
        problem.loss.total(first, targets)
    # Atomic sums on a GPU may come in another order: rounding is no randomness.
    difference = relative_error(second, first)
    if difference > min(100.0 * torch.finfo(first.dtype).eps, 2e-2):
        raise ValueError(
            f"{owner}: model must be deterministic, got outputs that differ by {difference:.1e} between two passes "
            "over the same samples (dropout with training=True, or noise in the forward pass)"
        )
