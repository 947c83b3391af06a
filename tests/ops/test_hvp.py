# SPDX-License-Identifier: Apache-2.0
"""The ops of csrc/hvp against their twins in float64, and what the wrappers promise beside numbers."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvlab.ops import hvp, reference
from tests import contracts
from tests.ops import hvp_samples
from tests.ops.hvp_samples import DTYPES, SHAPES, Draw

ops = torch.ops.curvlab


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    hvp_samples.check_forward(Draw(seed, dtype), shape)
    hvp_samples.check_backward(Draw(seed + 100, dtype), shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 16, 4, 10), (3, 2, 9, 12, 33), (1, 2, 64, 16, 70)])
def test_pooling(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    hvp_samples.check_pooling(Draw(0, dtype), shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 10), (2, 7, 33), (1, 5, 1000), (1, 2, 4100)])
def test_softmax(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hvp_samples.check_softmax(Draw(0, dtype), shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", hvp.KINDS)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    hvp_samples.check_activation(Draw(0, dtype), kind)


# ---- the twins have a second opinion of their own: autograd --------------------------------------------------------
TORCH_ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.3),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda z: torch.nn.functional.softplus(z, 1.7, 5.0),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("kind", hvp.KINDS)
def test_activations_are_torchs(kind: str) -> None:
    z = torch.cat([torch.linspace(-9, 9, 1001, dtype=torch.float64), torch.tensor([0.0, -0.0, 40.0, -40.0])]).double()
    z.requires_grad_()
    delta = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first,) = torch.autograd.grad(TORCH_ACTIVATIONS[kind](z).sum(), z, create_graph=True)
    second = torch.autograd.grad((first * delta).sum(), z)[0] if first.requires_grad else torch.zeros_like(delta)
    for module in (hvp, reference):
        got = module.activation_factors(z.detach(), delta, kind, slope=0.3, beta=1.7, threshold=5.0)
        torch.testing.assert_close(got[0].double(), first.detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.zeros_like(delta) if got[1] is None else got[1], second, rtol=0, atol=3e-14)


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_saturated_activations_keep_their_digits(kind: str) -> None:
    """1 - tanh^2 and s (1 - s) are 0 there in float64; the closed forms are right to the last digit."""
    z = torch.tensor([25.0, -25.0, 150.0], dtype=torch.float64)
    rate = 2.0 if kind == "tanh" else 1.0
    want = (4.0 if kind == "tanh" else 1.0) * torch.exp(-rate * z.abs())
    for module in (hvp, reference):
        first, second = module.activation_factors(z, torch.ones_like(z), kind)
        torch.testing.assert_close(first, want, rtol=1e-10, atol=0)
        torch.testing.assert_close(second, -rate * z.sign() * want, rtol=1e-10, atol=0)


def test_softmax_is_the_hessian_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, u = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 5), (3, 6, 5)))
    label, weight = torch.tensor([0, 1, 2, 3, 4, 0]), torch.rand(6, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (weight * torch.nn.functional.cross_entropy(x, label, reduction="none")).sum()

    hessian = torch.func.hessian(loss)(logits).reshape(30, 30)
    want = (u.reshape(3, 30) @ hessian).reshape(3, 6, 5)
    for module in (hvp, reference):
        got = module.softmax_hessian_product(logits.softmax(1), label, weight, u)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_softmax_keeps_its_digits_on_fitted_samples() -> None:
    logits = torch.tensor([[30.0, 0.0, -1.0]], dtype=torch.float64)
    u, label = torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([0])
    p = logits.softmax(1)
    want = reference.softmax_hessian_product(p, label, torch.ones(1, dtype=torch.float64), u.double())
    got = hvp.softmax_hessian_product(p.float(), label, torch.ones(1), u)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert want.abs().max() < 1e-11


def test_scatter_is_the_adjoint_of_gather() -> None:
    draw = Draw(1, torch.float64)
    x, g = draw.data(2, 3, 16, 5), draw.data(2, 3, 9, 5)
    index = torch.randint(-1, 16, (3, 9, 5), generator=draw.generator, dtype=torch.int32)
    left, right = (hvp.pool_gather(x, index) * g).sum(), (x * hvp.pool_scatter(g, index, 16)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


# ---- layouts, buffers, empties -------------------------------------------------------------------------------------
def test_images_need_no_views() -> None:
    draw = Draw(2, torch.float32)
    a, mask, bias = draw.data(2, 3, 4, 5, 6), draw.mask(3, 4, 5, 6), draw.rows(2, 6)
    got = hvp.tangent_forward(a, bias=bias, first=mask)
    want = hvp.tangent_forward(a.view(2, 60, 6), bias=bias, first=mask.view(60, 6))
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    assert torch.equal(got, want.view_as(got))
    assert torch.equal(hvp.tangent_forward(a, first=mask), hvp.tangent_forward(a, first=mask.bool()))  # pyright: ignore[reportArgumentType]


def test_nothing_is_copied_that_nothing_changes() -> None:
    g, bias = torch.ones(2, 3, 4), torch.zeros(2, 4)
    gy, gt, total, _ = hvp.tangent_backward(g, out_bias=bias)
    assert gy is g and gt is g and total is bias
    assert (bias == 3).all()
    hvp.tangent_backward(g, out_bias=bias, accumulate=True)
    assert (bias == 6).all()
    gy, gt, _, _ = hvp.tangent_backward(g, scale=torch.full((4,), 2.0), want_gy=False)
    assert gy is None and (gt == 2).all()
    gy, gt, _, _ = hvp.tangent_backward(g, scale=torch.full((4,), 2.0), out_gt=g)
    assert gt is g and gy is not None and (gt == 2).all() and (gy == 1).all()


def test_arguments_per_channel_are_converted() -> None:
    a = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    scale, bias = torch.full((4,), 2.0, dtype=torch.float64), torch.ones(4, 2, dtype=torch.bfloat16).T
    got = hvp.tangent_forward(a, scale=scale, bias=bias)
    assert isinstance(got, Tensor) and got.dtype == torch.bfloat16 and (got == 3).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_of_anything(shape: tuple[int, int, int]) -> None:
    k, r, c = shape
    draw = Draw(3, torch.float32)
    got = hvp.tangent_forward(draw.data(*shape), draw.data(*shape), scale=draw.channels(c), first=draw.mask(r, c))
    assert isinstance(got, Tensor) and got.shape == shape
    inv_std, dot = draw.channels(c), draw.channels(k, c)
    _, gt, bias, gain = hvp.tangent_backward(
        draw.data(*shape), want_bias=True, want_gain=True, dot=dot, inv_std=inv_std
    )
    assert gt.shape == shape and bias is not None and gain is not None
    assert torch.equal(bias, torch.zeros(k, c))
    torch.testing.assert_close(gain, inv_std * dot)
    assert hvp.softmax_hessian_product(*hvp_samples.softmax_arguments(draw, (k, r, 5))).shape == (k, r, 5)
    index = torch.full((r, 2, c), -1, dtype=torch.int32)
    assert hvp.pool_gather(draw.data(k, r, 4, c), index).shape == (k, r, 2, c)
    assert not hvp.pool_scatter(draw.data(k, r, 2, c), index, 4).any()
    assert hvp.activation_factors(draw.data(0), None, "gelu")[0].numel() == 0


def test_nan_passes_factors_and_stops_at_masks() -> None:
    a = torch.full((1, 4, 3), torch.nan)
    mask = torch.tensor([[1, 0, 1]], dtype=torch.uint8).repeat(4, 1)
    for module in (hvp, reference):
        got = module.tangent_forward(a, first=mask)
        assert torch.equal(got.isnan(), mask.bool()[None])
        assert module.tangent_forward(a, first=torch.zeros(4, 3)).isnan().all()


def test_same_bits_for_any_number_of_threads() -> None:
    draw = Draw(4, torch.float32)
    g, centered, t, delta = (
        draw.data(3, 20_000, 10),
        draw.data(20_000, 10),
        draw.data(3, 20_000, 10),
        draw.data(20_000, 10),
    )
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _, _, bias, gain = hvp.tangent_backward(
                g, centered=centered, t=t, delta=delta, inv_std=torch.ones(10), want_bias=True, want_gain=True
            )
            assert bias is not None and gain is not None
            results.append(torch.cat([bias, gain]).double())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        contracts.assert_same_bits(results[0], result)


def test_long_sums_keep_their_digits() -> None:
    g = torch.full((1, 1_000_003, 1), 0.1)
    _, _, bias, _ = hvp.tangent_backward(g, want_bias=True)
    assert bias is not None
    torch.testing.assert_close(bias.double(), g.double().sum(1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    code = (
        "import torch\nfrom tests.ops import hvp_samples as s\n"
        "for dtype in s.DTYPES:\n"
        "  for i, shape in enumerate(s.SHAPES):\n"
        "    s.check_forward(s.Draw(i, dtype), shape); s.check_backward(s.Draw(i, dtype), shape)\n"
        "  s.check_pooling(s.Draw(0, dtype), (2, 2, 9, 4, 33)); s.check_softmax(s.Draw(0, dtype), (2, 5, 21))\n"
    )
    environment = os.environ | {"CURVLAB_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if "this CPU or build lacks it" in done.stderr:
        pytest.skip(f"no {capability} here")
    assert done.returncode == 0, done.stderr[-3000:]


# ---- registration --------------------------------------------------------------------------------------------------
def bare_calls() -> dict[str, tuple]:
    """Arguments of the bare ops."""
    draw = Draw(5, torch.float32)
    a, b, mask = draw.data(2, 3, 4), draw.data(2, 3, 4), draw.mask(3, 4)
    new = lambda *shape: torch.empty(*shape)  # noqa: E731
    index = torch.randint(-1, 9, (2, 3, 4), dtype=torch.int32)
    forward = (a, b, draw.rows(2, 4), draw.channels(4), None, None, None, mask, draw.data(3, 4))
    backward = (a, None, mask, None, None, None, None, None, None, None, None, None)
    return {
        "activation_factors": (a, b, "tanh", 0.1, 1.0, 20.0, new(2, 3, 4), new(2, 3, 4)),
        "tangent_forward": (*forward, new(2, 3, 4), None, new(2, 4)),
        "tangent_backward": (*backward, new(2, 3, 4), None, new(2, 4), None, False),
        "pool_gather": (draw.data(2, 2, 9, 4), index, new(2, 2, 3, 4)),
        "pool_scatter": (draw.data(2, 2, 3, 4), index, new(2, 2, 9, 4), False),
        "softmax_hessian_product": (*hvp_samples.softmax_arguments(draw, (2, 3, 4)), new(2, 3, 4)),
    }


@pytest.mark.parametrize("name", list(bare_calls()))
def test_registration(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, bare_calls()[name])


def test_compilation() -> None:
    draw = Draw(6, torch.float32)
    a, b, mask = draw.data(2, 3, 4), draw.data(2, 3, 4), draw.mask(3, 4)
    p, label, weight, _ = hvp_samples.softmax_arguments(draw, (2, 3, 4))
    index = torch.randint(-1, 3, (3, 2, 4), dtype=torch.int32)

    def function(tensors: Sequence[Tensor]) -> Tensor:
        first, second = hvp.activation_factors(tensors[1][0], tensors[0][0], "gelu")
        out, pre = hvp.tangent_forward(tensors[0], tensors[1], first=mask, keep_pre=True)
        gy, _, bias, _ = hvp.tangent_backward(out, first=first, second=second, pre=pre, want_bias=True)
        assert gy is not None and bias is not None
        pooled = hvp.pool_gather(gy.view(2, 3, 1, 4).expand(2, 3, 3, 4).contiguous(), index)
        wide = hvp.pool_scatter(pooled, index, 3)
        return wide.sum((1, 2)) + bias + hvp.softmax_hessian_product(p, label, weight, gy).sum(1)

    contracts.assert_compiles(function, [a, b])


def test_derivatives_are_refused() -> None:
    a = torch.randn(2, 3, 4)
    leaf = a.clone().requires_grad_()
    calls = {
        "activation_factors": lambda x: hvp.activation_factors(x, None, "tanh")[0],
        "tangent_forward": lambda x: hvp.tangent_forward(x),
        "tangent_backward": lambda x: hvp.tangent_backward(x, g2=x)[1],
        "pool_gather": lambda x: hvp.pool_gather(x[None], torch.zeros(2, 1, 4, dtype=torch.int32)),
        "pool_scatter": lambda x: hvp.pool_scatter(x[None], torch.zeros(2, 3, 4, dtype=torch.int32), 2),
        "softmax_hessian_product": lambda x: hvp.softmax_hessian_product(
            torch.ones(3, 4), torch.zeros(3).long(), torch.ones(3), x
        ),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=rf"{name}: has no derivative"):
            call(leaf)
        with torch.no_grad():
            assert not call(leaf).requires_grad
        for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd):
            with pytest.raises(NotImplementedError, match=rf"{name}: has no derivative and no batching rule"):
                transform(lambda w, call=call: call(w).sum())(a)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"{name}: has no derivative"):
            call(forward_ad.make_dual(a, a))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
        ops.tangent_forward(forward_ad.make_dual(a, a), *[None] * 8, a.clone(), None, None)


# ---- errors that teach ---------------------------------------------------------------------------------------------
A, C4 = torch.ones(2, 3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hvp.tangent_forward(A.half()), TypeError, "a must be float32, float64 or bfloat16, got float16"),
        (lambda: hvp.tangent_forward(C4), ValueError, r"a must be \[K, ..., C\], got \[4\]"),
        (lambda: hvp.tangent_forward(A.transpose(1, 2)), ValueError, r"a must be contiguous, got strides \[12, 1, 4\]"),
        (lambda: hvp.tangent_forward(A, A[:1]), ValueError, r"b must have shape \[2, 3, 4\] like a, got \[1, 3, 4\]"),
        (lambda: hvp.tangent_forward(A, A.double()), TypeError, "b must be float32, got float64"),
        (lambda: hvp.tangent_forward(A, scale=C4[:3]), ValueError, r"scale must have shape \[4\] .*, got \[3\]"),
        (lambda: hvp.tangent_forward(A, scale=C4.long()), TypeError, "scale must be floating, got int64"),
        (lambda: hvp.tangent_forward(A, bias=C4), ValueError, r"bias must have shape \[2, 4\] .*, got \[4\]"),
        (lambda: hvp.tangent_forward(A, first=A), ValueError, r"first must have shape \[3, 4\] .*, got \[2, 3, 4\]"),
        (lambda: hvp.tangent_forward(A, first=A[0].int()), TypeError, "first must be float32, got int32"),
        (lambda: hvp.tangent_forward(A, gain=A[:, 0]), ValueError, "gain must come with centered, got gain alone"),
        (lambda: hvp.tangent_forward(A, dot=A[:, 0].double()), TypeError, "dot must be float32, got float64"),
        (lambda: hvp.tangent_forward(A, out=A.to("meta")), ValueError, "out must be on cpu like a, got meta"),
        (lambda: hvp.tangent_backward(A, second=A[0]), ValueError, "second must come with pre, got second alone"),
        (lambda: hvp.tangent_backward(A, out_bias=A[:, :, 0]), ValueError, r"out_bias must have shape \[2, 4\]"),
        (
            lambda: hvp.tangent_backward(A, out_bias=torch.ones(4, 2).T),
            ValueError,
            r"out_bias must have stride 1 along its channels, got strides \[1, 2\]",
        ),
        (lambda: hvp.activation_factors(A, A, "swish"), ValueError, "kind must be relu, leaky_relu, .*, got 'swish'"),
        (lambda: hvp.pool_gather(A, A.int()), ValueError, r"x must be \[K, N, HW, C\], got \[2, 3, 4\]"),
        (lambda: hvp.pool_gather(A[None], A), TypeError, "index must be int32, got float32"),
        (
            lambda: hvp.pool_gather(A[None], A.int()[:1]),
            ValueError,
            r"index must be \[N, R, C\] like x .*got \[1, 3, 4\]",
        ),
        (
            lambda: hvp.pool_gather(torch.ones(1, 2, 0, 4), A.int()),
            ValueError,
            r"x must have inputs to gather from, got \[1, 2, 0, 4\]",
        ),
        (
            lambda: hvp.pool_scatter(A[None], A.int(), 9, out=A[None]),
            ValueError,
            r"out must be \[K, N, 9, C\], got \[1,",
        ),
        (lambda: hvp.pool_scatter(A[None], A.int(), 4, out=A[None, :1]), ValueError, r"out must be \[K, N, 4, C\]"),
        (lambda: hvp.pool_scatter(A[None], A.int(), 3, out=A[None, :1]), ValueError, r"out must fit g \[1, 2, 3, 4\]"),
        (
            lambda: hvp.softmax_hessian_product(C4[None], torch.zeros(1), C4[:1], A[:, :1].contiguous()),
            TypeError,
            "label must be int64, got float32",
        ),
        (
            lambda: hvp.softmax_hessian_product(C4[None], torch.zeros(2).long(), C4[:1], A[:, :1].contiguous()),
            ValueError,
            r"label must have shape \[1\] \(the samples of u\), got \[2\]",
        ),
    ],
)
def test_errors_teach(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", list(bare_calls()))
def test_the_twin_takes_the_same_arguments(name: str) -> None:
    assert inspect.signature(getattr(hvp, name)) == inspect.signature(getattr(reference, name))
