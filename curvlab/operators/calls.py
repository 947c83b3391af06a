# SPDX-License-Identifier: Apache-2.0
"""Calls of a network at other values of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["call_at"]


def call_at(
    model: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """``model(*args, **kwargs)`` with other parameters and buffers; the model's own are back in place afterwards.

    ``torch.func.functional_call`` alone leaves the new value behind in a module that has two names
    (``nn.Sequential(layer, nn.Tanh(), layer)``): it swaps the tensor once for each name, and what it puts back last is
    what the first swap had brought (PyTorch issue 164759).  So each place that holds a tensor is named once here.

    Args:
        model: the network.
        values: name -> tensor, names as of ``named_parameters()`` and ``named_buffers()``; a tensor that stands in
            several places is replaced in all of them. What is not named stays.
        args: positional inputs.
        kwargs: inputs by name.
    """
    first_names: dict[int, str] = {}
    places: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():  # a module of several names comes once, by the first of them
        for held in (module._parameters, module._buffers):
            for own, tensor in held.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{own}" if prefix else own
                first = first_names.setdefault(id(tensor), name)
                if name in values or first in values:
                    places[name] = values[name if name in values else first]
    return functional_call(model, places, args, dict(kwargs or {}), tie_weights=False)
