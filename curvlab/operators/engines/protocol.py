# SPDX-License-Identifier: Apache-2.0
"""What an engine offers to the operators: products of the problem's reduced loss, K directions at once.

Rows lead: ``rows [K, P]`` is contiguous, row k is one direction, in the order of ``problem.params``.  Every product is
that of ``L(theta) = (1/Z) sum_n l(f(x_n; theta), y_n)`` over *this process'* batches, with the Z of all processes: the
operators add up what the processes return.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Engine", "UnsupportedModel", "batch_generator", "draw_seed"]


class UnsupportedModel(ValueError):
    """An engine cannot take this model: the message names the node and the layer."""


@runtime_checkable
class Engine(Protocol):
    """A way to multiply; built as ``SomeEngine(problem, *, memory_budget=None, precision=None, **options)``.

    Constructors raise :class:`UnsupportedModel`, naming node and layer, for a model that the engine cannot take, and
    ``ValueError`` where the memory budget (bytes) does not hold one sample and one direction.  Options that every
    engine takes: ``num_samples`` and ``generator`` of the sampled curvature (``kind="monte_carlo"``).
    """

    name: str

    def loss(self) -> float:
        """L(theta)."""
        ...

    def gradient(self) -> Tensor:
        """dL/dtheta, ``[P]``."""
        ...

    def hessian(self, rows: Tensor) -> Tensor:
        """d2L/dtheta2 v for each row v: ``[K, P]`` to ``[K, P]``."""
        ...

    def ggn(self, rows: Tensor, kind: str = "loss") -> Tensor:
        """J^T B J v / Z for each row v; B is ``problem.loss.curvature(..., kind)``: ``[K, P]`` to ``[K, P]``.

        The draws of ``"monte_carlo"`` are made once: two products with one engine are of one matrix.
        """
        ...

    def jacobian(self, rows: Tensor) -> Tensor:
        """J v for each row v, ``[K, P]`` to ``[K, M]``: all elements of the outputs, batches one after another."""
        ...

    def jacobian_transposed(self, outputs: Tensor) -> Tensor:
        """J^T u for each row u: ``[K, M]`` to ``[K, P]``."""
        ...


def draw_seed(generator: torch.Generator | None) -> int:
    """One number that fixes all later draws of an engine; 0 for None, which leaves the global generator alone."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())


def batch_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """The stream of batch ``index``: the same whenever that batch is visited, and with every engine."""
    return torch.Generator(device).manual_seed((seed + 0x9E3779B97F4A7C15 * (index + 1)) % 2**63)
