# SPDX-License-Identifier: Apache-2.0
"""Training steps of the paper's CNN(32)+BN: on sparse layers, and the author's way (dense weights, masked gradients).

A step is forward, backward and update (momentum SGD) of one batch of 128 CIFAR-10-shaped images. The rate is 0 while
it is timed, so that every engine stays at the network that it began with; before, both ways train for ten updates and
must go down the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import pruned_masks
from benchmarks.harness import Case
from curvlab.models import CNN
from curvlab.sparse import Mask, fuse, layerwise_magnitude, sparsify

CHANNELS, BATCH = 32, 128
UPDATES, RATE = 10, 0.01  # of the comparison of losses
AGREEMENT = 1e-2  # relative; float32 sums in another order drift apart by 1e-4 or so in ten updates
Builder = Callable[[nn.Module, Mask], nn.Module]

# (kept share, must hold / goal: how much faster than the author's way), by kind of mask
BARS = {"uniform": {0.1: (2.0, 2.5), 0.05: (2.4, 3.0)}, "global": {0.1: (1.3, 1.6), 0.05: (1.6, 2.0)}}


def batch() -> tuple[Tensor, Tensor]:
    """Images and labels; what they show does not change the arithmetic."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def network() -> nn.Module:
    """CNN(32)+BN at its seeded start."""
    return CNN(CHANNELS, generator=torch.Generator().manual_seed(0))


def mask_of(kind: str, density: float) -> Mask:
    """Layer by layer the same share (of the initial magnitudes), or one threshold for a trained network's weights."""
    return layerwise_magnitude(network(), density) if kind == "uniform" else pruned_masks.global_mask(density)


def train_step(
    model: nn.Module, x: Tensor, y: Tensor, *, masks: Mask | None = None, lr: float = 0.0
) -> Callable[[], Tensor]:
    """One update of ``model``; returns its loss. With masks, gradients are multiplied by them, all in one call."""
    model.train()
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=0.9, fused=True)
    kept = [] if masks is None else [(params[name], keep.float()) for name, keep in masks.items()]
    factors = [torch.empty_like(param).copy_(keep) for param, keep in kept]  # in the weight's own layout

    def step() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if kept:
            torch._foreach_mul_([param.grad for param, _ in kept], factors)  # type: ignore[misc]
        optimizer.step()
        return loss.detach()

    return step


def ours(mask: Mask, x: Tensor, y: Tensor, *, fused: bool = True, lr: float = 0.0) -> Callable[[], Tensor]:
    """Sparse layers, with batch normalization, ReLU and pooling in one pass."""
    model = sparsify(network(), mask)
    return train_step(fuse(model) if fused else model, x, y, lr=lr)


def authors_way(
    mask: Mask, x: Tensor, y: Tensor, *, layout: torch.memory_format = torch.channels_last, lr: float = 0.0
) -> Callable[[], Tensor]:
    """Dense weights, zero where pruned, gradients masked."""
    model = network()
    mask.apply_(model)
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    return train_step(model, x.contiguous(memory_format=layout), y, masks=mask, lr=lr)


def disagreement(mask: Mask, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest relative difference of the losses along the first updates of both ways, and the last loss.

    Raises:
        AssertionError: they differ by more than rounding explains.
    """
    one, other = ours(mask, x, y, lr=RATE), authors_way(mask, x, y, lr=RATE)
    pairs = [(float(one()), float(other())) for _ in range(UPDATES)]
    worst = max(abs(mine / right - 1) for mine, right in pairs)
    if not worst <= AGREEMENT:
        raise AssertionError(f"ticket_step: losses must agree to {AGREEMENT:g} over {UPDATES} updates, got {pairs}")
    return worst, pairs[-1][1]


def densities(mask: Mask) -> str:
    """Kept shares by layer, in the order of the network."""
    return ", ".join(f"{share:.2g}" for share in mask.layer_densities().values())


def cases(*, quick: bool) -> Iterator[Case]:
    """One case a kind of mask and a density."""
    x, y = batch()
    for kind, bars in BARS.items():
        for density, (must, goal) in bars.items():
            if quick and density != 0.1:
                continue
            mask = mask_of(kind, density)
            worst, loss = disagreement(mask, x, y)
            peers = {
                "masked dense, channels-last": authors_way(mask, x, y),
                "masked dense": authors_way(mask, x, y, layout=torch.contiguous_format),
            }
            if not quick:
                peers["ours, layers between not fused"] = ours(mask, x, y, fused=False)
            yield Case(
                f"training step, CNN(32)+BN, batch {BATCH}, {kind} masks, {100 * density:g} % kept",
                ours(mask, x, y),
                peers,
                note=f"kept by layer: {densities(mask)}; losses of both ways over {UPDATES} updates (to {loss:.3f}) "
                f"differ by {worst:.1e} at most",
                not_counted={"ours, layers between not fused": "this project's own"},
                bar=(1 / must, 1 / goal),
            )
