# SPDX-License-Identifier: Apache-2.0
"""Scales and filter normalization against loops over filters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlab.sharpness.directions import draw_normal, filter_normalized, random_directions, weight_scale
from tests.sharpness.nets import F64, draw, problem

pytestmark = pytest.mark.usefixtures("one_thread")


def filters(params: dict[str, Tensor]) -> list[tuple[slice, Tensor]]:
    """Where each filter stands in the flat vector, and its weights."""
    found, at = [], 0
    for tensor in params.values():
        for row in tensor:
            found.append((slice(at, at + row.numel()), row.reshape(-1)))
            at += row.numel()
    return found


@pytest.mark.parametrize("rms", [False, True])
def test_scales_are_norms_of_elements_filters_and_layers(rms: bool) -> None:
    params = problem().params
    assert torch.equal(
        weight_scale(params, "absolute", rms=rms), torch.ones(sum(p.numel() for p in params.values())).double()
    )
    flat = torch.cat([p.reshape(-1) for p in params.values()])
    torch.testing.assert_close(weight_scale(params, "element", rms=rms, eta=0.1), flat.abs() + 0.1)
    by_filter = weight_scale(params, "filter", rms=rms)
    for where, weights in filters(params):
        expected = weights.square().mean().sqrt() if rms else weights.norm()
        torch.testing.assert_close(by_filter[where], expected.expand(weights.numel()))
    pieces = weight_scale(params, "layer", rms=rms, eta=0.5).split([p.numel() for p in params.values()])
    for piece, tensor in zip(pieces, params.values(), strict=True):
        expected = (tensor.square().mean().sqrt() if rms else tensor.norm()) + 0.5
        torch.testing.assert_close(piece, expected.expand(tensor.numel()))


def test_filter_normalized_directions_are_as_long_as_the_filters() -> None:
    params = problem().params
    rows = torch.randn(3, sum(p.numel() for p in params.values()), dtype=F64, generator=draw())
    scaled, zeroed = filter_normalized(rows, params, one_dimensional="scale"), filter_normalized(rows, params)
    torch.testing.assert_close(filter_normalized(rows[1], params), zeroed[1], rtol=0, atol=0)
    at = 0
    for tensor in params.values():
        here = slice(at, at + tensor.numel())
        if tensor.ndim < 2:
            assert not zeroed[:, here].any()
        else:
            torch.testing.assert_close(zeroed[:, here], scaled[:, here], rtol=0, atol=0)
        at += tensor.numel()
    for where, weights in filters(params):
        for before, after in zip(rows, scaled, strict=True):
            torch.testing.assert_close(after[where].norm(), weights.norm())
            torch.testing.assert_close(
                torch.cosine_similarity(before[where], after[where], dim=0), torch.ones((), dtype=F64)
            )


def test_zero_filters_stay_zero() -> None:
    params = {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "s": torch.tensor(2.0)}
    rows = torch.tensor([1.0, 1.0, 0.0, 0.0, -4.0])
    assert filter_normalized(rows, params, one_dimensional="scale").tolist() == [0.0, 0.0, 0.0, 0.0, -2.0]
    assert weight_scale(params, "filter").tolist() == [0.0, 0.0, 5.0, 5.0, 2.0]


def test_draws_do_not_depend_on_how_many_come_at_once() -> None:
    here = problem()
    together, generator = draw_normal(4, 10, here, draw(5)), draw(5)
    apart = torch.cat([draw_normal(n, 10, here, generator) for n in (1, 2, 1)])
    assert torch.equal(together, apart)
    directions = random_directions(here, 2, generator=draw(5))
    assert directions.shape == (2, here.num_params)
    assert torch.equal(directions, filter_normalized(draw_normal(2, here.num_params, here, draw(5)), here.params))


def test_refusals() -> None:
    params = {"w": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"weight_scale: scale must be one of absolute, element"):
        weight_scale(params, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight_scale: eta must be 0 or more, got -1"):
        weight_scale(params, "element", eta=-1)
    with pytest.raises(ValueError, match=r"filter_normalized: directions must be .* P == 4"):
        filter_normalized(torch.ones(3), params)
    with pytest.raises(ValueError, match=r"one_dimensional must be"):
        filter_normalized(torch.ones(4), params, one_dimensional="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"random_directions: count"):
        random_directions(problem(), 0)
