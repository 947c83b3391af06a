# SPDX-License-Identifier: Apache-2.0
"""The networks and data of the curvature benchmarks, with their counts of operations.

Inputs are drawn around one random mean a class, so that training lowers the loss and the Hessian grows the few large
eigenvalues that real data give; images have the shapes of MNIST and CIFAR-10.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.models import CNN, MLP

CLASSES = 10
POOL = 2048  # samples that training draws from; the curvature is that of the first N


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut (1x1 where the shape changes)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images out."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet20(width: int = 16) -> nn.Module:
    """ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2): 3 x 3 blocks of ``width``, twice and four times that."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(3):
        for block in range(3):
            out = width * 2**stage
            layers.append(ResidualBlock(channels, out, 2 if block == 0 and stage > 0 else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def plain_cnn() -> nn.Module:
    """Three convolutions (32, 64, 128 channels, each with ReLU and max pooling) and two linear layers."""
    layers: list[nn.Module] = []
    for channels, out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def plain_mlp(width: int, hidden: int) -> nn.Module:
    """784 inputs, ``hidden`` layers of ``width``, 10 outputs, ReLU."""
    sizes = [784, *[width] * hidden]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Subject:
    """A network of the benchmark: how to build it and the shape of one input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def is_convolutional(self) -> bool:
        """Whether inputs are images."""
        return len(self.shape) == 3


SUBJECTS = {
    "MLP": Subject(lambda: plain_mlp(1024, 2), (784,)),
    "CNN": Subject(plain_cnn, (3, 32, 32)),
    "ResNet-20": Subject(resnet20, (3, 32, 32)),
    "ResNet-20, width 8": Subject(lambda: resnet20(8), (3, 32, 32)),
    "CNN(32)+BN": Subject(lambda: CNN(32), (3, 32, 32)),
    "tiny MLP": Subject(lambda: MLP(32), (784,)),
}


@dataclass(frozen=True)
class Setup:
    """One network in eval mode with the samples whose mean cross-entropy is differentiated twice."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    pool: tuple[Tensor, Tensor]

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters, in the order of the flat vector."""
        return list(self.model.parameters())

    @property
    def is_convolutional(self) -> bool:
        """Whether inputs are images."""
        return self.x.ndim == 4

    def with_model(self, model: nn.Module) -> Setup:
        """The same samples under another network."""
        return Setup(self.name, model, self.x, self.y, self.pool)


def make_setup(name: str, samples: int, *, steps: int = 0) -> Setup:
    """Subject ``name`` at its seeded start, or after ``steps`` steps of SGD; the first ``samples`` of the data."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    model = subject.build()
    y = torch.arange(POOL) % CLASSES
    means = torch.randn(CLASSES, *subject.shape)
    x = 0.35 * means[y] + torch.randn(POOL, *subject.shape)
    setup = Setup(name, model.eval(), x[:samples].clone(), y[:samples].clone(), (x, y))
    if steps:
        train(setup, steps)
    return setup


def train(setup: Setup, steps: int, *, seed: int = 0) -> None:
    """``steps`` steps of momentum SGD, batch 64, in place; leaves the network in eval mode."""
    x, y = setup.pool
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(setup.params, lr=0.01, momentum=0.9)
    setup.model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(setup.model(x[rows]), y[rows]).backward()
        optimizer.step()
    setup.model.zero_grad(set_to_none=True)
    setup.model.eval()


def product_flops(setup: Setup) -> tuple[float, float]:
    """Floating-point operations of one Hessian and one GGN product with kept activations.

    A layer whose input depends on parameters costs 6 forwards for the Hessian (two R-forward, four R-backward), 4 for
    the GGN; the first layer costs 2 of either. Elementwise work is not counted.
    """
    forwards: list[float] = []

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        forwards.append(2.0 * output.numel() * weight[0].numel())

    layers = [m for m in setup.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        setup.model(setup.x)
    for hook in hooks:
        hook.remove()
    first, rest = forwards[0], sum(forwards[1:])
    return 2 * first + 6 * rest, 2 * first + 4 * rest
