# SPDX-License-Identifier: Apache-2.0
"""One update of one network: momentum SGD, Adam, or sharpness-aware minimization.

    sam:  e = rho g(theta) / ||g(theta)||_2,   then one momentum SGD step from theta with the gradient g(theta + e)

Both gradients are of the same batch (Foret, Kleiner, Mobahi, Neyshabur 2021, eq. 2-3, p = 2).  Batch normalization
takes its running statistics from the first pass alone: those at theta + e belong to a network that nobody evaluates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.training.recipe import Recipe

__all__ = ["SamStep", "Step", "make_step"]


class Step:
    """Forward, backward, ``torch.optim``'s update.  Called as ``step(images, labels, lr) -> (loss, logits)``."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.params = model, list(model.parameters())
        # fused: one pass over parameter, state and gradient (foreach makes three); CPU and CUDA both have it.
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.params, lr=recipe.lr, fused=True)
        else:
            self.optimizer = torch.optim.SGD(self.params, lr=recipe.lr, momentum=recipe.momentum, fused=True)

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One update; loss (batch mean, 0-d) and logits are those before it, detached."""
        loss, logits = self.backward(images, labels)
        self.update(lr)
        return loss, logits

    def backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient at the present parameters, into ``.grad``."""
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), logits.detach()

    def update(self, lr: float) -> None:
        """The optimizer's step with the gradient in ``.grad``."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, ``"<parameter number>.<name>"``."""
        return {
            f"{i}.{name}": value
            for i, param in enumerate(self.params)
            for name, value in self.optimizer.state[param].items()
            if isinstance(value, Tensor)
        }

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        for key, value in saved.items():
            i, name = key.split(".", 1)
            param = self.params[int(i)]
            # In the parameter's own memory format: the fused kernel walks all of them as flat memory.
            own = torch.empty_like(param) if value.shape == param.shape else torch.empty_like(value)
            self.optimizer.state[param][name] = own.detach().copy_(value)


class SamStep(Step):
    """Sharpness-aware minimization; see the module's text.  Two gradients an update."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self.rho = recipe.rho
        self.normalized = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One update; loss and logits are those at theta."""
        loss, logits = self.backward(images, labels)
        kept = [param.detach().clone() for param in self.params]
        with torch.no_grad():
            grads = [param.grad for param in self.params if param.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            for param in self.params:
                if param.grad is not None:
                    # 1e-12: a zero gradient has no direction, and theta stays where it is.
                    param.add_(param.grad * (self.rho / (norm + 1e-12)))
        for module in self.normalized:
            module.track_running_stats = False  # in train mode: normalize by the batch, leave the statistics alone
        try:
            self.backward(images, labels)
        finally:
            for module in self.normalized:
                module.track_running_stats = True
        with torch.no_grad():
            for param, before in zip(self.params, kept, strict=True):
                param.copy_(before)  # exactly theta: subtracting e again would round
        self.update(lr)
        return loss, logits


def make_step(model: nn.Module, recipe: Recipe) -> Step:
    """The update that ``recipe.optimizer`` names, for ``model``."""
    return SamStep(model, recipe) if recipe.optimizer == "sam" else Step(model, recipe)
