# SPDX-License-Identifier: Apache-2.0
"""Matrices whose spectrum is known because they were made from it."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.operators.base import DenseOperator

DTYPES = [torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix, float64."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator(seed)))[0]


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """The float64 matrix with these eigenvalues and random eigenvectors."""
    vectors = rotation(len(values), seed)
    matrix = (vectors * values.double()) @ vectors.T
    return (matrix + matrix.T) / 2


def operator(matrix: Tensor, dtype: torch.dtype = torch.float64) -> DenseOperator:
    return DenseOperator(matrix.to(dtype), is_symmetric=True)


def hessian_like(size: int = 300, *, top: float = 100.0, seed: int = 1) -> Tensor:
    """Ten outliers, a bulk near zero, a negative tail: eigenvalues, descending."""
    bulk = 0.5 * torch.rand(size - 10, generator=generator(seed), dtype=torch.float64) ** 4 - 0.02
    outliers = top * 0.7 ** torch.arange(10, dtype=torch.float64)
    return torch.cat([outliers, bulk.sort(descending=True)[0]])
