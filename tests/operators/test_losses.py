# SPDX-License-Identifier: Apache-2.0
"""Losses on outputs against PyTorch's own, derivatives by ``torch.func``, and digits where naive formulas have none."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.operators import HessianOperator, Problem
from curvlab.operators.losses import CustomLoss, OutputLoss, SoftmaxCrossEntropy, SquaredError, as_loss
from tests.operators.models import F64, labels, normal

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=F64)


def dense(curvature, outputs: Tensor) -> Tensor:
    unit = torch.eye(outputs.numel(), dtype=outputs.dtype).reshape(-1, *outputs.shape)
    return curvature(unit).reshape(outputs.numel(), -1)


def check_against(reference, outputs: Tensor, targets: Tensor) -> None:
    """Mean, gradient and Hessian of PyTorch's loss."""
    loss = as_loss(reference)
    weight = loss.weight(None, targets)
    total = loss.total(outputs, targets)
    torch.testing.assert_close(total / weight, reference(outputs, targets), rtol=1e-13, atol=0)
    gradient = torch.func.grad(lambda z: reference(z, targets))(outputs)
    torch.testing.assert_close(loss.gradient(outputs, targets) / weight, gradient, rtol=1e-12, atol=1e-15)
    hessian = torch.func.hessian(lambda z: reference(z, targets))(outputs).reshape(outputs.numel(), -1)
    torch.testing.assert_close(
        dense(loss.curvature(outputs, targets), outputs) / weight, hessian, rtol=1e-12, atol=1e-15
    )
    again = torch.func.hessian(lambda z: loss.total(z, targets))(outputs).reshape(outputs.numel(), -1)
    torch.testing.assert_close(again / weight, hessian, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_pytorchs(shape, smoothing, weights):
    outputs = 3.0 * normal(*shape)
    indices = labels(shape[0], *shape[2:], classes=4)
    indices.view(-1)[1] = -100
    loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
    check_against(loss, outputs, indices)
    check_against(loss, outputs, normal(*shape, seed=5).softmax(1))
    check_against(functools.partial(F.cross_entropy, weight=weights, label_smoothing=smoothing), outputs, indices)


def test_squared_error_is_pytorchs():
    for reference in (nn.MSELoss(), F.mse_loss):
        check_against(reference, normal(4, 3, 2), normal(4, 3, 2, seed=2))


def test_a_callable_is_a_mean_over_the_batch():
    def cosh(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).cosh().sum() / len(outputs)

    loss = as_loss(cosh)
    assert isinstance(loss, CustomLoss) and not loss.is_convex
    check_against(cosh, normal(5, 3), normal(5, 3, seed=2))
    linear = as_loss(lambda outputs, targets: outputs.mean())
    assert not linear.curvature(normal(4, 2), normal(4, 2))(normal(3, 4, 2)).any()


def test_one_class_has_no_loss():
    outputs = normal(3, 1).requires_grad_()
    total = SoftmaxCrossEntropy().total(outputs, torch.zeros(3, dtype=torch.long))
    assert total.item() == 0.0
    assert not torch.autograd.grad(total, outputs)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("margin", [10.0, 30.0, 60.0])
def test_a_saturated_softmax_keeps_its_digits(dtype, margin):
    """Naive 1 - p has no digit left in float32 beyond a margin of 17; here loss, gradient and curvature have all."""
    loss = SoftmaxCrossEntropy()
    outputs = torch.tensor([[margin, 0.0, -1.0]], dtype=dtype)
    targets = torch.zeros(1, dtype=torch.long)
    others = math.exp(-margin) + math.exp(-margin - 1.0)
    precise = 20 * torch.finfo(dtype).eps
    assert loss.total(outputs, targets).item() == pytest.approx(math.log1p(others), rel=precise)
    p = [1.0 / (1.0 + others), math.exp(-margin) / (1.0 + others), math.exp(-margin - 1.0) / (1.0 + others)]
    wanted = torch.tensor([[-(p[1] + p[2]), p[1], p[2]]], dtype=F64)
    torch.testing.assert_close(loss.gradient(outputs, targets).double(), wanted, rtol=precise, atol=0)
    leaf = outputs.clone().requires_grad_()
    gradient = torch.autograd.grad(loss.total(leaf, targets), leaf, create_graph=True)[0]
    torch.testing.assert_close(gradient.detach().double(), wanted, rtol=precise, atol=0)
    exact = torch.tensor([p[0] * (p[1] + p[2]), -p[0] * p[1], -p[0] * p[2]], dtype=F64)
    u = torch.tensor([1.0, 0.0, 0.0], dtype=dtype)
    by_hand = loss.curvature(outputs, targets)(u.reshape(1, 1, 3))[0, 0]
    torch.testing.assert_close(by_hand.double(), exact, rtol=precise, atol=0)
    by_autograd = torch.autograd.grad(gradient, leaf, u.reshape(1, 3))[0][0]
    torch.testing.assert_close(by_autograd.double(), exact, rtol=precise, atol=0)


@pytest.mark.parametrize("gap", [40.0, 200.0, 1e4])
def test_a_confidently_wrong_prediction_does_not_overflow(gap):
    outputs = torch.tensor([[0.0, gap]], dtype=torch.float32)
    target = torch.zeros(1, dtype=torch.long)
    assert SoftmaxCrossEntropy().total(outputs, target).item() == pytest.approx(gap, rel=1e-6)
    torch.testing.assert_close(SoftmaxCrossEntropy().gradient(outputs, target), torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (SoftmaxCrossEntropy(WEIGHTS), labels(5, classes=4)),
        (SoftmaxCrossEntropy(label_smoothing=0.2), labels(5, classes=4)),
        (SquaredError(), normal(5, 4, seed=3)),
    ],
    ids=["weighted", "smoothed", "squared"],
)
def test_sampled_curvature_is_unbiased_with_error_falling_as_one_over_root_n(loss, targets):
    outputs = normal(5, 4)
    exact = dense(loss.curvature(outputs, targets), outputs)

    def errors(num_samples: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        runs = [
            dense(
                loss.curvature(outputs, targets, "monte_carlo", num_samples=num_samples, generator=generator), outputs
            )
            for _ in range(60)
        ]
        return torch.stack(runs) - exact

    few, many = errors(10), errors(160)
    spread = few.std(0)
    # Only entries within one sample can be non-zero in both, so only these have a spread.
    wrong = few.mean(0).abs() > 4.5 * spread / 60**0.5 + 1e-12
    if isinstance(loss, SoftmaxCrossEntropy):
        assert not wrong.any()
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 5).bool()
    assert not wrong[blocks].any()
    assert few[:, blocks].square().mean().sqrt() / many[:, blocks].square().mean().sqrt() == pytest.approx(4.0, rel=0.2)


def test_sampling_positions_of_a_sequence_one_by_one():
    outputs, targets = normal(2, 3, 4), labels(2, 4, classes=3)
    loss = SoftmaxCrossEntropy()
    generator = torch.Generator().manual_seed(0)
    sampled = dense(loss.curvature(outputs, targets, "monte_carlo", num_samples=20000, generator=generator), outputs)
    exact = dense(loss.curvature(outputs, targets), outputs)
    assert (sampled - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SquaredError(), CustomLoss(nn.MSELoss())])
def test_empirical_curvature_is_the_outer_product_a_sample(loss):
    outputs = normal(3, 2, 4)
    targets = labels(3, 4, classes=2) if isinstance(loss, SoftmaxCrossEntropy) else normal(3, 2, 4, seed=2)
    delta = loss.gradient(outputs, targets).reshape(3, -1)
    expected = torch.block_diag(*[torch.outer(d, d) for d in delta])
    curvature = loss.curvature(outputs, targets, "empirical")
    torch.testing.assert_close(dense(curvature, outputs), expected, rtol=1e-13, atol=1e-15)
    single = dense(curvature.to(torch.float32), outputs.float()).double()
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-6)


def test_which_loss_stands_for_what():
    ours = SquaredError()
    assert as_loss(ours) is ours and isinstance(ours, OutputLoss)
    weighted = as_loss(nn.CrossEntropyLoss(WEIGHTS, ignore_index=2, label_smoothing=0.1))
    assert isinstance(weighted, SoftmaxCrossEntropy)
    assert (weighted.ignore_index, weighted.label_smoothing) == (2, 0.1)
    assert weighted.weight(None, torch.tensor([0, 2, 3])) == pytest.approx(0.8)

    class Halved(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) / 2

    assert isinstance(as_loss(Halved()), CustomLoss)
    assert isinstance(as_loss(functools.partial(F.cross_entropy, reduction="mean")), SoftmaxCrossEntropy)


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(reduction="sum"), functools.partial(F.huber_loss, reduction="sum", delta=0.7)]
)
def test_a_callable_that_sums_is_not_summed_again(loss):
    outputs, targets = normal(5, 3), normal(5, 3, seed=2).sigmoid()
    assert as_loss(loss).total(outputs, targets) == loss(outputs, targets)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_negative_log_likelihood_counts_weights_not_samples(weights):
    outputs, targets = normal(9, 4, 2).log_softmax(1), labels(9, 2, classes=4)
    targets[1] = -100
    for reference in (nn.NLLLoss(weights), functools.partial(F.nll_loss, weight=weights)):
        loss = as_loss(reference)
        parts = [(outputs[:2], targets[:2]), (outputs[2:], targets[2:])]
        total = sum(loss.total(*part) for part in parts)
        assert float(total) / sum(loss.weight(None, y) for _, y in parts) == pytest.approx(
            float(reference(outputs, targets)), rel=1e-13
        )
    assert repr(as_loss(nn.NLLLoss(ignore_index=2))) == "NegativeLogLikelihood(ignore_index=2)"


def test_a_label_that_names_no_class_is_refused():
    loss, outputs = SoftmaxCrossEntropy(), normal(4, 3)
    for bad in (3, -1):
        targets = torch.tensor([0, bad, 2, -100])
        for call in (loss.gradient, loss.curvature):
            with pytest.raises(ValueError, match=rf"in \[0, 3\) .* or ignore_index, got {bad}"):
                call(outputs, targets)


def test_labels_are_looked_at_before_they_are_indices():
    """A label past the end would end a CUDA context, and -1 would be taken for the last class' weight."""
    weighted = SoftmaxCrossEntropy(WEIGHTS, ignore_index=255)
    with pytest.raises(ValueError, match=r"in \[0, C\) .* or ignore_index, got -1"):
        SoftmaxCrossEntropy().weight(None, torch.tensor([0, -1, -100]))
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=rf"in \[0, 4\) .* or ignore_index, got {bad}"):
            weighted.weight(None, torch.tensor([0, bad, 255]))
    assert weighted.weight(None, torch.tensor([1, 1, 255, 3])) == pytest.approx(4.3)
    assert weighted.weight(None, torch.tensor([1, 1, 255, 3], dtype=torch.uint8)) == pytest.approx(4.3)
    model = nn.Linear(3, 4).double()
    with pytest.raises(ValueError, match=r"in \[0, 4\) .* got 4"):
        HessianOperator(Problem(model, nn.CrossEntropyLoss(), (normal(3, 3), torch.tensor([0, 4, 1]))))


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), F.smooth_l1_loss])
def test_outputs_may_have_no_axis_but_the_samples(loss):
    own, outputs, targets = as_loss(loss), normal(5), normal(5, seed=3).sigmoid()
    gradient = own.gradient(outputs, targets)
    torch.testing.assert_close(dense(own.curvature(outputs, targets, "empirical"), outputs), gradient.square().diag())
    if own.is_convex:
        drawn = own.curvature(outputs, targets, "monte_carlo", num_samples=40_000, generator=torch.Generator())
        torch.testing.assert_close(dense(drawn, outputs), 2.0 * torch.eye(5, dtype=F64), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["loss", "monte_carlo", "empirical"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_no_directions_give_no_products(loss, kind):
    outputs = normal(4, 3)
    targets = labels(4, classes=3) if isinstance(loss, nn.CrossEntropyLoss) else normal(4, 3, seed=2)
    curvature = as_loss(loss).curvature(outputs, targets, kind)
    assert curvature(outputs.new_zeros(0, 4, 3)).shape == (0, 4, 3)


def test_losses_say_what_they_are():
    assert repr(as_loss(nn.CrossEntropyLoss())) == "SoftmaxCrossEntropy()"
    options = SoftmaxCrossEntropy(torch.ones(2), ignore_index=3, label_smoothing=0.1)
    assert repr(options) == "SoftmaxCrossEntropy(class_weights=[1.0, 1.0], ignore_index=3, label_smoothing=0.1)"
    assert repr(as_loss(F.mse_loss)) == "SquaredError()"
    assert repr(as_loss(F.l1_loss)) == "CustomLoss(l1_loss, 'mean')"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: as_loss(3), TypeError, "PyTorch loss or a callable, got int"),
        (lambda: as_loss(nn.MSELoss(reduction="none")), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: as_loss(functools.partial(F.mse_loss, reduction="none")), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: CustomLoss(F.l1_loss, "none"), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: SoftmaxCrossEntropy().weight(None, normal(5)), ValueError, r"class probabilities .*, got \[5\] of"),
        (lambda: SoftmaxCrossEntropy(label_smoothing=2.0), ValueError, r"in \[0, 1\], got 2.0"),
        (lambda: SoftmaxCrossEntropy(-WEIGHTS), ValueError, "non-negative"),
        (lambda: SoftmaxCrossEntropy().total(normal(3), labels(3, classes=2)), ValueError, r"\[N, C, ...\], got \[3\]"),
        (
            lambda: SoftmaxCrossEntropy().total(normal(3, 2), labels(4, classes=2)),
            ValueError,
            r"targets must be class indices .*, \[3\], got \[4\]",
        ),
        (lambda: SoftmaxCrossEntropy(WEIGHTS).total(normal(3, 2), labels(3, classes=2)), ValueError, "C == 2"),
        (
            lambda: SquaredError().total(normal(3, 1), normal(3)),
            ValueError,
            r"shaped as the outputs, \[3, 1\], got \[3\]",
        ),
        (lambda: CustomLoss(lambda o, t: o).total(normal(3, 1), normal(3)), ValueError, r"0-d tensor .*, got \[3, 1\]"),
        (
            lambda: SquaredError().curvature(normal(2, 1), normal(2, 1), "exact"),
            ValueError,
            "kind must be .* got 'exact'",
        ),
        (
            lambda: CustomLoss(F.l1_loss).curvature(normal(2, 1), normal(2, 1), "monte_carlo"),
            ValueError,
            "no known distribution",
        ),
        (
            lambda: SquaredError().curvature(normal(2, 1), normal(2, 1), "monte_carlo", num_samples=0),
            ValueError,
            "at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
