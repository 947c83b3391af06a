# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors and flat vectors."""

from __future__ import annotations

import pytest
import torch

from curvlab.operators.params import flatten, num_elements, unflatten

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(2, 3), (), (4,), (0, 5), (1, 2, 2)]


def tensors(*leading: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((*leading, *shape), generator=generator) for shape in SHAPES]


def test_flatten_is_row_major_and_unflatten_its_inverse():
    parts = tensors()
    vector = flatten(parts)
    assert vector.shape == (num_elements(parts),) == (15,)
    assert torch.equal(vector[:6], parts[0].reshape(-1))
    assert vector[6] == parts[1]
    for back, part in zip(unflatten(vector, parts), parts, strict=True):
        assert torch.equal(back, part)


def test_directions_are_columns():
    parts = tensors(7)
    matrix = flatten(parts, batched=True)
    assert matrix.shape == (15, 7)
    for k in range(7):
        assert torch.equal(matrix[:, k], flatten([part[k] for part in parts]))
    for back, part in zip(unflatten(matrix, tensors()), parts, strict=True):
        assert torch.equal(back, part)


def test_transposed_tensors_are_read_in_row_major_order():
    part = torch.arange(6.0).view(2, 3).T
    assert flatten([part]).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flatten([]), "at least one tensor"),
        (lambda: flatten([torch.zeros(2), torch.zeros(2, dtype=torch.float64)]), "share dtype and device .*float64"),
        (lambda: flatten([torch.zeros(2, 3), torch.zeros(3, 3)], batched=True), "K == 2 .* got \\[3, 3\\] at 1"),
        (lambda: unflatten(torch.zeros(4), [torch.zeros(5)]), "P == 5 \\(from like\\), got \\[4\\]"),
        (lambda: unflatten(torch.zeros(5, 1, 1), [torch.zeros(5)]), "\\[P\\] or \\[P, K\\]"),
    ],
)
def test_mismatches_are_told(call, match):
    with pytest.raises(ValueError, match=match):
        call()
