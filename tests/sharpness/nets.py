# SPDX-License-Identifier: Apache-2.0
"""Small trained networks for the tests of sharpness, and losses by an independent route."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from curvlab.operators.problem import Problem

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(*, batch_norm: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm, pooling, two fully connected layers: every symmetry has something to act on."""
    norm = [nn.BatchNorm2d(3)] if batch_norm else []
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip


def images(count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Four classes of noisy 6 x 6 patterns."""
    generator = draw(seed)
    patterns = torch.randn(4, 1, 6, 6, dtype=F64, generator=draw(99))
    y = torch.randint(0, 4, (count,), generator=generator)
    return patterns[y] + 0.7 * torch.randn(count, 1, 6, 6, dtype=F64, generator=generator), y


def trained(model: nn.Module, data: tuple[Tensor, Tensor], *, steps: int, lr: float = 0.05) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model.eval()


@lru_cache
def _network(seed: int, batch_norm: bool, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained(chain(batch_norm=batch_norm).double(), images(), steps=steps)


def network(seed: int = 0, *, batch_norm: bool = True, steps: int = 30) -> nn.Module:
    """A copy of a trained chain, float64, in evaluation mode."""
    return copy.deepcopy(_network(seed, batch_norm, steps))


def problem(seed: int = 0, *, steps: int = 30, batch_norm: bool = True, **options: object) -> Problem:
    return Problem(network(seed, batch_norm=batch_norm, steps=steps), nn.CrossEntropyLoss(), images(), **options)  # type: ignore[arg-type]


def outputs_at(model: nn.Module, row: Tensor, x: Tensor) -> Tensor:
    """Outputs at a row of parameters, by PyTorch alone; differentiable."""
    params = dict(model.named_parameters())
    pieces = row.split([param.numel() for param in params.values()])
    values = {name: piece.reshape(params[name].shape) for name, piece in zip(params, pieces, strict=True)}
    return functional_call(model, values, (x,))


def plain_loss(model: nn.Module, row: Tensor, data: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Mean cross-entropy at a row of parameters."""
    x, y = data or images()
    return functional.cross_entropy(outputs_at(model, row, x), y)


def row_of(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])
