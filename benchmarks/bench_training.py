# SPDX-License-Identifier: Apache-2.0
"""Training the networks of the study `ntk_width`: seeds of one width together, against a plain loop, seed after seed.

The protocol is the study's (MLP 784-w-w-w-10, 5,000 samples, batch 128, momentum SGD, cosine schedule); a call trains
every seed for a few epochs. Inputs are random: the arithmetic does not depend on them. The plain loop is what a careful
researcher writes: tensors on the device, one permutation an epoch, no DataLoader, no synchronization inside an epoch.
Use ``--threads 2`` (or more) and read the wall columns: trained together, seeds share the cores better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Case
from curvlab.data import Dataset
from curvlab.models import MLP
from curvlab.training.grouped import train_group
from curvlab.training.loop import Recipe

TITLE = "Training the networks of the NTK-width study"
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SAMPLES = 5000


def random_data() -> Dataset:
    """MNIST's shapes with random pixels and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    return Dataset("random", images, labels, images[:1], labels[:1], 10, False, "0" * 16, "random")


def seeds_of(width: int) -> int:
    """As many as the study's cpu preset trains of this width."""
    return 3 if width <= 1024 else 1


def networks(width: int) -> list[nn.Module]:
    """One network a seed."""
    return [MLP(width, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds_of(width))]


def plain_loop(
    models: list[nn.Module], x: Tensor, y: Tensor, recipe: Recipe, *, optimizer_options: dict[str, Any]
) -> list[Tensor]:
    """Train one network after the other, as a careful researcher writes it; returns the running losses."""
    losses = []
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, **optimizer_options)
        for epoch in range(recipe.epochs):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs))
            running = torch.zeros(())
            for rows in torch.randperm(len(x), generator=generator).split(recipe.batch_size):
                loss = F.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                running += loss.detach()
            losses.append(running)
    return losses


def _case(width: int, epochs: int, data: Dataset) -> Case:
    recipe = Recipe(epochs=epochs, batch_size=128, lr=0.01)
    ours, default, fused = networks(width), networks(width), networks(width)
    calls = itertools.count()

    def grouped() -> None:
        # A fresh set of seeds names the orders of this call; the networks simply train on, as the peers' do.
        offset = len(ours) * next(calls)
        train_group(ours, data, recipe, seeds=range(offset, offset + len(ours)))

    def plain(models: list[nn.Module], **options: Any) -> Callable[[], Any]:
        return lambda: plain_loop(models, data.train_x, data.train_y, recipe, optimizer_options=options)

    peers = {"plain loop, SGD": plain(default), "plain loop, SGD(fused=True)": plain(fused, fused=True)}
    return Case(f"width {width}, {epochs} epoch(s) x {len(ours)} seed(s)", grouped, peers)


def cases(*, quick: bool) -> Iterator[Case]:
    """One case a width; the quick form has all of them, as the widest get few rounds in any case."""
    data = random_data()
    for width in WIDTHS:
        yield _case(width, 2 if width <= 256 else 1, data)
