# SPDX-License-Identifier: Apache-2.0
"""What training refuses: the checkpoint of another network; and how a refusal leaves the models.  Sums of evaluate."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlab.data import Dataset
from curvlab.models import MLP
from curvlab.training import CheckpointFile, Recipe, evaluate, generator, train, train_group

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(epochs=2, batch_size=16, lr=0.1)


def dataset() -> Dataset:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=g), torch.randint(0, 10, (60,), generator=g)
    return Dataset("noise", x[:50], y[:50], x[50:], y[50:], 10, False, "0" * 16, "made here")


def mlp(parametrization: str = "standard", *, seed: int = 0) -> MLP:
    return MLP(8, in_features=6, parametrization=parametrization, generator=generator(seed, "init"))  # type: ignore[arg-type]


class Other(MLP):
    """Another class with the same parameters, which could compute something else."""


def renamed(model: MLP) -> MLP:
    model.__class__ = Other
    return model


def nudged(model: MLP) -> MLP:
    with torch.no_grad():
        bias = model.layers[-1].bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
    return model


def sequential(activation: nn.Module) -> nn.Module:
    return nn.Sequential(copy.deepcopy(mlp().layers[0]), activation, nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: mlp("ntk"), "affine_scales"),
        (lambda: mlp(seed=1), "initial_network"),
        (lambda: nudged(mlp()), "initial_network"),
    ],
)
def test_the_checkpoint_of_another_network_is_refused(tmp_path, make: Callable[[], MLP], key):
    data, path = dataset(), tmp_path / "c"
    train_group([mlp()], data, RECIPE, seeds=[0], checkpoint=CheckpointFile(path, every_seconds=0))
    model = make()
    before = [param.detach().clone() for param in model.parameters()]
    where = [param.data_ptr() for param in model.parameters()]
    with pytest.raises(ValueError, match=f"is of another run: {key} must be .*, got "):
        train_group([model], data, RECIPE, seeds=[0], checkpoint=CheckpointFile(path))
    assert [param.data_ptr() for param in model.parameters()] == where
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    resumed = train_group([mlp()], data, RECIPE, seeds=[0], checkpoint=CheckpointFile(path))
    assert len(resumed.history) == RECIPE.epochs


def test_the_checkpoint_of_another_class_or_activation_is_refused(tmp_path):
    data = dataset()
    path = tmp_path / "class"
    train(mlp(), data, RECIPE, seed=0, checkpoint=CheckpointFile(path, every_seconds=0))
    with pytest.raises(ValueError, match=r"classes must be \['Other'\], got \['MLP'\]"):
        train(renamed(mlp()), data, RECIPE, seed=0, checkpoint=CheckpointFile(path))
    path = tmp_path / "activation"
    relu = sequential(nn.ReLU())
    tanh = copy.deepcopy(relu)
    tanh[1] = nn.Tanh()  # type: ignore[index]
    train(relu, data, RECIPE, seed=0, checkpoint=CheckpointFile(path, every_seconds=0))
    with pytest.raises(ValueError, match="initial_network must be"):
        train(tanh, data, RECIPE, seed=0, checkpoint=CheckpointFile(path))


def test_a_callback_that_changes_the_start_does_not_stand_in_the_way_of_resuming(tmp_path):
    class Shift:
        """Changes the network differently in every process."""

        calls = 0

        def on_start(self, state) -> None:
            Shift.calls += 1
            with torch.no_grad():
                state.params[0].add_(0.01 * Shift.calls)

    data, path = dataset(), tmp_path / "c"
    for _ in range(2):
        train(mlp(), data, RECIPE, seed=0, callbacks=[Shift()], checkpoint=CheckpointFile(path, every_seconds=0))
    assert Shift.calls == 2


def test_half_precision_networks_have_an_identity(tmp_path):
    data, path = dataset(), tmp_path / "c"
    data = Dataset("noise", data.train_x.bfloat16(), data.train_y, data.test_x, data.test_y, 10, False, "0" * 16, "")
    model = nn.Sequential(mlp().layers[0], nn.ReLU(), nn.Linear(8, 10)).bfloat16()
    again = copy.deepcopy(model)
    for one in (model, again):
        result = train(one, data, RECIPE, seed=0, checkpoint=CheckpointFile(path, every_seconds=0))
        assert len(result.history) == RECIPE.epochs


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"first_seed": -1}, ValueError),
        ({"first_seed": 0.5}, TypeError),
        ({"callbacks": lambda seed: [object()]}, TypeError),
        ({"callbacks": lambda seed: [][seed]}, IndexError),
    ],
)
def test_a_refusal_leaves_the_models_with_their_own_storage(count, options, error):
    models = [mlp(seed=s) for s in range(count)]
    where = [param.data_ptr() for model in models for param in model.parameters()]
    before = [param.detach().clone() for model in models for param in model.parameters()]
    seeds = [options.get("first_seed", 0), 7][:count]
    with pytest.raises(error):
        train_group(models, dataset(), RECIPE, seeds=seeds, callbacks=options.get("callbacks", ()))
    after = [param for model in models for param in model.parameters()]
    assert [param.data_ptr() for param in after] == where
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_evaluate_sums_float32_losses_in_float64():
    g = torch.Generator().manual_seed(3)
    logits, labels = 4 * torch.randn(5000, 10, generator=g), torch.randint(0, 10, (5000,), generator=g)
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss, _ = evaluate(nn.Identity(), logits, labels)
    assert loss == pytest.approx(losses.double().mean().item(), rel=1e-13)
