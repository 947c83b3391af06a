# SPDX-License-Identifier: Apache-2.0
"""Ascents on losses whose maximum over the ball is known, and against steps written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from curvlab.operators.problem import Problem
from curvlab.sharpness.ascent import box_sharpness, sam_ascent, worst_case_sharpness
from curvlab.sharpness.batches import BatchSharpness, batch_sharpness
from curvlab.sharpness.directions import weight_scale
from curvlab.sharpness.evaluation import parameter_row
from tests.sharpness.nets import F64, draw, images, network, plain_loss, problem, row_of

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(*, gradient: bool = True) -> tuple[Problem, Tensor, Tensor]:
    """Least squares with its Hessian and gradient: L(theta + e) = L + g.e + e.He/2 exactly."""
    x = torch.randn(20, 4, dtype=F64, generator=draw(3)) * torch.tensor([1.0, 2.0, 0.5, 3.0])
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 2.0, 0.25]]))
    noise = torch.randn(20, 1, dtype=F64, generator=draw(4)) if gradient else torch.zeros(20, 1, dtype=F64)
    y = (model(x) + noise).detach()
    return Problem(model, nn.MSELoss(), (x, y)), 2 * x.T @ x / 20, (2 * x.T @ (model(x) - y).detach() / 20)[:, 0]


def largest_in_ball(hessian: Tensor, gradient: Tensor, radius: float) -> float:
    """max g.e + e.He/2 over ||e|| <= radius: (mu I - H) e = g with mu > lambda_1 and ||e|| = radius."""
    values, vectors = np.linalg.eigh(hessian.numpy())
    along = vectors.T @ gradient.numpy()
    mu = brentq(lambda m: np.linalg.norm(along / (m - values)) - radius, values[-1] + 1e-12, values[-1] + 1e6)
    e = along / (mu - values)
    return float(along @ e + 0.5 * values @ e**2)


@pytest.mark.parametrize("scale", ["absolute", "element"])
def test_worst_case_in_a_ball_is_the_trust_region_maximum(scale: str) -> None:
    here, hessian, gradient = quadratic()
    lengths = weight_scale(here.params, scale)  # type: ignore[arg-type]
    expected = largest_in_ball(lengths[:, None] * hessian * lengths, lengths * gradient, 0.3)
    found = worst_case_sharpness(here, 0.3, scale=scale, num_steps=150, tol=1e-12)  # type: ignore[arg-type]
    assert found.increase == pytest.approx(expected, rel=1e-6)
    assert (found.perturbation / lengths).norm().item() == pytest.approx(0.3, rel=1e-9)
    assert list(found.losses) == sorted(found.losses)  # convex: never down
    assert found.relative_increase == pytest.approx(expected / (1 + found.base_loss), rel=1e-6)


def test_worst_case_in_a_box_is_its_best_corner() -> None:
    here, hessian, gradient = quadratic()
    corners = torch.cartesian_prod(*[torch.tensor([-0.2, 0.2], dtype=F64)] * 4)
    expected = (corners @ gradient + 0.5 * ((corners @ hessian) * corners).sum(1)).max().item()
    found = worst_case_sharpness(here, 0.2, norm="linf", num_steps=50)
    assert found.increase == pytest.approx(expected, rel=1e-9)


def test_a_zero_gradient_starts_from_a_random_direction() -> None:
    here, hessian, _ = quadratic(gradient=False)
    assert sam_ascent(here, 0.1).increase == 0.0
    found = worst_case_sharpness(here, 0.1, num_steps=120, tol=1e-13, generator=draw())
    assert found.increase == pytest.approx(0.005 * torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-6)


def test_where_the_loss_is_not_convex_the_ascent_never_ends_below_where_it_was() -> None:
    here = problem(steps=5)
    for radius in (0.1, 3.0, 50.0):
        one, many = sam_ascent(here, radius), worst_case_sharpness(here, radius, num_steps=15)
        assert many.increase >= one.increase - 1e-12
        assert many.perturbation.norm().item() <= radius * (1 + 1e-9)
        row = row_of(network(steps=5)) + many.perturbation
        assert many.increase == pytest.approx(plain_loss(network(steps=5), row).item() - many.base_loss, rel=1e-9)
        assert many.num_gradients <= 16


@pytest.mark.parametrize("scale", ["absolute", "element", "filter"])
def test_sam_and_adaptive_sam_steps(scale: str) -> None:
    model, here = network(steps=5), problem(steps=5)
    row = row_of(model).requires_grad_()
    loss = plain_loss(model, row)
    (g,) = torch.autograd.grad(loss, row)
    d = weight_scale(here.params, scale, eta=0.01)  # type: ignore[arg-type]
    step = 0.05 * d**2 * g / (d * g).norm()
    found = sam_ascent(here, 0.05, scale=scale, eta=0.01)  # type: ignore[arg-type]
    torch.testing.assert_close(found.perturbation, step, rtol=1e-8, atol=1e-12)
    after = plain_loss(model, row.detach() + step).item()
    assert found.increase == pytest.approx(after - loss.item(), rel=1e-8)


def test_tiny_gradients_still_have_a_direction() -> None:
    x = torch.eye(3, dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    here = Problem(model, nn.MSELoss(), (x, torch.full((3, 1), 1e-200, dtype=F64)))
    assert sam_ascent(here, 0.1).perturbation.norm().item() == pytest.approx(0.1)


def test_box_sharpness_is_that_of_the_corners() -> None:
    """Convex least squares: the maximum in |z_i| <= epsilon (|theta_i| + 1) is at a corner."""
    here, hessian, gradient = quadratic()
    half = 0.1 * (parameter_row(here).abs() + 1)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 4) * half
    rise = (corners @ gradient + 0.5 * ((corners @ hessian) * corners).sum(1)).max().item()
    base = plain_mse(here)
    assert box_sharpness(here, 0.1, num_steps=50) == pytest.approx(100 * rise / (1 + base), rel=1e-6)


def plain_mse(here: Problem) -> float:
    (x, y), (weight,) = next(iter(here.batches())), here.params.values()
    return (x @ weight.T - y).square().mean().item()


def test_box_sharpness_in_a_subspace_moves_in_it() -> None:
    here, hessian, gradient = quadratic()
    value = box_sharpness(here, 0.1, subspace=1, num_steps=50, generator=draw(2))
    a = torch.randn(4, dtype=F64, generator=draw(2))
    half = 0.1 * (abs(a @ parameter_row(here) / a.square().sum()) + 1)
    ends = [(z * (a @ gradient) + 0.5 * z**2 * (a @ hessian @ a)).item() for z in (half, -half)]
    assert value == pytest.approx(100 * max(ends) / (1 + plain_mse(here)), rel=1e-6)


def test_batch_sharpness_is_the_mean_curvature_along_batch_gradients() -> None:
    model, (x, y) = network(steps=10), images()
    here = Problem(model, nn.CrossEntropyLoss(), list(zip(x.split(7), y.split(7), strict=True)))
    found = batch_sharpness(here, 6, num_batches=5, generator=draw(8))
    generator, curvatures, squares = draw(8), [], []
    for _ in range(5):
        chosen = torch.randperm(24, generator=generator)[:6]
        data = (x[chosen], y[chosen])
        loss = lambda row, data=data: plain_loss(model, row, data)  # noqa: E731
        g = torch.func.grad(loss)(row_of(model))
        h = torch.autograd.functional.hessian(loss, row_of(model))
        curvatures.append((g @ h @ g / (g @ g)).item())
        squares.append((g @ g).item())
    assert found.curvatures.tolist() == pytest.approx(curvatures, rel=1e-8)
    assert found.value == pytest.approx(np.mean(curvatures), rel=1e-8)
    assert found.standard_error == pytest.approx(np.std(curvatures, ddof=1) / math.sqrt(5), rel=1e-7)
    assert found.ratio_of_means == pytest.approx(np.average(curvatures, weights=squares), rel=1e-8)
    still = BatchSharpness(torch.tensor([math.nan, 3.0]), torch.tensor([0.0, 2.0]), 4)  # g = 0: g^T H g = 0 too
    assert still.ratio_of_means == 3.0


def test_a_batch_of_all_samples_is_the_full_loss() -> None:
    here = problem(steps=10)
    found = batch_sharpness(here, 24, num_batches=2, generator=draw())
    assert found.curvatures[0].item() == pytest.approx(found.curvatures[1].item(), rel=1e-9)


def test_a_loss_without_curvature_has_batch_sharpness_zero() -> None:
    here = Problem(nn.Linear(3, 1).double(), lambda z, _: z.mean(), (torch.ones(6, 3, dtype=F64), torch.zeros(6)))
    found = batch_sharpness(here, 3, num_batches=2)
    assert found.curvatures.tolist() == [0.0, 0.0] and (found.squared_gradients > 0).all()


def test_a_network_that_drops_its_second_derivative_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Cubic(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Once.apply(super().forward(input))  # type: ignore[return-value]

    here = Problem(Cubic(3, 1).double(), nn.MSELoss(), (torch.ones(6, 3, dtype=F64), torch.zeros(6, 1, dtype=F64)))
    with pytest.raises(ValueError, match=r"differentiable twice"):
        batch_sharpness(here, 3)


def test_refusals() -> None:
    here = problem()
    for function in (sam_ascent, worst_case_sharpness):
        with pytest.raises(ValueError, match=rf"{function.__name__}: radius must be positive and finite, got 0"):
            function(here, 0.0)
    with pytest.raises(ValueError, match=r"worst_case_sharpness: norm must be"):
        worst_case_sharpness(here, norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"worst_case_sharpness: num_steps"):
        worst_case_sharpness(here, num_steps=0)
    with pytest.raises(ValueError, match=r"worst_case_sharpness: start must be \[P\]"):
        worst_case_sharpness(here, start=torch.zeros(3))
    with pytest.raises(ValueError, match=r"box_sharpness: epsilon"):
        box_sharpness(here, -1.0)
    with pytest.raises(ValueError, match=r"box_sharpness: subspace must be in 1\.\."):
        box_sharpness(here, subspace=10**9)
    with pytest.raises(ValueError, match=r"batch_sharpness: batch_size must be in 1\.\.24 \(N\), got 25"):
        batch_sharpness(here, 25)
    with pytest.raises(ValueError, match=r"batch_sharpness: num_batches"):
        batch_sharpness(here, 5, num_batches=0)
