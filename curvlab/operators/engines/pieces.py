# SPDX-License-Identifier: Apache-2.0
"""The data in units of work that fit into a memory budget: whole batches, or parts of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlab.operators.losses import SoftmaxCrossEntropy, SquaredError
from curvlab.operators.problem import Problem

__all__ = ["MemoryModel", "Piece", "default_budget", "is_splittable", "pieces"]


@dataclass
class Piece:
    """Some samples of one batch; ``statistics`` (BatchNorm "frozen") are those of the whole batch."""

    inputs: Any
    targets: Tensor
    batch: int = 0
    part: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def head(self, n: int) -> Piece:
        """The first ``n`` samples."""
        return self.slice(0, n)

    def slice(self, start: int, stop: int, part: int = 0) -> Piece:
        """Samples ``start`` to ``stop``; what has no sample axis (a shared mask) stays whole."""
        inputs = _slice(self.inputs, start, stop, len(self))
        return Piece(inputs, self.targets[start:stop], self.batch, part, self.statistics)

    def owned(self) -> Piece:
        """With copies of the tensors: a kept map must not see what a caller later writes into his."""
        return Piece(_copied(self.inputs), self.targets.clone(), self.batch, self.part, self.statistics)


def _slice(value: Any, start: int, stop: int, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _slice(item, start, stop, size) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_slice(item, start, stop, size) for item in value)
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_copied(item) for item in value)
    return value


def is_splittable(problem: Problem) -> bool:
    """Whether the loss is a sum over samples by its kind, and BatchNorm does not look at other samples."""
    return type(problem.loss) in (SoftmaxCrossEntropy, SquaredError) and problem.batch_norm != "batch"


def pieces(problem: Problem, part_size: int | None = None) -> Iterator[Piece]:
    """The problem's batches, in parts of at most ``part_size`` samples."""
    for index, (inputs, targets) in enumerate(problem.batches()):
        whole = Piece(inputs, targets, index, 0, problem.statistics(inputs))
        if part_size is None or len(whole) <= part_size:
            yield whole
            continue
        for part, start in enumerate(range(0, len(whole), part_size)):
            yield whole.slice(start, start + part_size, part)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a map of n samples: ``kept(n)`` constants, ``peak(n)`` while it is built (constants included)."""

    kept_fixed: float
    kept_each: float
    peak_fixed: float
    peak_each: float

    @classmethod
    def fit(cls, small: tuple[int, int, int], large: tuple[int, int, int]) -> MemoryModel:
        """The straight lines through two measurements ``(samples, kept, peak)``."""
        step = large[0] - small[0]
        kept, peak = max((large[1] - small[1]) / step, 0.0), max((large[2] - small[2]) / step, 0.0)
        return cls(max(small[1] - kept * small[0], 0.0), kept, max(small[2] - peak * small[0], 0.0), peak)

    def kept(self, n: int) -> int:
        """Bytes kept for n samples."""
        return int(self.kept_fixed + self.kept_each * n)

    def peak(self, n: int) -> int:
        """Bytes needed while the map of n samples is built."""
        return int(self.peak_fixed + self.peak_each * n)

    def fitting(self, budget: int) -> int:
        """How many samples have their peak within ``budget``; may be 0."""
        if self.peak_fixed > budget:
            return 0
        return int((budget - self.peak_fixed) / max(self.peak_each, 1.0))


def default_budget(device: torch.device) -> int:
    """4 GiB; on CUDA half of the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return 4 << 30
