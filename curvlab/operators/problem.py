# SPDX-License-Identifier: Apache-2.0
r"""What curvature is taken of: model, loss, chosen parameters, data and reduction, frozen at one theta.

    L(theta) = (1/Z) sum_b sum_{n in b} l(f(x_n; theta), y_n)

Z is the normalizer of the *whole* data set (of all processes): for ``"mean"`` the sum of what the loss gives each batch
(cross entropy: class weights of the labels that count; squared error: output elements; other callables: samples), for
``"sum"`` 1.  The split into batches never enters, unless BatchNorm is asked to see batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curvlab.operators.batches import Batches, as_batches, first_samples
from curvlab.operators.calls import call_at
from curvlab.operators.losses import OutputLoss, as_loss, loss_reduction
from curvlab.operators.modes import (
    BatchNormMode,
    batch_norms,
    check_records,
    frozen_statistics,
    math_attention,
    own_dtypes,
    private_copy,
)
from curvlab.operators.params import flatten, select_names, unflatten

__all__ = ["Problem", "Reduction"]

Reduction = Literal["mean", "sum"]
Selection = str | Iterable[str] | Callable[[str, Tensor], bool] | None


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Problem:
    """A loss as a function of chosen parameters, at a snapshot of them: later training does not move it.

    Args:
        model: the network; never modified. Copied without its tensors, and run in evaluation mode.
        loss: ``nn.CrossEntropyLoss``, ``F.cross_entropy`` (or a ``functools.partial`` of it), ``nn.MSELoss``,
            ``F.mse_loss``, ``nn.NLLLoss``, an ``OutputLoss``, or a callable that returns the mean over a batch (the
            sum, if it has an attribute or keyword ``reduction`` that says so).
        data: ``(x, y)`` of tensors, or what can be iterated again and again over such pairs in a fixed order. Inputs x
            may be a tensor, a tuple (``model(*x)``) or a dict (``model(**x)``). Moved to the parameters' device, and
            floating-point tensors to their dtype.
        params: chosen parameters, all others stay fixed: names, glob patterns (``"features.*"``), or a predicate
            ``(name, parameter) -> bool``; None: all that require a gradient. A shared parameter counts once.
        reduction: ``"mean"`` divides by Z, ``"sum"`` does not.
        batch_norm: ``"eval"`` (running statistics), ``"frozen"`` (statistics of each batch at theta, then constants),
            ``"batch"`` (statistics of each batch, differentiated).
        process_group: sum N and Z, and later every product, over its processes; each passes its own
            share of the data, at least one sample.

    Attributes:
        model: the private copy; its structure is what counts, its values are those of :attr:`params` and others.
        params: name -> chosen parameter, detached, in the order of ``model.named_parameters()``.
        buffers: name -> buffer.
        fixed: name -> parameter that was not chosen.
        num_params: P.
        num_samples: N, of all processes.
        normalizer: Z, of all processes.

    Raises:
        TypeError: data, loss or outputs of a kind that is not taken.
        ValueError: no parameters chosen, a pattern that names none; parameters of several dtypes or devices; no
            samples; a one-shot iterator; ``reduction`` against that of the loss module; BatchNorm without running
            statistics in mode "eval".
        RuntimeError: inside ``torch.inference_mode``.
    """

    model: nn.Module
    loss: OutputLoss
    params: dict[str, Tensor]
    fixed: dict[str, Tensor]
    buffers: dict[str, Tensor]
    reduction: Reduction
    batch_norm: BatchNormMode
    process_group: Any
    num_samples: int
    normalizer: float
    data: Batches

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        params: Selection = None,
        reduction: Reduction = "mean",
        batch_norm: BatchNormMode = "eval",
        process_group: Any = None,
    ) -> None:
        check_records("Problem")
        if not isinstance(model, nn.Module):
            raise TypeError(f"Problem: model must be an nn.Module, got {type(model).__name__}")
        model = _unwrapped(model)
        if reduction not in get_args(Reduction):
            raise ValueError(f"Problem: reduction must be 'mean' or 'sum', got {reduction!r}")
        if loss_reduction(loss) == "sum" and reduction == "mean":
            raise ValueError("Problem: reduction must be 'sum' like that of the loss, got 'mean'")
        output_loss = as_loss(loss)
        chosen = select_names(model, params, "Problem")
        copied, values, buffers = private_copy(model, batch_norm)
        theta = {name: values.pop(name) for name in chosen}
        _check_params(theta)
        some = next(iter(theta.values()))
        batches = as_batches(data, "Problem")
        for name, value in {
            "model": copied,
            "loss": output_loss,
            "params": theta,
            "fixed": values,
            "buffers": buffers,
            "reduction": reduction,
            "batch_norm": batch_norm,
            "process_group": process_group,
            "data": batches,
        }.items():
            object.__setattr__(self, name, value)
        self._count(some.device)

    def _count(self, device: torch.device, *, may_weigh_nothing: bool = False) -> None:
        """Set N and Z, summed over the processes; Z is 1 where no target counts: the loss is 0 there."""
        samples, weight = 0, 0.0
        for _, targets in self.data:
            samples += len(targets)
            weight += self.loss.weight(None, targets)
        without = int(samples == 0)
        if self.process_group is not None:
            counts = torch.tensor([samples, weight, without], dtype=torch.float64, device=device)
            torch.distributed.all_reduce(counts, group=self.process_group)
            samples, weight, without = int(counts[0].item()), counts[1].item(), int(counts[2].item())
        if without:  # every process raises: one alone would leave the others waiting for it
            where = "" if self.process_group is None else f" on {without} process(es)"
            raise ValueError(f"Problem: data must hold at least one sample, got none{where}")
        if self.reduction == "mean" and not weight > 0.0 and not may_weigh_nothing:
            raise ValueError(f"Problem: data must hold a target that counts for reduction 'mean', got Z = {weight}")
        object.__setattr__(self, "num_samples", samples)
        object.__setattr__(self, "normalizer", weight if self.reduction == "mean" and weight > 0.0 else 1.0)

    @property
    def num_params(self) -> int:
        """P, the number of elements of the chosen parameters."""
        return sum(param.numel() for param in self.params.values())

    @property
    def dtype(self) -> torch.dtype:
        """That of the chosen parameters; inputs are brought to it."""
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        """That of the chosen parameters; the data is brought there."""
        return next(iter(self.params.values())).device

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """``(x, y)`` batch by batch, on the problem's device and in its dtype.

        Raises:
            ValueError: another pass gave other data (a loader that shuffles or draws augmentations).
        """
        for inputs, targets in self.data:
            yield _moved(inputs, self.device, self.dtype), _moved(targets, self.device, self.dtype)

    def outputs(
        self, params: Mapping[str, Tensor], inputs: Any, *, statistics: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``f(inputs; params)``, ``[N, ...]``, differentiable, in the problem's BatchNorm mode and without dropout.

        Args:
            params: a value for each name of :attr:`params` (those left out keep theta).
            inputs: one batch of :meth:`batches`.
            statistics: what :meth:`statistics` gave for this batch, to spare a second pass in mode "frozen".

        Raises:
            TypeError: the model returns anything but a tensor.
        """
        if statistics is None:
            statistics = self.statistics(inputs)
        outputs = self._call({**self.fixed, **self.buffers, **statistics, **self.params, **params}, inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Problem: model must return one tensor, got {type(outputs).__name__}; wrap it in a module that does"
            )
        return outputs

    def statistics(self, inputs: Any) -> dict[str, Tensor]:
        """Mean and variance that each BatchNorm sees in this batch at theta; empty but in mode "frozen"."""
        if self.batch_norm != "frozen":
            return {}
        values = {**self.fixed, **self.buffers, **self.params}
        return frozen_statistics(self.model, lambda: self._call(values, inputs))

    def _call(self, values: dict[str, Tensor], inputs: Any) -> Any:
        positional, named = (), {}
        if isinstance(inputs, Mapping):
            named = dict(inputs)
        else:
            positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        with math_attention(), own_dtypes(self.device):
            return call_at(self.model, values, positional, named)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with parameters, floating-point buffers and inputs in ``dtype``."""

        def cast(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: value.to(dtype) if value.is_floating_point() else value for n, value in values.items()}

        return self._with(params=cast(self.params), fixed=cast(self.fixed), buffers=cast(self.buffers))

    def subset(self, n: int) -> Problem:
        """The problem of the first ``n`` samples of this process alone (fewer where there are fewer), with their own Z.

        Raises:
            ValueError: n below one.
        """
        if n < 1:
            raise ValueError(f"subset: n must be at least 1, got {n}")
        smaller = self._with(data=first_samples(self.data, n), process_group=None)
        smaller._count(self.device, may_weigh_nothing=True)
        return smaller

    def with_params(self, params: Mapping[str, Tensor], *, buffers: Mapping[str, Tensor] | None = None) -> Problem:
        """The same problem at other values (a snapshot of them) of the chosen parameters, and of some buffers.

        Raises:
            ValueError: names or shapes that are not the problem's.
        """
        snapshot = {name: _checked(params, name, value) for name, value in self.params.items()}
        unknown = [name for name in {**params, **(buffers or {})} if name not in {**self.params, **self.buffers}]
        if unknown:
            raise ValueError(f"with_params: params must be the problem's, got {unknown[0]!r} besides")
        moved = {n: _checked(buffers, n, v) if buffers and n in buffers else v for n, v in self.buffers.items()}
        return self._with(params=snapshot, buffers=moved)

    def at(self, model: nn.Module) -> Problem:
        """The same problem at the present values of ``model``: of all parameters, chosen or fixed, and of the buffers.

        Raises:
            ValueError: names or shapes that are not the problem's.
        """
        model = _unwrapped(model)
        values: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        values.update(model.named_buffers(remove_duplicate=False))

        def snapshot(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: _checked(values, name, value, "at: model") for name, value in own.items()}

        return self._with(params=snapshot(self.params), fixed=snapshot(self.fixed), buffers=snapshot(self.buffers))

    def rows_to_params(self, rows: Tensor) -> dict[str, Tensor]:
        """Name -> ``[K, *shape]``, views of ``rows [K, P]``; from ``[P]``, ``[*shape]``."""
        pieces = unflatten(rows.T if rows.ndim == 2 else rows, list(self.params.values()))
        return dict(zip(self.params, pieces, strict=True))

    def params_to_rows(self, params: Mapping[str, Tensor], *, batched: bool = True) -> Tensor:
        """``[K, P]`` contiguous from name -> ``[K, *shape]``; unless ``batched``, ``[P]`` from ``[*shape]``."""
        tensors = [params[name] for name in self.params]
        return flatten(tensors, batched=True).T if batched else flatten(tensors)

    def __repr__(self) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        names = list(self.params)
        some = ", ".join(names[:4]) + (f", ... ({len(names)} tensors)" if len(names) > 4 else "")
        norms = f", batch_norm={self.batch_norm!r}" if batch_norms(self.model) else ""
        return (
            f"Problem({type(self.model).__name__}, {self.loss!r}, N={self.num_samples}, P={self.num_params} {where}, "
            f"reduction={self.reduction!r}{norms}, params: {some})"
        )

    def _with(self, **changes: Any) -> Problem:
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: compiled graphs have no second derivative, and gradient hooks of DDP have no place here."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _checked(params: Mapping[str, Tensor], name: str, own: Tensor, owner: str = "with_params: params") -> Tensor:
    if name not in params:
        raise ValueError(f"{owner} must have {name!r}, got {sorted(params)[:8]}")
    value = params[name]
    if value.shape != own.shape:
        raise ValueError(f"{owner} must have shape {list(own.shape)} for {name}, got {list(value.shape)}")
    return value.detach().to(own).clone()


def _check_params(theta: dict[str, Tensor]) -> None:
    first_name, first = next(iter(theta.items()))
    if not first.is_floating_point():
        raise ValueError(f"Problem: params must be floating point, got {first.dtype} for {first_name}")
    for name, param in theta.items():
        if param.dtype != first.dtype or param.device != first.device:
            raise ValueError(
                f"Problem: params must share dtype and device ({first.dtype}, {first.device} of {first_name}), "
                f"got {param.dtype}, {param.device} for {name}"
            )


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        # Inference tensors (features computed under inference_mode) cannot be saved for a backward pass.
        value = value.clone() if value.is_inference() else value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_moved(item, device, dtype) for item in value)
    return value
