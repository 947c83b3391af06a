# SPDX-License-Identifier: Apache-2.0
"""Synthetic rows of trained networks: accuracies that are given, test images that a seed gets right or wrong."""

from __future__ import annotations

from typing import Any

import torch

from experiments.base.networks import encode_hits

IMAGES = 10_000


def network_rows(factors: dict[str, Any], seed: int, percent: float, **more: float) -> list[dict[str, Any]]:
    """Rows of one network that gets the given share of 10,000 test images right: the easy ones, and some of its own."""
    drawn = torch.Generator().manual_seed(seed)
    ease = torch.linspace(0, 1, IMAGES) + 0.05 * torch.rand(IMAGES, generator=drawn)
    count = round(percent * IMAGES / 100)
    hits = torch.zeros(IMAGES, dtype=torch.bool)
    hits[ease.argsort()[:count]] = True
    values = {
        "test_accuracy": count / IMAGES,
        "train_accuracy": 1.0,
        "fit_loss": 1e-3,
        "norm": 20.0,
        "conv_norm": 10.0,
        "distance": 9.0,
        "diverged": 0.0,
        "train_seconds": 2.0,
        "measure_seconds": 0.5,
        "updates": 100.0,
        "radial_cosine": 1e-5,
    } | more
    head = {"run": f"{sorted(factors.items())}-{seed}", "seed": seed, "epoch": 20} | factors
    rows = [head | {"metric": metric, "value": value} for metric, value in values.items()]
    rows.append(head | {"metric": "test_hits", "value": count, "images": IMAGES, "bits": encode_hits(hits)})
    for epoch in (10, 20):
        rows.append(head | {"epoch": epoch, "step": 5 * epoch, "metric": "train_loss", "value": 1.0 / epoch})
    return rows
