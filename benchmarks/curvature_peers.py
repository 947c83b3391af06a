# SPDX-License-Identifier: Apache-2.0
"""Products with the Hessian and the GGN as peers compute them, each as a careful user of it writes them.

A builder takes a :class:`~benchmarks.curvature_models.Setup` and directions ``[K, P]``, does what the peer does once
(a kept graph, an operator object), and returns the call to be timed and how to read its result as ``[K, P]``. Vectors
are given in the peer's own form, split or transposed outside the timing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn import functional as F

from benchmarks.curvature_models import Setup

Call = Callable[[], Any]
Read = Callable[[Any], Tensor]
Builder = Callable[[Setup, Tensor], tuple[Call, Read]]


def channels_last(setup: Setup) -> Setup:
    """A copy whose network and images lie channels-last."""
    model = copy.deepcopy(setup.model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = setup.x.contiguous(memory_format=torch.channels_last)
    return Setup(setup.name, model, x, setup.y, setup.pool)


def split(rows: Tensor, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each row as a list of tensors shaped and laid out as ``params``."""
    found = []
    for row in rows:
        pieces = row.split([p.numel() for p in params])
        laid_out = [torch.empty_like(p).copy_(piece.view(p.shape)) for piece, p in zip(pieces, params, strict=True)]
        found.append([piece.detach() for piece in laid_out])
    return found


def join(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows ``[K, P]`` of K lists of tensors."""
    return torch.stack([torch.cat([t.detach().reshape(-1) for t in tensors]) for tensors in lists])


def _loss(setup: Setup) -> Tensor:
    return F.cross_entropy(setup.model(setup.x), setup.y)


def kept_gradient(setup: Setup) -> tuple[list[nn.Parameter], tuple[Tensor, ...]]:
    """The parameters and the gradient with its graph."""
    params = setup.params
    return params, torch.autograd.grad(_loss(setup), params, create_graph=True)


def kept_graph(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """The ten lines anyone writes: the gradient's graph kept, one ``autograd.grad`` a vector."""
    params, gradient = kept_gradient(setup)
    vectors = split(rows, params)
    return lambda: [torch.autograd.grad(gradient, params, v, retain_graph=True) for v in vectors], join


def kept_graph_batched(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """The same, all vectors at once with ``is_grads_batched``."""
    params, gradient = kept_gradient(setup)
    stacked = [torch.stack(pieces) for pieces in zip(*split(rows, params), strict=True)]
    return lambda: torch.autograd.grad(gradient, params, stacked, retain_graph=True, is_grads_batched=True), _by_rows


def rerun(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """Double backward, everything computed anew for every vector."""
    vectors = split(rows, setup.params)

    def call() -> list[tuple[Tensor, ...]]:
        found = []
        for v in vectors:
            params, gradient = kept_gradient(setup)
            found.append(torch.autograd.grad(gradient, params, v))
        return found

    return call, join


def _by_rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(len(t), -1) for t in tensors], 1)


def _by_name(found: Sequence[dict[str, Tensor]]) -> Tensor:
    return join([list(one.values()) for one in found])


def _functional(setup: Setup) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    params = {name: p.detach() for name, p in setup.model.named_parameters()}
    return lambda p: F.cross_entropy(functional_call(setup.model, p, (setup.x,)), setup.y), params


def _named(rows: Tensor, params: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(params, pieces, strict=True)) for pieces in split(rows, list(params.values()))]


def _stacked(rows: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    named = _named(rows, params)
    return {name: torch.stack([one[name] for one in named]) for name in params}


def func_jvp(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """``torch.func``: forward over reverse, one vector after another."""
    loss, params = _functional(setup)
    vectors = _named(rows, params)
    return lambda: [jvp(grad(loss), (params,), (v,))[1] for v in vectors], _by_name


def func_vmap(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """``torch.func``: forward over reverse under ``vmap``."""
    loss, params = _functional(setup)
    stacked = _stacked(rows, params)
    call = lambda: vmap(lambda v: jvp(grad(loss), (params,), (v,))[1])(stacked)  # noqa: E731
    return call, lambda found: _by_rows(list(found.values()))


def quiet_linearize(function: Callable[..., Any], *primals: Any) -> Callable[..., Any]:
    """The linear map of ``torch.func.linearize``, its deprecation warnings kept off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return linearize(function, *primals)[1]


def func_linearize(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """``torch.func.linearize`` of the gradient: the primal folded away, one vector after another."""
    loss, params = _functional(setup)
    vectors = _named(rows, params)
    product = quiet_linearize(grad(loss), params)
    return lambda: [product(v) for v in vectors], _by_name


def func_linearize_vmap(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """The same under ``vmap``."""
    loss, params = _functional(setup)
    stacked = _stacked(rows, params)
    product = quiet_linearize(grad(loss), params)
    return lambda: vmap(product)(stacked), lambda found: _by_rows(list(found.values()))


def curvlinops_hessian(setup: Setup) -> Any:
    """The Hessian of curvlinops as a linear operator."""
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        setup.model, nn.CrossEntropyLoss(), setup.params, [(setup.x, setup.y)], check_deterministic=False
    )


def curvlinops(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """The product of curvlinops: ``matmat`` over columns ``[P, K]`` (``matvec`` for one)."""
    return _curvlinops_product(curvlinops_hessian(setup), rows)


def _curvlinops_product(operator: Any, rows: Tensor) -> tuple[Call, Read]:
    if len(rows) == 1:
        vector = rows[0].contiguous()
        return lambda: operator @ vector, lambda found: found.detach()[None]
    columns = rows.T.contiguous()
    return lambda: operator @ columns, lambda found: found.detach().T


def pyhessian_object(setup: Setup) -> Any:
    """PyHessian's object; it takes whatever stands in ``.grad`` for part of the gradient, so that is cleared first."""
    from pyhessian import hessian

    setup.model.zero_grad(set_to_none=True)
    return hessian(setup.model, nn.CrossEntropyLoss(), data=(setup.x, setup.y), cuda=False)


def pyhessian(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """PyHessian: its kept graph of one batch and ``hessian_vector_product``."""
    from pyhessian.utils import hessian_vector_product

    found = pyhessian_object(setup)
    vectors = split(rows, found.params)
    return lambda: [hessian_vector_product(found.gradsH, found.params, v) for v in vectors], join


def eigenthings_hessian(setup: Setup, method: str = "autograd") -> Any:
    """hessian-eigenthings' Hessian operator."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    loss = supervised_loss(nn.CrossEntropyLoss())
    return HessianOperator(setup.model, [(setup.x, setup.y)], loss, method=method)  # pyright: ignore[reportArgumentType]


def eigenthings(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """hessian-eigenthings, double backward."""
    operator = eigenthings_hessian(setup)
    return lambda: [operator.matvec(v) for v in rows], lambda found: torch.stack(found).detach()


def eigenthings_differences(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """hessian-eigenthings, finite differences (on a copy: it moves the parameters in place)."""
    operator = eigenthings_hessian(setup.with_model(copy.deepcopy(setup.model)), "finite_difference")
    return lambda: [operator.matvec(v) for v in rows], lambda found: torch.stack(found).detach()


def backpack(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """BackPACK: nested reverse mode over given gradients."""
    from backpack.hessianfree.hvp import hessian_vector_product

    params = setup.params
    loss = _loss(setup)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    vectors = split(rows, params)
    return lambda: [hessian_vector_product(loss, params, v, grad_params=gradient) for v in vectors], join


def _softmax_hessian(setup: Setup, logits: Tensor) -> Callable[[Tensor], Tensor]:
    p = logits.detach().softmax(1)
    scale = 1.0 / len(setup.y)
    return lambda u: scale * (p * u - p * (p * u).sum(1, keepdim=True))


def ggn_kept_graph(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """GGN with kept graphs: J v by differentiating the vector-Jacobian product, then the loss Hessian, then J'."""
    params = setup.params
    logits = setup.model(setup.x)
    dummy = torch.zeros_like(logits, requires_grad=True)
    transposed = torch.autograd.grad(logits, params, dummy, create_graph=True)
    curvature = _softmax_hessian(setup, logits)
    vectors = split(rows, params)

    def one(v: list[Tensor]) -> tuple[Tensor, ...]:
        (tangent,) = torch.autograd.grad(transposed, dummy, v, retain_graph=True)
        return torch.autograd.grad(logits, params, curvature(tangent), retain_graph=True)

    return lambda: [one(v) for v in vectors], join


def ggn_linearize(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """GGN with ``torch.func``: ``linearize`` and ``vjp`` of the network, both kept."""
    params = {name: p.detach() for name, p in setup.model.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(setup.model, p, (setup.x,))

    logits, transposed, *_ = vjp(outputs, params)
    forward = quiet_linearize(outputs, params)
    curvature = _softmax_hessian(setup, logits)
    vectors = _named(rows, params)
    return lambda: [transposed(curvature(forward(v)))[0] for v in vectors], _by_name


def ggn_curvlinops(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """The GGN of curvlinops."""
    from curvlinops import GGNLinearOperator

    operator = GGNLinearOperator(
        setup.model, nn.CrossEntropyLoss(), setup.params, [(setup.x, setup.y)], check_deterministic=False
    )
    return _curvlinops_product(operator, rows)


def ggn_eigenthings(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """hessian-eigenthings' GGN."""
    from hessian_eigenthings import GGNOperator, supervised_forward, supervised_loss_of_output

    loss = supervised_loss_of_output(nn.CrossEntropyLoss())
    operator = GGNOperator(setup.model, [(setup.x, setup.y)], supervised_forward, loss)
    return lambda: [operator.matvec(v) for v in rows], lambda found: torch.stack(found).detach()


def ggn_backpack(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
    """BackPACK's GGN."""
    from backpack.hessianfree.ggnvp import ggn_vector_product

    logits = setup.model(setup.x)
    loss = F.cross_entropy(logits, setup.y)
    vectors = split(rows, setup.params)
    return lambda: [ggn_vector_product(loss, logits, setup.model, v) for v in vectors], join


def _in_channels_last(builder: Builder) -> Builder:
    def build(setup: Setup, rows: Tensor) -> tuple[Call, Read]:
        return builder(channels_last(setup), rows)

    return build


KEPT, LINEARIZE = "kept graph", "func.linearize"
STRONG: dict[str, Builder] = {KEPT: kept_graph, LINEARIZE: func_linearize, "curvlinops": curvlinops}
STRONG["PyHessian"] = pyhessian
OTHERS: dict[str, Builder] = {
    "double backward, re-run": rerun,
    "func jvp(grad)": func_jvp,
    "hessian-eigenthings": eigenthings,
    "hessian-eigenthings, differences": eigenthings_differences,
    "BackPACK": backpack,
}
BLOCK: dict[str, Builder] = {
    "kept graph, is_grads_batched": kept_graph_batched,
    "func vmap(jvp(grad))": func_vmap,
    "func.linearize, vmap": func_linearize_vmap,
}
GGN: dict[str, Builder] = {KEPT: ggn_kept_graph, LINEARIZE: ggn_linearize, "curvlinops": ggn_curvlinops}
GGN_OTHERS: dict[str, Builder] = {"hessian-eigenthings": ggn_eigenthings, "BackPACK": ggn_backpack}
IN_CHANNELS_LAST = (KEPT, LINEARIZE, "func.linearize, vmap")


def with_channels_last(builders: dict[str, Builder], setup: Setup) -> dict[str, Builder]:
    """``builders`` and, for images, the channels-last forms of those that may gain by it."""
    found = dict(builders)
    if setup.is_convolutional:
        for name in IN_CHANNELS_LAST:
            if name in builders:
                found[f"{name}, channels-last"] = _in_channels_last(builders[name])
    return found


def reference_product(setup: Setup, row: Tensor, *, ggn: bool = False) -> Tensor:
    """The product in float64 by the plainest route: what every engine is judged by."""
    double = Setup(setup.name, copy.deepcopy(setup.model).double(), setup.x.double(), setup.y, setup.pool)
    call, read = (ggn_kept_graph if ggn else kept_graph)(double, row.double()[None])
    return read(call())[0]
