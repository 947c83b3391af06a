# SPDX-License-Identifier: Apache-2.0
r"""The empirical neural tangent kernel, dense, and the network linearized in its parameters.

    K[(n, c), (m, d)] = < d f_c(x_n) / d theta, d f_d(x_m) / d theta >        (no 1/N, no 1/C; f are the logits)

with theta all parameters that require a gradient, n, m = 0..N-1 samples, c, d = 0..C-1 outputs; row ``n C + c``.

Nothing of size (N C) x P is formed for fully connected layers: with y = s (W a + b), and B = d f_c(x_n) / d y
``[N, C, out]``, the layer adds

    s^2 (B B^T)[(n, c), (m, d)] (a_n . a_m + 1)

(the +1 is the bias).  Convolutions sum over positions p before the square, dW[n, c] = sum_p B[n, c, :, p] u[n, :, p]
with u the unfolded patches, so their per-sample gradients are formed, in blocks of output channels.  Parameters of
anything else (normalization layers, shared or reused modules) get exact per-sample Jacobians by ``torch.func``.
Source: Jacot, Gabriel, Hongler 2018; the layer products are Novak, Sohl-Dickstein, Schoenholz 2022, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp

from curvlab.operators import layer_kernels as kernels
from curvlab.operators.calls import call_at

__all__ = ["empirical_ntk", "kernel_drift", "linearization_error", "linearized_outputs"]

DEFAULT_BUDGET = 4 << 30


def empirical_ntk(
    model: nn.Module,
    x: Tensor,
    *,
    params: Sequence[Tensor] | None = None,
    structured: bool = True,
    budget_bytes: int = DEFAULT_BUDGET,
) -> Tensor:
    """The kernel ``[N C, N C]`` of ``model`` at ``params`` on inputs ``x [N, ...]``, in the dtype of the parameters.

    Args:
        model: maps ``[N, ...]`` to logits ``[N, C]``, each sample on its own (evaluation mode where that matters).
        x: inputs.
        params: parameters to take the kernel at, in the order of ``model.parameters()`` (those that require a
            gradient); default: the model's own.  The model is not changed.
        structured: use layer products.  ``False`` takes exact per-sample Jacobians for everything: slower by orders of
            magnitude on wide layers, right for any model that ``torch.func`` takes.
        budget_bytes: memory for the kernel and its temporaries.

    Returns:
        Symmetric to the last bit.  Three entries were compared with plain autograd, sample by sample.  NaN in x gives
        NaN in the rows and columns of its sample, NaN in the parameters NaN wherever the outputs depend on it; neither
        is an error.

    Raises:
        TypeError: x is not floating point.
        ValueError: empty x; a layer in training mode that mixes samples or draws randomness; params of other shapes,
            dtype or device; the budget is too small (the message says how many samples would fit); or the comparison
            with autograd fails (a weight is used outside of its layer, outputs depend on other samples, or a product is
            not finite where autograd's is).
    """
    theta = _named(model, params, "empirical_ntk")
    _check(model, x, theta, "empirical_ntk")
    with torch.no_grad():
        outputs = call_at(model, theta, (x[:1],))
    if outputs.ndim != 2:
        raise ValueError(
            f"empirical_ntk: model must map [N, ...] to [N, C], got outputs {list(outputs.shape)} for one sample"
        )
    layers = kernels.find_layers(model, theta, x[:1]) if structured else []
    rest = [name for name in theta if not any(name in layer.names for layer in layers)]
    _check_budget(layers, [theta[name] for name in rest], x, outputs, budget_bytes)
    num = len(x) * outputs.shape[1]
    kernel = torch.zeros(num, num, dtype=outputs.dtype, device=x.device)
    spare = budget_bytes - kernel.numel() * kernel.element_size()
    kernels.add_layers(kernel, model, theta, x, layers, spare)
    for name in rest:
        kernels.add_by_jacobians(kernel, model, theta, x, name)
    kernels.mirror_lower(kernel)
    if layers:
        _compare_with_autograd(kernel, model, theta, x)
    return kernel


def kernel_drift(kernel: Tensor, reference: Tensor) -> float:
    """``||K - K_0||_F / ||K_0||_F``: how far the kernel moved, 0 for a network that is its own linearization.

    Sums in float64.  NaN in either kernel gives NaN.

    Raises:
        ValueError: shapes differ, or the reference is zero.
    """
    if kernel.shape != reference.shape:
        raise ValueError(
            f"kernel_drift: kernel must be {list(reference.shape)} like reference, got {list(kernel.shape)}"
        )
    # Row blocks: whole float64 copies of a 5000 x 5000 kernel would be 0.4 GB for two numbers.
    moved = base = 0.0
    for now, start in zip(kernel.split(256), reference.split(256), strict=True):
        start = start.double()
        moved += (now.double() - start).square().sum().item()
        base += start.square().sum().item()
    if base == 0.0:
        raise ValueError("kernel_drift: reference must not be all zero")
    return (moved / base) ** 0.5


def linearized_outputs(model: nn.Module, params0: Sequence[Tensor], params1: Sequence[Tensor], x: Tensor) -> Tensor:
    """``f(x; theta_0) + J(x; theta_0) (theta_1 - theta_0)``, ``[N, C]``, by one forward-mode product.

    Args:
        model: the network; its own parameters do not enter and stay as they are.
        params0: theta_0, in the order of ``model.parameters()`` (those that require a gradient).
        params1: theta_1, likewise.
        x: inputs ``[N, ...]``.  NaN in x or in the parameters gives NaN outputs.

    Raises:
        TypeError: x is not floating point.
        ValueError: empty x; a layer in training mode that mixes samples or draws randomness; parameter lists that do
            not match the model's, or of another dtype or device than x.
    """
    return _linearize(model, params0, params1, x, "linearized_outputs")[1]


def linearization_error(model: nn.Module, params0: Sequence[Tensor], x: Tensor) -> float:
    """``||f(theta_T) - f_lin(theta_T)||_F / ||f(theta_T) - f(theta_0)||_F`` on ``x``; theta_T is the model's own.

    0 for a network that is linear in its parameters along the way that it went (lazy), of order one when it is not.
    NaN in x or in the parameters gives NaN.

    Raises:
        TypeError: x is not floating point.
        ValueError: empty x; a layer in training mode that mixes samples or draws randomness; params0 do not match the
            model's parameters, or have another dtype or device than x; the outputs did not change at all.
    """
    own = [param.detach() for param in model.parameters() if param.requires_grad]
    start, linear = _linearize(model, params0, own, x, "linearization_error")
    with torch.no_grad():
        end = model(x)
    change = (end - start).double().norm().item()
    if change == 0.0:
        raise ValueError(
            "linearization_error: the outputs at params0 must differ from the model's, got no change at all"
        )
    return (end - linear).double().norm().item() / change


def _linearize(
    model: nn.Module, params0: Sequence[Tensor], params1: Sequence[Tensor], x: Tensor, owner: str
) -> tuple[Tensor, Tensor]:
    start = _named(model, params0, owner, "params0")
    end = _named(model, params1, owner, "params1")
    _check(model, x, start, owner, "params0")
    _check(model, x, end, owner, "params1")
    step = {name: end[name] - start[name] for name in start}
    with torch.no_grad():
        value, change = jvp(lambda theta: call_at(model, theta, (x,)), (start,), (step,))[:2]
    return value, value + change


def _named(
    model: nn.Module, params: Sequence[Tensor] | None, owner: str, argument: str = "params"
) -> dict[str, Tensor]:
    """Name -> detached tensor for the parameters that require a gradient; ``params`` replaces the values."""
    own = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    if not own:
        raise ValueError(f"{owner}: model must have parameters that require a gradient, got none")
    if params is None:
        return own
    params = list(params)
    if len(params) != len(own):
        raise ValueError(f"{owner}: {argument} must have {len(own)} tensors like the model, got {len(params)}")
    for (name, param), value in zip(own.items(), params, strict=True):
        if value.shape != param.shape:
            raise ValueError(
                f"{owner}: {argument} must have shape {list(param.shape)} for {name}, got {list(value.shape)}"
            )
    return {name: value.detach() for name, value in zip(own, params, strict=True)}


def _check(model: nn.Module, x: Tensor, theta: dict[str, Tensor], owner: str, argument: str = "params") -> None:
    if not x.is_floating_point():
        raise TypeError(f"{owner}: x must be floating point, got {x.dtype}")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{owner}: x must be [N, ...] with N of at least 1, got {list(x.shape)}")
    for name, param in theta.items():
        if param.dtype != x.dtype or param.device != x.device:
            raise ValueError(
                f"{owner}: {argument} must be {x.dtype} on {x.device} like x, got {param.dtype} on {param.device} "
                f"for {name}"
            )
    mixing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for name, module in model.named_modules():
        if module.training and isinstance(module, mixing):
            raise ValueError(
                f"{owner}: {name or 'model'} ({type(module).__name__}) must be in eval mode (call model.eval()), "
                "got training mode: its outputs depend on other samples or on chance"
            )


def _check_budget(
    layers: list[kernels.Layer], rest: list[Tensor], x: Tensor, outputs: Tensor, budget_bytes: int
) -> None:
    classes, item = outputs.shape[1], outputs.element_size()

    def need(samples: int) -> int:
        rows = samples * classes
        block = kernels.BLOCK_ROWS * rows
        signals = max((layer.signal_size(classes) for layer in layers), default=0) * samples
        jacobian = max((param.numel() for param in rest), default=0) * rows
        activations = sum(layer.activation_size() for layer in layers) * samples
        return item * (rows * rows + block + max(signals * 2, jacobian) + activations)

    if need(len(x)) <= budget_bytes:
        return
    low, high = 0, len(x)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= budget_bytes else (low, middle)
    advice = f"{low} samples would fit" if low else "not even one sample would fit"
    raise ValueError(
        f"empirical_ntk: budget_bytes must be at least {need(len(x))} ({need(len(x)) / 2**30:.2f} GiB) for "
        f"{len(x)} samples x {classes} outputs, got {budget_bytes} ({budget_bytes / 2**30:.2f} GiB); {advice}"
    )


def _compare_with_autograd(kernel: Tensor, model: nn.Module, theta: dict[str, Tensor], x: Tensor) -> None:
    """Two per-sample gradients by plain autograd against the three entries of K that they give.

    Where autograd gives NaN or an infinity, any such value agrees: which of them comes out is a matter of the order.
    """
    last = len(x) - 1
    classes = kernel.shape[0] // len(x)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    pair = []
    for sample, output in ((0, 0), (last, classes - 1)):
        value = call_at(model, leaves, (x[sample : sample + 1],))[0, output]
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        pair.append([None if grad is None else grad.double() for grad in grads])
    ends = (0, kernel.shape[0] - 1)
    # Of the finite ones: a NaN sample at one end must not decide on the entries of the other.
    scale = max((d for i in ends if math.isfinite(d := kernel[i, i].item())), default=0.0)
    # float32 products of 1e3..1e4 terms agree to about 1e-6 of the diagonal; a wrong structure is off by order one.
    tolerance = 1e-8 if kernel.dtype == torch.float64 else 1e-2 if kernel.dtype.itemsize == 2 else 1e-4
    for i in range(2):
        for j in range(i, 2):
            exact = sum(
                (a * b).sum().item() for a, b in zip(pair[i], pair[j], strict=True) if a is not None and b is not None
            )
            # In the kernel's dtype, so that what overflows there is infinite on both sides.
            exact = torch.tensor(exact, dtype=kernel.dtype).item()
            got = kernel[ends[i], ends[j]].item()
            agree = math.isfinite(got) == math.isfinite(exact)
            if agree and math.isfinite(exact):
                agree = abs(got - exact) <= tolerance * max(scale, abs(exact))
            if not agree:
                raise ValueError(
                    f"empirical_ntk: the layer products give K = {got:.6g} where autograd gives {exact:.6g} "
                    f"(entry {ends[i]}, {ends[j]}): model must use each weight in its own layer only, treat samples "
                    f"one by one, and not overflow {kernel.dtype}; pass structured=False for exact per-sample Jacobians"
                )
