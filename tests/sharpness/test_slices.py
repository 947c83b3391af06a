# SPDX-License-Identifier: Apache-2.0
"""Slices against single evaluations; tiles that survive interruption; barriers of networks that share or differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvlab.operators.problem import Problem
from curvlab.sharpness import slices
from curvlab.sharpness.directions import random_directions
from curvlab.sharpness.evaluation import LossEvaluator
from curvlab.sharpness.slices import LossSlice, linear_barrier, loss_slice
from tests.sharpness.nets import draw, images, network, outputs_at, plain_loss, problem, row_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_plane_holds_the_losses_of_its_points() -> None:
    model, here = network(), problem()
    directions = random_directions(here, 2, generator=draw(3))
    plane = loss_slice(here, directions, extent=(-1.0, 0.5), num_points=(4, 3))
    assert plane.losses.shape == (4, 3) and [len(axis) for axis in plane.coordinates] == [4, 3]
    assert plane.accuracies is not None
    for i, a in enumerate(plane.coordinates[0]):
        for j, b in enumerate(plane.coordinates[1]):
            row = row_of(model) + a * directions[0] + b * directions[1]
            assert plane.losses[i, j] == pytest.approx(plain_loss(model, row).item(), rel=1e-11)
            share = (outputs_at(model, row, images()[0]).argmax(1) == images()[1]).double().mean().item()
            assert plane.accuracies[i, j] == pytest.approx(share)
    expected = torch.cosine_similarity(directions[0], directions[1], dim=0).item()
    assert plane.cosine == pytest.approx(expected)


def test_the_middle_of_the_grid_is_the_network_itself() -> None:
    model, here = network(), problem()
    line = loss_slice(here, 1, extent=0.7, num_points=21, generator=draw())
    assert line.coordinates[0][10] == 0.0 and line.coordinates[0][[0, -1]].tolist() == [-0.7, 0.7]
    assert line.losses[10] == pytest.approx(plain_loss(model, row_of(model)).item(), rel=1e-12)
    assert np.isnan(line.cosine)


class Interrupted(Exception):
    pass


def test_an_interrupted_plane_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = problem()
    whole = loss_slice(here, 2, num_points=7, tile_points=10, generator=draw(1))
    calls = []

    def counted(self: LossEvaluator, rows: torch.Tensor, *, limit: int = 2) -> object:
        calls.append(len(rows))
        if len(calls) > limit:
            raise Interrupted
        return original(self, rows)

    original = LossEvaluator.__call__
    monkeypatch.setattr(LossEvaluator, "__call__", counted)
    with pytest.raises(Interrupted):
        loss_slice(here, 2, num_points=7, folder=tmp_path, tile_points=10, generator=draw(1))
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["tile_00000.npz", "tile_00001.npz"]
    monkeypatch.setattr(LossEvaluator, "__call__", original)
    (tmp_path / "tile_00001.npz").write_bytes(b"PK\x03\x04 torn")  # as a full disk may leave it
    before = (tmp_path / "tile_00000.npz").stat().st_mtime_ns
    resumed = loss_slice(here, 2, num_points=7, folder=tmp_path, tile_points=10, generator=draw(1))
    assert (tmp_path / "tile_00000.npz").stat().st_mtime_ns == before
    assert np.array_equal(resumed.losses, whole.losses)
    assert not list(tmp_path.glob(".*"))  # no scratch files stay

    def never(self: LossEvaluator, rows: torch.Tensor) -> object:
        raise Interrupted

    monkeypatch.setattr(LossEvaluator, "__call__", never)
    again = loss_slice(here, 2, num_points=7, folder=tmp_path, tile_points=10, generator=draw(1))
    assert np.array_equal(again.losses, whole.losses)
    assert again.accuracies is not None and whole.accuracies is not None
    assert np.array_equal(again.accuracies, whole.accuracies)


def test_a_loss_that_is_a_function_is_known_again_by_its_code(tmp_path: Path) -> None:
    """The next process has it at another address."""
    x, y = images()

    def of(power: int, folder: Path) -> LossSlice:
        source = f"lambda outputs, targets: outputs.logsumexp(1).sub(outputs[:, 0]).pow({power}).mean()"
        here = Problem(network(), eval(source), (x, y))
        return loss_slice(here, 1, num_points=3, folder=folder, generator=draw(1))

    first = of(2, tmp_path)
    (tmp_path / "tile_00000.npz").rename(tmp_path / "kept.npz")
    np.savez(tmp_path / "tile_00000.npz", losses=np.arange(3.0), accuracies=np.full(3, np.nan))
    assert of(2, tmp_path).losses.tolist() == [0.0, 1.0, 2.0] != first.losses.tolist()  # read, not computed
    with pytest.raises(ValueError, match="TileFolder: folder must be empty or hold this evaluation"):
        of(3, tmp_path)


def test_a_folder_of_another_slice_is_refused(tmp_path: Path) -> None:
    loss_slice(problem(), 1, num_points=5, folder=tmp_path, generator=draw(1))
    others = {
        "network": lambda: loss_slice(problem(steps=3), 1, num_points=5, folder=tmp_path, generator=draw(1)),
        "directions": lambda: loss_slice(problem(), 1, num_points=5, folder=tmp_path, generator=draw(2)),
        "grid": lambda: loss_slice(problem(), 1, num_points=7, folder=tmp_path, generator=draw(1)),
        "data": lambda: loss_slice(problem().subset(9), 1, num_points=5, folder=tmp_path, generator=draw(1)),
    }
    for other in others.values():
        with pytest.raises(ValueError, match=r"TileFolder: folder must be empty or hold this evaluation"):
            other()
    assert json.loads((tmp_path / "grid.json").read_text())["points"] == 5


def test_slices_are_saved_and_loaded(tmp_path: Path) -> None:
    plane = loss_slice(problem(), 2, num_points=3, generator=draw())
    again = LossSlice.load(plane.save(tmp_path / "plane.npz"))
    assert np.array_equal(again.losses, plane.losses) and again.cosine == plane.cosine
    assert again.accuracies is not None and plane.accuracies is not None
    assert np.array_equal(again.accuracies, plane.accuracies)
    bare = LossSlice((np.array([0.0, 1.0]),), np.array([1.0, 2.0]), None)
    assert LossSlice.load(bare.save(tmp_path / "line.npz")).accuracies is None


def test_barrier_of_a_line() -> None:
    axis = np.linspace(0.0, 1.0, 5)
    line = LossSlice((axis,), np.array([1.0, 3.0, 2.0, 1.0, 3.0]), np.array([1.0, 0.5, 0.7, 0.8, 0.6]))
    assert line.barrier == 3.0 - 1.5
    assert line.accuracy_barrier == pytest.approx(0.9 - 0.5)
    assert LossSlice((axis,), np.array([1.0, 0.5, 0.2, 0.5, 1.0]), None).barrier == 0.0
    assert LossSlice((axis,), np.array([1.0, np.nan, 0.2, 0.5, 1.0]), None).barrier == np.inf
    with pytest.raises(ValueError, match=r"needs a line, got 2 directions"):
        _ = LossSlice((axis, axis), np.zeros((5, 5)), None).barrier


@pytest.mark.parametrize("mode", ["eval", "batch", "frozen"])
def test_linear_barrier_between_two_networks(mode: str) -> None:
    first, second = network(0), network(1)
    a, b = (Problem(m, nn.CrossEntropyLoss(), images(), batch_norm=mode) for m in (first, second))  # type: ignore[arg-type]
    line = linear_barrier(a, b, num_points=5)
    middle = network(0)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), second.parameters(), strict=True):
            p.copy_(0.5 * (p + q))
        for p, q in zip(middle.buffers(), second.buffers(), strict=True):
            p.copy_((0.5 * (p + q)).to(p))
    for place, model in ((0, first), (2, middle), (4, second)):
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        if mode != "eval":
            norm.train()
            norm.track_running_stats = False
        assert line.losses[place] == pytest.approx(plain_loss(model, row_of(model)).item(), rel=1e-10)
    assert line.barrier > 0 and line.coordinates[0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_linear_barrier_without_moving_buffers_is_one_evaluation() -> None:
    a, b = (problem(seed, batch_norm=False) for seed in (0, 1))
    line, tight = linear_barrier(a, b), linear_barrier(a, b, memory_budget=1)
    assert np.allclose(line.losses, tight.losses, rtol=1e-12)
    assert line.accuracies is not None and len(line.accuracies) == 25
    assert linear_barrier(a, a, num_points=3).barrier < 1e-12


def test_refusals() -> None:
    here = problem()
    with pytest.raises(ValueError, match=r"loss_slice: directions must be 1 or 2 in number, got 3"):
        loss_slice(here, 3)
    with pytest.raises(ValueError, match=r"loss_slice: directions must be 1 or 2 in number, got 3"):
        loss_slice(here, torch.zeros(3, here.num_params))
    with pytest.raises(ValueError, match=r"loss_slice: extent must be positive"):
        loss_slice(here, 1, extent=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"loss_slice: num_points must be 2 or more"):
        loss_slice(here, 1, num_points=1)
    with pytest.raises(ValueError, match=r"loss_slice: tile_points"):
        loss_slice(here, 1, tile_points=0)
    with pytest.raises(ValueError, match=r"linear_barrier: num_points"):
        linear_barrier(here, here, num_points=1)
    with pytest.raises(ValueError, match=r"linear_barrier: second must have the params of first"):
        linear_barrier(here, problem(batch_norm=False))
    half = [Problem(network(seed), nn.CrossEntropyLoss(), images(), params="0.*") for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"linear_barrier: second must share the parameters that stay fixed"):
        linear_barrier(*half)
    assert slices.LossSlice is LossSlice
