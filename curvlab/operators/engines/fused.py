# SPDX-License-Identifier: Apache-2.0
r"""The fused engine: Pearlmutter's R-operator as a program over the network, K directions at once.

What depends on theta alone - inputs of layers, backward signals, masks, pooling indices, softmax probabilities - is
computed once per batch, in float64, and kept rounded to the working dtype: so float32 products agree with a float64
double backward to 1e-5 also on trained networks, where float32 autograd flips masks and loses the digits of p - y.
Each product then costs the fewest library calls there are: two matrix products or convolutions each for tangents,
signals and weight derivatives of a layer, everything between them in one pass.

Work goes chunk by chunk over the samples, so that tangents stay in the caches and memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.engines import graph_capture
from curvlab.operators.engines.chunks import make_plan, rows_at_once, split
from curvlab.operators.engines.heads import Head, make_head, sampled_curvatures
from curvlab.operators.engines.layer_rules.affine import AffineStep
from curvlab.operators.engines.layer_rules.norm import FixedNormStep
from curvlab.operators.engines.program import build_program, check_outputs
from curvlab.operators.engines.protocol import UnsupportedModel, batch_generator, draw_seed
from curvlab.operators.engines.steps import Kept, Product, Run, Step, to_internal, to_natural
from curvlab.operators.losses import CustomLoss, SoftmaxCrossEntropy, SquaredError
from curvlab.operators.precision import math_mode
from curvlab.operators.problem import Problem

__all__ = ["FusedEngine"]


@dataclass
class _Chunk:
    """Samples that pass together, and what was kept of them."""

    n: int
    batch: int
    kept: list[Any]
    outputs: Tensor  # float64, natural
    targets: Tensor
    signal: Tensor  # dL/d outputs, laid out, in the working dtype
    size: int  # output elements


class FusedEngine:
    """Products by a curvature program; see the module's docstring.

    Args:
        problem: what curvature is taken of.
        memory_budget: bytes for kept factors, passes, results and copies of directions; None: no limit.
        precision: None, ``"bf16"`` (factors, matrix products and convolutions; sums and results stay float32) or
            ``"tf32"`` (CUDA).
        num_samples, generator: of ``ggn(kind="monte_carlo")``; drawn once.

    Attributes:
        plan: samples a chunk, directions a pass, and bytes; :class:`curvlab.operators.engines.chunks.Plan`.
        notes: what reports should say: the chunks, and whether CUDA graphs are replayed.

    Raises:
        UnsupportedModel: naming the node and the layer.
        ValueError: a memory budget that does not hold what must be kept, saying what would fit; an unknown precision.
    """

    name = "fused"

    def __init__(
        self,
        problem: Problem,
        *,
        memory_budget: int | None = None,
        precision: str | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if precision not in (None, "bf16", "tf32") or (precision == "tf32" and problem.device.type != "cuda"):
            raise ValueError(f"FusedEngine: precision must be None, 'bf16' or (CUDA) 'tf32', got {precision!r}")
        if problem.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModel(
                f"FusedEngine: problem must be float32 or float64, got {problem.dtype} (precision='bf16' rounds the "
                "factors of a float32 problem)"
            )
        self.problem, self.memory_budget, self.precision = problem, memory_budget, precision
        self.num_samples, self._seed = num_samples, draw_seed(generator)
        self.dtype = problem.dtype
        self.compute = torch.bfloat16 if precision == "bf16" else problem.dtype
        self._exact = problem.to(torch.float64)
        self.theta: dict[str, Tensor] = {**self._exact.fixed, **self._exact.params}
        self._build()
        self._lay_out()
        self._chunks: list[_Chunk] = []
        self._prepared: str | None = None
        self._heads: dict[str, list[Head]] = {}
        self._replays = graph_capture.Replays(problem.device)

    @property
    def notes(self) -> tuple[str, ...]:
        """How work is cut, and whether CUDA graphs are replayed."""
        cut = f"chunks of {self.plan.samples} samples, {self.plan.kept} bytes kept"
        return (cut, self._replays.note) if self._replays.note else (cut,)

    def _build(self) -> None:
        sizes: list[int] = []
        first: Any = None
        statistics: Mapping[str, Tensor] | None = {}
        for inputs, targets in self._exact.batches():
            sizes.append(len(targets))
            if first is None:
                first = inputs
                statistics = self._exact.statistics(inputs)
        if self.problem.batch_norm == "frozen" and len(sizes) > 1:
            statistics = None
        self._batch_sizes = sizes
        probe = _take(first, [i % sizes[0] for i in range(3)])
        self.program = build_program(
            self._exact.model,
            self.theta,
            self._exact.buffers,
            frozenset(self.problem.params),
            probe,
            batch_norm=self.problem.batch_norm,
            statistics=statistics,
            first_conv=self.problem.device.type == "cpu" and self.compute == torch.float32,
        )
        with torch.no_grad():
            known = statistics or {}
            check_outputs(self.program, lambda n: self._exact.outputs({}, _take(probe, slice(n)), statistics=known))
        self._fixed_statistics = statistics is not None
        self.steps: list[Step] = [s for s in self.program.steps if self.program.slots[s.output].active]
        for index, step in enumerate(self.steps):
            if hasattr(step, "index"):
                step.index = index  # type: ignore[attr-defined]
            if isinstance(step, AffineStep):
                step.set_theta(self.theta, self.dtype, self.compute)
        separable = isinstance(self.problem.loss, (SoftmaxCrossEntropy, SquaredError))
        self._whole_batches = not separable or any(step.whole_batch for step in self.program.steps)
        self._inference = not isinstance(self.problem.loss, CustomLoss) and separable

    def _lay_out(self) -> None:
        """Offsets of the parameters in a row, and which parts of a result must start at zero."""
        self._offsets: dict[str, tuple[int, int]] = {}
        self._shapes = {name: value.shape for name, value in self.problem.params.items()}
        position = 0
        for name, value in self.problem.params.items():
            self._offsets[name] = (position, position + value.numel())
            position += value.numel()
        uses = [name for step in self.steps for name in step.names.values()]
        self._zeroed = frozenset(name for name in self._offsets if uses.count(name) != 1)
        self.plan = self._make_plan(1)

    def _make_plan(self, count: int) -> Any:
        return make_plan(
            self.program,
            self.steps,
            self._batch_sizes,
            num_params=self.problem.num_params,
            itemsize=self.compute.itemsize,
            second=True,
            whole_batches=self._whole_batches,
            budget=self.memory_budget,
            count=count,
        )

    # ---- the primal pass

    def _prepare(self, second: bool) -> None:
        """Keep the factors of all chunks, with those of second-order terms if asked; once."""
        if self._prepared == "second" or (self._prepared == "first" and not second):
            return
        self._chunks, self._heads = [], {}
        self._replays.clear()
        for index, (inputs, targets) in enumerate(self._exact.batches()):
            if not self._fixed_statistics:
                statistics = {**self._exact.buffers, **self._exact.statistics(inputs)}
                for step in self.program.steps:
                    if isinstance(step, FixedNormStep):
                        step.statistics = statistics
            start = 0
            for size in split(len(targets), self.plan.samples):
                whole = size == len(targets)
                part = inputs if whole else _take(inputs, slice(start, start + size))
                self._chunks.append(self._primal(index, part, targets[start : start + size], second))
                start += size
        self._prepared = "second" if second else "first"
        if second and any(isinstance(s, AffineStep) and "gain" in s.names for s in self.steps):
            signals = [chunk.signal.unsqueeze(0) for chunk in self._chunks]
            self._multiply(None, signals, 1, second=False, capture=True)

    def _primal(self, batch: int, inputs: Any, targets: Tensor, second: bool) -> _Chunk:
        program = self.program
        values: list[Tensor | None] = [None] * len(program.slots)
        given: Any = inputs if isinstance(inputs, (Mapping, tuple, list)) else [inputs]
        for key, slot in program.input_slots.items():
            values[slot] = given[key]
        needed = {slot for step in self.steps for slot in step.deltas()} if second else set()
        with torch.enable_grad() if needed else torch.no_grad():
            for step in program.steps:
                value = step.primal([values[slot] for slot in step.inputs], self.theta)  # type: ignore[misc]
                if step.output in needed and not value.requires_grad:
                    value = value.detach().requires_grad_()
                values[step.output] = value
        output = values[program.output]
        assert output is not None
        signal = self.problem.loss.gradient(output.detach(), targets) / self.problem.normalizer
        deltas: dict[int, Tensor] = {}
        if needed:
            order = sorted(needed)
            sources = [values[slot] for slot in order]
            found = torch.autograd.grad(output, sources, signal, materialize_grads=True)  # type: ignore[arg-type]
            deltas = dict(zip(order, found, strict=True))
        kept = Kept(values, deltas, {}, self.compute)
        with torch.no_grad():
            factors = [step.keep(kept, second) for step in self.steps]
            laid_out = to_internal(signal).to(self.compute)
        return _Chunk(len(targets), batch, factors, output.detach(), targets, laid_out, output.numel())

    # ---- products

    def _multiply(
        self,
        rows: Tensor | None,
        signals: list[Tensor] | None,
        count: int,
        *,
        second: bool,
        heads: list[Head] | None = None,
        forward_only: bool = False,
        capture: bool = False,
    ) -> Tensor:
        """All chunks and directions: ``[K, P]``, or ``[K, M]`` with ``forward_only``."""
        like = self._chunks[0].signal
        result = None
        if not forward_only:
            result = torch.empty(count, self.problem.num_params, dtype=self.dtype, device=like.device)
            for name in self._zeroed:
                lo, hi = self._offsets[name]
                result[:, lo:hi].zero_()
        outputs: list[Tensor] = []
        product = Product(rows, result, count, self._offsets, self._shapes, second, self._zeroed, capture)
        with torch.inference_mode() if self._inference and not capture else torch.no_grad():
            bound = [step.bind(product) for step in self.steps]
            at_once = max(1, min(count, self._directions))
            for index, chunk in enumerate(self._chunks):
                parts = []
                for lo in range(0, count, at_once):
                    hi = min(count, lo + at_once)
                    run = self._new_run(chunk.n, lo, hi, index == 0, second, bound)
                    if rows is not None:
                        for step, kept, own in zip(self.steps, chunk.kept, bound, strict=True):
                            step.forward(run, kept, own)
                    if forward_only:
                        parts.append(self._flat_outputs(run))
                        continue
                    if signals is not None:
                        arriving = signals[index][lo:hi].contiguous()
                    else:
                        assert heads is not None
                        tangent = run.t[self.program.output]
                        assert tangent is not None
                        arriving = heads[index](tangent)
                    run.give(self.program.output, arriving)
                    self._backward(run, chunk, bound)
                if forward_only:
                    outputs.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            if forward_only:
                outputs = [torch.cat(outputs, 1)]
            else:
                for step, own in zip(self.steps, bound, strict=True):
                    step.finish(product, own)
        if result is not None:
            return result
        return outputs[0].clone()  # a tensor of no inference mode

    def _new_run(self, n: int, lo: int, hi: int, fresh: bool, second: bool, bound: list[Any]) -> Run:
        count = len(self.program.slots)
        return Run(n, lo, hi, fresh, second, [None] * count, [None] * count, [None] * count, bound)

    def _backward(self, run: Run, chunk: _Chunk, bound: list[Any]) -> None:
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            step.backward(run, chunk.kept[index], bound[index])
            run.t[step.output] = None

    def _flat_outputs(self, run: Run) -> Tensor:
        tangent = run.t[self.program.output]
        assert tangent is not None
        return to_natural(tangent, 2).reshape(run.k, -1).to(self.dtype)

    def _heads_of(self, kind: str) -> list[Head]:
        """The curvature of the outputs, chunk by chunk; sampled kinds are drawn batch by batch, once."""
        if kind not in self._heads:
            loss, curvatures = self.problem.loss, []
            if kind == "monte_carlo":
                for batch in range(len(self._batch_sizes)):
                    parts = [(chunk.outputs, chunk.targets) for chunk in self._chunks if chunk.batch == batch]
                    generator = batch_generator(self._seed, batch, parts[0][0].device)
                    curvatures += sampled_curvatures(loss, parts, self.num_samples, generator)
            else:
                curvatures = [loss.curvature(chunk.outputs, chunk.targets, kind) for chunk in self._chunks]
            scale = 1.0 / self.problem.normalizer
            self._heads[kind] = [
                make_head(curvature, chunk.outputs.ndim, scale, self.dtype)
                for curvature, chunk in zip(curvatures, self._chunks, strict=True)
            ]
        return self._heads[kind]

    def _checked(self, name: str, rows: Tensor, columns: int) -> Tensor:
        if rows.ndim != 2 or rows.shape[1] != columns:
            raise ValueError(f"{name}: rows must be [K, {columns}], got {list(rows.shape)}")
        if rows.dtype != self.dtype:
            raise ValueError(f"{name}: rows must have dtype {self.dtype}, got {rows.dtype}")
        return rows.detach().contiguous()

    def _apply(self, key: str, rows: Tensor, function: Callable[[Tensor], Tensor], columns: int) -> Tensor:
        """``function`` of the rows, no more of them at once than the budget holds."""
        if len(rows) == 0:
            return rows.new_zeros(0, columns)
        plan = self._make_plan(len(rows))
        self._directions = plan.directions
        size, item = self.problem.num_params, self.dtype.itemsize
        at_once = rows_at_once(plan, len(rows), size, item, self.memory_budget)
        with math_mode(self.precision, self.problem.device):
            parts = [self._replays(key, part, function, self._inference) for part in rows.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    _directions = 1

    def loss(self) -> float:
        """L(theta), from float64 outputs."""
        self._prepare(False)
        totals = [self.problem.loss.total(chunk.outputs, chunk.targets) for chunk in self._chunks]
        return sum(float(total) for total in totals) / self.problem.normalizer

    def gradient(self) -> Tensor:
        """dL/dtheta ``[P]``."""
        self._prepare(False)
        self._directions = 1
        signals = [chunk.signal.unsqueeze(0) for chunk in self._chunks]
        with math_mode(self.precision, self.problem.device):
            return self._multiply(None, signals, 1, second=False)[0]

    def hessian(self, rows: Tensor) -> Tensor:
        """``H v`` for each row, ``[K, P]`` to ``[K, P]``."""
        rows = self._checked("hessian", rows, self.problem.num_params)
        self._prepare(True)
        heads = self._heads_of("loss")
        return self._apply(
            "hessian", rows, lambda v: self._multiply(v, None, len(v), second=True, heads=heads), rows.shape[1]
        )

    def ggn(self, rows: Tensor, kind: str = "loss") -> Tensor:
        """``J^T B J v / Z`` for each row."""
        rows = self._checked("ggn", rows, self.problem.num_params)
        self._prepare(False)
        heads = self._heads_of(kind)
        return self._apply(
            "ggn " + kind, rows, lambda v: self._multiply(v, None, len(v), second=False, heads=heads), rows.shape[1]
        )

    @property
    def num_outputs(self) -> int:
        """M, output elements of all batches."""
        self._prepare(False)
        return sum(chunk.size for chunk in self._chunks)

    def jacobian(self, rows: Tensor) -> Tensor:
        """``J v`` for each row: ``[K, P]`` to ``[K, M]``, batches one after another."""
        rows = self._checked("jacobian", rows, self.problem.num_params)
        self._prepare(False)
        return self._apply(
            "jacobian",
            rows,
            lambda v: self._multiply(v, None, len(v), second=False, forward_only=True),
            self.num_outputs,
        )

    def jacobian_transposed(self, outputs: Tensor) -> Tensor:
        """``J^T u`` for each row: ``[K, M]`` to ``[K, P]``."""
        self._prepare(False)
        outputs = self._checked("jacobian_transposed", outputs, self.num_outputs)

        def pull(u: Tensor) -> Tensor:
            signals = []
            parts = u.split([chunk.size for chunk in self._chunks], 1)
            for chunk, part in zip(self._chunks, parts, strict=True):
                natural = part.reshape(len(u), *chunk.outputs.shape).to(self.compute)
                signals.append(to_internal(natural, 2))
            return self._multiply(None, signals, len(u), second=False)

        return self._apply("jacobian_transposed", outputs, pull, self.problem.num_params)


def _take(inputs: Any, index: Any) -> Any:
    """The chosen samples of a batch of inputs."""
    if isinstance(inputs, Mapping):
        return {name: _take(value, index) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_take(value, index) for value in inputs)
    return inputs[index] if isinstance(inputs, Tensor) else inputs
