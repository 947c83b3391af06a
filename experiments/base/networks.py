# SPDX-License-Identifier: Apache-2.0
"""Trained networks as rows: losses, accuracies, norms, and which test images a network gets right (one bit each).

``settings.py`` reads them.
"""

from __future__ import annotations

import base64
import copy
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.data import Dataset
from curvlab.runs.store import Run, RunStore
from curvlab.training.loop import evaluate, train
from curvlab.training.stages import Trained, TrainStage, train_or_load
from experiments.base.study import Tools

RADIAL_IMAGES = 500  # the first that many training images

# ------------------------------------------------------------------------------------------------ training and rows


def run_stage(stage: TrainStage, run: Run, tools: Tools) -> dict[str, Any]:
    """Train (or find) the stage's network in the store of ``run``, append its rows, return facts for the summary."""
    whole = tools.dataset(stage.samples.dataset)
    trained = train_or_load(
        RunStore(run.path.parents[1]),
        stage,
        whole,
        checkpoint_seconds=tools.checkpoint_seconds,
        progress=lambda done, epochs: tools.progress(done, epochs + 1),  # the measurement counts as one epoch
        environment=tools.environment(),
    )
    rows = [
        {"epoch": line["epoch"], "step": line["step"], "metric": metric, "value": line[metric]}
        for line in trained.history
        for metric in ("train_loss", "train_accuracy")
    ]
    rows += final_rows(trained, stage, stage.samples.take(whole))
    run.append([{"seed": stage.seed} | row for row in rows])
    return {"stage": trained.run.name, "loaded": trained.loaded, "diverged": int(trained.diverged)}


def final_rows(trained: Trained, stage: TrainStage, data: Dataset) -> list[dict[str, Any]]:
    """What is measured at the end; of a diverged network only that it diverged."""
    final: dict[str, float] = {
        "diverged": float(trained.diverged),
        "updates": float(trained.history[-1]["step"]),
        "train_seconds": trained.seconds,
    }
    rows: list[dict[str, Any]] = []
    if not trained.diverged:
        began = time.perf_counter(), time.process_time()
        model, start = trained.model, stage.network.build(data, stage.seed)
        final |= _losses(model, data) | _norms(model, start)
        if stage.network.kind == "cnn" and stage.network.batch_norm:
            final["radial_cosine"] = radial_cosine(model, data)
        if trained.mark_epoch is not None:
            final["mark_epoch"] = float(trained.mark_epoch)
        hits = correct(model, data.test_x, data.test_y)
        rows.append({"metric": "test_hits", "value": int(hits.sum()), "images": len(hits), "bits": encode_hits(hits)})
        rows += [
            {"metric": "weight_norm", "value": param.detach().double().norm().item(), "layer": name}
            for name, param in model.named_parameters()
            if param.dim() > 1
        ]
        # As training's: of wall and processor time the smaller, since others may be using the machine.
        final["measure_seconds"] = min(time.perf_counter() - began[0], time.process_time() - began[1])
    rows += [{"metric": metric, "value": value} for metric, value in final.items()]
    return [{"epoch": stage.recipe.epochs} | row for row in rows]


def _losses(model: nn.Module, data: Dataset) -> dict[str, float]:
    fit_loss, fit_accuracy = evaluate(model, data.train_x, data.train_y)
    test_loss, test_accuracy = evaluate(model, data.test_x, data.test_y)
    names = ("fit_loss", "fit_accuracy", "test_loss", "test_accuracy")
    return dict(zip(names, (fit_loss, fit_accuracy, test_loss, test_accuracy), strict=True))


def _norms(model: nn.Module, start: nn.Module) -> dict[str, float]:
    """‖θ‖, ‖θ_T − θ_0‖, and the norm of the convolutions' weights (before batch normalization: free in scale)."""
    with torch.no_grad():
        pairs = [(a.double(), b.double()) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
        squares = [
            sum(float(a.square().sum()) for a, _ in pairs),
            sum(float((a - b).square().sum()) for a, b in pairs),
            sum(float(a.square().sum()) for a, _ in pairs if a.dim() == 4),
        ]
    return dict(zip(("norm", "distance", "conv_norm"), map(math.sqrt, squares), strict=True))


def radial_cosine(model: nn.Module, data: Dataset) -> float:
    """Largest |⟨w, ∇_w L⟩| / (‖w‖ ‖∇_w L‖) over the convolutions, batch statistics of the first 500 images, float64.

    The output does not depend on the scale of a weight that batch normalization follows, so the gradient has no part
    along it (Euler; up to the epsilon within the normalization): each such weight can only grow in plain SGD.
    """
    twin = copy.deepcopy(model).double().train()
    x, y = data.train_x[:RADIAL_IMAGES].double(), data.train_y[:RADIAL_IMAGES]
    weights = [param for param in twin.parameters() if param.dim() == 4]
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
    cosines = [
        float((w.detach() * g).sum() / (w.detach().norm() * g.norm())) for w, g in zip(weights, grads, strict=True)
    ]
    return max(map(abs, cosines))


def forecast_stage(stage: TrainStage, tools: Tools) -> float:
    """Seconds that training will take: the best of two timings of up to three steps, scaled up."""
    whole = tools.dataset(stage.samples.dataset)
    data, recipe = stage.samples.take(whole), stage.recipe
    few = data.subset(min(len(data.train_x), 3 * recipe.batch_size))
    once = replace(recipe, epochs=1)
    spent = min(train(stage.network.build(data, 0), few, once, seed=0).seconds for _ in range(2))
    return spent / once.steps_per_epoch(len(few.train_x)) * recipe.epochs * recipe.steps_per_epoch(len(data.train_x))


# ------------------------------------------------------------------------------------------------ images as bits


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 2048) -> Tensor:
    """Which samples the model (in eval mode already) gets right, bool ``[N]``."""
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([model(images).argmax(1) == labels for images, labels in parts])


def encode_hits(hits: Tensor) -> str:
    """Booleans as base64 text, eight a byte, first sample in the highest bit."""
    return base64.b64encode(np.packbits(hits.cpu().numpy()).tobytes()).decode()


def decode_hits(text: str, count: int) -> np.ndarray:
    """Back from :func:`encode_hits`, ``[count]`` of 0 and 1."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
