# SPDX-License-Identifier: Apache-2.0
"""Criteria: the scores of their formulas, counts exact to one weight, nested in the mask before."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from curvlab.models import NTKLinear
from curvlab.sparse import (
    Mask,
    global_magnitude,
    grasp,
    layerwise_magnitude,
    prunable_weights,
    random_mask,
    snip,
    sparsify,
    synflow,
)
from tests.sparse.samples import F64, batch, mask_of, network, seeded

Criterion = Callable[..., Mask]
CRITERIA: dict[str, Criterion] = {
    "global_magnitude": global_magnitude,
    "layerwise_magnitude": layerwise_magnitude,
    "random_mask": lambda model, density, **o: random_mask(model, density, generator=seeded(), **o),
    "snip": lambda model, density, **o: snip(model, density, batch(), **o),
    "grasp": lambda model, density, **o: grasp(model, density, batch(), **o),
    "synflow": lambda model, density, **o: synflow(model, density, batch()[0], rounds=7, **o),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("density", [0.0, 0.011, 0.2, 0.5, 0.777, 1.0])
def test_counts_are_exact_and_the_model_untouched(name: str, density: float) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    mask = CRITERIA[name](model, density)
    if name == "layerwise_magnitude":
        assert all(abs(mask.counts[n] - density * size) <= 0.5 + 1e-6 for n, size in mask.sizes.items())
    else:
        assert mask.num_kept == int(density * mask.num_total + 0.5)
    assert list(mask) == list(Mask.dense(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CRITERIA)
def test_masks_are_nested_in_the_present_one(name: str) -> None:
    model = network()
    present = mask_of(model, 0.6, seed=3)
    if name == "layerwise_magnitude":  # of whose layers each has room for the share
        present = layerwise_magnitude(model, 0.6)
    smaller = CRITERIA[name](model, 0.25, mask=present)
    assert smaller.is_nested_in(present) and abs(smaller.num_kept - 0.25 * smaller.num_total) <= 3
    # A sparse model brings its mask, and gives the same: pruned weights are zero in both.
    dense = copy.deepcopy(model)
    present.apply_(dense)
    assert CRITERIA[name](sparsify(model, present), 0.25) == CRITERIA[name](dense, 0.25, mask=present)
    with pytest.raises(ValueError, match="density must not exceed that of mask"):
        CRITERIA[name](model, 0.9, mask=present)


def test_magnitude_keeps_the_largest_and_breaks_ties_by_position() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 2.0, 0.5]]))
        model[1].weight.copy_(torch.tensor([[2.0], [-3.0], [0.1]]))
    kept = [global_magnitude(model, count / 7) for count in range(8)]
    chosen = [torch.cat([mask[n].flatten() for n in mask]).nonzero().flatten().tolist() for mask in kept]
    assert chosen[1:5] == [[5], [1, 5], [1, 2, 5], [1, 2, 4, 5]]
    assert all(a.is_nested_in(b) for a, b in itertools.pairwise(kept))
    by_layer = layerwise_magnitude(model, {"0.weight": 0.5, "1.weight": 1 / 3})
    assert by_layer["0.weight"].tolist() == [[False, True, True, False]]
    assert by_layer["1.weight"].flatten().tolist() == [False, True, False]
    assert global_magnitude(model, 0.5, params="1.*").counts == {"1.weight": 2}


def test_ties_everywhere_still_give_the_count() -> None:
    model = nn.Linear(50, 20)
    nn.init.ones_(model.weight)
    for count in (0, 1, 499, 1000):
        mask = global_magnitude(model, count / 1000)
        assert mask.num_kept == count and mask["weight"].flatten()[:count].all()


def _losses(model: nn.Module) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """Weights, and the loss as a function of them, training mode (its BatchNorm moves a copy's statistics)."""
    model = copy.deepcopy(model).train()
    x, y = batch()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(copy.deepcopy(model), weights, (x,)), y)

    return {name: weight.clone() for name, weight in prunable_weights(model).items()}, loss


def _largest(scores: dict[str, Tensor], count: int) -> Mask:
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.sort(descending=True).indices[:count]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return Mask({name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)})


def test_snip_is_the_derivative_in_a_factor_on_each_weight() -> None:
    model = network()
    weights, loss = _losses(model)
    factors = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    value = loss({name: weights[name] * factor for name, factor in factors.items()})
    grads = torch.autograd.grad(value, list(factors.values()))
    expected = {name: grad.abs() for name, grad in zip(factors, grads, strict=True)}
    mask = snip(model.train(), 0.3, batch())
    assert mask == _largest(expected, mask.num_kept)


def test_grasp_is_the_change_of_the_squared_gradient_norm() -> None:
    """Against a dense Hessian; and the temperature divides the outputs."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).to(F64)
    x, y = batch()
    weights = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    sizes = [weight.numel() for weight in weights.values()]
    theta = torch.cat([weight.flatten() for weight in weights.values()])

    def loss(vector: Tensor) -> Tensor:
        parts = [p.view(w.shape) for p, w in zip(vector.split(sizes), weights.values(), strict=True)]
        return F.cross_entropy(functional_call(model, dict(zip(weights, parts, strict=True)), (x,)) / 5.0, y)

    gradient, curvature = torch.func.grad(loss)(theta), hessian(loss)(theta)
    score = theta * (curvature @ gradient)
    expected = {n: p.view(weights[n].shape) for n, p in zip(weights, score.split(sizes), strict=True)}
    mask = grasp(model, 0.4, (x, y), temperature=5.0)
    assert mask == _largest(expected, mask.num_kept)
    assert mask != grasp(model, 0.4, (x, y), temperature=200.0) or mask != snip(model, 0.4, (x, y))


@pytest.mark.parametrize("criterion", [snip, grasp])
def test_batches_add_up(criterion: Criterion) -> None:
    """In evaluation mode the split into batches does not matter, also where their sizes differ."""
    model = network().eval()
    x, y = batch()
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    assert criterion(model, 0.3, parts) == criterion(model, 0.3, (x, y))


def test_synflow_scores_are_conserved_and_rounds_prevent_collapse() -> None:
    """One round: w dR/dw of the network of absolute values; many: no layer is emptied where one round does it."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)).to(F64)
    first, second = (model[i].weight.detach().abs() for i in (0, 2))
    through = first.sum(1), second.sum(0)  # R = sum_j (row sum of W1)_j (column sum of W2)_j
    expected = {"0.weight": first * through[1][:, None], "2.weight": second * through[0][None, :]}
    assert torch.allclose(expected["0.weight"].sum(), expected["2.weight"].sum())
    mask = synflow(model, 0.5, torch.zeros(3, 6), rounds=1)
    assert mask == _largest(expected, mask.num_kept)

    torch.manual_seed(0)
    sizes = [4, 60, 60, 4]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    deep = nn.Sequential(*layers[:-1])
    once, often = (synflow(deep, 0.02, torch.zeros(1, 4), rounds=n) for n in (1, 100))
    assert once.num_kept == often.num_kept
    assert min(often.counts.values()) >= 4 > min(once.counts.values())


def test_random_masks_are_uniform_and_repeat() -> None:
    model = network()
    a, b, c = (random_mask(model, 0.5, generator=seeded(s)) for s in (1, 1, 2))
    assert a == b != c
    like = layerwise_magnitude(model, 0.3)
    drawn = random_mask(model, like=like, generator=seeded())
    assert drawn.counts == like.counts and drawn != like
    layer = nn.Linear(40, 25)
    hits = sum(random_mask(layer, 0.25, generator=seeded(s))["weight"].double() for s in range(200))
    # binomial, n = 200, p = 1/4: standard deviation 6.1; 1000 positions stay within 5 of them
    assert (hits - 50).abs().max() < 31 and abs(float(hits.mean()) - 50) < 1e-9


def test_prunable_weights_leave_out_what_is_read_elsewhere() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.ntk, self.up, self.last = NTKLinear(4, 3), nn.ConvTranspose2d(2, 2, 2), nn.Linear(3, 2)
            self.tower = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    assert list(prunable_weights(Model())) == ["ntk.weight", "last.weight"]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), "half", True])
def test_densities_outside_the_unit_interval_are_refused(name: str, density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be a kept share in \[0, 1\]"):
        CRITERIA[name](network(), density)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: layerwise_magnitude(network(), {"stem.weight": 0.5}, params="head.*"), ValueError, "amiss"),
        (lambda: layerwise_magnitude(network(), {"nope": 0.5}), ValueError, "'nope', which matches none"),
        (lambda: random_mask(network()), ValueError, "one of density and like must be given, got none"),
        (lambda: random_mask(network(), 0.1, like=mask_of(network())), ValueError, "got both"),
        (lambda: global_magnitude(network(), 0.1, mask=0.5), TypeError, "mask must be a Mask"),  # type: ignore[arg-type]
        (lambda: global_magnitude(network(), 0.1, mask=Mask.dense(nn.Linear(2, 2))), ValueError, "for 'weight'"),
        (lambda: snip(network(), 0.1, []), ValueError, "at least one sample"),
        (lambda: snip(network(), 0.1, [batch()[0]]), TypeError, r"data must be \(x, y\)"),
        (
            lambda: snip(network(), 0.1, batch(), loss=nn.CrossEntropyLoss(reduction="none")),
            ValueError,
            "the mean over",
        ),
        (lambda: grasp(network(), 0.1, batch(), temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: grasp(network(), 0.1, batch(), temperature="hot"), ValueError, "temperature must be positive"),  # type: ignore[arg-type]
        (lambda: synflow(network(), 0.1, batch()[0], rounds=0), ValueError, "rounds must be an int of at least 1"),
        (lambda: synflow(network(), 0.1, batch()[0][:0]), ValueError, r"at least one sample, got \[0, 2, 5, 5\]"),
        (lambda: snip(network(), 0.1, None), TypeError, r"data must be \(x, y\) or such pairs, got NoneType"),  # type: ignore[arg-type]
        (lambda: random_mask(network(), like={}), TypeError, "like must be a Mask or None, got dict"),  # type: ignore[arg-type]
        (lambda: random_mask(network(), 0.1, generator=3), TypeError, "generator must be a torch.Generator"),  # type: ignore[arg-type]
        (lambda: global_magnitude(network(), 0.1, params=3), TypeError, "params must be names or patterns"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Callable[[], Mask], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.wide.weight[0, 0, 0, 0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"global_magnitude: scores must be finite, got NaN or infinite ones for wide"):
        global_magnitude(model, 0.5)
