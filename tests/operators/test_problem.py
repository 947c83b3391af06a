# SPDX-License-Identifier: Apache-2.0
"""Problems: what is frozen, what is counted, which data is refused, and that the split into batches never enters."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvlab.operators.engines.autograd import AutogradEngine
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.problem import Problem
from curvlab.operators.problem_operator import check_deterministic
from tests.operators.models import CASES, F64, Tied, labels, normal, seeded, split

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options) -> Problem:
    return Problem(net(), nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)), **options)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


class Noisy(nn.Module):
    """Dropout that evaluation mode does not switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(x, 0.5, training=True))


def test_later_training_moves_neither_problem_nor_products():
    model = net()
    problem = Problem(model, nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)))
    rows = normal(1, problem.num_params, seed=4)
    before = AutogradEngine(problem).hessian(rows)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0)
    assert torch.equal(AutogradEngine(problem).hessian(rows), before)


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_the_model_is_left_as_it_was(mode):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))).train()
    before = copy.deepcopy(model.state_dict())
    problem = Problem(model, nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)), batch_norm=mode)
    AutogradEngine(problem).hessian(normal(2, problem.num_params))
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(module.training for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in problem.buffers.items())


@pytest.mark.parametrize(
    "name", ["act_relu", "mse", "weighted", "smoothed", "soft_targets", "sequence", "named", "pair"]
)
def test_products_do_not_depend_on_the_split_into_batches(name):
    case = CASES[name]()
    problem = case.problem()
    rows = normal(2, problem.num_params, seed=4)
    x = [inputs for inputs, _ in case.batches]
    y = torch.cat([targets for _, targets in case.batches])
    if isinstance(x[0], dict):
        whole = {key: torch.cat([part[key] for part in x]) for key in x[0]}
    else:
        whole = tuple(map(torch.cat, zip(*x, strict=True))) if isinstance(x[0], tuple) else torch.cat(x)
    together = Problem(case.model, case.loss, (whole, y))
    single = Problem(case.model, case.loss, split(whole, y, [1] * len(y)))
    for other in (together, single):
        assert other.normalizer == pytest.approx(problem.normalizer, rel=1e-14)
        assert other.num_samples == problem.num_samples
        for kind in ("hessian", "ggn"):
            got, expected = (getattr(AutogradEngine(p), kind)(rows) for p in (other, problem))
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def test_which_parameters_are_chosen():
    assert list(small().params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(small(params="2.*").params) == ["2.weight", "2.bias"]
    assert list(small(params=["2.bias", "0.*"]).params) == ["0.weight", "0.bias", "2.bias"]
    assert list(small(params=lambda name, param: param.ndim == 2).params) == ["0.weight", "2.weight"]
    chosen = small(params="2.bias")
    assert list(chosen.fixed) == ["0.weight", "0.bias", "2.weight"] and chosen.num_params == 2
    model = net()
    model.get_parameter("0.weight").requires_grad_(False)
    data = (normal(7, 3), labels(7, classes=2))
    assert "0.weight" not in Problem(model, nn.CrossEntropyLoss(), data).params
    assert list(Problem(model, nn.CrossEntropyLoss(), data, params="0.weight").params) == ["0.weight"]
    tied = Problem(seeded(Tied), nn.CrossEntropyLoss(), (normal(5, 4), labels(5, classes=3)), params="second.weight")
    assert list(tied.params) == ["first.weight"]


def test_a_compiled_model_is_unwrapped():
    compiled = Problem(torch.compile(net()), nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)))
    rows = normal(1, compiled.num_params)
    assert list(compiled.params) == list(small().params)
    assert torch.equal(AutogradEngine(compiled).hessian(rows), AutogradEngine(small()).hessian(rows))


def test_rows_and_parameters():
    problem = small()
    rows = normal(3, problem.num_params)
    pieces = problem.rows_to_params(rows)
    assert {name: tuple(piece.shape) for name, piece in pieces.items()} == {
        "0.weight": (3, 4, 3), "0.bias": (3, 4), "2.weight": (3, 2, 4), "2.bias": (3, 2)
    }  # fmt: skip
    assert torch.equal(problem.params_to_rows(pieces), rows)
    single = problem.rows_to_params(rows[0])
    assert torch.equal(problem.params_to_rows(single, batched=False), rows[0])


def test_frozen_statistics_are_those_of_training_mode_and_have_no_derivative():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = normal(6, 3), labels(6, classes=2)
    problems = {mode: Problem(model, nn.CrossEntropyLoss(), (x, y), batch_norm=mode) for mode in ("frozen", "batch")}
    expected = copy.deepcopy(model).train()(x).detach()
    for problem in problems.values():
        torch.testing.assert_close(problem.outputs(problem.params, x), expected, rtol=1e-12, atol=1e-14)
    moved = {name: value + 0.1 for name, value in problems["frozen"].params.items()}
    before, after = problems["frozen"].statistics(x), problems["frozen"].with_params(moved).statistics(x)
    # At other parameters the outputs still use the statistics of theta, unless theta itself is moved there.
    assert torch.equal(before["1.running_mean"], problems["frozen"].statistics(x)["1.running_mean"])
    assert not torch.allclose(before["1.running_mean"], after["1.running_mean"])
    assert not torch.allclose(problems["frozen"].outputs(moved, x), problems["batch"].outputs(moved, x))
    torch.testing.assert_close(
        problems["frozen"].with_params(moved).outputs({}, x),
        problems["batch"].outputs(moved, x),
        rtol=1e-12,
        atol=1e-14,
    )


def test_to_subset_and_with_params():
    problem = small()
    assert problem.to(torch.float32).dtype == torch.float32 and problem.dtype == F64
    x, _ = next(iter(problem.to(torch.float32).batches()))
    assert x.dtype == torch.float32
    batches = Problem(net(), nn.CrossEntropyLoss(), split(normal(7, 3), labels(7, classes=2), [3, 4])).subset(5)
    assert [len(y) for _, y in batches.batches()] == [3, 2]
    assert (batches.num_samples, batches.normalizer) == (5, 5.0)
    zero = problem.with_params({name: torch.zeros_like(value) for name, value in problem.params.items()})
    assert AutogradEngine(zero).loss() == pytest.approx(0.6931471805599453)
    with pytest.raises(ValueError, match=r"with_params: params must have '0.weight', got \[\]"):
        problem.with_params({})
    with pytest.raises(ValueError, match=r"shape \[4, 3\] for 0.weight, got \[3, 4\]"):
        problem.with_params({**problem.params, "0.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="got 'extra' besides"):
        problem.with_params({**problem.params, "extra": torch.zeros(1)})


def test_a_steady_loader_is_taken_and_a_shuffling_one_refused():
    data = TensorDataset(normal(8, 3), labels(8, classes=2))
    steady = Problem(net(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=3))
    whole = Problem(net(), nn.CrossEntropyLoss(), (data.tensors[0], data.tensors[1]))
    rows = normal(1, whole.num_params)
    torch.testing.assert_close(AutogradEngine(steady).hessian(rows), AutogradEngine(whole).hessian(rows))
    generator = torch.Generator().manual_seed(0)
    shuffling = DataLoader(data, batch_size=3, shuffle=True, generator=generator)
    problem = Problem(net(), nn.CrossEntropyLoss(), shuffling)
    with pytest.raises(ValueError, match=r"same batches on every pass .*shuffle=False"):
        AutogradEngine(problem).hessian(rows)
    dropping = DataLoader(data, batch_size=3, shuffle=True, drop_last=True, generator=generator)
    with pytest.raises(ValueError, match="same batches"):
        AutogradEngine(Problem(net(), nn.CrossEntropyLoss(), dropping)).gradient()


def test_looking_at_a_loader_does_not_move_the_global_generator():
    loader = DataLoader(TensorDataset(normal(8, 3), labels(8, classes=2)), batch_size=3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    problem = Problem(net(), nn.CrossEntropyLoss(), loader)
    torch.manual_seed(7)
    list(problem.batches())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("later", [1, 3])
def test_a_pass_with_fewer_or_more_batches_is_refused(later):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            count = 2 if self.passes == 1 else later
            return iter([(normal(2, 3, seed=i), labels(2, classes=2)) for i in range(count)])

    with pytest.raises(ValueError, match="same batches"):
        AutogradEngine(Problem(net(), nn.CrossEntropyLoss(), Changing())).gradient()


def test_noise_in_the_forward_pass_is_found():
    problem = Problem(Noisy().double(), nn.CrossEntropyLoss(), (normal(7, 3), labels(7, classes=2)))
    with pytest.raises(ValueError, match="Judge: model must be deterministic, got outputs that differ by"):
        check_deterministic(problem, "Judge")
    check_deterministic(CASES["dropout"]().problem(), "Judge")


def test_inference_tensors_and_modes_do_not_turn_derivatives_into_zeros():
    expected = HessianOperator(small(), engine="autograd").to_dense()
    with torch.inference_mode():
        data = (normal(7, 3), labels(7, classes=2))
        with pytest.raises(RuntimeError, match=r"Problem: .* outside of torch.inference_mode"):
            small()
    features = HessianOperator(Problem(net(), nn.CrossEntropyLoss(), data), engine="linearized")
    torch.testing.assert_close(features.to_dense(), expected)
    problem = small()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"HessianOperator: .* outside of torch.inference_mode"):
            HessianOperator(problem)
        with pytest.raises(RuntimeError, match=r"HessianOperator: .* outside of torch.inference_mode"):
            _ = features @ torch.ones(features.shape[1], dtype=F64)


@pytest.mark.parametrize("engine", ["autograd", "linearized", "fused"])
def test_autocast_around_a_product_does_not_round_it(engine):
    problem = small().to(torch.float32)
    row = normal(1, problem.num_params).float()
    expected = HessianOperator(problem, engine=engine).apply_rows(row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = HessianOperator(problem, engine=engine).apply_rows(row)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_a_process_without_samples_stops_all_of_them(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda counts, group: counts.add_(torch.tensor([0.0, 0.0, 1.0]))
    )
    with pytest.raises(ValueError, match="at least one sample, got none on 1 process"):
        small(process_group=object())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_style_weight_norm_is_taken():
    layer = seeded(lambda: nn.utils.weight_norm(nn.Linear(3, 2)))
    layer(normal(7, 3))  # leaves a weight on the module that is no leaf
    new = seeded(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with torch.no_grad():
        for value, other in zip(new.parameters(), layer.parameters(), strict=True):
            value.copy_(other)
    data = (normal(7, 3), labels(7, classes=2))
    old, other = (Problem(m, F.cross_entropy, data) for m in (layer, new))
    assert list(old.params) == ["bias", "weight_g", "weight_v"]
    torch.testing.assert_close(
        HessianOperator(old, engine="autograd").to_dense(), HessianOperator(other, engine="autograd").to_dense()
    )


def test_a_problem_says_what_it_is():
    text = repr(small(reduction="sum"))
    assert text == (
        "Problem(Sequential, SoftmaxCrossEntropy(), N=7, P=26 float64 on cpu, reduction='sum', params: 0.weight, "
        "0.bias, 2.weight, 2.bias)"
    )
    many = Problem(nn.Sequential(*[nn.Linear(2, 2), nn.BatchNorm1d(2)] * 2), F.mse_loss, (normal(3, 2), normal(3, 2)))
    assert "batch_norm='eval', params: 0.weight" in repr(many)


def test_attention_says_that_it_takes_the_math_path():
    with pytest.warns(UserWarning, match="scaled_dot_product_attention runs by its math path"):
        check_deterministic(CASES["attention"]().problem(), "Judge")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_deterministic(CASES["act_relu"]().problem(), "Judge")
    encoder = seeded(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), nn.Flatten(), nn.Linear(12, 2)
        )
    )
    problem = Problem(encoder, nn.CrossEntropyLoss(), (normal(5, 3, 4), labels(5, classes=2)))
    with pytest.warns(UserWarning, match="math path"):
        check_deterministic(problem, "Judge")
    hessian = AutogradEngine(problem).hessian(torch.eye(problem.num_params, dtype=F64))
    assert hessian.abs().max() > 0.01
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-10, atol=1e-13)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(x), x


DATA = (normal(4, 3), labels(4, classes=2))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Problem("net", F.mse_loss, DATA), TypeError, "model must be an nn.Module, got str"),
        (lambda: small(reduction="none"), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: small(batch_norm="train"), ValueError, "'eval', 'frozen' or 'batch', got 'train'"),
        (lambda: small(params="7.*"), ValueError, "got '7.\\*', which matches none"),
        (lambda: small(params=lambda name, param: False), ValueError, "at least one parameter"),
        (lambda: Problem(net(), nn.MSELoss(reduction="sum"), DATA), ValueError, "'sum' like that of the loss"),
        (
            lambda: Problem(net(), functools.partial(F.cross_entropy, reduction="sum"), DATA),
            ValueError,
            "'sum' like that of the loss, got 'mean'",
        ),
        (lambda: Problem(net(), F.cross_entropy, (DATA[0], DATA[1].double())), ValueError, "class indices"),
        (lambda: Problem(net(), F.cross_entropy, iter([DATA])), ValueError, "one-shot iterator"),
        (lambda: Problem(net(), F.cross_entropy, DATA[0]), TypeError, "got Tensor"),
        (lambda: Problem(net(), F.cross_entropy, [DATA[0]]), TypeError, "pairs \\(inputs, targets\\)"),
        (lambda: Problem(net(), F.cross_entropy, (DATA[0], DATA[1][:3])), ValueError, "N == 3 .*got \\[4, 3\\]"),
        (lambda: Problem(net(), F.cross_entropy, []), ValueError, "at least one sample"),
        (
            lambda: Problem(net(), F.cross_entropy, (DATA[0], torch.full((4,), -100))),
            ValueError,
            "target that counts .* got Z = 0.0",
        ),
        (lambda: Problem(Two(), F.cross_entropy, DATA), ValueError, "share dtype and device"),
        (
            lambda: AutogradEngine(Problem(Two(), F.cross_entropy, DATA, params="b.*")).gradient(),
            TypeError,
            "must return one tensor, got tuple",
        ),
        (
            lambda: Problem(nn.BatchNorm1d(3, track_running_stats=False), F.cross_entropy, DATA),
            ValueError,
            "'frozen' or 'batch' .* no running statistics, got 'eval'",
        ),
        (lambda: small().subset(0), ValueError, "at least 1, got 0"),
        (
            lambda: check_deterministic(Problem(nn.Sequential(net(), nn.Flatten(0)), F.l1_loss, DATA), "Judge"),
            ValueError,
            r"Judge: model must return \[N, ...\] with N == 4 .*, got \[8\]",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
