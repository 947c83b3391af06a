# SPDX-License-Identifier: Apache-2.0
"""Which engine is picked, that its first product is checked, and that nothing falls back in silence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab.operators.covariance import GradientCovarianceOperator
from curvlab.operators.engines import select
from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.engines.protocol import UnsupportedModel, batch_generator, draw_seed
from curvlab.operators.engines.select import ENGINES, make_engine
from curvlab.operators.fisher import EmpiricalFisherOperator, FisherOperator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.precision import math_mode
from curvlab.operators.problem import Problem
from tests.operators.models import CASES, labels, normal, split

pytestmark = pytest.mark.usefixtures("one_thread")


class Wrong(AutogradEngine):
    """Right in its Hessian, wrong in its transposed Jacobian."""

    def jacobian_transposed(self, outputs: Tensor) -> Tensor:
        return super().jacobian_transposed(outputs) * 1.1


class Nan(AutogradEngine):
    def hessian(self, rows: Tensor) -> Tensor:
        return rows * float("nan")


class Declining(AutogradEngine):
    def __init__(self, problem: Problem, **options: object) -> None:
        raise UnsupportedModel("node tanh (Tanh) has no rule")


class Talkative(AutogradEngine):
    notes = ("captured nothing",)


def only(monkeypatch, **engines: type) -> None:
    monkeypatch.setattr(select, "ENGINES", {name: f"tests:{name}" for name in engines})
    monkeypatch.setattr(select, "_load", engines.__getitem__)


def test_auto_asks_the_fastest_first_and_reports():
    assert list(ENGINES) == ["fused", "linearized", "autograd"]
    engine, report = make_engine(CASES["act_relu"]().problem(torch.float32))
    assert (engine.name, report.engine, report.declined) == ("fused", "fused", {})
    assert 0.0 < report.check_error < 1e-6 and report.check_samples == 2
    assert str(report).startswith("engine fused; ") and "off float64 autograd on 2 samples" in str(report)


def test_what_declined_is_named(monkeypatch):
    only(monkeypatch, first=Declining, second=Talkative)
    engine, report = make_engine(CASES["act_tanh"]().problem())
    assert isinstance(engine, Talkative)
    assert report.declined == {"first": "node tanh (Tanh) has no rule"}
    assert str(report).splitlines()[1:] == ["not first: node tanh (Tanh) has no rule", "captured nothing"]
    with pytest.raises(UnsupportedModel, match="has no rule"):
        make_engine(CASES["act_tanh"]().problem(), "first")
    only(monkeypatch, first=Declining)
    with pytest.raises(UnsupportedModel, match="no engine takes the model: first: node tanh"):
        make_engine(CASES["act_tanh"]().problem())


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-4), (torch.float32, 0.1)])
@pytest.mark.parametrize("asked", ["auto", "first"])
def test_a_wrong_product_is_an_error_not_a_fallback(monkeypatch, dtype, off, asked):
    class Off(Wrong):
        def hessian(self, rows: Tensor) -> Tensor:
            product = AutogradEngine.hessian(self, rows)
            return product + off * product.roll(1, 1)

    only(monkeypatch, first=Off, second=AutogradEngine)
    with pytest.raises(RuntimeError, match=r"hessian product of engine 'first' must be within .* relative error of"):
        make_engine(CASES["act_tanh"]().problem(dtype), asked)


def test_a_product_that_is_not_finite_is_refused(monkeypatch):
    only(monkeypatch, first=Nan)
    with pytest.raises(RuntimeError, match="relative error of inf"):
        make_engine(CASES["act_tanh"]().problem(torch.float32))


def test_samples_that_do_not_count_and_batches_of_one_are_no_obstacle():
    case = CASES["ignored"]()
    x, y = normal(12, 3), torch.full((12,), -100)
    y[10:] = 1
    padded = Problem(case.model, case.loss, (x, y)).to(torch.float32)
    assert make_engine(padded, "linearized")[1].check_error == 0.0
    norm = CASES["bn1d_batch"]()
    odd = Problem(norm.model, norm.loss, split(normal(14, 3), labels(14, classes=3), [7, 7]), batch_norm="batch")
    assert make_engine(odd.to(torch.float32), "autograd")[1].check_samples == 7


def test_a_hessian_below_the_range_of_float32_is_no_wrong_product():
    case = CASES["linear"]()
    y = torch.tensor([0, 1, 2])
    far = Problem(case.model, case.loss, (200.0 * torch.eye(3, 4, dtype=torch.float64), y)).with_params(
        {"weight": torch.eye(3, 4), "bias": torch.zeros(3)}
    )
    assert make_engine(far.to(torch.float32), "autograd")[1].check_error == 0.0


def test_the_product_that_will_be_used_is_the_one_that_is_checked(monkeypatch):
    only(monkeypatch, first=Wrong)
    problem = CASES["act_tanh"]().problem(torch.float32)
    assert make_engine(problem, product="ggn")[1].check_error < 1e-6
    with pytest.raises(RuntimeError, match=r"jacobian product .* of 1.0e-01"):
        make_engine(problem, product="jacobian")


def test_the_judge_is_not_compared_with_itself():
    report = make_engine(CASES["act_tanh"]().problem(), "autograd")[1]
    assert math.isnan(report.check_error) and report.check_samples == 0
    assert str(report) == "engine autograd"
    report = make_engine(CASES["act_tanh"]().problem(torch.float32), "autograd")[1]
    assert 0.0 < report.check_error < 1e-5
    report = make_engine(CASES["act_tanh"]().problem(torch.float32), "autograd", precision="bf16")[1]
    assert 1e-4 < report.check_error < report.tolerance == 0.2


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_every_engine_gives_one_operator(engine):
    problem = CASES["conv_stride_padding"]().problem()
    rows = normal(3, problem.num_params, seed=4)
    expected = AutogradEngine(problem).hessian(rows)
    operator = HessianOperator(problem, engine=engine)
    torch.testing.assert_close(operator.apply_rows(rows), expected, rtol=1e-9, atol=1e-13)


def test_bad_arguments_are_refused():
    problem = CASES["linear"]().problem()
    with pytest.raises(ValueError, match=r"engine must be 'auto' or one of .*, got 'magic'"):
        make_engine(problem, "magic")
    with pytest.raises(ValueError, match=r"product must be .*, got 'fisher'"):
        make_engine(problem, product="fisher")
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        make_engine(problem, "autograd", memory_budget=10)


def test_seeds_and_streams():
    cpu = torch.device("cpu")
    assert draw_seed(None) == 0
    assert draw_seed(torch.Generator().manual_seed(3)) == draw_seed(torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert draw_seed(generator) != draw_seed(generator)
    draws = [torch.rand(2, generator=batch_generator(2**62 - 1, index, cpu)) for index in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_tf32_is_off_and_put_back_whichever_way_a_caller_set_it():
    cudnn: Any = torch.backends.cudnn
    matmul, conv = torch.backends.cuda.matmul, cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # from here on PyTorch raises where matmul.allow_tf32 is read
        for precision, inside in ((None, "ieee"), ("tf32", "tf32")):
            with math_mode(precision, torch.device("cuda")):
                assert (matmul.fp32_precision, conv.fp32_precision) == (inside, inside)
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", before[1])
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def test_a_hessian_of_nothing_but_rounding_is_no_wrong_product(monkeypatch):
    norm = CASES["bn1d_batch"]()
    before = next(name for name, value in norm.model.named_parameters() if value.ndim == 2).replace("weight", "bias")
    x, y = normal(14, 3), labels(14, classes=3)
    for dtype in (torch.float32, torch.float64):
        problem = Problem(norm.model, norm.loss, (x, y), params=before, batch_norm="batch").to(dtype)
        for engine in ENGINES:
            assert make_engine(problem, engine)[1].check_error in (0.0, pytest.approx(float("nan"), nan_ok=True))

    class Off(AutogradEngine):
        def hessian(self, rows: Tensor) -> Tensor:
            return super().hessian(rows) + 1e-4

    only(monkeypatch, first=Off)
    with pytest.raises(RuntimeError, match="must be within"):
        make_engine(problem.to(torch.float32))


class OneDtype(torch.nn.Module):
    """Multiplies by a tensor that is no buffer: it runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(3, 2)
        self.mixing = normal(3, 3).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x @ self.mixing).sin()


@pytest.mark.parametrize("engine", ["autograd", "linearized"])
def test_a_model_of_one_dtype_is_judged_in_it_and_the_report_says_so(engine):
    data = (normal(5, 3).float(), labels(5, classes=2))
    report = make_engine(Problem(OneDtype(), torch.nn.CrossEntropyLoss(), data), engine)[1]
    assert report.judge == "float32 autograd" and "does not run in float64" in report.notes[0]
    if engine == "linearized":
        assert 0.0 <= report.check_error < 1e-5 and "off float32 autograd on 2 samples" in str(report)


def test_empirical_products_are_checked_as_such(monkeypatch):
    class Off(AutogradEngine):
        def ggn(self, rows: Tensor, kind: str = "loss") -> Tensor:
            return super().ggn(rows, kind) * (1.1 if kind == "empirical" else 1.0)

    only(monkeypatch, first=Off)
    problem = CASES["act_tanh"]().problem(torch.float32)
    for operator in (EmpiricalFisherOperator, GradientCovarianceOperator):
        with pytest.raises(RuntimeError, match="empirical product of engine 'first'"):
            operator(problem)


def test_an_engine_that_declines_leaves_the_draws_alone(monkeypatch):
    class Late(AutogradEngine):
        def __init__(self, problem: Problem, **options: object) -> None:
            super().__init__(problem, **options)  # type: ignore[arg-type]
            raise UnsupportedModel("seen too late")

    problem = CASES["act_tanh"]().problem()
    expected = FisherOperator(problem, kind="monte_carlo", engine="autograd").to_dense()
    only(monkeypatch, first=Late, second=AutogradEngine)
    assert torch.equal(FisherOperator(problem, kind="monte_carlo").to_dense(), expected)


def test_the_report_reads_in_one_line_and_names_the_route():
    report = HessianOperator(CASES["act_tanh"]().problem(), engine="linearized").report
    assert report.notes == ("hessian: forward over reverse, recorded",)
    assert repr(report).startswith("<engine linearized; ") and repr(report).endswith("reverse, recorded>")


def test_bfloat16_problems_go_to_an_engine_that_takes_them():
    engine, report = make_engine(CASES["act_relu"]().problem(torch.bfloat16))
    assert engine.name == "linearized" and "must be float32 or float64" in report.declined["fused"]
