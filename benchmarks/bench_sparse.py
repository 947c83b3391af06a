# SPDX-License-Identifier: Apache-2.0
"""Sparse convolutions and linear layers against dense ones, and whole training steps of a pruned network.

Layers: forward and backward through autograd, gradients by input, weights and bias, batch 128, 3x3 convolutions of
padding 1. Peers: the library's dense kernels (NCHW and channels-last), the dense kernel on ``weight * mask``,
``torch.sparse`` CSR with unfold, sparselab for linear where it is installed. Masks are uniform, or those of a network
trained on CIFAR-10 (:mod:`benchmarks.pruned_masks`). Results are compared with float64 before anything is timed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import pruned_masks, ticket_step
from benchmarks.harness import Case, Engine
from curvlab.ops.sparse_conv import masked_conv2d, masked_linear

TITLE = "Sparse layers and training steps: ours and peers"
BATCH = 128
ACCURACY = 1e-4  # relative error that a peer's gradients may have

# Layer -> (channels in, out, side).
LAYERS = {"64 → 64 @32²": (64, 64, 32), "64 → 128 @16²": (64, 128, 16), "128 → 256 @8²": (128, 256, 8)}
# Kept share -> (must hold, goal): how much faster than the faster dense layout, one thread, uniform masks.
CONV_BARS = {0.2: (2.4, 3.5), 0.1: (3.5, 5.5), 0.05: (5.2, 8.0), 0.02: (8.5, 13.0)}
LINEAR_BARS = {0.2: (1.4, 2.0), 0.1: (2.2, 3.0), 0.05: (3.5, 5.0), 0.02: (5.0, 7.0)}
LINEAR = (4096, 256)  # features in, out
PRUNED, TWO_THREADS = 0.85, 0.9  # of a bar, with masks of pruned networks and with two threads
SWEEP = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # kept shares around the crossover
NEVER_SLOWER = 1 / 1.05  # of dense, as ``kernels="auto"`` chooses


@dataclass(frozen=True)
class Layer:
    """One layer with its input, the gradient above it, and a mask."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor

    @property
    def is_convolution(self) -> bool:
        """Whether inputs are images."""
        return self.x.dim() == 4

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The library's kernel."""
        return F.conv2d(x, weight, bias, padding=1) if self.is_convolution else F.linear(x, weight, bias)

    @property
    def flops(self) -> float:
        """Of all three passes, over nonzeros alone."""
        positions = self.grad.numel() / self.weight.shape[0]
        return 6.0 * int(self.mask.sum()) * positions


def leaf(tensor: Tensor) -> Tensor:
    """A copy to take gradients by."""
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def with_backward(forward: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Engine:
    """Forward, then the gradients by ``leaves``."""
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)


def make_layer(shape: tuple[int, ...], density: float, mask: Tensor | None = None) -> Layer:
    """A convolution (channels in, out, side) or a linear layer (features in, out); uniform unless a mask is given."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, *side = shape
    size, planes = ((3, 3), (side[0], side[0])) if side else ((), ())
    weight = torch.randn(outputs, inputs, *size, generator=generator)
    if mask is None:
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: round(density * weight.numel())]] = True
        mask = mask.view(weight.shape)
    x = torch.randn(BATCH, inputs, *planes, generator=generator)
    grad = torch.randn(BATCH, outputs, *planes, generator=generator)
    return Layer(x, grad, weight * mask, torch.randn(outputs, generator=generator), mask)


def ours(layer: Layer) -> Engine:
    """The op of this project."""
    indices = layer.mask.flatten().nonzero().squeeze(1)
    values, shape = layer.weight.flatten()[indices], layer.weight.shape

    def forward(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        if layer.is_convolution:
            return masked_conv2d(x, values, indices, shape, bias, padding=1)
        return masked_linear(x, values, indices, shape, bias)

    return with_backward(forward, [leaf(layer.x), leaf(values), leaf(layer.bias)], layer.grad)


def dense(layer: Layer, layout: torch.memory_format = torch.contiguous_format) -> Engine:
    """All weights."""
    x, weight, grad = layer.x, layer.weight, layer.grad
    if layer.is_convolution:
        x, weight, grad = (each.contiguous(memory_format=layout) for each in (x, weight, grad))
    return with_backward(layer.dense, [leaf(x), leaf(weight), leaf(layer.bias)], grad)


def dense_times_mask(layer: Layer) -> Engine:
    """What code bases do that prune by masks."""
    factor = layer.mask.float()
    forward = lambda x, weight, bias: layer.dense(x, weight * factor, bias)  # noqa: E731
    return with_backward(forward, [leaf(layer.x), leaf(layer.weight), leaf(layer.bias)], layer.grad)


def csr(layer: Layer) -> Engine:
    """``torch.sparse`` in rows, times the unfolded images (or the transposed inputs)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta state
        weight = layer.weight.flatten(1).to_sparse_csr()
    sides = layer.x.shape[2:]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not layer.is_convolution:
            return (weight @ x.t()).t() + bias
        columns = F.unfold(x, 3, padding=1)  # [N, C 9, H W]
        flat = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        out = (weight @ flat).view(weight.shape[0], len(x), -1).transpose(0, 1)
        return out.reshape(len(x), -1, *sides) + bias[:, None, None]

    return with_backward(forward, [leaf(layer.x), weight.requires_grad_(), leaf(layer.bias)], layer.grad)


def sparselab_linear(layer: Layer) -> Engine | None:
    """Sparselab's padded CSR, linear layers only; None where it is not installed or cannot be had."""
    if layer.is_convolution or importlib.util.find_spec("sparselab") is None:
        return None
    import numpy
    import sparselab
    from sparselab import ops

    ops._clear_transpose_cache()  # kept by id(matrix), and so found again by another matrix at the same address
    outputs, inputs = layer.weight.shape
    module = sparselab.SparseLinear(inputs, outputs, sparsity=0.5)  # no constructor from weights: given new ones below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta state of torch's CSR, which it goes through
        module._csr = sparselab.PaddedCSR.from_dense(layer.weight)
    module._values = torch.nn.Parameter(torch.from_numpy(numpy.asarray(module._csr.values)))
    module.bias = torch.nn.Parameter(layer.bias.clone())
    leaves = [leaf(layer.x), module._values, module.bias]
    return with_backward(lambda x, *_: module(x), leaves, layer.grad)


def check(layer: Layer, engine: Engine) -> float:
    """Largest relative error of the input's and the bias' gradients against float64."""
    x, weight, bias = leaf(layer.x.double()), layer.weight.double(), leaf(layer.bias.double())
    expected = torch.autograd.grad(layer.dense(x, weight, bias), [x, bias], layer.grad.double())
    found = engine()
    pairs = ((found[0], expected[0]), (found[-1], expected[1]))
    return max(float((mine.double() - right).norm() / right.norm()) for mine, right in pairs)


def errors_of(layer: Layer, peers: dict[str, Engine]) -> Iterator[tuple[str, float]]:
    """Each peer's relative error; infinite where it is not a number."""
    for peer, engine in peers.items():
        wrong = check(layer, engine)
        yield peer, wrong if wrong == wrong else float("inf")


def layer_case(name: str, layer: Layer, bar: tuple[float, float] | None, *, stock: bool, csr_too: bool = False) -> Case:
    """One layer; with ``stock`` the slower peers too."""
    mine = ours(layer)
    error = check(layer, mine)
    if error > 1e-5:
        raise AssertionError(f"{name}: our gradients are {error:.1e} off float64")
    peers = {"dense": dense(layer)}
    if layer.is_convolution:
        peers["dense, channels-last"] = dense(layer, torch.channels_last)
    if stock:
        peers["dense × mask"] = dense_times_mask(layer)
        if csr_too or not layer.is_convolution:
            peers["torch.sparse CSR" + (", unfold" if layer.is_convolution else "")] = csr(layer)
        if (lab := sparselab_linear(layer)) is not None:
            peers["sparselab"] = lab
    not_counted = {peer: f"relative error {wrong:.1e}" for peer, wrong in errors_of(layer, peers) if wrong > ACCURACY}
    if "sparselab" in peers:
        not_counted["sparselab"] = "shown beside: what must hold is over dense layers"
    return Case(
        name,
        mine,
        peers,
        note=f"{layer.flops / 1e9:.2f} GFLOP over nonzeros; our relative error {error:.1e}",
        not_counted=not_counted,
        bar=None if bar is None else (1 / bar[0], 1 / bar[1]),
    )


def scaled(bar: tuple[float, float], *, pruned: bool) -> tuple[float, float]:
    """A bar as it holds for these threads and masks."""
    factor = (PRUNED if pruned else 1.0) * (TWO_THREADS if torch.get_num_threads() > 1 else 1.0)
    return bar[0] * factor, bar[1] * factor


def convolution_cases(*, quick: bool) -> Iterator[Case]:
    """Uniform masks, then those of a pruned network."""
    for pruned in (False, True):
        for layer, shape in LAYERS.items():
            for density, bar in CONV_BARS.items():
                if quick and density != 0.1:
                    continue
                mask = pruned_masks.convolution(layer, density) if pruned else None
                made = make_layer(shape, density, mask)
                name = f"{layer}, {100 * (1 - density):g} % zeros, {'pruned' if pruned else 'uniform'}"
                # Unfolded images of the first layer take 0.3 GB, and CSR loses there by the same factor.
                wants_csr = shape[2] < 32 and density == 0.1
                yield layer_case(
                    name, made, scaled(bar, pruned=pruned), stock=not quick and not pruned, csr_too=wants_csr
                )


def linear_cases(*, quick: bool) -> Iterator[Case]:
    """Uniform masks."""
    for density, bar in LINEAR_BARS.items():
        if quick and density != 0.1:
            continue
        name = f"linear {LINEAR[0]} → {LINEAR[1]}, {100 * (1 - density):g} % zeros, uniform"
        yield layer_case(name, make_layer(LINEAR, density), scaled(bar, pruned=False), stock=True)


def sweep_cases(*, quick: bool) -> Iterator[Case]:
    """The layers as ``kernels="auto"`` runs them, through the densities where it changes over: never 5 % slower."""
    from curvlab.sparse import MaskedConv2d, MaskedLinear

    shapes = [*LAYERS.values(), LINEAR]
    for shape in shapes[2:3] if quick else shapes:
        for density in SWEEP[::2] if quick else SWEEP:
            layer = make_layer(shape, density)
            if layer.is_convolution:
                whole = torch.nn.Conv2d(shape[0], shape[1], 3, padding=1)
                module = MaskedConv2d(whole, layer.mask)
            else:
                module = MaskedLinear(torch.nn.Linear(*shape[:2]), layer.mask)
            leaves = [leaf(layer.x), *module.parameters()]
            engine = with_backward(lambda x, *_, module=module: module(x), leaves, layer.grad)
            peers = {"dense": dense(layer), "our op": ours(layer)}
            not_counted = {"our op": "this project's own, whatever auto takes"}
            if layer.is_convolution:
                peers["dense, channels-last"] = dense(layer, torch.channels_last)
                if module.path == "dense":
                    not_counted["dense, channels-last"] = "another layout than the layer's, which its dense path keeps"
            words = " → ".join(map(str, shape[:2])) + (f" @{shape[2]}²" if layer.is_convolution else "")
            yield Case(
                f"auto, {words}, {100 * density:g} % kept: {module.path}", engine, peers,
                not_counted=not_counted, bar=(1 / NEVER_SLOWER, 1.0),
            )  # fmt: skip


def cases(*, quick: bool) -> Iterator[Case]:
    """Layers, linear, the crossover, then whole steps."""
    yield from convolution_cases(quick=quick)
    yield from linear_cases(quick=quick)
    yield from sweep_cases(quick=quick)
    yield from ticket_step.cases(quick=quick)
