# SPDX-License-Identifier: Apache-2.0
"""Adam and SAM against loops written out here; what checkpoints keep of them; layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlab.models import CNN
from curvlab.training import CheckpointFile, Recipe, generator, train, train_group
from tests.training.samples import dataset, distance, equal, networks

pytestmark = pytest.mark.usefixtures("one_thread")

SAM = Recipe(3, 64, 0.1, optimizer="sam", rho=0.2)
ADAM = Recipe(4, 64, 0.003, optimizer="adam")


def cnn(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    made = CNN(2, image_size=8, generator=generator(seed, "init"))
    return made.to(dtype).to(memory_format=torch.channels_last)


def sam_written_out(model: nn.Module, data, recipe: Recipe, seed: int) -> None:
    """Foret et al.'s two steps on copies: the gradient at theta + e is taken on another network altogether."""
    order, velocity = generator(seed, "order"), [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(recipe.epochs):
        for rows in torch.randperm(len(data.train_x), generator=order).split(recipe.batch_size):
            x, y = data.train_x[rows], data.train_y[rows]
            model.train()
            away = copy.deepcopy(model)
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            with torch.no_grad():
                for param, g in zip(away.parameters(), grads, strict=True):
                    param += recipe.rho * g / norm
            grads = torch.autograd.grad(F.cross_entropy(away(x), y), list(away.parameters()))
            with torch.no_grad():
                for param, v, g in zip(model.parameters(), velocity, grads, strict=True):
                    v.mul_(recipe.momentum).add_(g)
                    param -= recipe.learning_rate(epoch) * v


def test_sam_is_the_two_steps_written_out() -> None:
    data = dataset(150, features=(3, 8, 8))
    mine, theirs, plain = cnn(), cnn(), cnn()
    result = train(mine, data, SAM, seed=2)
    sam_written_out(theirs, data, SAM, 2)
    assert distance(mine, theirs) < 1e-10
    for one, two in zip(mine.buffers(), theirs.buffers(), strict=True):  # statistics of the first pass alone
        assert torch.allclose(one, two, rtol=0, atol=1e-9)
    train(plain, data, Recipe(3, 64, 0.1), seed=2)
    assert distance(mine, plain) > 1e-4
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert all(m.track_running_stats for m in mine.modules() if isinstance(m, nn.BatchNorm2d))


def test_sam_of_a_vanishing_radius_is_sgd() -> None:
    data = dataset(150)
    mine, plain = networks((0,))[0], networks((0,))[0]
    train(mine, data, Recipe(3, 64, 0.1, optimizer="sam", rho=1e-13), seed=0)
    train(plain, data, Recipe(3, 64, 0.1), seed=0)
    assert distance(mine, plain) < 1e-10


def test_adam_is_torchs() -> None:
    data = dataset()
    mine, theirs = networks((3,))[0], networks((3,))[0]
    train(mine, data, ADAM, seed=3)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=ADAM.lr, foreach=False)
    order = generator(3, "order")
    for epoch in range(ADAM.epochs):
        optimizer.param_groups[0]["lr"] = ADAM.learning_rate(epoch)
        for rows in torch.randperm(len(data.train_x), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(theirs(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
    assert distance(mine, theirs) < 1e-10


@pytest.mark.parametrize("recipe", [SAM, ADAM, Recipe(3, 64, 0.1)], ids=["sam", "adam", "sgd"])
def test_resumed_runs_end_with_the_same_bits_in_any_memory_format(recipe: Recipe, tmp_path) -> None:
    class Stop(Exception):
        pass

    class Interrupt:
        def __init__(self, epoch: int) -> None:
            self.epoch = epoch

        def on_epoch(self, state) -> None:
            if state.epoch == self.epoch:
                raise Stop

    data = dataset(150, torch.float32, features=(3, 8, 8))
    whole, cut, resumed = (cnn(dtype=torch.float32) for _ in range(3))
    train(whole, data, recipe, seed=0)
    file = CheckpointFile(tmp_path / "c.safetensors", every_seconds=0)
    with pytest.raises(Stop):
        train(cut, data, recipe, seed=0, checkpoint=file, callbacks=[Interrupt(3)])
    result = train(resumed, data, recipe, seed=0, checkpoint=file, callbacks=[Interrupt(99)])
    assert equal(whole, resumed) and result.history[-1]["epoch"] == recipe.epochs


def test_channels_last_is_the_same_network_to_rounding() -> None:
    data = dataset(150, features=(3, 8, 8))
    last = cnn()
    plain = CNN(2, image_size=8, generator=generator(0, "init")).double()
    for model in (last, plain):
        train(model, data, Recipe(3, 64, 0.05), seed=0)
    assert distance(last, plain) < 1e-9


def test_full_batch_steps_once_an_epoch() -> None:
    data = dataset(100)
    model, steps = networks((0,))[0], []

    class Watch:
        def on_step(self, state) -> None:
            steps.append(state.step)

    train(model, data, Recipe(4, 100, 0.1), seed=0, callbacks=[Watch()])
    assert steps == [1, 2, 3, 4]


def test_a_group_that_asks_for_adam_is_trained_one_by_one() -> None:
    data = dataset(100)
    models, alone = networks((0, 1)), networks((0, 1))
    assert train_group(models, data, ADAM, seeds=[0, 1]).engine == "one-by-one"
    for s in (0, 1):
        train(alone[s], data, ADAM, seed=s)
        assert equal(models[s], alone[s])


@pytest.mark.parametrize("change", [{"optimizer": "lbfgs"}, {"rho": 0.0}, {"rho": float("inf")}])
def test_recipes_are_checked(change: dict) -> None:
    with pytest.raises(ValueError, match=f"Recipe: {next(iter(change))} must be"):
        Recipe(**({"epochs": 1, "batch_size": 8, "lr": 0.1} | change))
