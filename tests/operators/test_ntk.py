# SPDX-License-Identifier: Apache-2.0
"""The dense kernel against the Jacobian of the whole network by ``torch.func.jacrev``, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvlab.models import CNN, MLP, NTKLinear
from curvlab.operators import layer_kernels
from curvlab.operators.ntk import empirical_ntk, kernel_drift, linearization_error, linearized_outputs

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=draw(seed))


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel by the whole Jacobian: an independent route."""
    theta = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    parts = jacrev(lambda t: functional_call(model, t, (x,)))(theta)
    jacobian = torch.cat([part.reshape(part.shape[0] * part.shape[1], -1) for part in parts.values()], 1)
    return jacobian @ jacobian.T


def check(model: nn.Module, x: Tensor, **options: bool) -> None:
    torch.testing.assert_close(empirical_ntk(model, x, **options), dense(model, x), rtol=1e-11, atol=1e-12)


class Reused(nn.Module):
    """One layer used twice, and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Tied(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Stealing(nn.Module):
    """A weight that is used in its layer and once more behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.first.weight)


class Mixing(nn.Module):
    """Outputs that depend on the other samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x - x.mean(0) * 0.5)


class Tokens(nn.Module):
    """A fully connected layer at every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).mean(1))


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("samples", [1, 5, 70])  # 70 x 10 rows: more than one block
def test_mlp(parametrization, samples):
    model = MLP(13, in_features=7, parametrization=parametrization, generator=draw()).double()
    check(model, inputs(samples, 7))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_cnn_in_eval_mode(batch_norm):
    model = CNN(2, batch_norm=batch_norm, image_size=9, generator=draw()).double()
    with torch.no_grad():
        model(inputs(16, 3, 9, 9, seed=4))  # running statistics away from 0 and 1
    check(model.eval(), inputs(3, 3, 9, 9))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (
            nn.Sequential(
                nn.Conv2d(2, 5, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1)), nn.Flatten(), nn.LazyLinear(3)
            ),
            (4, 2, 7, 8),
        ),
        (
            nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)),
            (4, 4, 5, 5),
        ),
        (
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.LazyLinear(2)),
            (3, 2, 5, 5),
        ),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", bias=False), nn.Flatten(), nn.LazyLinear(2)), (3, 2, 5, 5)),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 1)), (6, 4)),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), (6, 4)),
        (Tokens(), (5, 7, 4)),
        (Reused(), (4, 5)),
        (Tied(), (4, 5)),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), (4, 4)),
    ],
    ids=["strided", "grouped", "circular", "same", "layernorm", "inplace", "tokens", "reused", "tied", "weightnorm"],
)
def test_odd_layers(model, shape):
    x = inputs(*shape)
    model = model.double()
    with torch.no_grad():
        model(x)  # sizes of lazy layers
    check(model, x)
    check(model, x, structured=False)


def test_frozen_parameters_do_not_count():
    model = MLP(6, in_features=5, generator=draw()).double()
    model.layers[1].weight.requires_grad_(False)
    model.layers[2].bias.requires_grad_(False)
    check(model, inputs(4, 5))
    assert model.layers[0].weight.requires_grad and not model.layers[1].weight.requires_grad


def test_kernel_at_other_parameters_leaves_the_model_alone():
    model = MLP(6, in_features=5, generator=draw()).double()
    other = MLP(6, in_features=5, generator=draw(9)).double()
    before = [param.clone() for param in model.parameters()]
    theta = list(other.parameters())
    got = empirical_ntk(model, inputs(4, 5), params=theta)
    torch.testing.assert_close(got, dense(other, inputs(4, 5)), rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(param.grad is None and param.requires_grad for param in [*model.parameters(), *theta])


def test_kernel_is_symmetric_to_the_last_bit_and_float32_follows_float64():
    model = MLP(40, in_features=30, parametrization="ntk", generator=draw())
    x = inputs(120, 30)
    single = empirical_ntk(model, x.float())
    assert single.dtype == torch.float32
    assert torch.equal(single, single.T)
    double = empirical_ntk(model.double(), x)
    assert kernel_drift(single, double) < 1e-6


def test_small_budget_makes_the_signals_in_groups_with_the_same_result():
    model = CNN(3, image_size=8, generator=draw()).double().eval()
    x = inputs(4, 3, 8, 8)
    with pytest.raises(ValueError, match="budget_bytes must be at least") as caught:
        empirical_ntk(model, x, budget_bytes=1)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    tight = empirical_ntk(model, x, budget_bytes=least)
    torch.testing.assert_close(tight, dense(model, x), rtol=1e-11, atol=1e-12)


def test_budget_error_says_how_many_samples_fit_and_that_many_do():
    model = MLP(64, in_features=20, generator=draw())
    x = torch.zeros(400, 20)
    with pytest.raises(
        ValueError, match=r"400 samples x 10 outputs, got 20000000 .*; (\d+) samples would fit"
    ) as caught:
        empirical_ntk(model, x, budget_bytes=20_000_000)
    fits = int(str(caught.value).rsplit("; ", 1)[1].split(" ")[0])
    assert 100 < fits < 400
    empirical_ntk(model, x[:fits], budget_bytes=20_000_000)
    with pytest.raises(ValueError, match="would fit"):
        empirical_ntk(model, x[: fits + 1], budget_bytes=20_000_000)


@pytest.mark.parametrize(("model", "why"), [(Stealing(), "outside"), (Mixing(), "mixing")])
def test_models_that_break_the_layer_products_are_refused(model, why):
    with pytest.raises(ValueError, match=r"layer products give K = .* where autograd gives"):
        empirical_ntk(model.double(), inputs(5, 4))
    if why == "outside":
        check(model.double(), inputs(5, 4), structured=False)


def test_a_wrong_scale_is_caught():
    class Wrong(NTKLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    with pytest.raises(ValueError, match="layer products give"):
        empirical_ntk(nn.Sequential(Wrong(4, 3)).double(), inputs(5, 4))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: empirical_ntk(m, torch.zeros(0, 5, dtype=F64)), ValueError, "N of at least 1, got \\[0, 5\\]"),
        (
            lambda m: empirical_ntk(m, torch.zeros(2, 5, dtype=torch.int64)),
            TypeError,
            "floating point, got torch.int64",
        ),
        (
            lambda m: empirical_ntk(m, torch.zeros(2, 5)),
            ValueError,
            "params must be torch.float32 .* got torch.float64",
        ),
        (lambda m: empirical_ntk(m, inputs(2, 5), params=[]), ValueError, "8 tensors like the model, got 0"),
        (
            lambda m: empirical_ntk(m, inputs(2, 5), params=list(m.parameters())[::-1]),
            ValueError,
            "shape \\[6, 5\\] for layers.0.weight",
        ),
        (lambda m: empirical_ntk(nn.ReLU(), inputs(2, 5)), ValueError, "parameters that require a gradient, got none"),
        (
            lambda m: linearized_outputs(m, [], list(m.parameters()), inputs(2, 5)),
            ValueError,
            "linearized_outputs: params",
        ),
        (
            lambda m: linearized_outputs(m, list(m.parameters()), [p.float() for p in m.parameters()], inputs(2, 5)),
            ValueError,
            "linearized_outputs: params1 must be torch.float64 .* got torch.float32",
        ),
        (lambda m: linearization_error(m, list(m.parameters()), inputs(2, 5)), ValueError, "got no change at all"),
        (
            lambda m: kernel_drift(torch.ones(2, 2), torch.ones(3, 3)),
            ValueError,
            "\\[3, 3\\] like reference, got \\[2, 2\\]",
        ),
        (lambda m: kernel_drift(torch.ones(2, 2), torch.zeros(2, 2)), ValueError, "not be all zero"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(MLP(6, in_features=5, generator=draw()).double())


def test_training_mode_of_layers_that_mix_samples_is_refused():
    with pytest.raises(ValueError, match=r"features.1 \(BatchNorm2d\) must be in eval mode"):
        empirical_ntk(CNN(2, generator=draw()), torch.zeros(2, 3, 32, 32))


LINEARIZED = {
    "linearized_outputs": lambda m, x: linearized_outputs(m, list(m.parameters()), list(m.parameters()), x),
    "linearization_error": lambda m, x: linearization_error(m, list(m.parameters()), x),
}


@pytest.mark.parametrize("owner", LINEARIZED)
def test_linearization_checks_inputs_and_mode(owner):
    mlp = MLP(6, in_features=5, generator=draw()).double()
    for x, error, match in (
        (torch.zeros(0, 5, dtype=F64), ValueError, r"x must be .* N of at least 1, got \[0, 5\]"),
        (torch.zeros(2, 5, dtype=torch.int64), TypeError, "x must be floating point, got torch.int64"),
        (torch.zeros(2, 5), ValueError, "params0 must be torch.float32 on cpu like x, got torch.float64"),
    ):
        with pytest.raises(error, match=f"{owner}: {match}"):
            LINEARIZED[owner](mlp, x)
    cnn = CNN(2, image_size=8, generator=draw())
    before = [buffer.clone() for buffer in cnn.buffers()]
    with pytest.raises(ValueError, match=rf"{owner}: features.1 \(BatchNorm2d\) must be in eval mode"):
        LINEARIZED[owner](cnn, torch.zeros(2, 3, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, cnn.buffers(), strict=True))


@pytest.mark.parametrize("sick", [0, 1, 3])
def test_a_nan_sample_gives_nan_in_its_own_entries(sick):
    model, x = MLP(6, in_features=5, generator=draw()).double(), inputs(4, 5)
    whole = empirical_ntk(model, x)
    x[sick] = float("nan")
    own = torch.zeros(4, 10, dtype=torch.bool)
    own[sick] = True
    touched = own.view(-1, 1) | own.view(1, -1)
    kernel = empirical_ntk(model, x)
    assert kernel[touched].isnan().all()
    assert not kernel[~touched].isnan().any()
    torch.testing.assert_close(kernel[~touched], whole[~touched], rtol=1e-11, atol=1e-12)


def test_nan_parameters_give_nan():
    model, x = MLP(6, in_features=5, generator=draw()).double(), inputs(4, 5)
    start = [param.detach().clone() for param in model.parameters()]
    whole = empirical_ntk(model, x)
    with torch.no_grad():
        model.layers[1].bias.fill_(float("nan"))
    assert empirical_ntk(model, x).isnan().any()
    assert math.isnan(kernel_drift(empirical_ntk(model, x), whole))
    assert math.isnan(linearization_error(model, start, x))
    assert linearized_outputs(model, start, list(model.parameters()), x).isnan().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_layer_products_that_are_not_finite_where_autograd_is_are_refused(monkeypatch, wrong):
    monkeypatch.setattr(layer_kernels, "add_layers", lambda kernel, *rest: kernel.fill_(wrong))
    with pytest.raises(ValueError, match=f"layer products give K = {wrong} where autograd gives "):
        empirical_ntk(MLP(6, in_features=5, generator=draw()).double(), inputs(4, 5))


def test_drift_is_a_relative_frobenius_norm():
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert kernel_drift(reference, reference) == 0.0
    assert kernel_drift(1.5 * reference, reference) == pytest.approx(0.5)
    assert kernel_drift(reference + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference) == pytest.approx(0.2)


def test_linearized_outputs_are_first_order():
    model = MLP(12, in_features=5, generator=draw()).double()
    x = inputs(7, 5)
    start = [param.detach() for param in model.parameters()]
    direction = [torch.randn(param.shape, dtype=F64, generator=draw(3)) for param in start]
    errors = []
    for size in (1e-3, 1e-4):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for param, step in zip(moved.parameters(), direction, strict=True):
                param.add_(step, alpha=size)
        end = list(moved.parameters())
        linear = linearized_outputs(model, start, end, x)
        errors.append((moved(x) - linear).norm().item())
        relative = linearization_error(moved, start, x)
        assert relative == pytest.approx(errors[-1] / (moved(x) - model(x)).norm().item(), rel=1e-9)
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)  # second order in the step


def test_a_linear_model_is_its_own_linearization():
    model = nn.Linear(5, 3).double()
    start = [torch.zeros_like(param) for param in model.parameters()]
    assert linearization_error(model, start, inputs(4, 5)) < 1e-14
