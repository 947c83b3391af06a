# SPDX-License-Identifier: Apache-2.0
"""Small networks with convolutions of every kind, and masks for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.sparse import Mask, random_mask

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


class Residual(nn.Module):
    """Strides, groups, a rectangular kernel, dilation, a shortcut, BatchNorm, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
        self.side = nn.Conv2d(4, 6, (1, 2), stride=(2, 1))
        self.wide = nn.Conv2d(6, 3, 3, padding="same", dilation=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 3 * 4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.stem(x)))
        h = torch.tanh(self.body(h) + self.side(h))
        return self.head(F.gelu(self.wide(h)))


def network(dtype: torch.dtype = F64, seed: int = 0) -> nn.Module:
    """Inputs ``[N, 2, 5, 5]``, three classes; running statistics and gains are not trivial."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Residual()
    with torch.no_grad():
        model.norm.running_mean.normal_()  # type: ignore[union-attr]
        model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        model.norm.weight.normal_()
    torch.random.set_rng_state(state)
    return model.to(dtype)


def batch(size: int = 7, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return normal(size, 2, 5, 5, dtype=dtype), torch.arange(size) % 3


def mask_of(model: nn.Module, density: float = 0.4, seed: int = 0) -> Mask:
    return random_mask(model, density, generator=seeded(seed))


def masked(model: nn.Module, mask: Mask) -> nn.Module:
    """The dense model itself with its pruned weights at zero."""
    mask.apply_(model)
    return model
