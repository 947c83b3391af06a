# SPDX-License-Identifier: Apache-2.0
"""A learnable data set, networks for it, the loop written out, and a callback that writes down what it sees."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from curvlab.data import Dataset
from curvlab.models import MLP
from curvlab.training import Recipe, generator

F64 = torch.float64


def dataset(num: int = 300, dtype: torch.dtype = F64, features: tuple[int, ...] = (1, 4, 5)) -> Dataset:
    """Ten noisy clusters: learnable, and never wholly."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (num + 50,), generator=g)
    centers = torch.randn(10, *features, generator=g)
    x = (centers[y] + 0.8 * torch.randn(num + 50, *features, generator=g)).to(dtype)
    return Dataset("clusters", x[:num], y[:num], x[num:], y[num:], 10, False, "0" * 16, "made here")


def networks(
    seeds=(0, 1, 2), *, width: int = 9, parametrization: str = "standard", dtype: torch.dtype = F64
) -> list[MLP]:
    return [
        MLP(width, in_features=20, parametrization=parametrization, generator=generator(s, "init")).to(dtype)  # type: ignore[arg-type]
        for s in seeds
    ]


def written_out(model: nn.Module, data: Dataset, recipe: Recipe, seed: int) -> list[tuple[float, float]]:
    """The loop as a researcher writes it, with torch's own optimizer and scheduler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    order = generator(seed, "order")
    rows = []
    for _ in range(recipe.epochs):
        loss_sum = hits = 0.0
        for batch in torch.randperm(len(data.train_x), generator=order).split(recipe.batch_size):
            x, y = data.train_x[batch], data.train_y[batch]
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(batch)
            hits += (logits.argmax(1) == y).sum().item()
        scheduler.step()
        rows.append((loss_sum / len(data.train_x), hits / len(data.train_x)))
    return rows


def distance(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


RECIPE = Recipe(epochs=6, batch_size=64, lr=0.2)


class Watcher:
    """Writes down what it sees; keeps a number across a checkpoint."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.loads: list[int] = []
        self.start: list[torch.Tensor] = []
        self.count = 0

    def on_start(self, state) -> None:
        self.start = [param.detach().clone() for param in state.params]
        self.events.append(("start", state.seed, state.epoch, state.step))

    def on_step(self, state) -> None:
        self.count += 1
        self.events.append(("step", state.seed, state.epoch, state.step))
        self.loads.append(sum(p.detach().sum().item() for p in state.params).__hash__())

    def on_epoch(self, state) -> None:
        self.events.append(("epoch", state.seed, state.epoch, state.step))
        assert state.history[-1]["epoch"] == state.epoch

    def on_end(self, state) -> None:
        self.events.append(("end", state.seed, state.epoch, state.step))

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.count = saved["count"]
