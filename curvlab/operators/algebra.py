# SPDX-License-Identifier: Apache-2.0
"""Operators made of operators: sums, products, shifts, deflation, restriction to coordinates, block diagonals.

Built by the methods of ``LinearOperator``.  Each has its own ``num_products``; those of its parts count as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from curvlab.operators.base import Layout, LinearOperator

__all__ = [
    "BlockDiagonalOperator",
    "DeflatedOperator",
    "ProductOperator",
    "RestrictedOperator",
    "ScaledOperator",
    "ShiftedOperator",
    "SumOperator",
    "TransposedOperator",
]


Selection = str | Iterable[str] | Iterable[int] | Mapping[str, Tensor] | Tensor


def _check_alike(owner: str, a: LinearOperator, b: LinearOperator) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"{owner}: operators must share dtype and device, got {a!r} and {b!r}")


def _is_transpose(a: LinearOperator, b: LinearOperator) -> bool:
    return isinstance(b, TransposedOperator) and b.base is a


def _check_square(owner: str, a: LinearOperator) -> None:
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"{owner}: the operator must be square, got [{a.shape[0]}, {a.shape[1]}]")


class TransposedOperator(LinearOperator):
    """``A^T``."""

    def __init__(self, base: LinearOperator) -> None:
        self.base = base
        super().__init__((base.shape[1], base.shape[0]), base.dtype, base.device, layout=base.output_layout)
        self.output_layout = base.layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows_transposed(rows)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows(rows)

    @property
    def T(self) -> LinearOperator:
        """What was transposed."""
        return self.base


class SumOperator(LinearOperator):
    """``A + B``."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        _check_alike("+", a, b)
        if a.shape != b.shape:
            raise ValueError(f"+: operators must have one shape, got {list(a.shape)} and {list(b.shape)}")
        self.terms = (a, b)
        super().__init__(
            a.shape,
            a.dtype,
            a.device,
            is_symmetric=a.is_symmetric and b.is_symmetric,
            is_psd=a.is_psd and b.is_psd,
        )
        known = a if a.layout is not None else b
        self.layout, self.output_layout = known.layout, known.output_layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self.terms[0].apply_rows(rows) + self.terms[1].apply_rows(rows)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.terms[0].apply_rows_transposed(rows) + self.terms[1].apply_rows_transposed(rows)


class ScaledOperator(LinearOperator):
    """``c A``."""

    def __init__(self, base: LinearOperator, factor: float) -> None:
        self.base, self.factor = base, factor
        super().__init__(
            base.shape,
            base.dtype,
            base.device,
            is_symmetric=base.is_symmetric,
            is_psd=base.is_psd and factor >= 0.0,
            layout=base.layout,
        )
        self.output_layout = base.output_layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows(rows) * self.factor

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows_transposed(rows) * self.factor


class ProductOperator(LinearOperator):
    """``A B``; known to be symmetric only as ``A A^T``."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        _check_alike("@", a, b)
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"@: operators must be [M, P] and [P, Q], got {list(a.shape)} and {list(b.shape)}")
        self.left, self.right = a, b
        gram = (a is b and a.is_symmetric) or _is_transpose(a, b) or _is_transpose(b, a)
        super().__init__((a.shape[0], b.shape[1]), a.dtype, a.device, is_psd=gram, layout=b.layout)
        plain = a.layout is None and a.output_layout is None and a.shape[0] == a.shape[1]
        self.output_layout = b.output_layout if plain else a.output_layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self.left.apply_rows(self.right.apply_rows(rows))

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.right.apply_rows_transposed(self.left.apply_rows_transposed(rows))


class ShiftedOperator(LinearOperator):
    """``A + c I``."""

    def __init__(self, base: LinearOperator, c: float) -> None:
        _check_square("shift", base)
        self.base, self.c = base, float(c)
        super().__init__(
            base.shape,
            base.dtype,
            base.device,
            is_symmetric=base.is_symmetric,
            is_psd=base.is_psd and self.c >= 0.0,
            layout=base.layout,
        )
        self.output_layout = base.output_layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows(rows).add_(rows, alpha=self.c)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.base.apply_rows_transposed(rows).add_(rows, alpha=self.c)


class DeflatedOperator(LinearOperator):
    """``A - sum_i lambda_i v_i v_i^T``, v_i orthonormal rows: found eigenpairs moved to zero."""

    def __init__(self, base: LinearOperator, eigenvalues: Tensor, rows: Tensor) -> None:
        _check_square("deflate", base)
        if eigenvalues.ndim != 1 or rows.shape != (len(eigenvalues), base.shape[1]):
            raise ValueError(
                f"deflate: eigenvalues and rows must be [m] and [m, P] with P == {base.shape[1]}, "
                f"got {list(eigenvalues.shape)} and {list(rows.shape)}"
            )
        self.base = base
        self.eigenvalues = eigenvalues.detach().to(base.device, base.dtype)
        self.rows = rows.detach().to(base.device, base.dtype).contiguous()
        super().__init__(base.shape, base.dtype, base.device, is_symmetric=base.is_symmetric, layout=base.layout)
        self.output_layout = base.output_layout

    def _apply(self, rows: Tensor) -> Tensor:
        return self._deflated(self.base.apply_rows(rows), rows)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self._deflated(self.base.apply_rows_transposed(rows), rows)

    def _deflated(self, product: Tensor, rows: Tensor) -> Tensor:
        return product.addmm_((rows @ self.rows.T) * self.eigenvalues, self.rows, alpha=-1.0)


class RestrictedOperator(LinearOperator):
    """``S A S^T`` with S the rows of the identity that belong to the chosen coordinates: ``[P', P']``.

    Attributes:
        indices: the chosen coordinates ``[P']``, increasing unless they were given as indices.
    """

    def __init__(self, base: LinearOperator, selection: Selection) -> None:
        _check_square("restrict", base)
        self.base = base
        self.indices, layout = _coordinates(base, selection)
        size = len(self.indices)
        super().__init__(
            (size, size),
            base.dtype,
            base.device,
            is_symmetric=base.is_symmetric,
            is_psd=base.is_psd,
            layout=layout,
        )

    def embed(self, rows: Tensor) -> Tensor:
        """``[K, P']`` to ``[K, P]``, zero in all other coordinates."""
        whole = rows.new_zeros(len(rows), self.base.shape[1])
        whole[:, self.indices] = rows
        return whole

    def extract(self, rows: Tensor) -> Tensor:
        """``[K, P]`` to the chosen coordinates, ``[K, P']``."""
        return rows[:, self.indices]

    def _apply(self, rows: Tensor) -> Tensor:
        return self.extract(self.base.apply_rows(self.embed(rows)))

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self.extract(self.base.apply_rows_transposed(self.embed(rows)))


class BlockDiagonalOperator(LinearOperator):
    """A without its entries between different groups of parameters.

    Args:
        base: A, over a parameter list.
        groups: names or glob patterns a group; parameters in no group get a zero row and column; None: one group a
            parameter.
    """

    def __init__(self, base: LinearOperator, groups: Sequence[Sequence[str]] | None = None) -> None:
        _check_square("block_diagonal", base)
        layout = _layout("block_diagonal", base)
        self.base = base
        groups = [[name] for name in layout] if groups is None else groups
        if not groups:
            raise ValueError("block_diagonal: groups must hold at least one group of parameters, got none")
        self.blocks = [_coordinates(base, group)[0] for group in groups]
        if len(torch.cat(self.blocks).unique()) != sum(map(len, self.blocks)):
            raise ValueError(f"block_diagonal: groups must not share a parameter, got {groups}")
        super().__init__(
            base.shape,
            base.dtype,
            base.device,
            is_symmetric=base.is_symmetric,
            is_psd=base.is_psd,
            layout=layout,
        )

    def _apply(self, rows: Tensor) -> Tensor:
        return self._by_blocks(rows, transposed=False)

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return self._by_blocks(rows, transposed=True)

    def _by_blocks(self, rows: Tensor, *, transposed: bool) -> Tensor:
        result = torch.zeros_like(rows)
        for block in self.blocks:
            part = torch.zeros_like(rows)
            part[:, block] = rows[:, block]
            product = self.base.apply_rows_transposed(part) if transposed else self.base.apply_rows(part)
            result[:, block] = product[:, block]
        return result


def _layout(owner: str, base: LinearOperator) -> Layout:
    if base.layout is None or base.output_layout is None:
        raise ValueError(f"{owner}: names need a matrix over a parameter list, got {base!r}")
    return base.layout


def _coordinates(base: LinearOperator, selection: Selection) -> tuple[Tensor, Layout | None]:
    """Chosen coordinates, and the layout of what they leave (None unless whole parameters are chosen)."""
    size = base.shape[1]
    if not isinstance(selection, (str, Mapping, Tensor)):
        selection = _listed(selection)
    if isinstance(selection, Tensor):
        return _of_vector(selection.to(base.device), size), None
    layout = _layout("restrict", base)
    if isinstance(selection, Mapping):
        return _of_mask(cast("Mapping[str, Tensor]", selection), layout, base.device), None
    names: set[str] = set()
    for pattern in [selection] if isinstance(selection, str) else selection:
        found = [name for name in layout if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"restrict: selection must name parameters of {list(layout)[:4]} ..., got {pattern!r}")
        names.update(found)
    if not names:
        raise ValueError("restrict: selection must choose at least one coordinate, got none")
    keep = {name: torch.full(tuple(shape), name in names, dtype=torch.bool) for name, shape in layout.items()}
    return _of_mask(keep, layout, base.device), {name: shape for name, shape in layout.items() if name in names}


def _listed(selection: Iterable[str] | Iterable[int]) -> list[str] | Tensor:
    """Names, or a tensor of what stands for coordinates."""
    array = getattr(selection, "__array__", None)
    if array is not None:
        return torch.tensor(array())
    items: list[Any] = list(selection)
    if all(isinstance(item, str) for item in items):
        return items
    if any(isinstance(item, str) or not isinstance(item, SupportsIndex) for item in items):
        raise TypeError(f"restrict: selection must be names, a mask or indices, got a list with {items[:4]}")
    return torch.tensor(items)


def _of_vector(selection: Tensor, size: int) -> Tensor:
    if selection.dtype == torch.bool:
        if selection.shape != (size,):
            raise ValueError(f"restrict: selection must be [P] with P == {size}, got {list(selection.shape)}")
        indices = selection.nonzero().squeeze(1)
    else:
        if selection.ndim != 1 or selection.is_floating_point() or selection.is_complex():
            raise ValueError(
                f"restrict: selection must be indices [P'] or a boolean vector [P], got {list(selection.shape)} of "
                f"{selection.dtype}"
            )
        indices = selection.long()
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
            raise ValueError(f"restrict: selection must hold indices in [0, {size}), got {indices.tolist()[:8]}")
        if len(indices.unique()) != len(indices):
            raise ValueError("restrict: selection must hold each index once, got repetitions")
    if not len(indices):
        raise ValueError("restrict: selection must choose at least one coordinate, got none")
    return indices


def _of_mask(mask: Mapping[str, Tensor], layout: Layout, device: torch.device) -> Tensor:
    for name, keep in mask.items():
        if name not in layout or keep.shape != layout[name]:
            raise ValueError(
                f"restrict: selection must map parameter names to masks of their shape, got {name!r} of "
                f"{list(keep.shape)}"
            )
    flat = [
        mask[name].to(device).bool().reshape(-1)
        if name in mask
        else torch.ones(shape.numel(), dtype=torch.bool, device=device)
        for name, shape in layout.items()
    ]
    return _of_vector(torch.cat(flat), sum(len(part) for part in flat))
