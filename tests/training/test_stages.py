# SPDX-License-Identifier: Apache-2.0
"""Stages: trained once, found by name, resumed with the same bits, refused when damaged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curvlab.data import Dataset, load
from curvlab.runs.store import RunStore, RunStoreError
from curvlab.training import Recipe, stages, train
from curvlab.training.stages import Network, Samples, TrainStage, open_stage, train_or_load
from tests.training.samples import equal

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE = TrainStage(Network("cnn", 2), Samples("digits", 192), Recipe(3, 64, 0.05), seed=1)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_a_stage_is_trained_once_and_then_loaded(digits: Dataset, tmp_path: Path) -> None:
    first = train_or_load(RunStore(tmp_path), STAGE, digits)
    again = train_or_load(RunStore(tmp_path), STAGE, digits)
    assert not first.loaded and again.loaded
    assert first.history == again.history and [row["epoch"] for row in again.history] == [1, 2, 3]
    assert set(again.history[0]) == {"seed", "epoch", "step", "train_loss", "train_accuracy"}
    assert equal(first.model, again.model) and not again.model.training
    assert all(torch.equal(a, b) for a, b in zip(first.model.buffers(), again.model.buffers(), strict=True))
    by_hand = STAGE.network.build(digits, 1)
    result = train(by_hand, digits.subset(192), STAGE.recipe, seed=1)
    assert equal(by_hand, again.model) and result.history == again.history
    assert again.history[-1]["train_loss"] < again.history[0]["train_loss"]
    assert first.run.path.parent == tmp_path / "stages" and not first.run.checkpoint_path.exists()


def test_the_name_is_a_function_of_everything_that_decides_the_weights(digits: Dataset, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    changes: list[dict] = [
        {},
        {"seed": 2},
        {"network": Network("cnn", 3)},
        {"network": Network("cnn", 2, batch_norm=False)},
        {"samples": Samples("digits", 100)},
        {"samples": Samples("digits", 192, label_noise=0.1)},
        {"recipe": Recipe(3, 32, 0.05)},
        {"recipe": Recipe(3, 64, 0.05, optimizer="sam")},
        {"loss_mark": 0.1},
    ]
    names = [open_stage(store, replace(STAGE, **change), digits).name for change in changes]
    assert len(set(names)) == len(names)
    assert open_stage(store, STAGE, digits.subset(192)).name == names[0]  # the subset is the same data
    touched = replace(digits, fingerprint="0" * 16)
    assert open_stage(store, STAGE, touched).name != names[0]


def test_an_interrupted_stage_resumes_with_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    stage = replace(STAGE, loss_mark=2.0)  # crossed at an epoch's end: the mark must survive the interruption as well
    whole = train_or_load(RunStore(tmp_path / "whole"), stage, digits)
    assert whole.mark_epoch is not None

    class Cut(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Cut

    store = RunStore(tmp_path / "cut")
    with pytest.raises(Cut):
        train_or_load(store, stage, digits, checkpoint_seconds=0, progress=stop)
    run = open_stage(store, stage, digits)
    assert run.checkpoint_path.exists() and not run.finished
    resumed = train_or_load(store, stage, digits, checkpoint_seconds=0)
    assert equal(whole.model, resumed.model) and whole.history == resumed.history
    assert whole.mark_epoch == resumed.mark_epoch
    one, two = whole.at_mark(), resumed.at_mark()
    assert one is not None and two is not None and equal(one, two)


def test_the_mark_holds_the_weights_of_the_first_epoch_below_it(digits: Dataset, tmp_path: Path) -> None:
    full = train_or_load(RunStore(tmp_path), replace(STAGE, loss_mark=0), digits)
    assert full.mark_epoch is None and full.at_mark() is None
    losses = [row["train_loss"] for row in full.history]
    marked = train_or_load(RunStore(tmp_path), replace(STAGE, loss_mark=losses[1]), digits)
    assert marked.mark_epoch == 2 and equal(marked.model, full.model)
    kept = marked.at_mark()
    assert kept is not None and not equal(kept, full.model)

    states = {}

    class Spy:
        def on_epoch(self, state) -> None:
            states[state.epoch] = [param.detach().clone() for param in state.params]

    train(STAGE.network.build(digits, 1), digits.subset(192), STAGE.recipe, seed=1, callbacks=[Spy()])
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), states[2], strict=True))


def test_damaged_and_missing_weights_are_named(digits: Dataset, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    path = train_or_load(store, STAGE, digits).run.path / "weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(RunStoreError, match=r"weights\.safetensors is not what"):
        train_or_load(store, STAGE, digits)
    path.unlink()
    with pytest.raises(RunStoreError, match=r"weights\.safetensors cannot be read"):
        train_or_load(store, STAGE, digits)
    shutil.rmtree(path.parent)
    assert not train_or_load(store, STAGE, digits).loaded


def test_label_noise_replaces_that_share_by_other_classes(digits: Dataset) -> None:
    noisy = Samples("digits", 1000, label_noise=0.2).take(digits)
    clean = digits.subset(1000)
    wrong = noisy.train_y != clean.train_y
    # binomial, n = 1000, p = 0.2: standard deviation 12.6
    assert abs(int(wrong.sum()) - 200) < 5 * 12.6
    assert set(noisy.train_y.tolist()) == set(range(10)) and noisy.fingerprint != clean.fingerprint
    again, other = (Samples("digits", 1000, label_noise=0.2, noise_seed=s).take(digits) for s in (0, 1))
    assert torch.equal(noisy.train_y, again.train_y) and not torch.equal(noisy.train_y, other.train_y)
    everything = Samples("digits", 1000, label_noise=1.0).take(digits)
    assert bool((everything.train_y != clean.train_y).all())


def test_a_cnn_is_channels_last_and_an_mlp_is_drawn_as_ever(digits: Dataset) -> None:
    cnn = Network("cnn", 4).build(digits, 0)
    weight = next(p for p in cnn.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert equal(Network("mlp", 8).build(digits, 0), Network("mlp", 8).build(digits, 0))
    assert not equal(Network("mlp", 8).build(digits, 0), Network("mlp", 8).build(digits, 1))


def test_bad_input_is_refused(digits: Dataset, tmp_path: Path) -> None:
    for call, match in (
        (lambda: Network("rnn", 2), "Network: kind must be"),  # type: ignore[arg-type]
        (lambda: Network("cnn", 0), "Network: size must be"),
        (lambda: Samples("digits", 0), "Samples: num_train must be"),
        (lambda: Samples("digits", label_noise=1.5), "Samples: label_noise must be"),
        (lambda: Samples("mnist").take(digits), "data must be mnist, got digits"),
        (lambda: Samples("digits", 5000).take(digits), r"in 1..1438"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    flat = replace(digits, train_x=digits.train_x.flatten(1))
    with pytest.raises(ValueError, match="square images"):
        Network("cnn", 2).build(flat, 0)
    assert stages.PROTOCOL >= 1
