# SPDX-License-Identifier: Apache-2.0
"""The algebra of operators against dense matrices; shapes, lists, counts and refusals."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from curvlab.operators.algebra import RestrictedOperator
from curvlab.operators.base import DenseOperator, LinearOperator
from curvlab.operators.hessian import HessianOperator
from curvlab.operators.jacobian import JacobianOperator
from curvlab.operators.problem import Problem
from tests.operators.models import CASES, F64, normal

pytestmark = pytest.mark.usefixtures("one_thread")

SYMMETRIC = normal(6, 6) + normal(6, 6).T
PSD = normal(6, 6, seed=3) @ normal(6, 6, seed=3).T
TALL = normal(4, 6, seed=4)
VALUES, ROWS = (lambda e: (e.eigenvalues[-2:], e.eigenvectors[:, -2:].T))(torch.linalg.eigh(SYMMETRIC))
A, B, J = DenseOperator(SYMMETRIC), DenseOperator(PSD, is_psd=True), DenseOperator(TALL)

COMPOSED: dict[str, tuple[Any, Tensor]] = {
    "sum": (A + B, SYMMETRIC + PSD),
    "difference": (A - B, SYMMETRIC - PSD),
    "scaled": (2.5 * A, 2.5 * SYMMETRIC),
    "divided": (-A / 4, -SYMMETRIC / 4),
    "scaled by others": (np.float32(2.0) * A * torch.tensor(0.5) * np.int64(3), 3.0 * SYMMETRIC),
    "sum of a list": (sum([A, B, A]), 2.0 * SYMMETRIC + PSD),
    "shifted": (B.shift(0.7), PSD + 0.7 * torch.eye(6, dtype=F64)),
    "shifted twice": (A.shift(1.0).shift(-3.0), SYMMETRIC - 2.0 * torch.eye(6, dtype=F64)),
    "product": (A @ B, SYMMETRIC @ PSD),
    "transposed": (J.T, TALL.T),
    "transposed product": ((A @ B).T, PSD @ SYMMETRIC),
    "gram": (J.T @ J, TALL.T @ TALL),
    "kernel": (J @ J.T, TALL @ TALL.T),
    "square": (A @ A, SYMMETRIC @ SYMMETRIC),
    "deflated": (A.deflate(VALUES, ROWS), SYMMETRIC - ROWS.T @ torch.diag(VALUES) @ ROWS),
    "indices": (A.restrict(torch.tensor([4, 0, 3])), SYMMETRIC[[4, 0, 3]][:, [4, 0, 3]]),
    "boolean": (B.restrict(torch.tensor([1, 0, 1, 1, 0, 0]).bool()), PSD[[0, 2, 3]][:, [0, 2, 3]]),
    "restricted product": ((A @ B).restrict(torch.tensor([1, 2])), (SYMMETRIC @ PSD)[1:3, 1:3]),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_operators_are_the_dense_ones(name):
    operator, expected = COMPOSED[name]
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.to_dense(block=2), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.T.to_dense(), expected.T, rtol=1e-12, atol=1e-12)
    rows = normal(3, expected.shape[1], seed=9)
    torch.testing.assert_close(operator.apply_rows(rows), rows @ expected.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator @ rows.T, expected @ rows.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator @ rows[0], expected @ rows[0], rtol=1e-12, atol=1e-12)
    left = normal(2, expected.shape[0], seed=10)
    torch.testing.assert_close(operator.apply_rows_transposed(left), left @ expected, rtol=1e-12, atol=1e-12)
    if operator.is_symmetric:
        torch.testing.assert_close(expected, expected.T)
    if operator.is_psd:
        assert torch.linalg.eigvalsh(expected).min() > -1e-10
    assert operator.apply_rows(rows[:0]).shape == (0, expected.shape[0])


def test_what_is_known_of_composed_operators():
    known = {name: (operator.is_symmetric, operator.is_psd) for name, (operator, _) in COMPOSED.items()}
    assert known["sum"] == (True, False) and (B + B).is_psd
    assert known["difference"] == (True, False) and not (B - B).is_psd
    assert known["product"] == (False, False) and known["transposed product"] == (False, False)
    assert known["gram"] == known["kernel"] == known["square"] == (True, True)
    assert known["shifted"] == (True, True) and not B.shift(-0.1).is_psd
    assert known["deflated"] == (True, False)
    assert known["indices"] == (True, False) and known["boolean"] == (True, True)
    assert not DenseOperator(TALL).is_symmetric and A.is_symmetric and A.T is A and J.T.T is J


def test_products_are_counted_by_vectors():
    operator = DenseOperator(SYMMETRIC)
    shifted = operator.shift(1.0)
    assert operator.num_products == 0
    shifted.apply_rows(normal(3, 6))
    assert (operator @ normal(6)).shape == (6,)
    assert (operator.num_products, shifted.num_products) == (4, 3)
    operator.to_dense(block=4)
    operator.apply_rows(normal(0, 6))
    assert operator.num_products == 10


def test_results_carry_no_graph_and_do_not_alias():
    v = normal(6).requires_grad_()
    assert not (A @ v).requires_grad
    rows = normal(2, 6)
    before = rows.clone()
    A.shift(2.0).deflate(VALUES, ROWS).apply_rows(rows)
    assert torch.equal(rows, before)


class Identity(LinearOperator):
    def _apply(self, rows: Tensor) -> Tensor:
        return rows


def test_an_operator_that_returns_its_argument_shares_no_memory_with_it():
    identity = Identity((6, 6), F64, torch.device("cpu"), is_symmetric=True)
    v = normal(6)
    before = v.clone()
    torch.testing.assert_close(identity.shift(1.0) @ v, 2.0 * before)
    torch.testing.assert_close(identity.deflate(VALUES, ROWS) @ v, before - ROWS.T @ (VALUES * (ROWS @ before)))
    result = identity @ v
    result += 1.0
    assert torch.equal(v, before)


@pytest.fixture(scope="module")
def hessian() -> HessianOperator:
    return HessianOperator(CASES["act_tanh"]().problem(), engine="autograd")


@pytest.fixture(scope="module")
def matrix(hessian) -> Tensor:
    return hessian.to_dense()


def test_lists_of_tensors(hessian, matrix):
    rows = normal(3, hessian.shape[1], seed=5)
    pieces = list(hessian.problem.rows_to_params(rows).values())
    blocks = hessian @ pieces
    expected = list(hessian.problem.rows_to_params(rows @ matrix).values())
    for got, want in zip(blocks, expected, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    for got, want in zip(hessian @ [piece[1] for piece in pieces], expected, strict=True):
        torch.testing.assert_close(got, want[1], rtol=1e-11, atol=1e-13)
    empty = hessian @ [piece[:0] for piece in pieces]
    assert [block.shape for block in empty] == [(0, *want.shape[1:]) for want in expected]
    with pytest.raises(ValueError, match=r"list of \[\*shape\] or \[K, \*shape\] .* got \[\[4, 3\]\]"):
        hessian @ [pieces[0][0]]
    with pytest.raises(ValueError, match="not over a parameter list"):
        A @ [normal(6)]


def test_a_jacobian_that_happens_to_be_square_gives_outputs_not_parameters():
    case = CASES["linear"]()
    x, y = case.batches[0]
    square = JacobianOperator(Problem(case.model, case.loss, (x.repeat(2, 1)[:5], y.repeat(2)[:5])), engine="autograd")
    assert square.shape == (15, 15)
    weight, bias = normal(3, 4), normal(3, seed=2)
    got = square @ [weight, bias]
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got.reshape(5, 3), x.repeat(2, 1)[:5] @ weight.T + bias, rtol=1e-12, atol=1e-13)
    for same in (2.0 * square, square + 0.0 * square, square.shift(0.0), (1.0 * square.T).T):
        outputs = same @ [weight, bias]
        assert isinstance(outputs, Tensor) and outputs.shape == (15,)
    for transposed in (square.T, 2.0 * square.T):
        with pytest.raises(ValueError, match="not over a parameter list"):
            _ = transposed @ [weight, bias]
    gram = square.T @ square
    assert [tuple(part.shape) for part in gram @ [weight, bias]] == [(3, 4), (3,)]
    with pytest.raises(ValueError, match="names need a matrix over a parameter list"):
        square.block_diagonal()


def test_restriction_by_names_and_masks(hessian, matrix):
    names = ["0.weight", "4.bias"]
    kept = torch.tensor([*range(12), *range(48, 51)])
    by_name = hessian.restrict(names)
    torch.testing.assert_close(by_name.to_dense(), matrix[kept][:, kept], rtol=1e-11, atol=1e-13)
    assert list(by_name.layout or ()) == names
    blocks = by_name @ [normal(4, 3), normal(3)]
    assert [tuple(block.shape) for block in blocks] == [(4, 3), (3,)]
    mask = {"0.weight": normal(4, 3, seed=6) > 0, "2.weight": torch.zeros(4, 4)}
    flat = torch.cat([mask["0.weight"].reshape(-1), torch.ones(4), torch.zeros(16), torch.ones(19)]).bool()
    masked = hessian.restrict(mask)
    assert isinstance(masked, RestrictedOperator)
    torch.testing.assert_close(masked.to_dense(), matrix[flat][:, flat], rtol=1e-11, atol=1e-13)
    rows = normal(2, masked.shape[0])
    whole = masked.embed(rows)
    assert not whole[:, ~flat].any() and torch.equal(masked.extract(whole), rows)
    for indices in ([50, 0, 7], np.array([50, 0, 7]), (i for i in (50, 0, 7))):
        part = hessian.restrict(indices)
        torch.testing.assert_close(part.to_dense(), matrix[[50, 0, 7]][:, [50, 0, 7]], rtol=1e-11, atol=1e-13)
    with pytest.raises(TypeError, match=r"must be names, a mask or indices, got a list with \[0.5\]"):
        hessian.restrict([0.5])
    for wrong, match in (
        ("5.*", "got '5.\\*'"),
        ({"0.weight": torch.ones(3, 4)}, "masks of their shape, got '0.weight' of \\[3, 4\\]"),
        (torch.zeros(51).bool(), "at least one coordinate"),
        (torch.zeros(50).bool(), "P == 51, got \\[50\\]"),
        (torch.tensor([1, 51]), "indices in \\[0, 51\\)"),
        (torch.tensor([1, 1]), "each index once"),
        (torch.tensor([0.5]), "indices .* got \\[1\\] of torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            hessian.restrict(wrong)
    with pytest.raises(ValueError, match="over a parameter list"):
        A.restrict("0.weight")


def test_block_diagonal(hessian, matrix):
    sizes = [shape.numel() for shape in hessian.layout.values()]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    expected = matrix * (owner.unsqueeze(1) == owner)
    blocks = hessian.block_diagonal()
    torch.testing.assert_close(blocks.to_dense(), expected, rtol=1e-11, atol=1e-13)
    layer = torch.tensor([0, 0, 1, 1, -1, -1])[owner]  # the last layer is in no group
    grouped = hessian.block_diagonal([["0.*"], ["2.weight", "2.bias"]])
    expected = matrix * ((layer.unsqueeze(1) == layer) & (layer >= 0))
    torch.testing.assert_close(grouped.to_dense(), expected, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="must not share a parameter"):
        hessian.block_diagonal([["0.*"], ["*.bias"]])
    with pytest.raises(ValueError, match="block_diagonal: groups must hold at least one group"):
        hessian.block_diagonal([])


def test_scipy_form_serves_its_solvers(hessian, matrix):
    scipy = hessian.to_scipy()
    assert scipy.shape == hessian.shape and scipy.dtype == np.float64
    values = eigsh(scipy, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), torch.linalg.eigvalsh(matrix)[-3:].numpy(), rtol=1e-8)
    block = normal(6, 2).numpy()
    fixed = block.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain: Any = A.to_scipy()
        np.testing.assert_allclose(plain @ block[::-1, ::-1], SYMMETRIC.numpy() @ block[::-1, ::-1], rtol=1e-12)
        np.testing.assert_allclose(plain @ fixed, SYMMETRIC.numpy() @ block, rtol=1e-12)
    np.testing.assert_allclose(J.to_scipy() @ block, TALL.numpy() @ block, rtol=1e-12)
    np.testing.assert_allclose(J.to_scipy().rmatvec(block[:4, 0]), TALL.T.numpy() @ block[:4, 0], rtol=1e-12)
    np.testing.assert_allclose(J.to_scipy().rmatmat(block[:4]), TALL.T.numpy() @ block[:4], rtol=1e-12)
    with pytest.raises(TypeError, match="BFloat16"):
        DenseOperator(SYMMETRIC.bfloat16()).to_scipy()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: A.apply_rows(normal(6)), ValueError, r"rows must be \[K, P\] with P == 6, got \[6\]"),
        (lambda: A.apply_rows(normal(2, 5)), ValueError, r"got \[2, 5\]"),
        (
            lambda: A.apply_rows(normal(2, 6).float()),
            ValueError,
            "rows must be torch.float64 on cpu, got torch.float32",
        ),
        (lambda: A @ normal(5), ValueError, r"\[P\] or \[P, K\] with P == 6, got \[5\]"),
        (lambda: A @ 3, TypeError, "unsupported operand"),
        (lambda: A @ np.ones(6), TypeError, r"V must be a torch tensor, got ndarray; to_scipy\(\) takes arrays"),
        (lambda: A + 3, TypeError, "unsupported operand"),
        (lambda: A + J, ValueError, r"one shape, got \[6, 6\] and \[4, 6\]"),
        (lambda: A + DenseOperator(SYMMETRIC.float()), ValueError, "share dtype and device"),
        (lambda: A @ J, ValueError, r"got \[6, 6\] and \[4, 6\]"),
        (lambda: J.shift(1.0), ValueError, r"square, got \[4, 6\]"),
        (lambda: A.deflate(VALUES, ROWS.T), ValueError, r"\[m\] and \[m, P\] with P == 6"),
        (lambda: DenseOperator(normal(3)), ValueError, r"\[rows, columns\] of floating point, got \[3\]"),
        (lambda: LinearOperator((2, 2), F64, torch.device("cpu")) @ normal(2), NotImplementedError, "no product"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
