# SPDX-License-Identifier: Apache-2.0
"""Fused groups against the plain layers: training, statistics, eval mode, names; what must be left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from curvlab.models import CNN
from curvlab.sparse import global_magnitude, sparsify
from curvlab.sparse.fusion import BatchNormReLU, fuse


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y, losses = images(16, 3, 16, 16).to(next(model.parameters()).dtype), torch.arange(16) % 10, []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_fused_network_trains_as_the_plain_one(density: float) -> None:
    dense = CNN(4, image_size=16, generator=torch.Generator().manual_seed(0)).double()
    plain = dense if density == 1 else sparsify(dense, global_magnitude(dense, density), kernels="sparse")
    fused = fuse(plain)
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(BatchNormReLU) == 6 and nn.MaxPool2d not in kinds and kinds.count(nn.ReLU) == 1
    assert [module.pool for module in fused.modules() if isinstance(module, BatchNormReLU)] == [False, True] * 3
    assert train(plain) == pytest.approx(train(fused), rel=1e-10)
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    plain.load_state_dict(ours)
    x = images(3, 3, 16, 16, seed=1).double()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-10)


def test_the_copy_is_its_own() -> None:
    plain = CNN(2, image_size=8)
    before = copy.deepcopy(plain.state_dict())
    train_me = fuse(plain)
    train(nn.Sequential(nn.AvgPool2d(2), train_me), steps=1)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert "with ReLU and 2x2 max pooling" in repr(train_me)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_the_plain_layers(momentum: float | None) -> None:
    plain = nn.Sequential(nn.BatchNorm2d(5, momentum=momentum), nn.ReLU())
    fused = fuse(plain)
    for seed in range(3):
        x = 2 * images(6, 5, 4, 4, seed=seed) + 1
        torch.testing.assert_close(fused(x), plain(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(fused[0], name), getattr(plain[0], name))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.5}])
def test_options_of_the_normalization_stay(options: dict) -> None:
    plain = nn.Sequential(nn.BatchNorm2d(3, **options), nn.ReLU(), nn.MaxPool2d(2))
    fused = fuse(plain)
    assert isinstance(fused[0], BatchNormReLU) and fused[0].pool
    x = images(4, 3, 6, 6)
    for mode in (True, False):
        torch.testing.assert_close(fused.train(mode)(x), plain.train(mode)(x))


def shared_stays(model: nn.Sequential) -> bool:
    """One normalization in two places is one still: after .to() too."""
    fused = fuse(model).double()
    fused(images(4, 2, 3, 3).double())
    return fused[0].running_mean is fused[2].running_mean and int(fused[0].num_batches_tracked) == 2  # type: ignore[arg-type]


def test_pruned_models_are_fused_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)  # leaves a tensor that deepcopy refuses
    fused = fuse(model)
    assert isinstance(fused[1], BatchNormReLU)
    torch.testing.assert_close(fused(images(2, 1, 5, 5)), model(images(2, 1, 5, 5)))


def test_other_groups_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    for layers in (
        [nn.BatchNorm2d(2), nn.GELU()],
        [Own(2), nn.ReLU()],
        [nn.BatchNorm2d(2), hooked],
        [nn.BatchNorm2d(2)],
        [nn.ReLU(), nn.BatchNorm2d(2)],
    ):
        assert not any(isinstance(module, BatchNormReLU) for module in fuse(nn.Sequential(*layers)).modules())
    for pool in (nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, padding=1)):
        fused = fuse(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), pool))
        assert isinstance(fused[0], BatchNormReLU) and not fused[0].pool and type(fused[2]) is nn.MaxPool2d
    shared = nn.BatchNorm2d(2)
    assert shared_stays(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()))
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got str"):
        fuse("model")  # type: ignore[arg-type]
