# SPDX-License-Identifier: Apache-2.0
"""Masks of really pruned networks for the sparse benchmark: ``python -m benchmarks.pruned_masks`` makes the file anew.

CNN(64) and CNN(32) with batch normalization are trained on the first 5,000 images of CIFAR-10 (batch 128, lr 0.01,
momentum 0.9, cosine schedule, seed 0) and pruned by magnitude: CNN(64), whose layers have the shapes that are timed,
layer by layer; CNN(32) by one global threshold, as the paper does. Their rows are uneven, unlike a uniform mask's.
Stored is, for each weight, at how many of the densities it is kept (masks of one network are nested).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curvlab.sparse import Mask, global_magnitude, layerwise_magnitude

FILE = Path(__file__).resolve().parent / "pruned_masks.npz"
DENSITIES = (0.2, 0.1, 0.05, 0.02)
EPOCHS = {64: 4, 32: 12}
CONVOLUTIONS = {"64 → 64 @32²": 3, "64 → 128 @16²": 7, "128 → 256 @8²": 14}  # layer -> its place in CNN(64).features


def convolution(layer: str, density: float) -> Tensor:
    """Boolean mask ``[C_out, C_in, 3, 3]`` of a layer of CNN(64), pruned to ``density`` by itself."""
    with np.load(FILE) as stored:
        return _kept(stored[f"64/features.{CONVOLUTIONS[layer]}.weight"], density)


def global_mask(density: float) -> Mask:
    """All weights of CNN(32)+BN under one threshold."""
    with np.load(FILE) as stored:
        names = [name for name in stored.files if name.startswith("32/")]
        return Mask({name.removeprefix("32/"): _kept(stored[name], density) for name in names})


def _kept(times: np.ndarray, density: float) -> Tensor:
    # Kept at this density: kept at it and at every larger one.
    return torch.from_numpy(times > DENSITIES.index(density))


def make(file: Path = FILE) -> None:
    """Train, prune, write."""
    from curvlab.data import load
    from curvlab.training.loop import Recipe, train
    from curvlab.training.stages import Network

    data = load("cifar10").subset(5000)
    stored: dict[str, np.ndarray] = {}
    for channels, epochs in EPOCHS.items():
        model = Network("cnn", channels).build(data, 0)
        found = train(model, data, Recipe(epochs, 128, 0.01), seed=0)
        print(f"CNN({channels}): training accuracy {found.history[-1]['train_accuracy']:.3f}", file=sys.stderr)
        prune = layerwise_magnitude if channels == 64 else global_magnitude
        masks = [prune(model, density) for density in DENSITIES]
        for name in masks[0]:
            if channels == 32 or name in {f"features.{place}.weight" for place in CONVOLUTIONS.values()}:
                times = torch.stack([mask[name] for mask in masks]).sum(0)
                stored[f"{channels}/{name}"] = times.to(torch.uint8).numpy()
    np.savez_compressed(file, **stored)  # type: ignore[arg-type]


if __name__ == "__main__":
    make()
