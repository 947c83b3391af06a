# SPDX-License-Identifier: Apache-2.0
"""Data that is other data on a later pass is found; batches without samples are nobody's concern."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvlab.operators import GGNOperator, HessianOperator, JacobianOperator, Problem
from curvlab.operators.batches import Batches, as_batches, first_samples
from tests.operators.models import labels, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


class Changing:
    """A loader whose second pass shows the images changed."""

    def __init__(self, images: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self.images, self.change, self.passes = images, change, 0

    def __iter__(self):
        self.passes += 1
        images = self.images if self.passes == 1 else self.change(self.images)
        return iter([(images, torch.zeros(len(images), dtype=torch.int64))])


def _one_pixel(images: Tensor) -> Tensor:
    images = images.clone()
    images[-1, 0, 0, 0] += 1
    return images


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(-1),
        lambda x: x.flip(-2),
        lambda x: x.flip(1),
        lambda x: x.roll(1, -1),
        lambda x: x.transpose(-1, -2),
        lambda x: x.flip(0),
        _one_pixel,
    ],
    ids=["mirrored", "upside_down", "channels", "shifted", "turned", "order", "pixel"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex64])
def test_an_augmentation_is_found(change, dtype):
    images = (100.0 * normal(5, 3, 8, 8)).abs().to(dtype)
    data = as_batches(Changing(images, change), "Problem")
    list(data)
    with pytest.raises(ValueError, match=r"same batches on every pass .* batch 0"):
        list(data)


def test_the_same_images_pass_whatever_their_layout():
    images = normal(5, 3, 8, 8)
    data = as_batches(Changing(images, lambda x: x.contiguous(memory_format=torch.channels_last)), "Problem")
    assert len(list(data)) == len(list(data)) == 1


def test_a_large_sample_is_checked_in_pieces(monkeypatch):
    images = normal(7, 3, 8, 8)
    whole = as_batches(Changing(images, lambda x: x), "Problem")
    list(whole)
    monkeypatch.setattr("curvlab.operators.batches._CHECKED_AT_ONCE", 400)
    assert len(list(whole)) == 1


@pytest.mark.parametrize("engine", ["autograd", "linearized", "fused"])
def test_data_that_is_written_after_the_problem_was_made_is_refused(engine):
    x, y = normal(7, 3), labels(7, classes=2)
    problem = Problem(net(), nn.CrossEntropyLoss(), (x, y))
    operator = HessianOperator(problem, engine=engine)
    expected = operator.to_dense()
    x += 1.0
    if engine == "autograd":  # the others hold what they need
        with pytest.raises(ValueError, match=r"data must stay as it was .* changed in place"):
            operator.to_dense()
    else:
        torch.testing.assert_close(operator.to_dense(), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="data must stay as it was"):
        HessianOperator(problem, engine=engine).to_dense()


def test_a_first_layer_that_works_in_place_is_refused():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match="a model whose first layer works in place"):
        HessianOperator(Problem(model, nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)))).to_dense()


def test_nested_inputs_and_targets_are_watched_and_inference_tensors_taken():
    with torch.inference_mode():
        fixed = normal(4, 3)
    watched, targets = normal(4, 2), labels(4, classes=2)
    data = as_batches([({"a": fixed, "b": (watched, 3)}, targets)], "Problem")
    assert len(list(data)) == 1
    for tensor in (watched, targets):
        data = as_batches([({"a": fixed, "b": (watched, 3)}, targets)], "Problem")
        tensor.add_(0)
        with pytest.raises(ValueError, match="changed in place"):
            list(data)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_batches_without_samples_are_left_out(place, held):
    x, y = normal(7, 3), labels(7, classes=2)
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    parts.insert(place, (x[:0], y[:0]))
    data = parts if held else Batches(parts, held=False)
    for kind in (HessianOperator, GGNOperator, JacobianOperator):
        expected = kind(Problem(net(), nn.CrossEntropyLoss(), (x, y)), engine="autograd").to_dense()
        for engine in ("autograd", "linearized", "fused"):
            found = kind(Problem(net(), nn.CrossEntropyLoss(), data), engine=engine).to_dense()
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert [len(targets) for _, targets in first_samples(as_batches(data, "Problem"), 5)] == [3, 2]
    with pytest.raises(ValueError, match="at least one sample, got none"):
        Problem(net(), nn.CrossEntropyLoss(), [(x[:0], y[:0])])
