# SPDX-License-Identifier: Apache-2.0
r"""Matrices that only multiply: ``A @ V`` for vectors, blocks and lists, an algebra on them, and dense or SciPy forms.

Internally directions are rows, ``[K, P]`` contiguous, because K directions then lie one after the other like K lists of
parameters; ``A @ V`` takes the columns of mathematics, ``[P]`` or ``[P, K]``, or lists ``[*shape]`` / ``[K, *shape]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlab.operators.params import flatten, unflatten

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

__all__ = ["DenseOperator", "Layout", "LinearOperator"]

Layout = Mapping[str, torch.Size]
"""Name -> shape of the tensors that a vector consists of, in their order."""


class LinearOperator:
    """A real matrix ``[rows, columns]`` given by its products.

    Subclasses write ``_apply`` and, unless symmetric, ``_apply_transposed``.

    Args:
        shape: ``(rows, columns)``.
        dtype: of the vectors, in and out.
        device: of the vectors.
        is_symmetric: A = A^T.
        is_psd: symmetric without negative eigenvalues.
        layout: the tensors that an input vector (and an output vector, if the matrix is square) is made of; None where
            vectors are flat only. A square matrix with other outputs sets ``output_layout`` to None.
    """

    __array_ufunc__ = None  # NumPy's arrays and scalars leave * and @ to this class
    num_products = 0
    """Vectors multiplied so far (a block of K counts K), products with the transpose included."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_symmetric: bool = False,
        is_psd: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = (int(shape[0]), int(shape[1])), dtype, torch.device(device)
        self.is_symmetric, self.is_psd = is_symmetric or is_psd, is_psd
        self.layout = layout
        self.output_layout = layout if self.shape[0] == self.shape[1] else None

    # What subclasses write

    def _apply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        if self.is_symmetric:
            return self._apply(rows)
        raise NotImplementedError(f"{type(self).__name__} has no product with its transpose")

    # What solvers call

    def apply_rows(self, rows: Tensor) -> Tensor:
        """``A v`` for each row v: ``[K, columns]`` to ``[K, rows]``, contiguous, in memory of its own. K may be 0.

        Raises:
            TypeError: rows are no tensor.
            ValueError: rows of another shape, dtype or device.
        """
        return self._checked(rows, self.shape[1], self.shape[0], transposed=False)

    def apply_rows_transposed(self, rows: Tensor) -> Tensor:
        """``A^T u`` for each row u: ``[K, rows]`` to ``[K, columns]``."""
        return self._checked(rows, self.shape[0], self.shape[1], transposed=True)

    def _checked(self, rows: Tensor, size: int, result_size: int, *, transposed: bool) -> Tensor:
        if not isinstance(rows, Tensor):
            raise TypeError(f"{type(self).__name__}: rows must be a tensor [K, P], got {type(rows).__name__}")
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ValueError(f"{type(self).__name__}: rows must be [K, P] with P == {size}, got {list(rows.shape)}")
        if rows.dtype != self.dtype or rows.device != self.device:
            raise ValueError(
                f"{type(self).__name__}: rows must be {self.dtype} on {self.device}, got {rows.dtype} on {rows.device}"
            )
        if not len(rows):
            return rows.new_zeros(0, result_size)
        self.num_products += len(rows)
        rows = rows.detach().contiguous()
        with torch.no_grad():
            result = (self._apply_transposed(rows) if transposed else self._apply(rows)).contiguous()
        # An identity may hand back what it was given; shifts and deflation write into what they get.
        same = result.untyped_storage()._cdata == rows.untyped_storage()._cdata
        return result.clone() if same else result

    # What users write

    def __matmul__(self, other: Any) -> Any:
        """``A @ V``: ``[P]``, ``[P, K]``, a list ``[*shape]`` or ``[K, *shape]`` per tensor, or another operator."""
        if isinstance(other, LinearOperator):
            return _algebra().ProductOperator(self, other)
        if isinstance(other, Tensor):
            if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
                raise ValueError(
                    f"{type(self).__name__}: V must be [P] or [P, K] with P == {self.shape[1]}, got {list(other.shape)}"
                )
            return self.apply_rows(other.unsqueeze(0))[0] if other.ndim == 1 else self.apply_rows(other.T).T
        if isinstance(other, (list, tuple)):
            return self._multiply_list(other)
        if hasattr(other, "__array__"):
            raise TypeError(
                f"{type(self).__name__}: V must be a torch tensor, got {type(other).__name__}; to_scipy() takes arrays"
            )
        return NotImplemented

    def _multiply_list(self, tensors: Sequence[Tensor]) -> list[Tensor] | Tensor:
        if self.layout is None:
            raise ValueError(f"{type(self).__name__}: V must be [P] or [P, K]: the matrix is not over a parameter list")
        shapes = list(self.layout.values())
        extra = {tensor.ndim - len(shape) for tensor, shape in zip(tensors, shapes, strict=False)}
        batched = extra == {1}
        given = [tensor.shape[1:] if batched else tensor.shape for tensor in tensors]
        if len(tensors) != len(shapes) or extra not in ({0}, {1}) or given != shapes:
            raise ValueError(
                f"{type(self).__name__}: V must be a list of [*shape] or [K, *shape] with shapes "
                f"{[list(shape) for shape in shapes]}, got {[list(tensor.shape) for tensor in tensors]}"
            )
        result = self @ flatten(list(tensors), batched=batched)
        if self.output_layout is None:
            return result
        return unflatten(result, [torch.empty(shape, device="meta") for shape in self.output_layout.values()])

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self if self.is_symmetric else _algebra().TransposedOperator(self)

    def __add__(self, other: Any) -> LinearOperator:
        return _algebra().SumOperator(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return (-1.0) * self

    def __radd__(self, other: Any) -> LinearOperator:
        """``sum([A, B])`` begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: Any) -> LinearOperator:
        number = isinstance(factor, Real) or (isinstance(factor, Tensor) and factor.ndim == 0)
        return _algebra().ScaledOperator(self, float(factor)) if number else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LinearOperator:
        return self * (1.0 / divisor) if isinstance(divisor, Real) else NotImplemented

    def shift(self, c: float) -> LinearOperator:
        """``A + c I``."""
        return _algebra().ShiftedOperator(self, c)

    def deflate(self, eigenvalues: Tensor, rows: Tensor) -> LinearOperator:
        """``A - sum_i lambda_i v_i v_i^T`` for known eigenpairs: lambda ``[m]``, orthonormal v as ``rows [m, P]``."""
        return _algebra().DeflatedOperator(self, eigenvalues, rows)

    def restrict(
        self, selection: str | Iterable[str] | Iterable[int] | Mapping[str, Tensor] | Tensor
    ) -> LinearOperator:
        """The principal submatrix of some coordinates, ``[P', P']`` (see :class:`algebra.RestrictedOperator`).

        Args:
            selection: names or glob patterns of parameters; a mask, name -> boolean tensor (parameters it does not name
                are kept whole); a boolean vector ``[P]``; or indices ``[P']`` (a tensor, an array or a list).
        """
        return _algebra().RestrictedOperator(self, selection)

    def block_diagonal(self, groups: Sequence[Sequence[str]] | None = None) -> LinearOperator:
        """The matrix without its entries between different groups of parameters; None: one group a parameter.

        A product costs as many products of this matrix as there are groups.
        """
        return _algebra().BlockDiagonalOperator(self, groups)

    def to_dense(self, *, block: int = 64) -> Tensor:
        """The matrix ``[rows, columns]`` by products with the unit vectors, ``block`` at a time."""
        columns = self.shape[1]
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for start in range(0, columns, block):
            size = min(block, columns - start)
            unit = torch.zeros(size, columns, dtype=self.dtype, device=self.device)
            unit[torch.arange(size), torch.arange(start, start + size)] = 1.0
            dense[:, start : start + size] = self.apply_rows(unit).T
        return dense

    def to_scipy(self) -> ScipyLinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays, for the solvers there.

        Raises:
            ImportError: SciPy is not installed.
            TypeError: NumPy has no such dtype (bfloat16).
        """
        try:
            import numpy as np
            from scipy.sparse.linalg import LinearOperator as Scipy
        except ImportError as error:
            raise ImportError("to_scipy: SciPy must be installed: pip install scipy") from error

        def product(array: Any, *, transposed: bool) -> Any:
            # A copy: tensors have neither the negative strides nor the write protection that NumPy's views may have.
            columns = torch.from_numpy(np.array(array, order="C")).to(self.device, self.dtype)
            rows = columns.reshape(columns.shape[0], -1).T
            result = self.apply_rows_transposed(rows) if transposed else self.apply_rows(rows)
            return result.T.reshape(-1, *array.shape[1:]).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        forward, backward = (lambda v: product(v, transposed=False)), (lambda v: product(v, transposed=True))
        # type: ignore - SciPy's stubs do not know its keyword constructor
        return Scipy(self.shape, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward, dtype=dtype)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        facts = [f"[{self.shape[0]}, {self.shape[1]}]", str(self.dtype).removeprefix("torch."), str(self.device)]
        facts += ["psd"] if self.is_psd else ["symmetric"] if self.is_symmetric else []
        return f"{type(self).__name__}({', '.join(facts)})"


class DenseOperator(LinearOperator):
    """A matrix that is held, ``[rows, columns]``.

    Args:
        matrix: 2-d, floating point; held as it is, not copied.
        is_symmetric: declared by the caller; None: tested exactly.
        is_psd: declared by the caller.
    """

    def __init__(self, matrix: Tensor, *, is_symmetric: bool | None = None, is_psd: bool = False) -> None:
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(
                f"DenseOperator: matrix must be [rows, columns] of floating point, got {list(matrix.shape)} of "
                f"{matrix.dtype}"
            )
        self.matrix = matrix.detach()
        if is_symmetric is None:
            is_symmetric = matrix.shape[0] == matrix.shape[1] and torch.equal(self.matrix, self.matrix.T)
        shape = (matrix.shape[0], matrix.shape[1])
        super().__init__(shape, matrix.dtype, matrix.device, is_symmetric=is_symmetric, is_psd=is_psd)

    def _apply(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.T

    def _apply_transposed(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


def _algebra() -> Any:
    # The algebra's classes are LinearOperators: it imports this module, so this one finds it late.
    from curvlab.operators import algebra

    return algebra
