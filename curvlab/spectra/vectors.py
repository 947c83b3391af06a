# SPDX-License-Identifier: Apache-2.0
"""What every solver stands on: the operator as it is seen here, products with a basis, random directions.

A basis is a matrix of rows ``[m, P]`` with unit column stride.  With P in the millions every pass over it is a pass
over memory, so there are two kinds of pass, each at the speed of reading the basis once: ``row_dots`` and
``subtract_rows``.  Dots are summed in float64 across blocks of columns, which costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from curvlab.operators.precision import math_mode

__all__ = [
    "Operator",
    "agree",
    "check_operator",
    "check_positive",
    "combine_rows",
    "draw_normal",
    "draw_signs",
    "inner_products",
    "probe_blocks",
    "process_group",
    "progress_bar",
    "random_signs",
    "recur",
    "row_dots",
    "student_quantile",
    "subtract_rows",
    "transform_rows",
]

BLOCK = 1 << 14
"""Columns a sum in the rows' own precision: on constant data, the worst case, float32 is then off by 1e-5 at most."""
GROUP = 8
"""Basis rows a matrix product: with 8 it takes the time of a read (0.27 ms a row of 1.9 M), with 16 twice that."""


class Operator(Protocol):
    """A square matrix that only multiplies: all that the solvers see of :class:`curvlab.operators.LinearOperator`."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that it takes and gives."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the vectors that it takes and gives."""
        ...

    def apply_rows(self, rows: Tensor) -> Tensor:
        """``[K, P] -> [K, P]``: row k becomes ``A rows[k]``."""
        ...


def check_operator(owner: str, operator: Any, *, symmetric: bool = False) -> int:
    """P of a square operator of float32 or float64 with at least one row.

    Raises:
        TypeError: no ``apply_rows``; another dtype.
        ValueError: not square, empty, or declared not symmetric where it must be.
    """
    if not callable(getattr(operator, "apply_rows", None)):
        raise TypeError(f"{owner}: A must be a LinearOperator (with apply_rows), got {type(operator).__name__}")
    if operator.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{owner}: A must be float32 or float64, got {operator.dtype}")
    if not getattr(operator, "is_symmetric", True) and symmetric:
        raise ValueError(f"{owner}: A must be symmetric, got an operator declared not to be")
    rows, columns = operator.shape
    if rows != columns or rows < 1:
        raise ValueError(f"{owner}: A must be square with at least one row, got {rows} x {columns}")
    return rows


def check_positive(owner: str, **arguments: int | float | None) -> None:
    """Every argument that is given must be a number above zero; integers where the value given is an integer type.

    Raises:
        ValueError: one is not.
    """
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} must be a finite number above 0, got {value!r}")


def row_dots(basis: Tensor, rows: Tensor) -> np.ndarray:
    """``basis rows^T``, float64 ``[m, b]`` on the host, from ``[m, P]`` and ``[b, P]``: one pass over the basis."""
    m, size = basis.shape
    b = rows.shape[0]
    if m == 0 or b == 0:
        return np.zeros((m, b))
    if basis.device.type != "cpu":
        with exact_products():
            return (basis @ rows.T).double().cpu().numpy()
    whole = size // BLOCK
    parts = torch.empty(whole + 1, m, b, dtype=basis.dtype)
    left, right = blocks(basis), blocks(rows).transpose(1, 2)
    for low in range(0, m, GROUP):
        torch.bmm(left[:, low : low + GROUP], right, out=parts[:whole, low : low + GROUP])
    torch.mm(basis[:, whole * BLOCK :], rows[:, whole * BLOCK :].T, out=parts[whole])
    return parts.sum(0, dtype=torch.float64).numpy()


def blocks(rows: Tensor) -> Tensor:
    """``[m, P]`` as a view ``[P // BLOCK, m, BLOCK]``, for one batched product where a loop costs a call a block."""
    whole = rows.shape[1] // BLOCK
    return rows[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).transpose(0, 1)


def subtract_rows(rows: Tensor, coefficients: np.ndarray, basis: Tensor) -> None:
    """``rows -= coefficients basis`` in place, ``[b, P]``, ``[b, m]``, ``[m, P]``: one pass over the basis."""
    if coefficients.size == 0:
        return
    weights = torch.from_numpy(np.ascontiguousarray(coefficients)).to(rows)
    if len(rows) == 1:
        rows[0].addmv_(basis.T, weights[0], alpha=-1)
        return
    with exact_products():
        rows.addmm_(weights, basis, alpha=-1)


def transform_rows(rows: Tensor, change: np.ndarray, coefficients: np.ndarray, basis: Tensor) -> None:
    """``rows[:k] = change rows - coefficients basis`` in place, ``[k, b]``, ``[k, m]``: one pass over all."""
    k = len(change)
    own, weights = (torch.from_numpy(np.ascontiguousarray(a)).to(rows) for a in (change, coefficients))
    block = BLOCK if rows.device.type == "cpu" else max(1, rows.shape[1])
    with exact_products():
        for columns, known in zip(rows.split(block, 1), basis.split(block, 1), strict=True):
            if len(rows) == 1:
                columns[0].mul_(own[0, 0]).addmv_(known.T, weights[0], alpha=-1)
            else:
                columns[:k] = torch.mm(own, columns).addmm_(weights, known, alpha=-1)


def combine_rows(coefficients: np.ndarray, basis: Tensor, out: Tensor | None = None) -> Tensor:
    """``coefficients basis``, ``[b, P]`` from ``[b, m]`` and ``[m, P]``; ``out`` may be the first rows of ``basis``.

    In blocks of columns: what is overwritten is at most a block ahead of what is still to be read.
    """
    weights = torch.from_numpy(np.ascontiguousarray(coefficients)).to(basis)
    if out is None:
        with exact_products():
            return weights @ basis
    block = BLOCK if basis.device.type == "cpu" else 1 << 22
    with exact_products():
        for start in range(0, basis.shape[1], block):
            out[:, start : start + block] = weights @ basis[:, start : start + block]
    return out


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """``<left[k], right[k]>`` for every row, float64 ``[K]`` on the host, summed in float64 across blocks."""
    if left.device.type != "cpu":
        return torch.linalg.vecdot(left, right).double().cpu()
    found = [row_dots(x[None], y[None])[0, 0] for x, y in zip(left, right, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def recur(products: Tensor, scale: np.ndarray, coefficients: np.ndarray, near: Tensor, out: Tensor) -> np.ndarray:
    """``out[j] = scale[j] products[j] - sum_i coefficients[j, i] near[i]``; returns the new rows' squared norms.

    Passes over whole rows: in blocks that stay in the cache the calls cost more than the memory (3.0 against 1.7 ms
    for one row of 1.9 M and two near ones).
    """
    weights = torch.from_numpy(np.ascontiguousarray(coefficients)).to(out)
    if len(out) == 1:
        torch.mul(products[0], float(scale[0]), out=out[0]).addmv_(near.T, weights[0], alpha=-1)
    else:
        with exact_products():
            torch.mul(products, torch.from_numpy(np.ascontiguousarray(scale)).to(out)[:, None], out=out)
            out.addmm_(weights, near, alpha=-1)
    return inner_products(out, out).numpy()


def exact_products() -> AbstractContextManager[None]:
    """No TF32 in here: three digits would be left of orthogonality."""
    return math_mode(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


_SIGNS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def random_signs(
    num: int, size: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Rademacher rows ``[num, size]``: each entry +1 or -1 with probability 1/2, one random bit an entry.

    A random byte picks a row of eight signs from a table: 0.1 of the time of a ``randint`` for every entry.
    """
    table = _SIGNS.get((dtype, device))
    if table is None:
        bytes_ = torch.arange(256, device=device)
        table = (1 - 2 * (bytes_[:, None] >> torch.arange(8, device=device) & 1)).to(dtype)
        _SIGNS[dtype, device] = table
    per_row = -(-size // 8)
    words = torch.empty(-(-num * per_row // 8), dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=generator)  # all 64 bits; without bounds the highest stays 0
    bytes_ = words.view(torch.uint8)[: num * per_row].to(torch.int32)
    if size % 8 == 0:
        return table.index_select(0, bytes_).view(num, size)
    signs = torch.empty(num, size, dtype=dtype, device=device)
    whole = size - size % 8
    for row, picked in zip(signs, bytes_.view(num, per_row), strict=True):  # written in place: a copy costs as much
        torch.index_select(table, 0, picked[:-1], out=row[:whole].view(-1, 8))
        row[whole:] = table.index_select(0, picked[-1:])[0, : size - whole]
    return signs


def process_group(A: Any) -> Any:
    """The group over whose processes the products of ``A`` are summed, wherever in an expression it stands; or None."""
    group = getattr(getattr(A, "problem", None), "process_group", None)
    parts = [getattr(A, name, None) for name in ("base", "left", "right")] + list(getattr(A, "terms", ()))
    for part in parts:
        group = group if group is not None or part is None else process_group(part)
    return group


def agree(A: Any, drawn: Tensor) -> Tensor:
    """What the first process drew: a sum of products with different vectors is the product with none of them."""
    group = process_group(A)
    if group is not None:
        torch.distributed.broadcast(drawn, group=group, group_src=0)
    return drawn


def draw_signs(A: Operator, num: int, generator: torch.Generator | None) -> Tensor:
    """Random signs ``[num, P]`` as ``A`` takes them, the same on all its processes; drawn where the generator is."""
    device = A.device if generator is None else generator.device
    return agree(A, random_signs(num, A.shape[0], dtype=A.dtype, device=device, generator=generator).to(A.device))


def draw_normal(A: Operator, num: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal rows ``[num, P]`` as ``A`` takes them, as :func:`draw_signs`."""
    device = A.device if generator is None else generator.device
    return agree(A, torch.randn(num, A.shape[0], dtype=A.dtype, device=device, generator=generator).to(A.device))


def probe_blocks(num: int, size: int, itemsize: int, block_size: int | None) -> Iterator[int]:
    """Sizes of blocks that add up to ``num``: ``block_size`` rows each, by default 8, fewer where 8 rows pass 1 GiB."""
    width = block_size or max(1, min(8, (1 << 30) // max(1, size * itemsize)))
    while num > 0:
        yield min(width, num)
        num -= width


@contextmanager
def progress_bar(show: bool, what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A function ``(products done, remark)``; a bar of ``rich`` on the terminal when ``show``, else nothing."""
    if not show:
        yield lambda done, remark="": None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}"), transient=True) as bar:
        task = bar.add_task(what, total=total, remark="")
        yield lambda done, remark="": bar.update(task, completed=done, remark=remark)


def student_quantile(dof: int, probability: float = 0.975) -> float:
    """The quantile of Student's t with ``dof`` >= 1 degrees of freedom, by bisection of its closed form.

    P(|T| <= t) is a finite sum in cos and sin of arctan(t / sqrt(dof)) (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(dof))
        cosine2 = math.cos(angle) ** 2
        odd = dof % 2
        term = total = math.cos(angle) if odd else 1.0
        if odd and dof == 1:
            total = 0.0
        for j in range(3 if odd else 2, dof - 1, 2):
            term *= (j - 1) / j * cosine2
            total += term
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * total)
        return math.sin(angle) * total

    dof = min(dof, 100_000 + dof % 2)  # the quantile moved by less than 1e-5 from there on
    low, high = 0.0, 1.0
    while inside(high) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2
