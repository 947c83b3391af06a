# SPDX-License-Identifier: Apache-2.0
"""Sparse layers: the dense layers they come from, by either path; gradients; state; devices, dtypes and compilation."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from curvlab.norms import parameter_norms
from curvlab.ops import sparse_conv
from curvlab.sparse import Mask, MaskedConv2d, MaskedLinear, densify, random_mask, sparsify
from curvlab.sparse.crossover import FEW_POSITIONS_DENSITY, choose_path
from tests.sparse.samples import F64, batch, mask_of, masked, network, normal, seeded

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": (1, 2)},
    "strided": {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1, "bias": False},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "pointwise": {"kernel_size": 1},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": 2},
    "same_even": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "replicate_same": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
}


def _convolution(name: str, dtype: torch.dtype = F64) -> nn.Conv2d:
    options = dict(CONVOLUTIONS[name])
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, options.pop("kernel_size"), **options).to(dtype)


def _keep(weight: torch.Tensor, density: float = 0.4) -> torch.Tensor:
    return torch.rand(weight.shape, generator=seeded()) < density


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_dense_one_with_zeros(name: str, kernels: Any) -> None:
    layer = _convolution(name)
    keep = _keep(layer.weight)
    sparse = MaskedConv2d.from_dense(layer, keep, kernels=kernels)
    with torch.no_grad():
        layer.weight.masked_fill_(~keep, 0.0)
    x = normal(3, 4, 9, 11).requires_grad_()
    got, expected = sparse(x), layer(x)
    assert got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    g = normal(*got.shape, seed=5)
    mine = torch.autograd.grad(got, [x, *sparse.parameters()], g)
    theirs = torch.autograd.grad(expected, [x, *layer.parameters()], g)
    assert torch.allclose(mine[0], theirs[0], rtol=1e-11, atol=1e-11)
    assert torch.allclose(mine[1], theirs[1][keep], rtol=1e-11, atol=1e-11)
    assert len(mine) == len(theirs) and (len(mine) < 3 or torch.allclose(mine[2], theirs[2]))
    back = sparse.dense_layer()
    assert torch.equal(back.weight, layer.weight) and torch.equal(back(x), layer(x))
    assert (back.padding, back.padding_mode, back.groups) == (layer.padding, layer.padding_mode, layer.groups)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["padded", "same_even", "reflect"])
def test_one_image_without_a_batch_axis(name: str, kernels: Any) -> None:
    layer = _convolution(name)
    sparse = MaskedConv2d.from_dense(layer, _keep(layer.weight), kernels=kernels)
    x = normal(4, 9, 11)
    assert torch.allclose(sparse(x), sparse.dense_layer()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_built_on_the_meta_device_and_loaded(kernels: Any) -> None:
    model = network().eval()
    mask, x = mask_of(model), batch()[0]
    trained = sparsify(model, mask, kernels=kernels)
    empty = sparsify(copy.deepcopy(model).to("meta"), mask, kernels=kernels)
    assert empty(x.to("meta")).shape == (len(x), 3)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(trained.state_dict())
    assert torch.equal(empty(x), trained(x)) and Mask.from_model(empty) == mask
    taken = sparsify(copy.deepcopy(model).to("meta"), mask)
    taken.load_state_dict(trained.state_dict(), assign=True)
    again = sparsify(model, mask)
    for name in ("stem", "wide"):  # "auto" goes by the device that the values have now
        assert getattr(taken, name).path == getattr(again, name).path == "sparse"
    assert torch.equal(taken(x), again(x))


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("lead", [(5,), (), (2, 3)])
def test_a_linear_layer_is_the_dense_one_with_zeros(lead: tuple[int, ...], kernels: Any) -> None:
    layer = nn.Linear(7, 4).to(F64)
    keep = _keep(layer.weight)
    sparse = MaskedLinear.from_dense(layer, keep, kernels=kernels)
    with torch.no_grad():
        layer.weight.masked_fill_(~keep, 0.0)
    x = normal(*lead, 7)
    assert torch.allclose(sparse(x), layer(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse.dense_layer().weight, layer.weight)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_kept(density: float, kernels: Any) -> None:
    model = network().eval()
    mask = random_mask(model, density, generator=seeded())
    sparse = sparsify(model, mask, kernels=kernels)
    x, y = batch()
    assert torch.allclose(sparse(x), masked(model, mask)(x), rtol=1e-12, atol=1e-12)
    for optimizer in (
        torch.optim.SGD(sparse.parameters(), 0.1, 0.9),
        torch.optim.Adam(sparse.parameters(), fused=True),
    ):
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
    assert Mask.from_model(sparse) == mask


def test_parameters_cost_only_what_survives() -> None:
    model = network()
    mask = mask_of(model, 0.2)
    sparse = sparsify(model, mask)
    others = sum(p.numel() for n, p in model.named_parameters() if n not in mask)
    assert sum(p.numel() for p in sparse.parameters()) == mask.num_kept + others
    names = [name.replace(".values", ".weight") for name, _ in sparse.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    # in the order of the dense vector, without what is pruned
    dense = torch.cat(
        [p.flatten()[mask[n].flatten()] if n in mask else p.flatten() for n, p in model.named_parameters()]
    )
    assert torch.equal(dense, torch.cat([p.flatten() for p in sparse.parameters()]))
    norms, expected = parameter_norms(sparse), parameter_norms(densify(sparse))
    for key in ("l1", "l2", "linf", "nonzeros"):
        with torch.no_grad():
            assert torch.allclose(getattr(norms.total, key), getattr(expected.total, key), rtol=1e-12)


def test_state_goes_through_files_copies_and_casts() -> None:
    model = network().eval()
    mask = mask_of(model)
    sparse, x = sparsify(model, mask, kernels="sparse"), batch()[0]
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other = sparsify(network(seed=9).eval(), mask, kernels="sparse")
    assert not torch.equal(other(x), sparse(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), sparse(x))
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        twin.stem.values.add_(1.0)  # type: ignore[operator, union-attr]
    assert torch.equal(other(x), sparse(x)) and not torch.equal(twin(x), sparse(x))
    whole = io.BytesIO()
    torch.save(sparse, whole)
    whole.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(x), sparse(x))
    single = copy.deepcopy(sparse).to(torch.float32)
    assert single.stem.indices.dtype == torch.int64  # type: ignore[union-attr]
    assert torch.allclose(single(x.float()).double(), sparse(x), atol=1e-5)
    half = copy.deepcopy(sparse).to(torch.bfloat16)  # no sparse kernel on the CPU: the dense path
    assert torch.allclose(half(x.bfloat16()).double(), sparse(x), atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert single(x.float()).dtype == torch.bfloat16


def test_a_state_of_another_mask_is_refused() -> None:
    model = network()
    sparse = sparsify(model, mask_of(model, 0.4))
    state = sparsify(model, mask_of(model, 0.3)).state_dict()
    with pytest.raises(RuntimeError, match=r"stem must hold \d+ weights, got \d+: first give the model the mask"):
        sparse.load_state_dict(state)
    moved = sparsify(model, random_mask(model, like=mask_of(model, 0.4), generator=seeded(8)))
    sparse.load_state_dict(moved.state_dict())  # as many weights elsewhere: they come with their positions
    assert Mask.from_model(sparse) == Mask.from_model(moved)
    assert torch.equal(sparse.eval()(batch()[0]), moved.eval()(batch()[0]))
    for change in (lambda i: i.flip(0), lambda i: i + 10_000, lambda i: i.int()):
        state = moved.state_dict()
        state["wide.indices"] = change(state["wide.indices"])
        with pytest.raises(RuntimeError, match=r"wide\.indices must be increasing int64 positions in \[0, 162\)"):
            sparse.load_state_dict(state)


def test_layouts_do_not_matter() -> None:
    model = network().eval()
    sparse = sparsify(model, mask_of(model), kernels="sparse")
    x = batch()[0]
    expected = sparse(x)
    last = x.to(memory_format=torch.channels_last)
    strided = torch.stack([x, x], -1)[..., 0]
    for other in (last, strided):
        assert torch.allclose(sparse(other), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(copy.deepcopy(sparse).to(memory_format=torch.channels_last)(last), expected)  # type: ignore[call-overload]
    kept = sparsify(model.to(memory_format=torch.channels_last), mask_of(model), kernels="dense")  # type: ignore[call-overload]
    assert kept.stem(x).is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert densify(kept).stem.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_compiles_whole(kernels: Any) -> None:
    """No graph break; gradients as in eager mode.  The aot_eager backend: no C++ compiler in the test."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))
    sparse = sparsify(model, mask_of(model), kernels=kernels)
    x, y = batch(dtype=torch.float32)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(nn.functional.cross_entropy(sparse(x), y), list(sparse.parameters()))
    got = torch.autograd.grad(nn.functional.cross_entropy(compiled(x), y), list(sparse.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_exports_with_any_number_of_images(kernels: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))
    sparse = sparsify(model, mask_of(model), kernels=kernels)
    x = batch(dtype=torch.float32)[0]
    program = torch.export.export(sparse, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert torch.equal(program.module()(x[:4]), sparse(x[:4]))


def test_auto_goes_by_density_and_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    limits = [((64, 32, 3, 3), 0.65), ((64, 128, 3, 3), 0.57), ((64, 2048, 1, 1), 0.55), ((256, 4096), 0.2)]
    for shape, limit in limits:
        assert choose_path("auto", limit, cpu, shape) == "sparse"
        assert choose_path("auto", limit + 1e-6, cpu, shape) == "dense"
        assert choose_path("auto", 0.01, cuda, shape) == "dense"
        assert choose_path("sparse", 1.0, cuda, shape) == "sparse"
        assert choose_path("dense", 0.0, cpu, shape) == "dense"
    assert choose_path("auto", 1.0, cpu, (32, 3, 3, 3)) == "sparse"  # few weights a filter: always faster
    assert choose_path("auto", 0.01, cpu, (10, 256)) == "dense"  # few weights: never
    layer = nn.Conv2d(32, 2, 3)
    order = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    assert [MaskedConv2d(layer, order < n).path for n in (3, 575)] == ["sparse", "dense"]
    assert "3 of 576 weights, sparse" in repr(MaskedConv2d(layer, order < 3))


def test_auto_computes_small_batches_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("masked_conv2d", "masked_linear"):
        op = getattr(sparse_conv, name)
        monkeypatch.setattr(sparse_conv, name, lambda *a, op=op, name=name, **k: calls.append(name) or op(*a, **k))
    conv = MaskedConv2d(
        nn.Conv2d(8, 8, 3, padding=1), torch.rand(8, 8, 3, 3, generator=seeded(0)) < FEW_POSITIONS_DENSITY + 0.1
    )
    linear = MaskedLinear(nn.Linear(1024, 512), torch.rand(512, 1024, generator=seeded(0)) < 0.15)
    assert (conv.path, linear.path) == ("sparse", "sparse")
    conv(torch.randn(1, 8, 16, 16)), linear(torch.randn(100, 1024))
    assert calls == []
    conv(torch.randn(4, 8, 16, 16)), linear(torch.randn(2, 64, 1024))
    assert calls == ["masked_conv2d", "masked_linear"]


def test_frozen_weights_stay_frozen() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    sparse = MaskedLinear(layer, torch.ones(2, 3).bool())
    assert not sparse.values.requires_grad and sparse.bias is not None and sparse.bias.requires_grad
    assert not sparse.dense_layer().weight.requires_grad


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: MaskedLinear(nn.Linear(2, 3), torch.ones(3, 2)),
            ValueError,
            r"boolean .* \[3, 2\], got torch.float32",
        ),
        (
            lambda: MaskedLinear(nn.Linear(2, 3), torch.ones(2, 3).bool()),
            ValueError,
            r"\[3, 2\], got torch.bool \[2, 3\]",
        ),
        (lambda: MaskedLinear(nn.Linear(2, 3), None), ValueError, "got NoneType"),  # type: ignore[arg-type]
        (
            lambda: MaskedLinear(nn.Linear(2, 3), torch.ones(3, 2).bool()).set_mask(0.5),  # type: ignore[arg-type]
            ValueError,
            r"MaskedLinear: mask must be boolean with the weight's shape \[3, 2\], got float",
        ),
        (lambda: MaskedLinear(OwnForward(2, 3), torch.ones(3, 2).bool()), TypeError, "got OwnForward"),
        (lambda: MaskedConv2d(nn.Linear(2, 3), torch.ones(3, 2).bool()), TypeError, "nn.Conv2d"),  # type: ignore[arg-type]
        (lambda: MaskedLinear(nn.Linear(2, 3), torch.ones(3, 2).bool(), kernels="fast"), ValueError, "kernels must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
