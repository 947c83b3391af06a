# SPDX-License-Identifier: Apache-2.0
"""Small networks of every layer kind, with data and loss: what each engine and operator is held to.

``CASES[name]()`` gives a :class:`Case` in float64, the same on every call: random smooth-enough data (no activation at
a kink, no tie in a pool), at most a few hundred parameters, so that dense matrices by an independent route are cheap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.models import CNN, MLP
from curvlab.operators.problem import Problem

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A network, its data in batches, and PyTorch's own loss for them."""

    model: nn.Module
    loss: Any
    batches: list[tuple[Any, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self, dtype: torch.dtype = F64, **options: Any) -> Problem:
        problem = Problem(self.model, self.loss, self.batches, **{**self.options, **options})
        return problem if dtype == F64 else problem.to(dtype)


class Functional(nn.Module):
    """Functional forms: F.relu, torch.tanh, methods, view, a mean over positions, operators and torch.cat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(2, 3, 3), nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).mean((2, 3))
        side = torch.tanh(self.one(h.view(h.size(0), -1)))
        return self.two(torch.cat([torch.relu(h + side), F.gelu(side)], dim=1))


class Residual(nn.Module):
    """Two residual blocks with normalization, the second with a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.down = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2))
        self.skip = nn.Conv2d(3, 2, 1, stride=2)
        self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = F.relu(self.block(h) + h)
        h = torch.relu(self.down(h) + self.skip(h))
        return self.last(torch.flatten(self.pool(h), 1))


class Concatenated(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 1), nn.Linear(5 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([torch.tanh(self.left(x)), torch.sigmoid(self.right(x))], 1)
        return self.last(F.avg_pool2d(h, 2).flatten(1))


class Tied(nn.Module):
    """One weight in two layers, and one layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.second(h)))


class Unused(nn.Module):
    """A layer that the loss never sees: zero rows and columns, not an error."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Named(nn.Module):
    """Inputs by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, left: Tensor, *, right: Tensor | None = None) -> Tensor:
        h = self.left(left)
        return self.last(torch.tanh(h if right is None else h + self.right(right)))


class Pair(nn.Module):
    """Two positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * torch.sigmoid(self.right(right))


class Sequence(nn.Module):
    """Tokens to one prediction a position: outputs ``[N, C, L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(self.embed(tokens)))).transpose(1, 2)


class Embedded(nn.Module):
    """Tokens, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(self.embed(tokens).mean(1)))


class Attention(nn.Module):
    """One head of self-attention by ``F.scaled_dot_product_attention``."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward, self.last = nn.Linear(3, 9), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inward(x).chunk(3, -1)
        return self.last((x + self.outward(F.scaled_dot_product_attention(q, k, v))).mean(1))


class Scaled(nn.Linear):
    """A layer in NTK parametrization: affine_scale (W x + b)."""

    affine_scale = 0.4

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.affine_scale


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=_draw(seed))


def labels(*shape: int, classes: int, seed: int = 2) -> Tensor:
    return torch.randint(classes, shape, generator=_draw(seed))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network in float64, drawn from a seed without moving the global stream; no bias is 0, no gain 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.2 * torch.randn_like(param))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(0.3 * torch.randn_like(buffer))
                elif name.endswith("running_var"):
                    buffer.copy_(0.5 + torch.rand_like(buffer))
    return model.eval()


def split(x: Any, y: Tensor, sizes: list[int]) -> list[tuple[Any, Tensor]]:
    """Uneven batches of tensors, tuples or dicts."""

    def cut(value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            return list(value.split(sizes))
        if isinstance(value, dict):
            return [dict(zip(value, parts, strict=True)) for parts in zip(*map(cut, value.values()), strict=True)]
        return list(zip(*map(cut, value), strict=True))

    return list(zip(cut(x), y.split(sizes), strict=True))


def classified(build: Callable[[], nn.Module], *shape: int, classes: int, sizes: tuple[int, ...] = (), **options: Any):
    """Random inputs ``[N, *shape]`` and labels, with cross entropy."""

    def make() -> Case:
        cut = list(sizes) or [4, 3]
        x, y = normal(sum(cut), *shape), labels(sum(cut), classes=classes)
        return Case(seeded(build), nn.CrossEntropyLoss(), split(x, y, cut), options)

    return make


def _mlp(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3))


def _conv(*args: Any, features: int, activation: type[nn.Module] = nn.ReLU, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(*args, **options), activation(), nn.Conv2d(args[1], 2, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(features, 3),
    )  # fmt: skip


def _pooled(pool: nn.Module, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), pool, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(8, 3))


def _narrow(module: nn.Module) -> None:
    """The fully connected part of the CNN to a size that dense matrices bear: 4 channels a pixel are left of 8 x 8."""
    if isinstance(module, CNN):
        module.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def _norm_1d() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def _norm_2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2, affine=False),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def _norm_without_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3))


def _loss_case(loss: Any, targets: Callable[[], Tensor], outputs: int = 3) -> Callable[[], Case]:
    def make() -> Case:
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))
        return Case(model, loss() if isinstance(loss, type) else loss, split(normal(7, 3), targets(), [5, 2]))

    return make


def _ignored() -> Tensor:
    y = labels(7, classes=3)
    y[2] = -100
    return y


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((1.0 + (outputs - targets).square()).sqrt() - 1.0).sum() / len(outputs)


def _inputs_case(build: Callable[[], nn.Module], x: Callable[[], Any], y: Callable[[], Tensor], **options: Any):
    def make() -> Case:
        targets = y()
        return Case(seeded(build), nn.CrossEntropyLoss(), split(x(), targets, [3, len(targets) - 3]), options)

    return make


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=1.5),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}

CASES: dict[str, Callable[[], Case]] = {
    **{f"act_{name}": classified(_mlp(kind), 3, classes=3) for name, kind in ACTIVATIONS.items()},
    "linear": classified(lambda: nn.Linear(4, 3), 4, classes=3),
    "linear_no_bias": classified(
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)), 4, classes=3
    ),
    "tokens_linear": classified(_tokens, 4, 3, classes=3),
    "ntk_scale": classified(lambda: nn.Sequential(Scaled(4, 5), nn.ReLU(), Scaled(5, 3)), 4, classes=3),
    "models_mlp": classified(lambda: MLP(3, in_features=4, num_classes=3, parametrization="ntk"), 4, classes=3),
    "models_cnn": classified(
        lambda: CNN(1, image_size=8, num_classes=2).apply(_narrow),
        3,
        8,
        8,
        classes=2,
        params=["features.?.*", "classifier.3.bias"],
    ),
    "conv_stride_padding": classified(_conv(2, 3, 3, stride=2, padding=1, features=8), 2, 6, 5, classes=3),
    "conv_dilation": classified(_conv(2, 2, 2, dilation=2, features=8, activation=nn.SiLU), 2, 5, 5, classes=3),
    "conv_groups": classified(_conv(4, 4, 3, groups=2, padding=1, features=12), 4, 4, 3, classes=3),
    "conv_depthwise": classified(_conv(3, 6, (3, 2), groups=3, bias=False, features=4), 3, 5, 3, classes=3),
    "conv_one_by_one": classified(_conv(3, 2, 1, features=4), 3, 3, 2, classes=3),
    "bn1d_eval": classified(_norm_1d, 3, classes=3, batch_norm="eval"),
    "bn1d_frozen": classified(_norm_1d, 3, classes=3, batch_norm="frozen"),
    "bn1d_batch": classified(_norm_1d, 3, classes=3, batch_norm="batch"),
    "bn2d_eval": classified(_norm_2d, 2, 5, 5, classes=3, batch_norm="eval"),
    "bn2d_frozen": classified(_norm_2d, 2, 5, 5, classes=3, batch_norm="frozen"),
    "bn2d_batch": classified(_norm_2d, 2, 5, 5, classes=3, batch_norm="batch"),
    "bn_without_statistics": classified(_norm_without_statistics, 3, classes=3, batch_norm="frozen"),
    "layer_norm": classified(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)), 3, classes=3
    ),
    "pool_max": classified(_pooled(nn.MaxPool2d(2), 12), 2, 4, 4, classes=3),
    "pool_max_overlapping": classified(_pooled(nn.MaxPool2d(3, stride=2, padding=1), 12), 2, 4, 4, classes=3),
    "pool_max_ceil": classified(_pooled(nn.MaxPool2d(2, ceil_mode=True), 12), 2, 3, 3, classes=3),
    "pool_avg": classified(_pooled(nn.AvgPool2d(2), 12), 2, 4, 4, classes=3),
    "pool_avg_padded": classified(_pooled(nn.AvgPool2d(3, stride=2, padding=1), 12), 2, 4, 4, classes=3),
    "pool_adaptive": classified(_pooled(nn.AdaptiveAvgPool2d(2), 12), 2, 5, 5, classes=3),
    "dropout": classified(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Identity(), nn.Linear(5, 3)), 3, classes=3
    ),
    "functional": classified(Functional, 2, 4, 4, classes=2),
    "residual": classified(Residual, 2, 4, 4, classes=3, batch_norm="eval"),
    "residual_batch": classified(
        Residual, 2, 4, 4, classes=3, batch_norm="batch", params=["norm.*", "down.1.*", "skip.*", "last.*"]
    ),
    "concatenated": classified(Concatenated, 2, 4, 4, classes=2),
    "tied": classified(Tied, 4, classes=3),
    "unused": classified(Unused, 3, classes=2),
    "subset": classified(_mlp(nn.Tanh), 3, classes=3, params=["0.*", "4.bias"]),
    "sum": classified(_mlp(nn.Sigmoid), 3, classes=3, reduction="sum"),
    "embedding": _inputs_case(Embedded, lambda: labels(6, 3, classes=7, seed=5), lambda: labels(6, classes=3)),
    "sequence": _inputs_case(Sequence, lambda: labels(5, 4, classes=6, seed=5), lambda: labels(5, 4, classes=5)),
    "named": _inputs_case(
        Named, lambda: {"left": normal(6, 3), "right": normal(6, 2, seed=8)}, lambda: labels(6, classes=3)
    ),
    "pair": _inputs_case(Pair, lambda: (normal(6, 3), normal(6, 2, seed=8)), lambda: labels(6, classes=3)),
    "attention": _inputs_case(Attention, lambda: normal(5, 4, 3), lambda: labels(5, classes=2)),
    "mse": _loss_case(nn.MSELoss, lambda: normal(7, 3, seed=6)),
    "mse_one_output": _loss_case(F.mse_loss, lambda: normal(7, 1, seed=6), outputs=1),
    "weighted": _loss_case(
        nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.2], dtype=F64), label_smoothing=0.1), _ignored
    ),
    "ignored": _loss_case(nn.CrossEntropyLoss(), _ignored),
    "smoothed": _loss_case(functools.partial(F.cross_entropy, label_smoothing=0.2), lambda: labels(7, classes=3)),
    "soft_targets": _loss_case(nn.CrossEntropyLoss(), lambda: normal(7, 3, seed=6).softmax(1)),
    "custom_loss": _loss_case(_huber, lambda: normal(7, 3, seed=6)),
}
