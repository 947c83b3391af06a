# SPDX-License-Identifier: Apache-2.0
"""Average flatness against loops, against the law for a quadratic loss, and independent of the memory budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from curvlab.operators.problem import Problem
from curvlab.sharpness.directions import weight_scale
from curvlab.sharpness.evaluation import parameter_row
from curvlab.sharpness.perturbation import Flatness, average_flatness
from tests.sharpness.nets import F64, draw, images, network, outputs_at, plain_loss, problem, row_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scale", ["absolute", "element", "filter", "layer"])
def test_losses_are_those_of_a_loop_over_draws_and_levels(scale: str) -> None:
    model, here = network(), problem()
    draws = torch.randn(3, here.num_params, dtype=F64, generator=draw(7))
    found = average_flatness(here, [0.01, 0.1, 1.0], scale=scale, draws=draws)  # type: ignore[arg-type]
    theta, lengths = row_of(model), weight_scale(here.params, scale, rms=True)  # type: ignore[arg-type]
    x, y = images()
    for s, std in enumerate((0.01, 0.1, 1.0)):
        for v, xi in enumerate(draws):
            row = theta + std * lengths * xi
            assert found.losses[s, v].item() == pytest.approx(plain_loss(model, row).item(), rel=1e-11)
            share = (outputs_at(model, row, x).argmax(1) == y).double().mean().item()
            assert found.accuracies is not None
            assert found.accuracies[s, v].item() == pytest.approx(share, abs=1e-15)
    assert found.base_loss == pytest.approx(plain_loss(model, theta).item(), rel=1e-12)
    torch.testing.assert_close(found.increase, (found.losses - found.base_loss).mean(1))
    torch.testing.assert_close(found.relative_increase, found.increase / found.base_loss)
    torch.testing.assert_close(found.standard_error, found.losses.std(1) / math.sqrt(3))


def test_a_quadratic_loss_rises_by_half_the_trace_times_the_variance() -> None:
    """E L(theta + sigma xi) - L(theta) = sigma^2 tr(H) / 2, within four standard errors that shrink as 1/sqrt(V)."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2).double(), torch.randn(30, 5, dtype=F64)
    here = Problem(model, nn.MSELoss(), (x, model(x).detach() + 0.1))
    trace = 2.0 / 60 * 2 * (x.square().sum().item() + 30)  # d2/dtheta2 of the mean of 60 squares; two outputs
    errors = []
    for count in (50, 3200):
        found = average_flatness(here, [0.3, 2.0], num_draws=count, antithetic=True, generator=draw(count))
        expected = torch.tensor([0.3, 2.0], dtype=F64) ** 2 * trace / 2
        assert ((found.increase - expected).abs() < 4 * found.standard_error).all()
        errors.append(found.standard_error[0].item())
    assert errors[0] / errors[1] == pytest.approx(8.0, rel=0.25)


def test_the_error_of_antithetic_draws_is_that_of_pairs() -> None:
    """A quadratic loss at its minimum rises alike both ways: 20 draws are 10, and the stated error the true one."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2).double(), torch.randn(30, 5, dtype=F64)
    here = Problem(model, nn.MSELoss(), (x, model(x).detach()))
    found = [average_flatness(here, 0.3, num_draws=20, antithetic=True, generator=draw(seed)) for seed in range(60)]
    spread = torch.stack([one.increase for one in found]).std()
    stated = torch.stack([one.standard_error for one in found]).square().mean().sqrt()
    assert stated.item() == pytest.approx(spread.item(), rel=0.2)
    assert math.isnan(average_flatness(here, 0.3, num_draws=2, antithetic=True).standard_error.item())


def test_antithetic_draws_remove_the_gradient() -> None:
    here = problem(steps=3)
    plain = average_flatness(here, 1e-4, num_draws=8, generator=draw())
    paired = average_flatness(here, 1e-4, num_draws=8, antithetic=True, generator=draw())
    assert paired.increase.abs().item() < 0.05 * plain.increases.abs().mean().item()


def test_the_budget_does_not_change_the_numbers() -> None:
    here = problem()
    whole = average_flatness(here, [0.01, 0.2], num_draws=6, antithetic=True, generator=draw(1))
    tight = average_flatness(here, [0.01, 0.2], num_draws=6, antithetic=True, generator=draw(1), memory_budget=1)
    torch.testing.assert_close(tight.losses, whole.losses, rtol=1e-12, atol=0)


def test_half_accuracy_std_interpolates_the_crossing() -> None:
    stds = torch.tensor([0.4, 0.1, 0.2], dtype=F64)  # in any order
    accuracies = torch.tensor([[0.2, 0.4], [1.0, 1.0], [0.9, 0.7]], dtype=F64)
    shares = {"losses": torch.zeros(3, 2), "base_loss": 0.0, "base_accuracy": 1.0, "num_classes": 4, "scale": "filter"}
    here = Flatness(stds, accuracies=accuracies, **shares)  # type: ignore[arg-type]
    # half way between 1 and 1/4 is 0.625: from 0.8 at 0.2 to 0.3 at 0.4
    assert here.half_accuracy_std == pytest.approx(0.2 * 2 ** ((0.8 - 0.625) / 0.5))
    high = Flatness(stds, accuracies=torch.ones(3, 2, dtype=F64), **shares)  # type: ignore[arg-type]
    none = Flatness(stds, accuracies=None, **shares)  # type: ignore[arg-type]
    assert math.isnan(high.half_accuracy_std) and math.isnan(none.half_accuracy_std)


def test_single_draws_and_levels() -> None:
    here = problem()
    found = average_flatness(here, 0.0, num_draws=1)
    assert found.losses.tolist() == [[pytest.approx(found.base_loss, rel=1e-12)]]
    assert math.isnan(found.standard_error.item())
    assert found.num_classes == 4
    assert not torch.isnan(parameter_row(here)).any()


def test_refusals() -> None:
    here = problem()
    for std in (-1.0, math.nan, []):
        with pytest.raises(ValueError, match=r"average_flatness: std must be finite and 0 or more"):
            average_flatness(here, std)
    with pytest.raises(ValueError, match=r"num_draws must be even, got 3"):
        average_flatness(here, 0.1, num_draws=3, antithetic=True)
    with pytest.raises(ValueError, match=r"num_draws must be at least 1, got 0"):
        average_flatness(here, 0.1, num_draws=0)
    with pytest.raises(ValueError, match=r"average_flatness: draws must be \[K, P\]"):
        average_flatness(here, 0.1, draws=torch.zeros(2, 3))
