# SPDX-License-Identifier: Apache-2.0
"""Wrappers of csrc/norms: ``multi_tensor_norms`` and ``filter_norms``.

Neither op has a derivative. A backward pass through a result raises; inside a ``torch.func`` transform or under
forward-mode AD, where such ops would give silent zeros, the call itself raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvlab import _host

COLUMNS = ("l1", "l2", "linf", "nonzeros", "distance", "inner", "reference_l2")
"""The columns of ``multi_tensor_norms``, in order."""


def _refuse_transforms(op: str) -> None:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op}: has no derivative and no batching rule: call it outside torch.func transforms (grad, vjp, jvp, "
            "vmap) and outside forward_ad.dual_level"
        )


def _check_devices_of_fakes(op: str, *lists: Sequence[Tensor]) -> None:
    # FakeTensorMode lets a 0-d CPU tensor stand among CUDA ones, as pointwise operators do; the kernels do not.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        devices = sorted({str(t.device) for tensors in lists for t in tensors})
        if len(devices) > 1:
            raise ValueError(f"{op}: tensors must be on one device, got {', '.join(devices)}")


def multi_tensor_norms(tensors: Sequence[Tensor], reference: Sequence[Tensor] = (), *, l2_only: bool = False) -> Tensor:
    r"""Norms of each tensor x of a list, and of the whole list as one vector, in one pass over memory.

    .. math:: \sum_i |x_i|,\ \sqrt{\sum_i x_i^2},\ \max_i |x_i|,\ \#\{i : x_i \neq 0\},\
              \sqrt{\sum_i (x_i - r_i)^2},\ \sum_i x_i r_i,\ \sqrt{\sum_i r_i^2}

    Sums are accumulated in float64 in a fixed order: the result has the same bits for any number of threads. Relative
    error: at most 1e-7 for float32 inputs at 1e8 elements (products of floats are exact in double), 1e-14 for float64;
    the inner product relative to ``|x| |r|``. NaN and infinities propagate; a NaN counts as a nonzero.
    CUDA: one kernel launch, no synchronization with the host, deterministic, capturable in a graph.

    Args:
        tensors: T dense tensors on one device, each float32, float64, bfloat16 or float16, of any shape (empty and 0-d
            too). Strided tensors whose layout differs from their reference's are copied first.
        reference: none, or T tensors r with the shapes and dtypes of ``tensors``.
        l2_only: compute only the column ``l2`` (no reference then).

    Returns:
        float64 ``[T + 1, 7]`` on the tensors' device, columns as in ``COLUMNS``, the last row global. Columns that were
        not asked for are NaN. An empty tensor has zeros; an empty list gives one row of zeros, on the CPU.

    Raises:
        TypeError: a dtype or layout that is not supported, or a reference of another dtype.
        ValueError: lists of different lengths, other shapes, several devices, ``l2_only`` with a reference.
        NotImplementedError: inside a ``torch.func`` transform or forward-mode AD, or without a kernel for the device.
    """
    _refuse_transforms("multi_tensor_norms")
    _check_devices_of_fakes("multi_tensor_norms", tensors, reference)
    if not tensors and not reference:  # no tensor says to FakeTensorMode where the result lies
        return torch.zeros(1, len(COLUMNS), dtype=torch.float64)
    return torch.ops.curvlab.multi_tensor_norms(tensors, reference, l2_only)


def filter_norms(tensors: Sequence[Tensor]) -> Tensor:
    r"""L2 norm of each slice along the first dimension, :math:`\sqrt{\sum_i w_{j,i}^2}`, for a list of tensors.

    A 1-d tensor has slices of one element, so its norms are the absolute values; a 0-d tensor is one slice.

    Args:
        tensors: dense tensors ``[C, ...]`` on one device, each float32, float64, bfloat16 or float16.

    Returns:
        float64 ``[sum of C]`` on the tensors' device, one tensor's slices after another's.

    Raises:
        TypeError: a dtype or layout that is not supported.
        ValueError: several devices.
        NotImplementedError: inside a ``torch.func`` transform or forward-mode AD, or without a kernel for the device.
    """
    _refuse_transforms("filter_norms")
    _check_devices_of_fakes("filter_norms", tensors)
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.ops.curvlab.filter_norms(tensors)


class PreparedNorms:
    """``multi_tensor_norms`` for lists that are measured again and again: the lists are taken apart once.

    It holds the tensors themselves, so it sees every change of their values, and of their memory (``p.data = ...``).
    Raises what ``multi_tensor_norms`` raises, at construction.
    """

    def __init__(self, tensors: Sequence[Tensor], reference: Sequence[Tensor] = ()) -> None:
        _refuse_transforms("multi_tensor_norms")
        _check_devices_of_fakes("multi_tensor_norms", tensors, reference)
        self._table = _host.NormTable(list(tensors), list(reference))

    def __call__(self, *, l2_only: bool = False) -> Tensor:
        """As ``multi_tensor_norms`` of the lists."""
        _refuse_transforms("multi_tensor_norms")
        return self._table(l2_only)
