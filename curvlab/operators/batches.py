# SPDX-License-Identifier: Apache-2.0
"""Data that gives the same batches, in the same order, on every pass - or an error.

A matrix that is another one at each product is the worst that can happen to a Lanczos iteration, and nothing shows it:
so every pass over a loader is compared, batch by batch, with the first, and tensors in memory are watched for in-place
changes.  Batches without samples are left out: no engine has anything to do with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

__all__ = ["Batches", "as_batches", "first_samples"]

Signature = tuple[int, float]

_GOLDEN = 0.6180339887498949
_CHECKED_AT_ONCE = 2**20  # elements that are widened to float64 together: 8 MB


class Batches:
    """Re-iterable over ``(inputs, targets)``; ``held`` says that the tensors are in memory and cannot change order."""

    def __init__(self, source: Iterable[Any], *, held: bool, owner: str = "Problem") -> None:
        self._source, self._held, self._owner = source, held, owner
        self._signatures: list[Signature] | None = None
        self._versions = [_versions(item) for item in source] if held else []

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return (pair for pair in (self._held_pairs() if self._held else self._loaded_pairs()) if len(pair[1]))

    def _held_pairs(self) -> Iterator[tuple[Any, Tensor]]:
        for item, versions in zip(self._source, self._versions, strict=True):
            if _versions(item) != versions:
                raise ValueError(
                    f"{self._owner}: data must stay as it was when the problem was made, got tensors that were changed "
                    "in place since (by the caller, or by a model whose first layer works in place)"
                )
            yield _checked_pair(item, self._owner)

    def _loaded_pairs(self) -> Iterator[tuple[Any, Tensor]]:
        seen: list[Signature] = []
        first = self._signatures
        for item in _quietly_iterated(self._source):
            pair = _checked_pair(item, self._owner)
            seen.append(_signature(pair))
            if first is not None and (len(seen) > len(first) or not _same(seen[-1], first[len(seen) - 1])):
                raise _changed(self._owner, len(seen) - 1)
            yield pair
        if first is None:
            self._signatures = seen
        elif len(seen) != len(first):
            raise _changed(self._owner, len(seen))


def as_batches(data: Any, owner: str) -> Batches:
    """One batch from ``(x, y)``, many from what can be iterated again.

    Raises:
        TypeError: neither.
        ValueError: a one-shot iterator, which is empty on its second pass.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return Batches([(data[0], data[1])], held=True, owner=owner)
    if isinstance(data, (tuple, list)):
        return Batches(list(data), held=True, owner=owner)
    if isinstance(data, Iterator):
        raise ValueError(
            f"{owner}: data must be iterable again and again (a list, a DataLoader), got the one-shot iterator "
            f"{type(data).__name__}"
        )
    if not isinstance(data, Iterable) or isinstance(data, Tensor):
        raise TypeError(f"{owner}: data must be (x, y) or an iterable of such pairs, got {type(data).__name__}")
    return Batches(data, held=False, owner=owner)


def first_samples(data: Batches, n: int) -> Batches:
    """The first ``n`` samples, in batches split as those of ``data``."""
    kept: list[tuple[Any, Tensor]] = []
    left = n
    for inputs, targets in data:
        size = len(targets)
        kept.append((inputs, targets) if size <= left else (_head(inputs, left, size), targets[:left]))
        left -= min(size, left)
        if left == 0:
            break
    return Batches(kept, held=True)


def _quietly_iterated(source: Iterable[Any]) -> Iterator[Any]:
    """``iter(source)``; a DataLoader in fixed order leaves the global generator where it was.

    It draws a seed for its workers at every pass, so looking at curvature would change a training run's shuffles.
    """
    if not isinstance(source, DataLoader) or source.generator is not None or source.num_workers:
        return iter(source)
    if type(source.sampler) is not SequentialSampler or type(source.batch_sampler) not in (BatchSampler, type(None)):
        return iter(source)
    with torch.random.fork_rng(devices=[]):
        return iter(source)


def _head(value: Any, n: int, size: int) -> Any:
    if isinstance(value, Tensor):
        # What has no sample axis (a shared mask, a scalar) stays whole.
        return value[:n] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _head(item, n, size) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_head(item, n, size) for item in value)
    return value


def _checked_pair(item: Any, owner: str) -> tuple[Any, Tensor]:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Tensor):
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(f"{owner}: data must give pairs (inputs, targets) with a tensor of targets, got {got}")
    inputs, targets = item
    if targets.ndim == 0:
        raise ValueError(f"{owner}: targets must be [N, ...], got a 0-d tensor")
    if isinstance(inputs, Tensor) and (inputs.ndim == 0 or len(inputs) != len(targets)):
        raise ValueError(
            f"{owner}: inputs must be [N, ...] with N == {len(targets)} (from targets), got {list(inputs.shape)}"
        )
    return inputs, targets


def _signature(pair: tuple[Any, Tensor]) -> Signature:
    """Number of samples, and a sum that knows the order of the samples."""
    return len(pair[1]), _checksum(pair[0]) + math.e * _checksum(pair[1])


def _checksum(value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return 0.0
        flat = value.detach().reshape(len(value) if value.ndim else 1, -1)
        wide = torch.complex128 if flat.is_complex() else torch.float64
        # Weights in [1, 2) that tell the elements of a sample apart: a flipped or rolled image has the same plain sum.
        weights = 1.0 + (torch.arange(flat.shape[1], dtype=torch.float64, device=flat.device) * _GOLDEN).frac()
        weights = weights.to(wide)
        step = max(1, _CHECKED_AT_ONCE // flat.shape[1])
        sums = torch.cat([(part.to(wide) * weights).sum(1).abs() for part in flat.split(step)])
        return float((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum().item())
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return sum((i + 1) * _checksum(item) for i, item in enumerate(value))
    return 0.0


def _versions(value: Any) -> list[int]:
    """How often each tensor of a batch was written; inference tensors do not count."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [value._version]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [n for item in value for n in _versions(item)] if isinstance(value, (tuple, list)) else []


def _same(a: Signature, b: Signature) -> bool:
    if a[0] != b[0]:
        return False
    return (math.isnan(a[1]) and math.isnan(b[1])) or math.isclose(a[1], b[1], rel_tol=1e-10, abs_tol=1e-10)


def _changed(owner: str, index: int) -> ValueError:
    return ValueError(
        f"{owner}: data must give the same batches on every pass (shuffle=False, no random augmentation), "
        f"got other samples in batch {index} than on the first pass"
    )
