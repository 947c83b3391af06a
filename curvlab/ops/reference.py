# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch, in float64: the second opinion. Same signatures and results, no kernel of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NAN = float("nan")


def _sums(x: Tensor, reference: Tensor | None) -> Tensor:
    """l1, sum of squares, linf, nonzeros, squared distance, inner product, squared reference of one tensor."""
    x = x.detach().double().reshape(-1)
    linf = x.abs().max() if x.numel() else x.new_zeros(())
    own = [x.abs().sum(), x.square().sum(), linf, torch.count_nonzero(x).double()]
    if reference is None:
        return torch.stack([*own, *[x.new_full((), _NAN)] * 3])
    r = reference.detach().double().reshape(-1)
    return torch.stack([*own, (x - r).square().sum(), (x * r).sum(), r.square().sum()])


def multi_tensor_norms(tensors: Sequence[Tensor], reference: Sequence[Tensor] = (), *, l2_only: bool = False) -> Tensor:
    """As ``curvlab.ops.norms.multi_tensor_norms``."""
    if not tensors:
        return torch.zeros(1, 7, dtype=torch.float64)
    references: Sequence[Tensor | None] = reference or [None] * len(tensors)
    rows = torch.stack([_sums(x, r) for x, r in zip(tensors, references, strict=True)])
    total = rows.sum(0)
    total[2] = rows[:, 2].max()
    out = torch.cat([rows, total[None]])
    out[:, [1, 4, 6]] = out[:, [1, 4, 6]].sqrt()
    if l2_only:
        out[:, [0, 2, 3, 4, 5, 6]] = _NAN
    return out


def _filter_norms(w: Tensor) -> Tensor:
    w = w.detach().double()
    rows = w.shape[0] if w.dim() else 1
    return w.reshape(rows, w.numel() // max(rows, 1)).square().sum(1).sqrt()


def filter_norms(tensors: Sequence[Tensor]) -> Tensor:
    """As ``curvlab.ops.norms.filter_norms``."""
    return torch.cat([_filter_norms(w) for w in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)
