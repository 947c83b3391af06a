# SPDX-License-Identifier: Apache-2.0
"""The layers between sparse convolutions in one pass: batch normalization, ReLU and 2 x 2 max pooling.

With a tenth of the weights kept, the convolutions of the paper's network (CNN(32), batch 128, one thread) take 70 of
210 ms of a training step, and these layers, in the library's kernels, 120.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from curvlab.ops import norm_act
from curvlab.sparse.sparsify import copied_model

__all__ = ["BatchNormReLU", "fuse"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class BatchNormReLU(nn.BatchNorm2d):
    """A BatchNorm2d with the ReLU (and 2 x 2 max pooling) that follows it; parameters and buffers as they were.

    Args:
        layer: whose parameters and buffers to hold, not copied.
        pool: pool as well.
    """

    def __init__(self, layer: nn.BatchNorm2d, *, pool: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in _TABLES})
        for name in _TABLES:
            getattr(self, name).update(getattr(layer, name))
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H, W]``, or half the height and width."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        # In training without tracked statistics the buffers, where there are any, stay as they are.
        tracked = not self.training or self.track_running_stats
        return norm_act.batch_norm_relu(
            input,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            training=by_batch,
            momentum=momentum,
            eps=self.eps,
            pool=self.pool,
        )

    def extra_repr(self) -> str:
        """As BatchNorm2d, then what is fused."""
        return f"{super().extra_repr()}, with ReLU" + (" and 2x2 max pooling" if self.pool else "")


_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def fuse(model: ModuleT) -> ModuleT:
    """A copy of ``model`` in whose Sequentials each BatchNorm2d, ReLU (, MaxPool2d(2)) is one :class:`BatchNormReLU`.

    The other layers of a group become ``nn.Identity``, so that names, and with them ``state_dict``, stay as they are: a
    trained copy's goes back into the plain model. Layers with hooks or a forward of their own are left alone, and
    normalizations that stand in several places.

    Args:
        model: any module.

    Raises:
        TypeError: not a module.
    """
    copied = copied_model(model, "fuse")
    # One in two places would become two, whose statistics part at the next .to().
    places_of = Counter(id(child) for module in copied.modules() for child in module._modules.values())
    for module in list(copied.modules()):
        if type(module) is not nn.Sequential:
            continue
        places = list(module._modules.items())
        for at, ((name, norm), (relu_name, relu)) in enumerate(pairwise(places)):
            if not (_is_plain(norm, nn.BatchNorm2d) and _is_plain(relu, nn.ReLU)) or places_of[id(norm)] > 1:
                continue
            pool_name, pool = places[at + 2] if at + 2 < len(places) else ("", None)
            pools = _is_plain(pool, nn.MaxPool2d) and _is_two_by_two(cast("Any", pool))
            module._modules[name] = BatchNormReLU(cast("nn.BatchNorm2d", norm), pool=pools)
            for other in (relu_name, *([pool_name] if pools else [])):
                module._modules[other] = nn.Identity()
    return copied


def _is_plain(module: nn.Module | None, kind: type) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is kind and not any(getattr(module, name) for name in hooks)


def _is_two_by_two(pool: nn.MaxPool2d) -> bool:
    sizes = [pool.kernel_size, pool.stride]
    twos = all(size in (2, (2, 2)) for size in sizes)
    rest = pool.padding in (0, (0, 0)) and pool.dilation in (1, (1, 1))
    return twos and rest and not pool.ceil_mode and not pool.return_indices
