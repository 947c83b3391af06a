# SPDX-License-Identifier: Apache-2.0
"""Which weights survive: an immutable mapping from parameter names to boolean tensors, counted exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from curvlab.sparse.layers import MaskedLayer
from curvlab.sparse.prunable import check_module, prunable_layers, prunable_weights

__all__ = ["Mask"]

_KIND = "curvlab.sparse.Mask"


class Mask(Mapping[str, Tensor]):
    """Name of a weight -> boolean tensor of its shape, True where the weight is kept.

    Names are those of the dense model (``"features.0.weight"``), also for a model that :func:`sparsify` made.
    Immutable: tensors are copied on the way in and out.  ``mask_a <= mask_b`` in words is :meth:`is_nested_in`;
    ``&`` and ``|`` combine masks of the same weights.

    Args:
        keep: at least one boolean tensor by name.

    Raises:
        TypeError: names that are no strings, or values that are no boolean tensors.
        ValueError: no tensors.
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        if not isinstance(keep, Mapping):
            raise TypeError(f"Mask: keep must map names to boolean tensors, got {type(keep).__name__}")
        if not keep:
            raise ValueError("Mask: keep must hold at least one tensor, got none")
        for name, value in keep.items():
            if not isinstance(name, str):
                raise TypeError(f"Mask: names must be strings, got {name!r}")
            if not isinstance(value, Tensor) or value.dtype != torch.bool:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"Mask: keep must hold boolean tensors, got {got} for {name!r}")
        # Row-major whatever the weight's layout: positions are counted in this order.
        self._keep = {n: v.detach().clone(memory_format=torch.contiguous_format) for n, v in keep.items()}

    # ---- where masks come from

    @classmethod
    def dense(cls, model: nn.Module, params: Any = None) -> Mask:
        """All of the chosen weights (see :func:`curvlab.sparse.prunable.prunable_weights`) kept."""
        weights = prunable_weights(model, params, "Mask.dense")
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    @classmethod
    def from_zeros(cls, model: nn.Module, params: Any = None) -> Mask:
        """The chosen weights that are not exactly zero (a NaN counts as kept)."""
        weights = prunable_weights(model, params, "Mask.from_zeros")
        return cls({name: weight != 0 for name, weight in weights.items()})

    @classmethod
    def from_model(cls, model: nn.Module) -> Mask:
        """The masks of the model's sparse layers.

        Raises:
            ValueError: there is no sparse layer.
        """
        check_module(model, "Mask.from_model")
        layers = prunable_layers(model)
        found = {name: layer.mask for name, layer in layers.items() if isinstance(layer, MaskedLayer)}
        if not found:
            raise ValueError(
                "Mask.from_model: model must have sparse layers (made by sparsify), got none; Mask.from_zeros and "
                "Mask.from_prune read dense models"
            )
        return cls(found)

    @classmethod
    def from_prune(cls, model: nn.Module) -> Mask:
        """The masks that ``torch.nn.utils.prune`` put on a model, by the parameters' plain names (no ``_orig``).

        Raises:
            ValueError: nothing is pruned that way, or a mask holds other values than 0 and 1.
        """
        check_module(model, "Mask.from_prune")
        found: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            for hook in module._forward_pre_hooks.values():
                if not isinstance(hook, prune.BasePruningMethod):
                    continue
                name = hook._tensor_name
                value = getattr(module, f"{name}_mask")
                full = f"{prefix}.{name}" if prefix else name
                if not bool(((value == 0) | (value == 1)).all()):
                    raise ValueError(f"Mask.from_prune: masks must be of zeros and ones, got others for {full}")
                found[full] = value != 0
        if not found:
            raise ValueError("Mask.from_prune: model must be pruned by torch.nn.utils.prune, got one without its masks")
        return cls(found)

    def to_prune(self, model: nn.Module) -> None:
        """Put these masks on a dense model, in place, as ``torch.nn.utils.prune.custom_from_mask`` does.

        Masks that are on it already are combined with these (``prune``'s own way).

        Raises:
            ValueError: a name that is no parameter of the model, or another shape.
        """
        check_module(model, "Mask.to_prune")
        places: list[tuple[nn.Module, str, Tensor]] = []
        for name, keep in self._keep.items():
            prefix, _, last = name.rpartition(".")
            try:
                module = model.get_submodule(prefix)
            except AttributeError:
                module = nn.Module()
            param = module._parameters.get(last, module._parameters.get(f"{last}_orig"))
            if param is None or param.shape != keep.shape:
                got = "no such parameter" if param is None else list(param.shape)
                raise ValueError(f"Mask.to_prune: model must have {name} of shape {list(keep.shape)}, got {got}")
            places.append((module, last, keep.to(param.device)))
        for module, last, keep in places:
            prune.custom_from_mask(module, last, keep)

    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of a dense model to zero, in place.

        Raises:
            ValueError: a name that is no parameter of the model (a sparse layer has none to set), or another shape.
        """
        check_module(model, "Mask.apply_")
        params = dict(model.named_parameters(remove_duplicate=False))
        for name, keep in self._keep.items():
            if name not in params or params[name].shape != keep.shape:
                got = list(params[name].shape) if name in params else "no such parameter"
                raise ValueError(f"Mask.apply_: model must have {name} of shape {list(keep.shape)}, got {got}")
        with torch.no_grad():
            for name, keep in self._keep.items():
                # Not a product: 0 * NaN is NaN, and 0 * -1 is -0.
                params[name].masked_fill_(~keep.to(params[name].device), 0.0)

    # ---- mapping

    def __getitem__(self, name: str) -> Tensor:
        return self._keep[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def __eq__(self, other: object) -> bool:
        """The same weights, in any order, and the same of them kept."""
        if not isinstance(other, Mask):
            return NotImplemented
        if self.keys() != other.keys():
            return False
        return all(torch.equal(keep, other._keep[name].to(keep.device)) for name, keep in self._keep.items())

    def __hash__(self) -> int:
        return hash(frozenset(self.counts.items()))

    # ---- counts

    @cached_property
    def counts(self) -> dict[str, int]:
        """Kept weights of each tensor."""
        sums = [keep.sum() for keep in self._keep.values()]
        one_device = len({value.device for value in sums}) == 1
        numbers = torch.stack(sums).tolist() if one_device else [int(value) for value in sums]
        return dict(zip(self._keep, map(int, numbers), strict=True))

    @property
    def sizes(self) -> dict[str, int]:
        """All weights of each tensor."""
        return {name: keep.numel() for name, keep in self._keep.items()}

    @property
    def num_kept(self) -> int:
        """Kept weights of all tensors."""
        return sum(self.counts.values())

    @property
    def num_total(self) -> int:
        """All weights of all tensors."""
        return sum(self.sizes.values())

    @property
    def density(self) -> float:
        """Kept share, ``num_kept / num_total``; 1 where there are no weights."""
        return self.num_kept / self.num_total if self.num_total else 1.0

    def layer_densities(self) -> dict[str, float]:
        """Kept share of each tensor; 1 for an empty one."""
        sizes = self.sizes
        return {name: kept / sizes[name] if sizes[name] else 1.0 for name, kept in self.counts.items()}

    # ---- relations

    def is_nested_in(self, other: Mask) -> bool:
        """Whether all that this mask keeps, ``other`` keeps.

        Raises:
            ValueError: masks of other weights.
        """
        return all(not bool((mine & ~theirs).any()) for _, mine, theirs in self._pairs(other, "is_nested_in"))

    def __and__(self, other: Mask) -> Mask:
        """Kept by both."""
        return Mask({name: mine & theirs for name, mine, theirs in self._pairs(other, "&")})

    def __or__(self, other: Mask) -> Mask:
        """Kept by one of them."""
        return Mask({name: mine | theirs for name, mine, theirs in self._pairs(other, "|")})

    def _pairs(self, other: Mask, what: str) -> Iterable[tuple[str, Tensor, Tensor]]:
        if not isinstance(other, Mask):
            raise TypeError(f"Mask {what}: other must be a Mask, got {type(other).__name__}")
        shapes = [{name: list(keep.shape) for name, keep in mask._keep.items()} for mask in (self, other)]
        if shapes[0] != shapes[1]:
            names = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
            raise ValueError(
                f"Mask {what}: other must be of the same weights, got {names[0]}: {shapes[0].get(names[0])} and "
                f"{shapes[1].get(names[0])}"
            )
        return [(name, mine, other._keep[name].to(mine.device)) for name, mine in self._keep.items()]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Mask:
        """The mask of ``function(name, keep)`` for each tensor."""
        return Mask({name: function(name, keep.clone()) for name, keep in self._keep.items()})

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on ``device``."""
        return Mask({name: keep.to(device) for name, keep in self._keep.items()})

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; its folder is made.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        header = {"kind": _KIND, "names": json.dumps(list(self._keep))}
        try:
            save_file({name: keep.cpu() for name, keep in self._keep.items()}, scratch, metadata=header)
            os.replace(scratch, target)
        except SafetensorError as error:
            raise OSError(f"Mask.save: {target} could not be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            with safe_open(Path(path), framework="pt", device="cpu") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("kind") != _KIND:
                    raise ValueError(f"its metadata say {metadata.get('kind')!r}")
                # The file orders tensors by size; the mask's order is the model's.
                return cls({name: handle.get_tensor(name) for name in json.loads(metadata["names"])})
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"Mask.load: {path} must be a file written by Mask.save, got {error}") from error

    def __repr__(self) -> str:
        return f"Mask({self.num_kept} of {self.num_total} weights in {len(self)} tensors, density {self.density:.4g})"

    def __str__(self) -> str:
        """A line a tensor: name, kept and all weights, kept share; then the total."""
        width = max(map(len, [*self._keep, "total"]))
        sizes, shares = self.sizes, self.layer_densities()
        lines = [f"{n:<{width}}  {kept:>9} of {sizes[n]:>9}  {shares[n]:.4f}" for n, kept in self.counts.items()]
        return "\n".join([*lines, f"{'total':<{width}}  {self.num_kept:>9} of {self.num_total:>9}  {self.density:.4f}"])
