# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import curvlab
from curvlab.norms import NormTable, ParameterNorms, filter_norms, parameter_norms, total_norm


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def test_known_numbers() -> None:
    x = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0, 0.0]])]
    r = [torch.tensor([0.0, 0.0]), torch.tensor([[12.0, 5.0]])]
    got = parameter_norms(x, r)
    assert isinstance(got, ParameterNorms) and got.names == ("0", "1")
    assert got.l1.tolist() == [7, 12] and got.l2.tolist() == [5, 12] and got.linf.tolist() == [4, 12]
    assert got.nonzeros.tolist() == [2, 1] and got.distance.tolist() == [5, 5] and got.inner.tolist() == [0, 144]
    assert got.reference_l2.tolist() == [0, 13]
    assert got.relative_movement.tolist() == [math.inf, 5 / 13]
    assert math.isnan(got.cosine[0]) and got.cosine[1] == 144 / 156
    total = got.total
    assert total.l2.shape == () and total.l2 == 13 and total.distance == math.sqrt(50) and total.names == ("total",)
    assert total.relative_movement == math.sqrt(50) / 13 and total.cosine == 144 / 169
    assert total_norm(x) == 13 and total_norm(x).dtype == torch.float64


def test_against_torch_on_a_module() -> None:
    net, start = small_net(), small_net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        got = parameter_norms(net, start)
        assert got.names == tuple(name for name, _ in net.named_parameters())
        flat, flat0 = (torch.cat([p.reshape(-1) for p in m.parameters()]).double() for m in (net, start))
        torch.testing.assert_close(got.total.distance, (flat - flat0).norm(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.total.cosine, torch.cosine_similarity(flat, flat0, 0), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.total.l1, flat.abs().sum(), rtol=1e-12, atol=0)
        stock = torch.nn.utils.get_total_norm(list(net.parameters())).double()
        torch.testing.assert_close(total_norm(net), stock, rtol=1e-6, atol=0)


def test_every_form_of_params_gives_the_same() -> None:
    net = small_net().requires_grad_(False)
    want = parameter_norms(net)
    pairs = list(net.named_parameters())
    for params in (dict(pairs), pairs, iter(pairs), (p for p in net.parameters()), list(net.parameters())):
        got = parameter_norms(params)
        assert torch.equal(got.l2, want.l2) and torch.equal(got.total.l2, want.total.l2)
    assert parameter_norms(dict(pairs)).names == parameter_norms(iter(pairs)).names == want.names
    assert want.distance.isnan().all() and want.total.cosine.isnan()


def test_no_parameters() -> None:
    got = parameter_norms(nn.ReLU())
    assert got.l2.shape == (0,) and got.total.l2 == 0 and filter_norms([]) == [] and total_norm([]) == 0


def test_zero_reference_that_did_not_move_is_nan() -> None:
    assert parameter_norms([torch.zeros(3)], [torch.zeros(3)]).relative_movement.isnan().all()


def test_filter_norms() -> None:
    net = small_net().requires_grad_(False)
    for norms, p in zip(filter_norms(net), net.parameters(), strict=True):
        torch.testing.assert_close(norms, p.double().reshape(len(p), -1).norm(dim=1), rtol=1e-12, atol=0)
    assert [n.tolist() for n in filter_norms([torch.tensor(-3.0), torch.tensor([-1.0, 2.0])])] == [[3], [1, 2]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda f: f(torch.ones(3)), TypeError, "params must be a module or a collection of tensors, got one tensor"),
        (lambda f: f(3), TypeError, "params must be a module or a collection of tensors, got int"),
        (lambda f: f([torch.ones(3), 2.0]), TypeError, r"params\[1\] must be a tensor, got float"),
        (lambda f: f({"w": torch.ones(3).int()}), TypeError, r"params\[0\] must be float32, .* got int32"),
        (lambda f: f([torch.ones(1), torch.ones(1, device="meta")]), ValueError, r"params\[1\] must be on cpu"),
    ],
)
@pytest.mark.parametrize("function", [parameter_norms, total_norm, filter_norms, NormTable], ids=lambda f: f.__name__)
def test_errors_name_the_function_and_its_argument(function, call, kind, message) -> None:
    with pytest.raises(kind, match=f"^{function.__name__}: {message}"):
        call(function)


@pytest.mark.parametrize("function", [parameter_norms, NormTable], ids=lambda f: f.__name__)
def test_errors_about_the_reference(function) -> None:
    w = torch.ones(3)
    with pytest.raises(ValueError, match=f"^{function.__name__}: reference must have 2 tensors like params, got 1"):
        function([w, w], [w])
    with pytest.raises(ValueError, match=r"reference\[0\] must have shape \[3\] like params\[0\], got \[1, 3\]"):
        function([w], [w[None]])
    with pytest.raises(TypeError, match=r"reference\[0\] must be float32 like params\[0\], got float64"):
        function([w], [w.double()])
    with pytest.raises(ValueError, match="names of params in their order: expected 'b' at 1, got 'c'"):
        function({"a": w, "b": w}, {"a": w, "c": w})


def test_results_refuse_a_backward_pass() -> None:
    net = small_net()
    with pytest.raises(RuntimeError, match="derivative for multi_tensor_norms is not implemented"):
        total_norm(net).backward()
    with pytest.raises(RuntimeError, match="derivative for multi_tensor_norms is not implemented"):
        NormTable(net, small_net())().total.distance.backward()
    with pytest.raises(NotImplementedError, match=r"^total_norm: has no derivative"):
        torch.func.grad(lambda w: total_norm([w]))(torch.ones(3))


@pytest.mark.parametrize("function", [parameter_norms, total_norm, filter_norms, NormTable], ids=lambda f: f.__name__)
def test_lazy_parameters_are_refused(function) -> None:
    with pytest.raises(
        ValueError, match=rf"^{function.__name__}: params\[0\] must be initialized, got a lazy parameter"
    ):
        function(nn.LazyLinear(3))


def test_detached_results_can_be_read() -> None:
    got, net = parameter_norms(small_net(), small_net()), small_net().requires_grad_(False)
    assert got.l2.requires_grad and got.total.l2.requires_grad
    want = parameter_norms(net, net)
    assert got.detach().l2.numpy().tolist() == want.l2.tolist() and got.detach().names == want.names
    assert float(got.total.detach().l2) == want.total.l2


def test_table_follows_its_tensors() -> None:
    net, start = small_net(), small_net()
    table = NormTable(net, start)
    assert table().total.distance == 0 and table.names == tuple(dict(net.named_parameters()))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.randn(4, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    for p in list(net.parameters())[:2]:  # other memory, as after .data assignment or a move
        p.data = p.data.clone() * 2
    for got, want in ((table(), parameter_norms(net, start)),):
        assert torch.equal(got.values, want.values) and got.total.distance > 0
    assert torch.equal(table.total_norm(), total_norm(net))


def test_public_names() -> None:
    for name in ("parameter_norms", "NormTable", "total_norm", "filter_norms", "NormRecorder", "ParameterNorms"):
        assert getattr(curvlab, name) is getattr(curvlab.norms, name)


def test_printing_shows_a_line_a_tensor_and_the_total() -> None:
    weights = {"weight": torch.tensor([3.0, -4.0]), "bias": torch.zeros(2)}
    alone, against = (
        str(parameter_norms(weights)),
        str(parameter_norms(weights, {k: v + 1 for k, v in weights.items()})),
    )
    head, weight, bias, total = alone.splitlines()
    assert head.split() == ["l1", "l2", "linf", "nonzeros"]  # no reference: no columns of NaN
    assert weight.split() == ["weight", "7", "5", "4", "2"]
    assert bias.split() == ["bias", "0", "0", "0", "0"]
    assert total.split() == ["total", "7", "5", "4", "2"]
    assert against.splitlines()[0].split()[4:] == ["distance", "inner", "reference_l2"]
    assert str(parameter_norms(weights).total).splitlines()[1].split()[0] == "total"
