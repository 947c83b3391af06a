# SPDX-License-Identifier: Apache-2.0
"""The networks of the studies: fully connected and convolutional, drawn from a given generator.

Every constructor draws from the ``torch.Generator`` that it is handed (the global one when it is ``None``), so that
a seed names one network and building a network never moves somebody else's random stream.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

__all__ = ["CNN", "MLP", "NTKLinear", "Parametrization"]

Parametrization = Literal["standard", "ntk"]


def _default_init(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    """Draw ``layer`` as PyTorch's ``reset_parameters`` does: U(±1/sqrt(fan_in)) for weight and bias, in that order."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5.0), generator=generator)
    if layer.bias is not None:
        bound = 1.0 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _linear(in_features: int, out_features: int, generator: torch.Generator | None) -> nn.Linear:
    # skip_init: the constructor's own draw would come from the global generator and is thrown away.
    layer = cast("nn.Linear", nn.utils.skip_init(nn.Linear, in_features, out_features))
    _default_init(layer, generator)
    return layer


def _conv3x3(in_channels: int, out_channels: int, generator: torch.Generator | None) -> nn.Conv2d:
    layer = cast("nn.Conv2d", nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, kernel_size=3, padding=1))
    _default_init(layer, generator)
    return layer


class NTKLinear(nn.Linear):
    r"""Linear layer in NTK parametrization: ``y = (x W^T + b) / sqrt(3 fan_in)``, with W, b of unit variance.

    The entries are drawn from U(±sqrt(3)), so the effective weight ``W / sqrt(3 fan_in)`` is U(±1/sqrt(fan_in)): the
    *same initial function* as PyTorch's ``nn.Linear``, draw for draw from the same generator (to rounding).  What
    changes is training: the gradient in W carries the factor ``1/sqrt(3 fan_in)``, so that each weight moves by
    O(1/sqrt(width)) against entries of size one, and the kernel has a limit as the width grows.

    Shapes: x ``[..., in_features]``, y ``[..., out_features]``.  Source: Jacot, Gabriel, Hongler 2018 (section 2),
    with the constant 1/3 of PyTorch's default initialization.

    Attributes:
        affine_scale: ``1/sqrt(3 fan_in)``.  Curvature code reads it: the layer is ``affine_scale * (x W^T + b)``.
    """

    affine_scale: float

    def __init__(self, in_features: int, out_features: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(in_features, out_features, device="meta")
        self.affine_scale = 1.0 / math.sqrt(3.0 * in_features)
        self.to_empty(device="cpu")
        # The draw is nn.Linear's own, divided by the scale: this is what makes the two initial functions coincide.
        _default_init(self, generator)
        with torch.no_grad():
            self.weight.div_(self.affine_scale)
            self.bias.div_(self.affine_scale)

    def forward(self, input: Tensor) -> Tensor:
        """``affine_scale * (input W^T + b)``."""
        return super().forward(input) * self.affine_scale

    def extra_repr(self) -> str:
        """The factor beside the shapes, for ``print(model)``."""
        return f"{super().extra_repr()}, affine_scale={self.affine_scale:.4g}"


class MLP(nn.Module):
    """Fully connected ReLU network ``in - w - ... - w - classes`` (three hidden layers: 784-w-w-w-10).

    Parameters of the default shape: ``784 w + w + 2 (w^2 + w) + 10 w + 10``, e.g. 134,794 at width 128.

    Args:
        width: hidden width w.
        in_features: input features; inputs ``[N, ...]`` are flattened to ``[N, in_features]``.
        num_classes: outputs C.
        hidden_layers: number of hidden layers.
        parametrization: ``"standard"`` (PyTorch's default init, plain layers) or ``"ntk"`` (:class:`NTKLinear`; the
            same initial function for the same generator).
        generator: source of the initial draw.

    Raises:
        ValueError: a size below one, or an unknown parametrization.
    """

    def __init__(
        self,
        width: int,
        *,
        in_features: int = 784,
        num_classes: int = 10,
        hidden_layers: int = 3,
        parametrization: Parametrization = "standard",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "in_features": in_features, "num_classes": num_classes, "hidden_layers": hidden_layers}
        _check_sizes("MLP", sizes)
        if parametrization not in ("standard", "ntk"):
            raise ValueError(f"MLP: parametrization must be 'standard' or 'ntk', got {parametrization!r}")
        self.width, self.parametrization = width, parametrization
        widths = [in_features] + [width] * hidden_layers + [num_classes]
        layers: list[nn.Linear] = []
        for fan_in, fan_out in pairwise(widths):
            if parametrization == "ntk":
                layers.append(NTKLinear(fan_in, fan_out, generator=generator))
            else:
                layers.append(_linear(fan_in, fan_out, generator))
        self.layers = nn.ModuleList(layers)

    def linear_layers(self) -> list[nn.Linear]:
        """The layers in order (``layers``, typed)."""
        return cast("list[nn.Linear]", list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, C]`` of inputs ``[N, ...]``."""
        h = x.flatten(1)
        *hidden, last = self.layers
        for layer in hidden:
            h = torch.relu(layer(h))
        return last(h)


class CNN(nn.Module):
    """VGG-like network: [conv c, conv c, pool] [2c, 2c, pool] [4c, 4c, pool], fc -> 256 -> classes; 3x3, padding 1.

    With 32x32 inputs the first fully connected layer is ``64 c -> 256``.  CNN(32) has 815,018 parameters with batch
    normalization (after each convolution) and 814,122 without.

    Args:
        channels: c, the channels of the first block.
        batch_norm: normalize after each convolution.
        num_classes: outputs C.
        in_channels: input channels.
        image_size: side of the square inputs, at least 8 (three poolings by two).
        generator: source of the initial draw.

    Raises:
        ValueError: a size below one, or images smaller than 8x8.
    """

    def __init__(
        self,
        channels: int,
        *,
        batch_norm: bool = True,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("CNN", {"channels": channels, "num_classes": num_classes, "in_channels": in_channels})
        if image_size < 8:
            raise ValueError(f"CNN: image_size must be at least 8 (three poolings by two), got {image_size}")
        self.channels, self.batch_norm = channels, batch_norm
        blocks: list[nn.Module] = []
        fan_in = in_channels
        for block in range(3):
            fan_out = channels << block
            for _ in range(2):
                blocks.append(_conv3x3(fan_in, fan_out, generator))
                if batch_norm:
                    blocks.append(nn.BatchNorm2d(fan_out))
                blocks.append(nn.ReLU())
                fan_in = fan_out
            blocks.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*blocks)
        side = image_size // 8
        self.classifier = nn.Sequential(
            nn.Flatten(),
            _linear(fan_in * side * side, 256, generator),
            nn.ReLU(),
            _linear(256, num_classes, generator),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, C]`` of images ``[N, in_channels, image_size, image_size]``."""
        return self.classifier(self.features(x))


def _check_sizes(owner: str, sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
