# SPDX-License-Identifier: Apache-2.0
"""Interruption: exceptions, kill -9, damaged and foreign checkpoints, failed saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from curvlab.models import CNN
from curvlab.training import CheckpointFile, Recipe, generator, train_group
from tests.training import samples
from tests.training.samples import RECIPE, Watcher, dataset, distance, equal, networks

pytestmark = pytest.mark.usefixtures("one_thread")


class Stop(Exception):
    """Ends a run in the middle."""


def interrupted(epoch: int):
    class Interrupt:
        def on_epoch(self, state) -> None:
            if state.epoch == epoch:
                raise Stop

    return Interrupt()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_resume_ends_with_the_same_bits(tmp_path, kind):
    seeds = [0, 1, 2] if kind == "mlp" else [0, 1]
    data = dataset(dtype=torch.float32) if kind == "mlp" else dataset(80, torch.float32, (3, 8, 8))

    def make() -> list[nn.Module]:
        if kind == "mlp":
            return list(networks(dtype=torch.float32))
        cnns = [CNN(2, image_size=8, generator=generator(s, "init")) for s in seeds]
        return [nn.Sequential(nn.Dropout(0.2), cnn) for cnn in cnns]

    torch.manual_seed(1)
    whole = make()
    watchers = {seed: Watcher() for seed in seeds}
    result = train_group(whole, data, RECIPE, seeds=seeds, callbacks=lambda seed: [watchers[seed]])
    torch.manual_seed(1)
    path = tmp_path / "run" / "checkpoint.safetensors"
    cut = {seed: [Watcher(), interrupted(4)] for seed in seeds}
    with pytest.raises(Stop):
        train_group(
            make(),
            data,
            RECIPE,
            seeds=seeds,
            callbacks=lambda seed: cut[seed],
            checkpoint=CheckpointFile(path, every_seconds=0),
        )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    torch.manual_seed(99)  # the resumed process has another random state
    resumed = make()
    seen = {seed: [Watcher(), interrupted(99)] for seed in seeds}
    done: list[int] = []
    again = train_group(
        resumed, data, RECIPE, seeds=seeds, callbacks=lambda seed: seen[seed],
        checkpoint=CheckpointFile(path, every_seconds=0), progress=lambda epoch, total: done.append(epoch),
    )  # fmt: skip
    assert done == [3, 4, 5, 6]
    assert again.history == result.history
    for s, seed in enumerate(seeds):
        assert equal(whole[s], resumed[s])
        assert all(torch.equal(a, b) for a, b in zip(whole[s].buffers(), resumed[s].buffers(), strict=True))
        assert seen[seed][0].count == watchers[seed].count
        assert all(torch.equal(a, b) for a, b in zip(seen[seed][0].start, watchers[seed].start, strict=True))


SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
import torch
from training_samples import RECIPE, dataset, networks
from curvlab.training import CheckpointFile, train_group
torch.set_num_threads(1)
class Slow:
    def on_epoch(self, state):
        print(state.epoch, flush=True)
        time.sleep({pause})
models = networks(dtype=torch.float32)
train_group(models, dataset(dtype=torch.float32), RECIPE, seeds=[0, 1, 2], callbacks=lambda seed: [Slow()],
            checkpoint=CheckpointFile({checkpoint!r}, every_seconds=0))
torch.save([[p.detach() for p in m.parameters()] for m in models], {out!r})
"""


def test_a_killed_process_resumes_with_the_same_bits(tmp_path):
    """kill -9 while it trains; a fresh process goes on from the checkpoint and ends as one that was never killed."""
    (tmp_path / "training_samples.py").write_text(Path(samples.__file__).read_text())

    def start(name: str, out: str, pause: float) -> subprocess.Popen[str]:
        paths = [str(tmp_path), os.getcwd()]
        code = SCRIPT.format(path=paths, pause=pause, checkpoint=str(tmp_path / name), out=str(tmp_path / out))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    killed = start("a", "unused", 0.05)
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 3:
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "unused").exists() and (tmp_path / "a").exists()
    resumed, whole = start("a", "resumed", 0), start("b", "whole", 0)
    first = resumed.communicate(timeout=120)[0].split()
    whole.communicate(timeout=120)
    assert int(first[0]) in (3, 4)  # finished epochs are not repeated
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("resumed", "whole"))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    data, path = dataset(), tmp_path / "c"
    train_group(networks(), data, Recipe(2, 64, 0.1), seeds=[0, 1, 2], checkpoint=CheckpointFile(path, every_seconds=0))
    for recipe, seeds in ((Recipe(2, 64, 0.2), [0, 1, 2]), (Recipe(2, 64, 0.1), [0, 1, 3])):
        models = networks()
        with pytest.raises(ValueError, match=r"is of another run: (recipe|seeds) must be"):
            train_group(models, data, recipe, seeds=seeds, checkpoint=CheckpointFile(path))
    finished = networks()
    result = train_group(finished, data, Recipe(2, 64, 0.1), seeds=[0, 1, 2], checkpoint=CheckpointFile(path))
    assert len(result.history) == 6 and distance(finished[0], networks()[0]) > 0  # a finished run is not repeated


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "c"
    file = CheckpointFile(path)
    assert file.load() is None
    file.save({"a": torch.arange(5.0)[::2], "b": torch.zeros((), dtype=torch.bool)}, {"epoch": 3})
    tensors, header = file.load() or ({}, {})
    assert tensors["a"].tolist() == [0, 2, 4] and header == {"epoch": 3}
    for content in (path.read_bytes()[:-3], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a checkpoint written by curvlab"):
            file.load()
    file.remove()
    file.remove()
    assert not path.exists()


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    file = CheckpointFile(tmp_path / "c")
    file.save({"a": torch.ones(1)}, {})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.save({"a": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert (file.load() or ({}, {}))[0]["a"].item() == 1
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        CheckpointFile(tmp_path / "file" / "c").save({"a": torch.zeros(1)}, {})


def test_shared_storage_is_saved_apart(tmp_path):
    whole = torch.arange(10.0)
    file = CheckpointFile(tmp_path / "c")
    file.save({"whole": whole, "part": whole[2:4], "again": whole}, {})
    tensors, _ = file.load() or ({}, {})
    assert tensors["part"].tolist() == [2, 3] and torch.equal(tensors["again"], whole)


def test_due_waits(tmp_path):
    assert CheckpointFile(tmp_path / "c", every_seconds=0).due()
    slow = CheckpointFile(tmp_path / "c", every_seconds=0.05)
    assert not slow.due()
    time.sleep(0.06)
    assert slow.due()
    slow.save({}, {})
    assert not slow.due()
    with pytest.raises(ValueError, match="0 or more, got -1"):
        CheckpointFile(tmp_path / "c", every_seconds=-1)
