# SPDX-License-Identifier: Apache-2.0
"""The loop and the grouped engine: against a loop written out here, and against each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from curvlab.models import CNN, MLP
from curvlab.training import Recipe, evaluate, generator, train, train_group
from curvlab.training.grouped import GroupedEngine, choose_engine
from curvlab.training.loop import PlainEngine, drive
from curvlab.training.stacked import Stack
from tests.training.samples import RECIPE, Watcher, dataset, distance, equal, networks, written_out

pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_is_the_loop_written_out():
    data = dataset()
    mine, theirs = networks((3,))[0], networks((3,))[0]
    rows = written_out(theirs, data, RECIPE, 3)
    result = train(mine, data, RECIPE, seed=3)
    assert distance(mine, theirs) < 1e-12
    for row, (loss, accuracy) in zip(result.history, rows, strict=True):
        assert row["train_loss"] == pytest.approx(loss, rel=1e-10)
        assert row["train_accuracy"] == pytest.approx(accuracy)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert [row["step"] for row in result.history] == [5, 10, 15, 20, 25, 30]  # 300 samples: four full batches and 44
    assert set(result.history[0]) == {"seed", "epoch", "step", "train_loss", "train_accuracy"}
    assert result.engine == "plain" and not result.diverged


@pytest.mark.parametrize(("parametrization", "lr"), [("standard", 0.1), ("ntk", 2.0)])
@pytest.mark.parametrize("stack_size", [1, 2, 3])
@pytest.mark.parametrize("num", [300, 320, 40])  # a partial batch, none, and less than one batch
def test_grouped_agrees_with_plain(parametrization, lr, stack_size, num):
    data, recipe = dataset(num), Recipe(5, 64, lr)
    plain, grouped = (networks(parametrization=parametrization) for _ in range(2))
    a = drive(PlainEngine(plain, data, recipe, seeds=[4, 5, 6]), data, recipe)
    b = drive(GroupedEngine(grouped, data, recipe, seeds=[4, 5, 6], stack_size=stack_size), data, recipe)
    start = networks(parametrization=parametrization)
    for one, two, initial in zip(plain, grouped, start, strict=True):
        assert distance(one, two) < 1e-10
        assert distance(one, initial) > 1e-3
    for one, two in zip(a.history, b.history, strict=True):
        assert {k: one[k] for k in ("seed", "epoch", "step")} == {k: two[k] for k in ("seed", "epoch", "step")}
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-10)
        assert two["train_accuracy"] == one["train_accuracy"]


def test_a_network_trains_the_same_in_any_company():
    data = dataset()
    together, alone = networks((0, 1, 2)), networks((1,))
    train_group(together, data, RECIPE, seeds=[0, 1, 2])
    train(alone[0], data, RECIPE, seed=1)
    assert distance(together[1], alone[0]) < 1e-10


def test_grouped_repeats_its_bits_in_float32():
    data = dataset(dtype=torch.float32)
    once, again = (networks(dtype=torch.float32, width=40) for _ in range(2))
    first = train_group(once, data, RECIPE, seeds=[0, 1, 2])
    second = train_group(again, data, RECIPE, seeds=[0, 1, 2])
    assert all(equal(a, b) for a, b in zip(once, again, strict=True))
    assert first.history == second.history
    assert first.engine == "grouped"


def test_models_keep_their_parameter_objects_and_storage():
    models = networks((0, 1))
    params = [list(model.parameters()) for model in models]
    pointers = [[p.data_ptr() for p in row] for row in params]
    train_group(models, dataset(), RECIPE, seeds=[0, 1])
    for model, row, where in zip(models, params, pointers, strict=True):
        assert all(a is b for a, b in zip(model.parameters(), row, strict=True))
        assert [p.data_ptr() for p in row] == where
        assert all(p.requires_grad and p.grad is None and p.is_leaf for p in row)


def test_engine_is_chosen_by_kind_and_size():
    mlps = networks()
    assert choose_engine(mlps)[0] == 3
    assert choose_engine([MLP(1024), MLP(1024)])[0] == 1
    assert choose_engine([MLP(8), MLP(9)])[0] == 0
    assert choose_engine([MLP(8), MLP(8, parametrization="ntk")])[0] == 0
    assert choose_engine([CNN(2)])[0] == 0
    mlps[0].layers[0].weight.requires_grad_(False)
    assert choose_engine(mlps)[0] == 0


def test_what_cannot_be_stacked_is_trained_one_by_one():
    data = dataset(64, features=(3, 8, 8))
    models, alone = ([CNN(2, image_size=8, generator=generator(s, "init")).double() for s in (0, 1)] for _ in range(2))
    result = train_group(models, data, Recipe(2, 32, 0.05), seeds=[0, 1])
    assert result.engine == "one-by-one"
    for s in (0, 1):
        train(alone[s], data, Recipe(2, 32, 0.05), seed=s)
        assert equal(models[s], alone[s])


def test_learning_rate_is_the_cosine_of_the_scheduler():
    recipe = Recipe(7, 10, 0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for epoch in range(7):
        assert recipe.learning_rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert recipe.learning_rate(0) == 0.3
    assert Recipe(7, 10, 0.3, schedule="constant").learning_rate(6) == 0.3


@pytest.mark.parametrize("kind", ["grouped", "one a stack", "plain"])
def test_callbacks_see_live_networks_of_their_own_seed(kind):
    data, recipe, models = dataset(100), Recipe(2, 64, 0.1), networks((5, 7))
    initial = networks((5, 7))
    watchers = {5: Watcher(), 7: Watcher()}
    engines = {
        "grouped": lambda: GroupedEngine(models, data, recipe, seeds=[5, 7], stack_size=2),
        "one a stack": lambda: GroupedEngine(models, data, recipe, seeds=[5, 7], stack_size=1),
        "plain": lambda: PlainEngine(models, data, recipe, seeds=[5, 7]),
    }
    drive(engines[kind](), data, recipe, callbacks=lambda seed: [watchers[seed]])
    for s, seed in enumerate((5, 7)):
        seen = watchers[seed]
        assert seen.events == [
            ("start", seed, 0, 0), ("step", seed, 0, 1), ("step", seed, 0, 2), ("epoch", seed, 1, 2),
            ("step", seed, 1, 3), ("step", seed, 1, 4), ("epoch", seed, 2, 4), ("end", seed, 2, 4),
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(seen.start, initial[s].parameters(), strict=True))
        assert len(set(seen.loads)) == 4  # every step moved the tensors that it saw


def test_a_callback_may_evaluate_and_change_the_network():
    """Pruning enters this way: what a callback zeroes is zero when the next step begins."""

    class Prune:
        def on_step(self, state) -> None:
            evaluate(state.model, data.test_x, data.test_y)
            with torch.no_grad():
                state.params[0][:, ::2] = 0

    data = dataset()
    plain, grouped = networks((0, 1)), networks((0, 1))
    drive(PlainEngine(plain, data, RECIPE, seeds=[0, 1]), data, RECIPE, callbacks=lambda seed: [Prune()])
    train_group(grouped, data, RECIPE, seeds=[0, 1], callbacks=lambda seed: [Prune()])
    for one, two in zip(plain, grouped, strict=True):
        assert distance(one, two) < 1e-10
        assert two.layers[0].weight[:, ::2].abs().max() == 0 < two.layers[0].weight.abs().max()


@pytest.mark.parametrize("kind", ["grouped", "plain"])
def test_divergence_is_a_flag_not_an_exception(kind):
    data = dataset()
    models = networks((0, 1))
    with torch.no_grad():
        models[1].layers[1].weight[0, 0] = float("nan")
    engine = (
        GroupedEngine(models, data, RECIPE, seeds=[0, 1], stack_size=2)
        if kind == "grouped"
        else PlainEngine(models, data, RECIPE, seeds=[0, 1])
    )
    result = drive(engine, data, RECIPE)
    assert result.diverged == (False, True)
    assert [row["epoch"] for row in result.history if row["seed"] == 0] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in result.history if row["seed"] == 1] == [1]
    healthy = networks((0,))[0]
    train(healthy, data, RECIPE, seed=0)
    assert distance(models[0], healthy) < 1e-10  # the sick neighbor did not infect it


def test_a_run_ends_when_all_have_diverged():
    result = train(networks((0,))[0], dataset(), Recipe(50, 64, 1e200), seed=0)
    assert result.diverged and len(result.history) < 5


def test_evaluate_is_the_mean_in_eval_mode_and_restores_the_mode():
    data = dataset(64, features=(3, 8, 8))
    model = nn.Sequential(nn.Dropout(0.5), CNN(2, image_size=8, generator=generator(0, "init"))).double().train()
    model[1].features[1].eval()
    modes = [module.training for module in model.modules()]
    loss, accuracy = evaluate(model, data.train_x, data.train_y, batch_size=10)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    logits = model(data.train_x)
    assert loss == pytest.approx(F.cross_entropy(logits, data.train_y).item(), rel=1e-12)
    assert accuracy == pytest.approx((logits.argmax(1) == data.train_y).double().mean().item())
    for x, y in ((data.train_x[:0], data.train_y[:0]), (data.train_x, data.train_y[:3])):
        with pytest.raises(ValueError, match="same number of samples"):
            evaluate(model, x, y)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": -1.0},
        {"momentum": 1.0},
        {"schedule": "step"},
    ],
)
def test_recipes_are_checked(change):
    with pytest.raises(ValueError, match=f"Recipe: {next(iter(change))} must be"):
        Recipe(**({"epochs": 1, "batch_size": 8, "lr": 0.1} | change))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda d: train_group([], d, RECIPE, seeds=[]), ValueError, "at least one network"),
        (lambda d: train_group(networks(), d, RECIPE, seeds=[0]), ValueError, r"one per network \(3\), got 1"),
        (lambda d: train_group(networks(), d, RECIPE, seeds=[0, 1, 1]), ValueError, "differ from each other"),
        (lambda d: train_group(networks((0,)) * 2, d, RECIPE, seeds=[0, 1]), ValueError, "different objects"),
        (lambda d: train_group(networks(dtype=torch.float32), d, RECIPE, seeds=[0, 1, 2]), ValueError, "torch.float32"),
        (lambda d: train_group([MLP(4).to("meta")], d, RECIPE, seeds=[0]), ValueError, "data's device cpu, got meta"),
        (lambda d: train_group(networks(), d, RECIPE, seeds=[0, 1, 2], callbacks=[Watcher()]), ValueError, "seed ->"),
        (lambda d: train(networks()[0], d, RECIPE, seed=0, callbacks=[Watcher]), TypeError, "with one of on_start"),
        (lambda d: train(networks()[0], d, RECIPE, seed=0, callbacks=[object()]), TypeError, "on_start, on_step"),
        (lambda d: train(nn.ReLU(), d, RECIPE, seed=0), ValueError, "model must have parameters"),
        (lambda d: train(networks()[0], d, RECIPE, seed=-1), ValueError, "seed must be 0 or more"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(dataset(70))


def test_streams_are_independent_and_repeatable():
    draws = {
        (seed, name): tuple(torch.randint(0, 2**31, (4,), generator=generator(seed, name)).tolist())
        for seed in range(20)
        for name in ("init", "order", "probe")
    }
    assert len(set(draws.values())) == 60
    assert draws[0, "init"] == tuple(torch.randint(0, 2**31, (4,), generator=generator(0, "init")).tolist())
    for wrong, error in (
        ((-1, "init"), ValueError),
        ((0, ""), ValueError),
        ((0.0, "init"), TypeError),
        ((0, 1), TypeError),
    ):
        with pytest.raises(error, match="stream_seed"):
            generator(*wrong)


@pytest.mark.cuda_build
@pytest.mark.parametrize("num", [128, 100])
def test_a_step_on_fake_cuda_tensors_stays_on_the_device(num):
    """No kernel runs: a buffer made on the CPU, a mix of devices or a read of a value on the host would fail here."""
    models = networks((0, 1), width=16, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for layer in (layer for model in models for layer in model.linear_layers()):
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape, device="cuda"))
            layer.bias = nn.Parameter(torch.empty(layer.bias.shape, device="cuda"))
        stack = Stack(models, {64, 36}, 0.9)
        x = torch.empty(num, 20, device="cuda")
        size = 64 if num == 128 else 36
        rows = torch.zeros(2 * size, dtype=torch.int64, device="cuda")
        onehot, logits = torch.empty(2, 10, size, device="cuda"), torch.empty(2, 10, size, device="cuda")
        stack.step(x, rows, onehot, logits, torch.zeros((), device="cuda"))
        assert {tensor.device.type for tensor in (stack.theta, stack.velocity, logits)} == {"cuda"}
        with pytest.raises(RuntimeError):
            stack.step(x, rows, onehot.cpu(), logits, 0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("num", [300, 320])
def test_captured_steps_on_a_gpu_agree_with_the_plain_engine(num):
    data, recipe = dataset(num), Recipe(5, 64, 0.2)
    parts = {name: getattr(data, name).cuda() for name in ("train_x", "train_y", "test_x", "test_y")}
    data = replace(data, **parts)
    plain, grouped = ([model.cuda() for model in networks()] for _ in range(2))
    drive(PlainEngine(plain, data, recipe, seeds=[0, 1, 2]), data, recipe)
    assert train_group(grouped, data, recipe, seeds=[0, 1, 2]).engine == "grouped"
    for one, two in zip(plain, grouped, strict=True):
        assert distance(one, two) < 1e-10


def test_small_groups_run_on_one_thread_and_give_the_setting_back() -> None:
    seen: list[int] = []

    class Watch:
        def on_step(self, state: object) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for width in (8, 256):  # 4 k parameters in all; 1.1 M
            seen.clear()
            models = networks(range(8), width=width)
            train_group(models, dataset(40), Recipe(1, 16, 0.1), seeds=range(8), callbacks=lambda seed: [Watch()])
            assert set(seen) == {1 if width == 8 else 2}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
