# SPDX-License-Identifier: Apache-2.0
"""Transformations keep the function (the predictions), move the parameters, and say where each one went."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvlab.models import CNN, MLP
from curvlab.sharpness.symmetries import SYMMETRIES, transform
from tests.sharpness.nets import F64, draw, images, network, row_of

pytestmark = pytest.mark.usefixtures("one_thread")


def moved_statistics(model: nn.Module) -> nn.Module:
    """Running statistics that are not 0 and 1, and a variance as small as eps."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=draw(1))
            module.running_var.uniform_(1e-5, 2.0, generator=draw(2))
    return model.eval()


NETWORKS = {
    "chain": lambda: (network(), images()[0]),
    "chain without BatchNorm": lambda: (network(batch_norm=False), images()[0]),
    "mlp": lambda: (MLP(7, in_features=5, generator=draw()).double(), torch.randn(9, 5, dtype=F64, generator=draw(3))),
    "cnn": lambda: (
        moved_statistics(CNN(2, image_size=8, generator=draw())).double(),
        torch.randn(5, 3, 8, 8, dtype=F64, generator=draw(3)),
    ),
}


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_parameters_move(symmetry: str, name: str) -> None:
    model, x = NETWORKS[name]()
    if symmetry == "bn_scale" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        with pytest.raises(ValueError, match=r"transform: model must have BatchNorm .*, got none"):
            transform(model, "bn_scale")
        return
    before, row = model(x).detach(), row_of(model)
    changed = transform(model, symmetry, generator=draw(5), inputs=x)  # type: ignore[arg-type]
    after = changed.model(x).detach()
    if symmetry == "logit_scale":
        torch.testing.assert_close(after, 10 * before, rtol=1e-11, atol=1e-11)
    else:
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(row_of(changed.model), row, rtol=0.1)
    assert torch.equal(row_of(model), row) and torch.equal(model(x), before)  # the model itself is not touched
    if symmetry == "permutation":
        assert torch.equal(row_of(changed.model), row[changed.order])
        assert not torch.equal(changed.order, torch.arange(len(row)))
    else:
        assert torch.equal(changed.order, torch.arange(len(row)))


def test_the_layers_of_dinh_take_alpha_and_its_inverse() -> None:
    model = MLP(4, in_features=3, hidden_layers=1, generator=draw()).double()
    first, last = model.linear_layers()
    a, b = transform(model, "relu_rescaling", strength=8.0).model.linear_layers()  # type: ignore[operator]
    torch.testing.assert_close(a.weight, 8 * first.weight)
    torch.testing.assert_close(a.bias, 8 * first.bias)
    torch.testing.assert_close(b.weight, last.weight / 8)
    torch.testing.assert_close(b.bias, last.bias)


def test_neurons_have_factors_of_their_own() -> None:
    model = MLP(50, in_features=3, hidden_layers=1, generator=draw()).double()
    changed = transform(model, "neuron_rescaling", generator=draw(1)).model
    factors = (changed.linear_layers()[0].bias / model.linear_layers()[0].bias).detach()  # type: ignore[operator]
    assert 0.1 <= factors.min() < 0.2 and 5 < factors.max() <= 10


def test_what_is_no_chain_is_refused() -> None:
    x = torch.randn(4, 3, dtype=F64)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)) + x)

    with pytest.raises(ValueError, match=r"transform: model must be a chain in the order .* changed by"):
        transform(Residual().double(), "relu_rescaling", inputs=x)
    with pytest.raises(ValueError, match=r"got Tanh at 1"):
        transform(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), "permutation")
    with pytest.raises(ValueError, match=r"at least two affine layers, got 1"):
        transform(nn.Linear(3, 3), "permutation")
    with pytest.raises(ValueError, match=r"transform: symmetry must be one of relu_rescaling"):
        transform(nn.Linear(3, 3), "rotation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"transform: strength must be above 1"):
        transform(nn.Linear(3, 3), "logit_scale", strength=1.0)
    with pytest.raises(ValueError, match=r"feed each layer's 4 outputs"):
        transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(6, 1)), "relu_rescaling")
