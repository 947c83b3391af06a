# SPDX-License-Identifier: Apache-2.0
"""The networks: parameter counts of the paper, PyTorch's default draw, one initial function in two parametrizations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from curvlab.models import CNN, MLP, NTKLinear


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


# Published: arXiv 2604.07603, its released results.
MLP_PARAMS = {8: 6514, 32: 27562, 128: 134794, 1024: 2913290, 2048: 10020874, 4096: 36818954}
CNN_PARAMS_NO_BN = {4: 72990, 8: 152082, 16: 337050, 32: 814122, 64: 2196810, 96: 4150890}


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("width", [8, 32, 128, 1024])
def test_mlp_parameter_counts_are_the_papers(width, parametrization):
    assert count(MLP(width, parametrization=parametrization)) == MLP_PARAMS[width]


@pytest.mark.parametrize("width", [2048, 4096])
def test_mlp_parameter_counts_of_wide_networks(width):
    with torch.device("meta"):
        assert 784 * width + 2 * width * width + 10 * width + 3 * width + 10 == MLP_PARAMS[width]
        assert (
            count(
                nn.Sequential(
                    nn.Linear(784, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 10)
                )
            )
            == MLP_PARAMS[width]
        )


@pytest.mark.parametrize("channels", sorted(CNN_PARAMS_NO_BN))
def test_cnn_parameter_counts_are_the_papers(channels):
    assert count(CNN(channels, batch_norm=False)) == CNN_PARAMS_NO_BN[channels]


def test_cnn_with_batch_norm_has_the_papers_count():
    model = CNN(32)
    assert count(model) == 815018
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 6


def test_mlp_draw_is_pytorchs_default_bit_for_bit():
    torch.manual_seed(7)
    layers = [nn.Linear(784, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)]
    model = MLP(16, generator=torch.Generator().manual_seed(7))
    for mine, theirs in zip(model.layers, layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)


def test_cnn_draw_is_pytorchs_default_bit_for_bit():
    torch.manual_seed(3)
    first = nn.Conv2d(3, 4, 3, padding=1)
    model = CNN(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.features[0].weight, first.weight)
    assert torch.equal(model.features[0].bias, first.bias)


def test_building_a_network_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    MLP(8, generator=generator)
    MLP(8, parametrization="ntk", generator=generator)
    CNN(4, generator=generator)
    assert torch.equal(torch.rand(3), expected)


def test_both_parametrizations_start_as_the_same_function():
    standard, ntk = (
        MLP(24, in_features=20, parametrization=name, generator=torch.Generator().manual_seed(5)).double()
        for name in ("standard", "ntk")
    )
    x = torch.randn(9, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ntk(x), standard(x), rtol=1e-5, atol=1e-6)  # drawn in float32


def test_ntk_entries_have_unit_variance_and_the_scale_is_the_stated_one():
    layer = NTKLinear(300, 400, generator=torch.Generator().manual_seed(0))
    assert layer.affine_scale == pytest.approx(1 / math.sqrt(900))
    assert layer.weight.var().item() == pytest.approx(1.0, rel=0.02)  # 120,000 draws: standard error 0.3 %
    assert layer.weight.abs().max().item() <= math.sqrt(3) * (1 + 1e-6)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    expected = (x @ layer.weight.T + layer.bias) / math.sqrt(900)
    torch.testing.assert_close(layer(x), expected)
    assert "affine_scale=0.03333" in repr(layer)


def test_outputs_have_one_row_a_sample():
    assert MLP(8)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert MLP(8, in_features=64, num_classes=4, hidden_layers=1)(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert CNN(2)(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    assert CNN(2, in_channels=1, image_size=8)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: MLP(0), ValueError, "MLP: width must be at least 1, got 0"),
        (lambda: MLP(8, num_classes=-1), ValueError, "num_classes must be at least 1, got -1"),
        (lambda: MLP(8.0), TypeError, "width must be an int, got float"),
        (lambda: MLP(8, parametrization="mup"), ValueError, "'standard' or 'ntk', got 'mup'"),
        (lambda: CNN(0), ValueError, "CNN: channels must be at least 1"),
        (lambda: CNN(4, image_size=7), ValueError, "at least 8 .* got 7"),
    ],
)
def test_bad_sizes_are_refused(build, error, match):
    with pytest.raises(error, match=match):
        build()
