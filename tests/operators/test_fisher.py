# SPDX-License-Identifier: Apache-2.0
"""Fisher matrices and the covariance of gradients against dense ones from per-sample gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlab.operators.covariance import GradientCovarianceOperator
from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.fisher import EmpiricalFisherOperator, FisherOperator
from curvlab.operators.problem import Problem
from tests.operators.dense import dense_empirical_fisher, dense_ggn
from tests.operators.models import CASES, F64, Case, labels, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = ("linearized", "autograd")


def small_net(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def case_of(loss: object, targets: Tensor) -> Case:
    x = normal(len(targets), 3)
    return Case(small_net(), loss, [(x[:4], targets[:4]), (x[4:], targets[4:])])


def sample_gradients(case: Case, loss: object) -> Tensor:
    """``[N, P]``: plain autograd, sample by sample, of ``loss(outputs, target)``."""
    params: dict[str, Tensor] = dict(case.model.named_parameters())
    found = []
    for inputs, targets in case.batches:
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            value = loss(functional_call(case.model, params, (x,)), y)  # type: ignore[operator]
            found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(params.values()))]))
    return torch.stack(found)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance * expected.abs().max().item() + 1e-13


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["act_tanh", "weighted", "sequence", "conv_stride_padding"])
def test_exact_fisher_is_the_expected_outer_product(name: str, engine: str) -> None:
    case = CASES[name]()
    fisher = FisherOperator(case.problem(), engine=engine)
    rows = normal(3, fisher.shape[0], seed=9)
    close(fisher.apply_rows(rows), rows @ dense_ggn(case))
    assert fisher.is_psd


def test_exact_fisher_by_summing_over_all_labels() -> None:
    """The definition itself: sum_c p_c g(c) g(c)^T for every sample, gradients in theta by autograd."""
    case = case_of(nn.CrossEntropyLoss(), labels(7, classes=3))
    model, params = case.model, dict[str, Tensor](case.model.named_parameters())
    dense = torch.zeros(31, 31, dtype=F64)
    for inputs, _ in case.batches:
        for x in inputs.split(1):
            log_p = functional_call(model, params, (x,)).log_softmax(1)[0]
            for log_p_c in log_p:
                parts = torch.autograd.grad(log_p_c, list(params.values()), retain_graph=True)
                g = torch.cat([part.reshape(-1) for part in parts])
                dense += log_p_c.exp().detach() * torch.outer(g, g) / 7
    close(FisherOperator(case.problem()).to_dense(), dense)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["act_tanh", "weighted", "sequence", "mse", "custom_loss", "bn1d_frozen"])
def test_empirical_fisher_is_dense(name: str, engine: str) -> None:
    case = CASES[name]()
    operator = EmpiricalFisherOperator(case.problem(), engine=engine)
    rows = normal(2, operator.shape[0], seed=9)
    close(operator.apply_rows(rows), rows @ dense_empirical_fisher(case))
    assert operator.is_psd


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_monte_carlo_is_unbiased_with_the_right_spread(loss: str) -> None:
    """Mean of 400 independent estimates within 4.5 standard errors; four times the draws halve the deviation."""
    targets = labels(7, classes=3) if loss == "cross_entropy" else normal(7, 3, seed=6)
    case = case_of(nn.CrossEntropyLoss() if loss == "cross_entropy" else nn.MSELoss(), targets)
    problem = case.problem()
    row = normal(1, problem.num_params, seed=9)
    exact = (row @ dense_ggn(case))[0] if loss == "cross_entropy" else FisherOperator(problem).apply_rows(row)[0]

    def estimates(num_samples: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(num_samples)
        # the engine alone: checks at construction would be most of the time
        engines = (AutogradEngine(problem, num_samples=num_samples, generator=generator) for _ in range(count))
        return torch.stack([engine.ggn(row, "monte_carlo")[0] for engine in engines])

    one, four = estimates(1, 400), estimates(4, 200)
    error = (one.mean(0) - exact).abs() / (one.std(0) / 400**0.5 + 1e-12)
    assert error.max().item() < 4.5
    ratio = (one - exact).square().sum(1).mean() / (four - exact).square().sum(1).mean()
    assert 2.6 < ratio.item() < 6.0  # 4 with a standard error of about 0.5


def test_monte_carlo_draws_once_and_alike_in_every_engine() -> None:
    case = CASES["act_tanh"]()
    problem = case.problem()
    rows = normal(2, problem.num_params, seed=9)
    built = [
        FisherOperator(problem, kind="monte_carlo", generator=torch.Generator().manual_seed(5), engine=engine)
        for engine in ENGINES
    ]
    first = built[0].apply_rows(rows)
    close(built[0].apply_rows(rows), first)
    close(built[1].apply_rows(rows), first)
    other = FisherOperator(problem, kind="monte_carlo", generator=torch.Generator().manual_seed(6)).apply_rows(rows)
    assert (other - first).abs().max() > 1e-3 * first.abs().max()


def test_precision_error_compares_one_draw() -> None:
    """Two draws would be 50 % apart, bfloat16 is not."""
    problem = CASES["act_tanh"]().problem(torch.float32)
    fisher = FisherOperator(problem, kind="monte_carlo", engine="linearized", precision="bf16")
    assert 1e-5 < fisher.precision_error < 3e-2


def test_processes_with_generators_alike_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    problem = CASES["act_tanh"]().problem(process_group=object())
    dense = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        dense.append(FisherOperator(problem, kind="monte_carlo", engine="autograd").to_dense())
    assert torch.equal(dense[0], dense[2])
    assert (dense[0] - dense[1]).norm() > 0.05 * dense[0].norm()


def test_precision_error_of_the_covariance_is_that_of_its_mean_too() -> None:
    problem = CASES["act_tanh"]().problem(torch.float32)
    low = GradientCovarianceOperator(problem, engine="autograd", precision="bf16")
    stated = low.precision_error
    row = torch.randn(1, problem.num_params, generator=torch.Generator().manual_seed(0))
    full = GradientCovarianceOperator(problem, engine="autograd").apply_rows(row)
    true = ((low.apply_rows(row) - full).norm() / full.norm()).item()
    assert stated == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "weighted"])
def test_gradient_covariance_is_that_of_the_samples(loss: str, reduction: str, engine: str) -> None:
    weights = torch.tensor([0.5, 2.0, 1.2], dtype=F64)
    targets = normal(7, 3, seed=6) if loss == "mse" else labels(7, classes=3)
    module, each, z = {
        "cross_entropy": (nn.CrossEntropyLoss(), F.cross_entropy, 7.0),
        "mse": (nn.MSELoss(), functools.partial(F.mse_loss, reduction="sum"), 21.0),
        "weighted": (
            nn.CrossEntropyLoss(weights),
            functools.partial(F.cross_entropy, weight=weights, reduction="sum"),
            weights[targets].sum().item() if loss == "weighted" else 0.0,
        ),
    }[loss]
    case = case_of(module, targets)
    problem = case.problem(reduction=reduction)
    gradients = sample_gradients(case, each) * (7.0 / (z if reduction == "mean" else 1.0))
    centered = gradients - gradients.mean(0)
    operator = GradientCovarianceOperator(problem, engine=engine)
    rows = normal(3, problem.num_params, seed=9)
    close(operator.apply_rows(rows), rows @ (centered.T @ centered / 7))
    close(operator.mean, gradients.mean(0))
    uncentered = GradientCovarianceOperator(problem, engine=engine, centered=False)
    close(uncentered.apply_rows(rows), rows @ (gradients.T @ gradients / 7))


def test_covariance_of_equal_samples_is_zero_to_rounding() -> None:
    x, y = normal(1, 3).expand(6, 3).clone(), torch.ones(6, dtype=torch.long)
    problem = Problem(small_net(), nn.CrossEntropyLoss(), (x, y))
    operator = GradientCovarianceOperator(problem)
    product = operator.apply_rows(operator.mean.unsqueeze(0))
    assert product.norm().item() <= 1e-13 * operator.mean.norm().item() ** 3


def test_split_into_batches_does_not_matter() -> None:
    x, y = normal(7, 3), labels(7, classes=3)
    row = normal(1, 31, seed=9)
    for operator in (EmpiricalFisherOperator, GradientCovarianceOperator):
        results = [
            operator(Problem(small_net(), nn.CrossEntropyLoss(), list(zip(x.split(n), y.split(n), strict=True))))
            for n in (7, 3, 1)
        ]
        for other in results[1:]:
            close(other.apply_rows(row), results[0].apply_rows(row))


def test_refusals_name_the_argument() -> None:
    problem = CASES["act_tanh"]().problem()
    with pytest.raises(ValueError, match="FisherOperator: kind must be"):
        FisherOperator(problem, kind="empirical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FisherOperator: num_samples must be at least 1, got 0"):
        FisherOperator(problem, num_samples=0)
    custom = Problem(small_net(), lambda out, y: F.cross_entropy(out, y), (normal(4, 3), labels(4, classes=3)))
    for kind in ("exact", "monte_carlo"):
        with pytest.raises(ValueError, match="FisherOperator: problem must have cross entropy or squared error"):
            FisherOperator(custom, kind=kind)
    with pytest.raises(ValueError, match="batch_norm 'eval' or 'frozen'"):
        GradientCovarianceOperator(CASES["bn1d_batch"]().problem())
