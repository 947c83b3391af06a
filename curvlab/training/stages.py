# SPDX-License-Identifier: Apache-2.0
"""Training as stages: a network that one study trained is found by another through its name.

A :class:`TrainStage` holds everything that decides the trained weights: network, samples, recipe and seed.  Its folder
``root/stages/<slug>-<hash>/`` is a run of the store (the hash covers the stage, the bytes of the data and
:data:`PROTOCOL`), with ``weights.safetensors`` beside the rows.  :func:`train_or_load` trains once and loads from then
on; killed in between, it goes on from its checkpoint with the same bits.

Convolutional networks are trained channels-last: library convolutions take 0.6 of the time there on a CPU (CNN(8) with
batch normalization, batch 128, one thread: 44 ms a step instead of 72), and the weights are the same to rounding.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.data import Dataset
from curvlab.models import CNN, MLP
from curvlab.runs.store import Run, RunStore, RunStoreError
from curvlab.training.callbacks import TrainState
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.grouped import train_group
from curvlab.training.loop import train
from curvlab.training.recipe import Recipe
from curvlab.training.seeding import generator

__all__ = ["PROTOCOL", "Network", "Samples", "TrainStage", "Trained", "open_stage", "train_or_load"]

PROTOCOL = 1  # raising it retires every stored stage: for a change of the training code that changes weights
STAGES = "stages"  # the folder in the store


@dataclass(frozen=True)
class Network:
    """Which network; input and output sizes come from the data.

    Raises:
        ValueError: an unknown kind, or a size below one.
    """

    kind: Literal["cnn", "mlp"]
    size: int
    """Channels of the CNN's first block, or hidden width of the MLP."""
    batch_norm: bool = True
    """CNN: normalize after each convolution.  An MLP has none: leave the default."""
    hidden_layers: int = 3
    """MLP only."""

    def __post_init__(self) -> None:
        if self.kind not in ("cnn", "mlp"):
            raise ValueError(f"Network: kind must be 'cnn' or 'mlp', got {self.kind!r}")
        for name in ("size", "hidden_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Network: {name} must be an int of at least 1, got {value!r}")

    def build(self, data: Dataset, seed: int) -> nn.Module:
        """θ_0 of ``seed`` (stream "init") for ``data``, on its device: drawn again, bit for bit, wherever needed."""
        drawn = generator(seed, "init")
        shape = tuple(data.train_x.shape[1:])
        model: nn.Module
        if self.kind == "cnn":
            if len(shape) != 3 or shape[1] != shape[2]:
                raise ValueError(
                    f"Network: data must be square images [N, C, S, S] for a CNN, got {[len(data.train_x), *shape]}"
                )
            model = CNN(
                self.size, batch_norm=self.batch_norm, num_classes=data.num_classes, in_channels=shape[0],
                image_size=shape[1], generator=drawn,
            )  # fmt: skip
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            model = MLP(
                self.size, in_features=data.train_x[0].numel(), num_classes=data.num_classes,
                hidden_layers=self.hidden_layers, generator=drawn,
            )  # fmt: skip
        return model.to(device=data.train_x.device, dtype=data.train_x.dtype)


@dataclass(frozen=True)
class Samples:
    """Which training samples.

    Raises:
        ValueError: num_train below one, label_noise outside [0, 1].
    """

    dataset: str
    num_train: int | None = None
    """The first that many, in the order of the file; None: all."""
    label_noise: float = 0.0
    """Share of the training labels (each drawn with this probability) replaced by another class, uniformly."""
    noise_seed: int = 0
    """Names the draw of the noise (stream "label noise")."""

    def __post_init__(self) -> None:
        if self.num_train is not None and (not isinstance(self.num_train, int) or self.num_train < 1):
            raise ValueError(f"Samples: num_train must be an int of at least 1 or None, got {self.num_train!r}")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"Samples: label_noise must be within [0, 1], got {self.label_noise!r}")

    def take(self, data: Dataset) -> Dataset:
        """These samples of ``data`` (the whole data set, or the subset itself).

        Raises:
            ValueError: ``data`` is another data set, or holds too few training samples.
        """
        if data.name != self.dataset:
            raise ValueError(f"Samples.take: data must be {self.dataset}, got {data.name}")
        taken = data if self.num_train is None else data.subset(self.num_train)
        if self.label_noise == 0:
            return taken
        drawn, count = generator(self.noise_seed, "label noise"), len(taken.train_y)
        hit = torch.rand(count, generator=drawn) < self.label_noise
        shift = torch.randint(1, taken.num_classes, (count,), generator=drawn)  # never 0: a noisy label is a wrong one
        moved = (hit * shift).to(taken.train_y.device)
        return replace(
            taken,
            train_y=(taken.train_y + moved) % taken.num_classes,
            fingerprint=hashlib.sha256(
                f"{taken.fingerprint}~{self.label_noise}~{self.noise_seed}".encode()
            ).hexdigest()[:16],
        )


@dataclass(frozen=True)
class TrainStage:
    """One training run: what its stored weights are a function of.

    Attributes:
        network: the model.
        samples: the training data.
        recipe: epochs, batch size, optimizer.
        seed: streams "init" and "order".
        loss_mark: the weights after the first epoch whose running training loss is at most this are kept as well
            (networks compared at equal loss); 0: none.
    """

    network: Network
    samples: Samples
    recipe: Recipe
    seed: int
    loss_mark: float = 0.01

    def __str__(self) -> str:
        net = f"{self.network.kind.upper()}({self.network.size})"
        return f"{net}, batch {self.recipe.batch_size}, lr {self.recipe.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Trained:
    """A trained network and how it came to be.

    Attributes:
        model: at the last epoch, in eval mode, on the data's device.
        history: rows ``{seed, epoch, step, train_loss, train_accuracy}`` (see :class:`TrainResult`).
        diverged: an epoch's loss was not finite; the weights are those of that epoch.
        seconds: training time over all sessions, the smaller of wall and processor time: on a machine that others use
            too, the processor's is what one thread took.
        loaded: nothing was trained now.
        run: the stage's folder.
        mark_epoch: epoch of the weights kept at ``loss_mark``, None where the loss never came down to it.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    diverged: bool
    seconds: float
    loaded: bool
    run: Run
    mark_epoch: int | None

    def at_mark(self) -> nn.Module | None:
        """A copy of the network as it was at ``mark_epoch``; None where there is none."""
        if self.mark_epoch is None:
            return None
        model = copy.deepcopy(self.model)
        load_weights(model, self.run.path / "mark.safetensors", self.run.summary["mark_sha256"])
        return model


def open_stage(store: RunStore, stage: TrainStage, data: Dataset) -> Run:
    """The stage's folder in ``store`` (made if it is not there); ``.name``, ``.finished``.

    Raises:
        ValueError: ``data`` is not what the stage asks for.
        RunStoreError: see :meth:`RunStore.open`.
    """
    taken = stage.samples.take(data)
    return store.open(STAGES, stage, context={"data": taken.fingerprint, "protocol": str(PROTOCOL)})


def train_or_load(
    store: RunStore,
    stage: TrainStage,
    data: Dataset,
    *,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Trained:
    """The stage's network: loaded if ``store`` has it, else trained (resuming a checkpoint) and stored.

    Args:
        store: where stages are kept; studies that share it share the networks.
        stage: what to train.
        data: the whole data set (its samples are taken here), on the device to train on.
        checkpoint_seconds: an epoch end after this time saves the state.
        progress: called as ``progress(epochs_done, epochs)``.
        environment: facts to store beside the result, not part of the name.

    Raises:
        ValueError: ``data`` is not what the stage asks for.
        RunStoreError: the folder is unusable, its files were damaged, or another process trains this stage.
    """
    run = open_stage(store, stage, data)
    taken = stage.samples.take(data)
    if not run.finished:
        with run.lock():
            if not run.finished:
                _train(run, stage, taken, checkpoint_seconds, progress, environment)
                return _load(run, stage, taken, loaded=False)
    return _load(run, stage, taken, loaded=True)


def _train(
    run: Run,
    stage: TrainStage,
    data: Dataset,
    checkpoint_seconds: float,
    progress: Callable[[int, int], None] | None,
    environment: Mapping[str, Any] | None,
) -> None:
    model = stage.network.build(data, stage.seed)
    marker = _Marker(stage.loss_mark, run.path / "mark.safetensors")
    checkpoint = CheckpointFile(run.checkpoint_path, every_seconds=checkpoint_seconds)
    options: Any = {"callbacks": [marker], "checkpoint": checkpoint, "progress": progress}
    if stage.network.kind == "mlp":  # hand-written steps: width 1024 takes half the time of autograd and an optimizer
        group = train_group([model], data, stage.recipe, seeds=[stage.seed], **options)
        history, diverged = group.history, group.diverged[0]
    else:
        result = train(model, data, stage.recipe, seed=stage.seed, **options)
        history, diverged = result.history, result.diverged
    path = run.path / "weights.safetensors"
    CheckpointFile(path).save(model.state_dict(), {"stage": run.name})
    run.append(history_rows(history))
    summary = {"diverged": diverged, "weights_sha256": digest_of(path), "mark_epoch": marker.epoch}
    if marker.epoch is not None:
        summary["mark_sha256"] = digest_of(marker.path)
    run.finish(summary, environment=environment)


class _Marker:
    """Callback: keeps the weights of the first epoch whose running training loss is at most ``loss``."""

    def __init__(self, loss: float, path: Path) -> None:
        self.loss, self.path = loss, path
        self.epoch: int | None = None

    def on_epoch(self, state: TrainState) -> None:
        if self.epoch is None and not state.diverged and state.history[-1]["train_loss"] <= self.loss:
            self.epoch = state.epoch
            # A run resumed from before this epoch comes here again, with the same bits.
            CheckpointFile(self.path).save(state.model.state_dict(), {"epoch": state.epoch})

    def state_dict(self) -> dict[str, int | None]:
        return {"epoch": self.epoch}

    def load_state_dict(self, saved: Mapping[str, int | None]) -> None:
        self.epoch = saved["epoch"]


def _load(run: Run, stage: TrainStage, data: Dataset, *, loaded: bool) -> Trained:
    done = run.done
    model = stage.network.build(data, stage.seed)
    load_weights(model, run.path / "weights.safetensors", done["summary"]["weights_sha256"])
    return Trained(
        model,
        history_of(run, stage.seed),
        done["summary"]["diverged"],
        min(done["wall_seconds"], done["cpu_seconds"]),
        loaded,
        run,
        done["summary"]["mark_epoch"],
    )


def history_rows(history: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a training run as a store keeps them: one metric each."""
    for row in history:
        for metric in [name for name in row if name not in ("seed", "epoch", "step")]:
            yield {"epoch": row["epoch"], "step": row["step"], "metric": metric, "value": row[metric]}


def history_of(run: Run, seed: int) -> list[dict[str, Any]]:
    """What :func:`history_rows` was given, from the store."""
    lines: dict[int, dict[str, Any]] = {}
    for row in run.rows():
        line = lines.setdefault(row["epoch"], {"seed": seed, "epoch": row["epoch"], "step": row["step"]})
        line[row["metric"]] = row["value"]
    return list(lines.values())


def load_weights(model: nn.Module, path: Path, sha256: str) -> None:
    """Give ``model`` the state in ``path`` and leave it in eval mode.

    Raises:
        RunStoreError: the file cannot be read, or is not the one with this digest.
    """
    digest_of(path, sha256)
    loaded = CheckpointFile(path).load()
    assert loaded is not None  # its digest was just read
    weights: dict[str, Tensor] = loaded[0]
    model.load_state_dict(weights)  # copies into the model's own memory format
    model.eval()


def digest_of(path: Path, expected: str | None = None) -> str:
    """Sha256 of a file's bytes.

    Raises:
        RunStoreError: a digest is expected, and the file cannot be read or has another.
    """
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunStoreError(
            f"train_or_load: {path} cannot be read ({error}); move its folder away and run again"
        ) from error
    if expected is not None and found != expected:
        raise RunStoreError(
            f"train_or_load: {path} is not what done.json vouches for (sha256 {expected[:12]}, now {found[:12]}): "
            "it was edited or damaged; move its folder away and run again"
        )
    return found
