# SPDX-License-Identifier: Apache-2.0
"""The mode in which a network is looked at: evaluation, BatchNorm as declared, attention by its math path.

Weight normalization is written out: the second derivative of ``torch._weight_norm`` takes the norms of v for constants
(PyTorch 2.14: off by as much as the Hessian itself, and not symmetric), and every engine would agree on it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

__all__ = [
    "BatchNormMode",
    "batch_norms",
    "check_records",
    "frozen_statistics",
    "math_attention",
    "own_dtypes",
    "private_copy",
    "watch_attention",
]

BatchNormMode = Literal["eval", "frozen", "batch"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """``g v / |v|`` with a right second derivative; the norm runs over all axes but ``dim``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _WeightNorm(parametrizations._WeightNorm):
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return _weight_norm(weight_v, weight_g, self.dim)


class _OldWeightNorm(WeightNorm):
    def compute_weight(self, module: nn.Module) -> Any:
        g, v = getattr(module, f"{self.name}_g"), getattr(module, f"{self.name}_v")
        return _weight_norm(v, g, self.dim)


def _make_derivatives_right(model: nn.Module) -> None:
    """In a private copy: weight normalizations of both styles written out, embeddings with their plain gradient."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            # Scaled by how often a word occurs, a "gradient" is none: its Jacobian is not symmetric. Sparse gradients
            # have the same values and no second derivative.
            module.scale_grad_by_freq = module.sparse = False
        if type(module) is parametrizations._WeightNorm:
            module.__class__ = _WeightNorm
        for hook in module._forward_pre_hooks.values():
            if type(hook) is WeightNorm:
                hook.__class__ = _OldWeightNorm


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Name -> BatchNorm layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def private_copy(model: nn.Module, batch_norm: BatchNormMode) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """``(copy, parameters, buffers)``: a copy in evaluation mode whose tensors are detached clones of the model's.

    BatchNorm layers of the copy say their mode by their own attributes: "eval" and "frozen" normalize by
    ``running_mean`` and ``running_var`` (which "frozen" replaces batch by batch), "batch" is in training mode without
    running statistics, so that no pass moves any.

    Raises:
        ValueError: an unknown mode, or "eval" with a layer that has no running statistics.
    """
    if batch_norm not in get_args(BatchNormMode):
        raise ValueError(f"Problem: batch_norm must be 'eval', 'frozen' or 'batch', got {batch_norm!r}")
    # deepcopy refuses tensors that are no leaves (weights of old-style parametrizations) and copies all others: the
    # memo hands it our clones, so that shared tensors stay shared and the copy owns no second set of values.
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo).eval()
    _make_derivatives_right(copied)
    for name, layer in batch_norms(copied).items():
        if batch_norm == "batch":
            layer.train()
            layer.track_running_stats = False
        elif layer.running_mean is None and batch_norm == "eval":
            raise ValueError(
                f"Problem: batch_norm must be 'frozen' or 'batch' for {name} ({type(layer).__name__}), which has no "
                "running statistics, got 'eval'"
            )
        elif layer.running_mean is None:
            like = next(copied.parameters())
            layer.running_mean = torch.zeros(layer.num_features, dtype=like.dtype, device=like.device)
            layer.running_var = torch.ones_like(layer.running_mean)
    params = {name: param.detach() for name, param in copied.named_parameters()}
    return copied, params, dict(copied.named_buffers())


def frozen_statistics(model: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """Buffer name -> mean or (biased) variance that each BatchNorm of ``model`` sees while ``call`` runs it.

    During the call the layers normalize by their batch, so that each sees what training would show it.

    Raises:
        ValueError: a layer that is run twice in one pass has two statistics and no place for the second.
    """
    found: dict[str, Tensor] = {}
    layers = batch_norms(model)

    def record(name: str, layer: nn.modules.batchnorm._BatchNorm) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if f"{name}.running_mean" in found:
                raise ValueError(f"Problem: batch_norm must be 'eval' or 'batch' for {name}, which is run twice")
            axes = [axis for axis in range(args[0].ndim) if axis != 1]
            variance, mean = torch.var_mean(args[0], axes, correction=0)
            found[f"{name}.running_mean"], found[f"{name}.running_var"] = mean, variance

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(record(name, layer)))
            layer.training, layer.track_running_stats = True, False
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.training, layer.track_running_stats = False, True
    return found


def check_records(owner: str) -> None:
    """Refuse ``torch.inference_mode``, under which derivatives come out as zeros without a word.

    Raises:
        RuntimeError: it is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{owner}: derivatives must be taken outside of torch.inference_mode, which records none; no_grad may stay"
        )


@contextlib.contextmanager
def own_dtypes(device: torch.device) -> Iterator[None]:
    """Without a caller's autocast, which would round the products inside of every engine."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Scaled-dot-product attention by its math path: the fused ones have no second derivative."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _AttentionWatch(TorchFunctionMode):
    """Whether ``F.scaled_dot_product_attention`` was called, by the model itself or by ``nn.MultiheadAttention``."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen |= func is functional.scaled_dot_product_attention
        # A mode does not see the calls inside of this one; with weights asked for, it multiplies by itself.
        self.seen |= func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True)
        return func(*args, **kwargs)


@contextlib.contextmanager
def watch_attention(owner: str) -> Iterator[None]:
    """Warn once that attention takes the math path, if the calls inside use scaled-dot-product attention."""
    with _AttentionWatch() as watch:
        yield
    if watch.seen:
        warnings.warn(
            f"{owner}: scaled_dot_product_attention runs by its math path, which has second derivatives: more memory "
            "than the fused paths, the same function to rounding",
            stacklevel=6,
        )
