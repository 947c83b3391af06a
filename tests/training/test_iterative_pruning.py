# SPDX-License-Identifier: Apache-2.0
"""Pruning levels: exact counts, nested masks, survivors rewound bit for bit, kill and resume."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab.data import Dataset, load
from curvlab.runs.store import RunStore, RunStoreError
from curvlab.sparse import Mask, densify, global_magnitude, sparsify
from curvlab.training import Recipe, evaluate, generator, train
from curvlab.training.iterative_pruning import PruneLevel, open_level, prune_or_load, starting_network
from curvlab.training.stages import Network, Samples, TrainStage, train_or_load
from tests.training.samples import equal

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Small:
    """A network of the caller's own, with a convolution, a normalization and linear layers."""

    width: int = 6

    def build(self, data: Dataset, seed: int) -> nn.Module:
        state = torch.random.get_rng_state()
        torch.random.default_generator.set_state(generator(seed, "init").get_state())
        side = data.train_x.shape[-1] // 2
        model = nn.Sequential(
            nn.Conv2d(data.train_x.shape[1], 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
            nn.Linear(3 * side * side, self.width), nn.ReLU(), nn.Linear(self.width, data.num_classes),
        )  # fmt: skip
        torch.random.set_rng_state(state)
        return model.to(data.train_x.dtype)


RECIPE = Recipe(epochs=3, batch_size=64, lr=0.1)
LEVEL = PruneLevel(Small(), Samples("digits", 200), RECIPE, seed=1, densities=(0.8, 0.64, 0.3), rewind_step=5)
"""Four updates an epoch: the rewind point is after the first batch of the second epoch."""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("levels"))


def _state_after(step: int, digits: Dataset) -> dict[str, Tensor]:
    """What the plain loop's network holds after so many updates."""
    model = LEVEL.network.build(digits, LEVEL.seed)
    states: dict[int, dict[str, Tensor]] = {0: {name: v.clone() for name, v in model.state_dict().items()}}

    class Spy:
        def on_step(self, state: Any) -> None:
            states[state.step] = {name: v.clone() for name, v in state.model.state_dict().items()}

    train(model, digits.subset(200), RECIPE, seed=LEVEL.seed, callbacks=[Spy()])
    return states[step]


@pytest.mark.parametrize("step", [0, 4, 5])
def test_survivors_are_those_of_the_rewind_point_bit_for_bit(step: int, digits: Dataset, store: RunStore) -> None:
    expected = _state_after(step, digits)
    level = replace(LEVEL, rewind_step=step)
    previous = Mask.dense(LEVEL.network.build(digits, LEVEL.seed))
    for depth in (1, 2, 3):
        at = replace(level, densities=level.densities[:depth])
        model, mask = starting_network(store, at, digits)
        assert mask.is_nested_in(previous) and mask.num_kept == int(at.densities[-1] * mask.num_total + 0.5)
        dense = densify(model).state_dict()
        for name, value in dense.items():
            want = expected[name].clone()
            if name in mask:
                want[~mask[name]] = 0.0
            assert torch.equal(value, want), name
        trained = prune_or_load(store, at, digits)
        assert trained.mask == mask == Mask.from_model(trained.model)
        assert all(torch.equal(trained.mask[n], keep) for n, keep in mask.items())
        parent = prune_or_load(store, at.parent, digits)
        assert parent.loaded and global_magnitude(parent.model, at.densities[-1], mask=parent.mask) == mask
        previous = mask


def test_a_level_trains_what_follows_the_rewind_point(digits: Dataset, store: RunStore) -> None:
    """The same batches and rates as the dense network's from update k on, written out with dense masked weights."""
    trained = prune_or_load(store, LEVEL, digits)
    start, mask = starting_network(store, LEVEL, digits)
    by_hand = densify(start)
    data, order = digits.subset(200), generator(LEVEL.seed, "order")
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum)
    step = 0
    by_hand.train()
    for epoch in range(RECIPE.epochs):
        optimizer.param_groups[0]["lr"] = RECIPE.learning_rate(epoch)
        for rows in torch.randperm(200, generator=order).split(64):
            step += 1
            if step <= LEVEL.rewind_step:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(data.train_x[rows]), data.train_y[rows]).backward()
            for name, keep in mask.items():
                gradient = by_hand.get_parameter(name).grad
                assert gradient is not None
                gradient.mul_(keep)
            optimizer.step()
    for (name, a), b in zip(densify(trained.model).state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    assert [row["epoch"] for row in trained.history] == [2, 3] and trained.history[-1]["step"] == 12


def test_levels_are_trained_once_and_shared(digits: Dataset, store: RunStore) -> None:
    first = prune_or_load(store, LEVEL, digits)
    again = prune_or_load(store, LEVEL, digits)
    assert again.loaded and equal(first.model, again.model) and first.history == again.history
    assert not again.model.training and again.run.name == open_level(store, LEVEL, digits).name
    deeper = replace(LEVEL, densities=(*LEVEL.densities, 0.2))
    assert deeper.parent == LEVEL
    names = [
        open_level(store, level, digits).name
        for level in (
            LEVEL,
            replace(LEVEL, seed=2),
            replace(LEVEL, densities=(0.3,)),
            replace(LEVEL, rewind_step=4),
            replace(LEVEL, control="reinit"),
            replace(LEVEL, criterion="layerwise_magnitude"),
            replace(LEVEL, held_out=10),
            replace(LEVEL, kernels="dense"),
            replace(LEVEL, network=Small(7)),
        )
    ]
    assert len(set(names)) == len(names)
    # The dense network is one for all of these.
    one = replace(LEVEL, densities=(0.8,))
    dense = [replace(one, **c).parent for c in ({}, {"rewind_step": 4}, {"criterion": "layerwise_magnitude"})]
    assert dense[0] == dense[1] == dense[2]


def test_a_dense_network_of_the_studies_is_their_stage(digits: Dataset, tmp_path: Path) -> None:
    store, network = RunStore(tmp_path), Network("cnn", 2)
    stage = train_or_load(store, TrainStage(network, Samples("digits", 128), Recipe(2, 64, 0.05), 3), digits)
    level = PruneLevel(network, Samples("digits", 128), Recipe(2, 64, 0.05), 3, densities=(0.1,), rewind_step=1)
    found = prune_or_load(store, level.parent, digits)
    assert found.loaded and found.run.name == stage.run.name and equal(found.model, stage.model)
    ticket = prune_or_load(store, level, digits)
    assert ticket.mask == global_magnitude(stage.model, 0.1) and ticket.mask.density == pytest.approx(0.1, abs=1e-3)
    loss, accuracy = evaluate(ticket.model, digits.test_x, digits.test_y)
    assert loss > 0 and 0 <= accuracy <= 1


def test_controls_change_what_they_say_and_nothing_else(digits: Dataset, store: RunStore) -> None:
    start, mask = starting_network(store, LEVEL, digits)
    same, again = starting_network(store, replace(LEVEL, control="reinit"), digits)
    assert again == mask and not equal(start, same)
    fresh = LEVEL.network.build(digits, LEVEL.seed)
    assert not torch.equal(densify(same)[0].weight, sparsify(fresh, mask)[0].to_dense())  # type: ignore[index, operator]
    shuffled, moved = starting_network(store, replace(LEVEL, control="shuffle"), digits)
    assert moved.counts == mask.counts and moved != mask
    drawn, other = starting_network(store, replace(LEVEL, control="random"), digits)
    assert other.num_kept == mask.num_kept and other.counts != mask.counts
    theta = _state_after(LEVEL.rewind_step, digits)
    for model, where in ((shuffled, moved), (drawn, other)):
        weight = densify(model).get_parameter("4.weight")
        assert torch.equal(weight[where["4.weight"]], theta["4.weight"][where["4.weight"]])
    reinit = prune_or_load(store, replace(LEVEL, control="reinit"), digits)
    assert [row["epoch"] for row in reinit.history] == [1, 2, 3]  # a new draw has no updates behind it


def test_a_killed_level_resumes_with_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    class Kill(Exception):
        pass

    level = replace(LEVEL, densities=(0.5, 0.2), held_out=50)
    whole = prune_or_load(RunStore(tmp_path / "whole"), level, digits)
    store, kills = RunStore(tmp_path / "cut"), 0
    seen: set[tuple[int, int]] = set()

    def stop(done: int, total: int) -> None:
        nonlocal kills
        if done == 2 and (kills, done) not in seen:
            seen.add((kills, done))
            kills += 1
            raise Kill

    result = None
    for _ in range(8):
        try:
            result = prune_or_load(store, level, digits, checkpoint_seconds=0, progress=stop if kills < 3 else None)
            break
        except Kill:
            continue
    assert kills == 3 and result is not None  # once in each of the three levels
    assert equal(whole.model, result.model) and whole.history == result.history and whole.mask == result.mask


def test_held_out_images_are_measured_every_epoch(digits: Dataset, store: RunStore) -> None:
    trained = prune_or_load(store, replace(LEVEL, held_out=50), digits)
    assert [sorted(row) for row in trained.history] == [
        ["epoch", "held_accuracy", "held_loss", "seed", "step", "train_accuracy", "train_loss"]
    ] * 2
    loss, accuracy = evaluate(trained.model, digits.train_x[200:250], digits.train_y[200:250])
    assert (trained.history[-1]["held_loss"], trained.history[-1]["held_accuracy"]) == (loss, accuracy)
    assert equal(trained.model, prune_or_load(store, LEVEL, digits).model)  # looking changes nothing


def test_a_late_start_is_the_rest_of_the_training(digits: Dataset) -> None:
    """Without momentum the optimizer's fresh start makes no difference: from update 6 on, the same bits."""
    recipe, data = replace(RECIPE, momentum=0.0), digits.subset(200)
    model = Small().build(digits, 0)
    states: list[dict[str, Tensor]] = []

    class Spy:
        def on_step(self, state: Any) -> None:
            states.append({name: value.clone() for name, value in state.model.state_dict().items()})

    whole = train(model, data, recipe, seed=0, callbacks=[Spy()])
    late = Small().build(digits, 0)
    late.load_state_dict(states[5])
    rest = train(late, data, recipe, seed=0, start_step=6)
    assert equal(model, late)
    assert rest.history[1:] == whole.history[2:] and rest.history[0]["epoch"] == 2
    assert 0 <= rest.history[0]["train_accuracy"] <= 1 and rest.history[0]["step"] == 8
    for bad in (-1, 13, 1.5, True):
        with pytest.raises(ValueError, match=r"start_step must be an int in 0\.\.12"):
            train(late, data, recipe, seed=0, start_step=bad)  # type: ignore[arg-type]


def test_damage_is_named(digits: Dataset, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    level = replace(LEVEL, densities=(0.5,), rewind_step=0)
    path = prune_or_load(store, level, digits).run.path / "mask.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RunStoreError, match=r"mask\.safetensors is not what done\.json vouches for"):
        prune_or_load(store, level, digits)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"densities": (0.5, 0.6)}, ValueError, "densities must fall within"),
        ({"densities": (0.0,)}, ValueError, "densities must fall within"),
        ({"densities": (1.2,)}, ValueError, "densities must fall within"),
        ({"densities": (), "control": "reinit"}, ValueError, "control must be 'ticket' for the dense network"),
        ({"control": "luck"}, ValueError, "control must be one of ticket, reinit, shuffle, random, got 'luck'"),
        ({"criterion": "luck"}, ValueError, "criterion must be one of global_magnitude"),
        ({"kernels": "luck"}, ValueError, "kernels must be one of auto"),
        ({"rewind_step": -1}, ValueError, "rewind_step must be an int of at least 0"),
        ({"held_out": 5, "samples": Samples("digits")}, ValueError, "num_train where images are held out"),
        ({"network": "cnn"}, TypeError, "network must be a frozen dataclass with build"),
    ],
)
def test_bad_levels_are_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        replace(LEVEL, **change)


def test_levels_that_the_data_cannot_give_are_refused(digits: Dataset, store: RunStore) -> None:
    with pytest.raises(ValueError, match="rewind_step must be below the recipe's 12 updates, got 12"):
        prune_or_load(store, replace(LEVEL, rewind_step=12), digits)
    with pytest.raises(ValueError, match="data must hold 100200 training images"):
        prune_or_load(store, replace(LEVEL, held_out=100_000), digits)


def test_pruned_weights_stay_nowhere_through_all_levels(digits: Dataset, store: RunStore) -> None:
    """Kept shares of the trained networks are those of the masks, level by level."""
    levels = [replace(LEVEL, densities=LEVEL.densities[:n]) for n in (1, 2, 3)]
    trained = [prune_or_load(store, level, digits) for level in levels]
    for one in trained:
        assert Mask.from_zeros(densify(one.model)) == one.mask  # a trained survivor is no zero
    assert all(after.mask.is_nested_in(before.mask) for before, after in pairwise(trained))
