# SPDX-License-Identifier: Apache-2.0
"""Recorded linear maps: replays equal the function, constants are snapshots, and what cannot be repeated is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvlab.operators.engines.tape import Unrecordable, record
from tests.operators.models import F64, normal


def accumulated(v: Tensor) -> Tensor:
    """Two products in one sum: replayed as one addmm."""
    a, b = normal(4, 5, seed=11), normal(4, 5, seed=12)
    return v @ a + (2.0 * v) @ b


def accumulated_twice_used(v: Tensor) -> Tensor:
    product = v @ normal(4, 5, seed=11)
    return (v @ normal(4, 5, seed=12) + product) * 3.0 - product


def written_buffer(v: Tensor) -> Tensor:
    """A constant that the argument is written into: a replay must start from a fresh one."""
    buffer = torch.ones(3, 4, dtype=F64)
    buffer -= 1.0
    buffer.add_(v)
    return buffer + v


def in_place_on_values(v: Tensor) -> Tensor:
    w = v * 2.0
    view = w[:, :2]
    view.mul_(5.0)
    return w


def scattered(v: Tensor) -> Tensor:
    return torch.zeros(3, 7, dtype=F64).index_add(1, torch.tensor([0, 3, 3, 6]), v).cumsum(1)


def split_up(v: Tensor) -> Tensor:
    first, second = v.chunk(2, 1)
    return torch.cat([second, first + second], 1)


MAPS = [accumulated, accumulated_twice_used, written_buffer, in_place_on_values, scattered, split_up]


@pytest.mark.parametrize("function", MAPS)
def test_replays_are_the_function(function: Callable[[Tensor], Tensor]) -> None:
    program, results = record(lambda v: [function(v)], [normal(3, 4)])
    assert torch.equal(results[0], function(normal(3, 4)))  # type: ignore[arg-type]
    for seed in (5, 6, 5):
        v = normal(3, 4, seed=seed)
        kept = v.clone()
        (got,) = program(v)
        assert got is not None
        assert torch.allclose(got, function(v), rtol=1e-13, atol=1e-14)
        assert torch.equal(v, kept)


def test_two_products_become_one_call() -> None:
    program, _ = record(lambda v: [accumulated(v)], [normal(3, 4)])
    assert program.num_steps == 3  # mm, mul, addmm
    assert program.constant_bytes == 2 * 4 * 5 * 8


def test_steps_that_no_result_needs_are_left_out() -> None:
    big = normal(4, 1000, seed=3)

    def function(v: Tensor) -> list[Tensor | None]:
        _ = v @ big
        return [v + 0.0, None, torch.ones(2)]

    program, _ = record(function, [normal(3, 4)])
    assert (program.num_steps, program.constant_bytes) == (1, 0)
    results = program(normal(3, 4, seed=2))
    assert results[1:] == [None, None]  # what the argument does not reach is zero in a linear map


def test_temporaries_are_counted_by_what_lives_together() -> None:
    def chain(v: Tensor) -> list[Tensor]:
        for _ in range(50):
            v = v * 2.0
        return [v]

    program, _ = record(chain, [normal(1000)])
    assert program.recording_bytes == 50 * 8000
    assert program.temporary_bytes == 2 * 8000


def test_rounded_constants_and_arguments() -> None:
    a = normal(64, 64, seed=3)
    program, _ = record(lambda v: [v @ a], [normal(8, 64)], rounded=torch.bfloat16)
    (low,) = program(normal(8, 64, seed=4))
    assert low is not None and low.dtype == torch.bfloat16
    exact = normal(8, 64, seed=4) @ a
    assert 1e-4 < ((low.double() - exact).norm() / exact.norm()).item() < 1e-2


def taken_out(v: Tensor) -> Tensor:
    return v * float(v.sum())


def overwritten_argument(v: Tensor) -> Tensor:
    return v.mul_(2.0)


def written_part(v: Tensor) -> Tensor:
    buffer = torch.zeros(3, 8, dtype=F64)
    buffer[:, ::2] = v
    return buffer


@pytest.mark.parametrize("function", [taken_out, overwritten_argument, written_part])
def test_what_a_replay_could_not_repeat_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Unrecordable):
        record(lambda v: [function(v)], [normal(3, 4)])


def test_memory_is_written_over_only_when_nobody_reads_it_again() -> None:
    """A view, a second reader, a result and the argument itself must survive; the chain in between is in place."""

    def function(v: Tensor) -> list[Tensor]:
        a = v @ normal(4, 4, seed=3)
        view = a[:, 1:]
        b = a + v  # a is read again through its view
        c = b * 2.0
        d = c - v  # c is dead: in place
        e = d + d.T.contiguous().T  # shares no memory
        return [e, b, view + 0.0, v * 1.0, d * 0.5]

    program, _ = record(function, [normal(4, 4)])
    v = normal(4, 4, seed=7)
    kept = v.clone()
    for got, expected in zip(program(v), function(v), strict=True):
        assert got is not None and torch.allclose(got, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(v, kept)
