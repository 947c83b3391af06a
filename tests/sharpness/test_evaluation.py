# SPDX-License-Identifier: Apache-2.0
"""Losses at many points: both ways against PyTorch one point at a time, and digits of losses near zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from curvlab.operators.problem import Problem
from curvlab.sharpness.directions import draw_normal
from curvlab.sharpness.evaluation import LossEvaluator, loss_and_gradient, parameter_row
from tests.sharpness.nets import F64, draw, images, network, outputs_at, plain_loss, problem, row_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("way", ["stacked", "loop"])
@pytest.mark.parametrize("split", [24, 5])
def test_losses_and_accuracies_are_those_of_plain_pytorch(way: str, split: int) -> None:
    model, (x, y) = network(), images()
    batches = list(zip(x.split(split), y.split(split), strict=True))
    here = Problem(model, functional.cross_entropy, batches)
    rows = row_of(model) + 0.2 * draw_normal(7, here.num_params, here, draw(3))
    found = LossEvaluator(here, way=way)(rows)  # type: ignore[arg-type]
    expected = torch.stack([plain_loss(model, row).detach() for row in rows])
    torch.testing.assert_close(found.losses, expected, rtol=1e-12, atol=0)
    assert found.accuracies is not None
    shares = [(outputs_at(model, row, x).argmax(1) == y).double().mean().item() for row in rows]
    assert found.accuracies.tolist() == pytest.approx(shares, abs=1e-15)


def test_a_small_budget_changes_nothing_but_the_sweeps() -> None:
    here = problem()
    rows = parameter_row(here) + 0.1 * draw_normal(5, here.num_params, here, draw())
    for way in ("stacked", "loop"):
        whole, tight = LossEvaluator(here, way=way), LossEvaluator(here, way=way, memory_budget=1)  # type: ignore[arg-type]
        assert tight.points_at_once == 1 < 5 <= whole.points_at_once
        torch.testing.assert_close(tight(rows).losses, whole(rows).losses, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mode", ["frozen", "batch"])
@pytest.mark.parametrize("way", ["stacked", "loop"])
def test_batch_norm_modes(mode: str, way: str) -> None:
    """ "batch": the statistics at each point; "frozen": those at theta, for every point."""
    model = network()
    here = Problem(model, nn.CrossEntropyLoss(), images(), batch_norm=mode)  # type: ignore[arg-type]
    rows = row_of(model) + 0.2 * draw_normal(3, here.num_params, here, draw())
    reference = network()
    norm = next(m for m in reference.modules() if isinstance(m, nn.BatchNorm2d))
    if mode == "batch":
        norm.train()
        norm.track_running_stats = False
    else:
        first = reference[0](images()[0]).detach()  # type: ignore[operator]
        norm.running_mean, norm.running_var = first.mean((0, 2, 3)), first.var((0, 2, 3), correction=0)
    expected = torch.stack([plain_loss(reference, row).detach() for row in rows])
    torch.testing.assert_close(LossEvaluator(here, way=way)(rows).losses, expected, rtol=1e-10, atol=0)  # type: ignore[arg-type]


def test_small_losses_keep_their_digits() -> None:
    """A loss of 1e-5 from float32 logits is that of the logits to 1e-6 of itself; a float32 log-sum-exp is not."""
    x = torch.randn(64, 12, generator=draw())
    y = torch.randint(0, 5, (64,), generator=draw(1))
    model = nn.Linear(12, 5)
    with torch.no_grad():  # logits that separate the classes: labels are made to fit a linear network
        model.weight.copy_(torch.randn(5, 12, generator=draw(2)))
        y = model(x).argmax(1)
        keep = model(x).topk(2, 1).values.diff(dim=1).abs()[:, 0] > 0.5
        x, y = x[keep], y[keep]
        gap = model(x).topk(2, 1).values.diff(dim=1).abs().min()
        model.weight.mul_(11.0 / gap)
        model.bias.zero_()
        logits = model(x)
    exact = []  # by Python's own log1p and fsum
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        exact.append(math.log1p(math.fsum(math.exp(z - row[label]) for c, z in enumerate(row) if c != label)))
    truth = math.fsum(exact) / len(exact)
    assert 1e-7 < truth < 1e-5
    here = Problem(model, nn.CrossEntropyLoss(), (x, y))
    for way in ("stacked", "loop"):
        found = LossEvaluator(here, way=way).base().losses.item()  # type: ignore[arg-type]
        # vmap's product may round the logits themselves: the float32 forward is not what is tested
        assert found == pytest.approx(truth, rel=1e-6 if way == "loop" else 1e-4)
    assert loss_and_gradient(here, parameter_row(here))[0] == pytest.approx(truth, rel=1e-6)
    assert abs(functional.cross_entropy(logits, y).item() / truth - 1) > 1e-4
    wide = here.to(F64)
    doubled = functional.cross_entropy(model.double()(x.double()), y).item()
    assert LossEvaluator(wide).base().losses.item() == pytest.approx(doubled, rel=1e-9)


def test_mean_squares_and_custom_losses_have_no_accuracy() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    squares = Problem(model, nn.MSELoss(), (x, y))
    custom = Problem(model, lambda z, t: (z - t).abs().mean(), [(x[:5], y[:5]), (x[5:], y[5:])])
    row = parameter_row(squares)
    for way in ("stacked", "loop"):
        found = LossEvaluator(squares, way=way)(torch.stack([row, 2 * row]))  # type: ignore[arg-type]
        assert found.accuracies is None
        assert found.losses[0].item() == pytest.approx(functional.mse_loss(model(x), y).item(), rel=1e-12)
        absolute = LossEvaluator(custom, way=way)(row).losses.item()  # type: ignore[arg-type]
        assert absolute == pytest.approx((model(x) - y).abs().mean().item(), rel=1e-12)


def test_gradient_is_that_of_autograd() -> None:
    model, here = network(), problem()
    row = row_of(model).requires_grad_()
    loss = plain_loss(model, row)
    (expected,) = torch.autograd.grad(loss, row)
    value, gradient = loss_and_gradient(here, parameter_row(here))
    assert value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def test_the_way_follows_the_size_of_the_network() -> None:
    small = Problem(nn.Linear(4, 2), nn.MSELoss(), (torch.zeros(3, 4), torch.zeros(3, 2)))
    large = Problem(nn.Linear(4, 20000), nn.MSELoss(), (torch.zeros(3, 4), torch.zeros(3, 20000)))
    assert (LossEvaluator(small).way, LossEvaluator(large).way) == ("stacked", "loop")


def test_a_network_that_vmap_refuses_goes_by_the_loop() -> None:
    class Branching(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            z = super().forward(input)
            return z if z.sum() > 0 else -z

    torch.manual_seed(0)
    model, x, y = Branching(3, 2).double(), torch.randn(5, 3, dtype=F64), torch.tensor([0, 1, 1, 0, 1])
    evaluator = LossEvaluator(Problem(model, nn.CrossEntropyLoss(), (x, y)))
    assert evaluator.way == "loop"
    assert evaluator.base().losses.item() == pytest.approx(functional.cross_entropy(model(x), y).item(), rel=1e-12)


def test_refusals() -> None:
    here = problem()
    with pytest.raises(ValueError, match=r"LossEvaluator: way must be"):
        LossEvaluator(here, way="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LossEvaluator: rows must be \[K, P\] with P == "):
        LossEvaluator(here)(torch.zeros(2, 3))
    assert LossEvaluator(here)(torch.zeros(0, here.num_params)).losses.shape == (0,)
