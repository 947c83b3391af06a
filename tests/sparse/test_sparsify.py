# SPDX-License-Identifier: Apache-2.0
"""Dense models to sparse ones and back, other masks in mid-training, and what training never moves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from curvlab.models import CNN, MLP, NTKLinear
from curvlab.sparse import (
    Mask,
    MaskedConv2d,
    MaskedLinear,
    densify,
    global_magnitude,
    random_mask,
    reinitialize,
    shuffle_layerwise,
    sparsify,
    update_mask,
)
from curvlab.training import Recipe, generator, train, train_group
from tests.sparse.samples import F64, batch, mask_of, masked, network, seeded
from tests.training.samples import dataset

Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_sparsify_copies_and_densify_undoes() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    mask = mask_of(model)
    sparse = sparsify(model, mask)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(sparse.stem, MaskedConv2d) and isinstance(sparse.head[1], MaskedLinear)  # type: ignore[index]
    assert sparse.norm is not model.norm and sparse.training
    dense = densify(sparse)
    expected = masked(model, mask)
    assert type(dense.stem) is nn.Conv2d and dense.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in dense.state_dict().items())
    with torch.no_grad():
        dense.stem.weight.add_(1.0)
    assert Mask.from_model(sparse) == mask  # the copy has memory of its own


def test_what_the_mask_does_not_name_stays() -> None:
    model = network()
    mask = Mask({"wide.weight": torch.zeros(3, 6, 3, 3).bool()})
    sparse = sparsify(model, mask)
    assert [type(m) for m in (sparse.stem, sparse.wide, sparse.head[3])] == [nn.Conv2d, MaskedConv2d, nn.Linear]  # type: ignore[index]
    more = sparsify(sparse, Mask({"stem.weight": torch.ones(4, 2, 3, 3).bool()}))  # sparse models can be sparsified on
    assert isinstance(more.stem, MaskedConv2d) and set(Mask.from_model(more)) == {"wide.weight", "stem.weight"}


def test_layers_in_several_places_and_at_the_root() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.again = self.one
            self.inner = nn.Sequential(self.one, nn.ConvTranspose2d(1, 1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[0](self.again(self.one(x)))

    model = Twice().to(F64)
    mask = mask_of(model)
    sparse = sparsify(model, mask)
    assert sparse.one is sparse.again is sparse.inner[0] and type(sparse.inner[1]) is nn.ConvTranspose2d  # type: ignore[index]
    x = torch.randn(2, 3, dtype=F64)
    assert torch.allclose(sparse(x), masked(model, mask)(x))
    layer = nn.Linear(3, 2)
    assert isinstance(sparsify(layer, mask_of(layer)), MaskedLinear)
    assert isinstance(densify(sparsify(layer, mask_of(layer))), nn.Linear)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_masked_dense_weights(name: str, kernels: Any) -> None:
    """Step for step against dense weights with masked gradients; pruned weights stay exactly zero, without -0."""
    model = network()
    mask = mask_of(model)
    sparse = sparsify(model, mask, kernels=kernels)
    dense = masked(network(), mask)
    ours, theirs = (OPTIMIZERS[name](m.parameters()) for m in (sparse, dense))
    for _ in range(5):
        _step(sparse, ours)
        x, y = batch()
        theirs.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        for key, keep in mask.items():
            gradient = dense.get_parameter(key).grad
            assert gradient is not None
            gradient.masked_fill_(~keep, 0.0)
        theirs.step()
        assert Mask.from_model(sparse) == mask
        back = densify(sparse)
        for key, keep in mask.items():
            pruned = back.get_parameter(key)[~keep]
            assert bool((pruned == 0).all()) and not torch.signbit(pruned).any()
        for key, value in back.state_dict().items():
            assert torch.allclose(value, dense.state_dict()[key], rtol=1e-8, atol=1e-8), key


def _dense_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every state tensor of every sparse layer, scattered to the dense weight's shape; scalars as they are."""
    found = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, (MaskedConv2d, MaskedLinear)):
            state = {**optimizer.state[layer.values], "value": layer.values.detach(), "grad": layer.values.grad}
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    found[f"{prefix}.{key}"] = layer.scatter(value) if value.ndim else value
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_mask_moves_the_optimizers_state_by_position(name: str) -> None:
    model = network()
    old = mask_of(model, 0.5)
    new = random_mask(model, 0.4, generator=seeded(7))  # prunes and grows
    sparse = sparsify(model, old)
    optimizer = OPTIMIZERS[name](sparse.parameters())
    for _ in range(3):
        _step(sparse, optimizer)
    loss = F.cross_entropy(sparse(batch()[0]), batch()[1])  # a graph that is still alive holds the old parameters
    before = _dense_state(sparse, optimizer)
    count = len(optimizer.param_groups[0]["params"])
    update_mask(sparse, new, optimizer)
    assert Mask.from_model(sparse) == new
    after = _dense_state(sparse, optimizer)
    assert before.keys() == after.keys() and len(after) > 12
    for key, value in after.items():
        keep = (
            (old[f"{key.rpartition('.')[0]}.weight"] & new[f"{key.rpartition('.')[0]}.weight"]) if value.ndim else None
        )
        want = before[key] if keep is None else before[key].masked_fill(~keep, 0.0)
        assert torch.equal(value, want), key
    params = optimizer.param_groups[0]["params"]
    assert len(params) == count and {id(p) for p in params} == {id(p) for p in sparse.parameters()}
    del loss
    for _ in range(2):
        _step(sparse, optimizer)
    assert Mask.from_model(sparse) == new
    moved = [n for n in new if bool((densify(sparse).get_parameter(n)[new[n] & ~old[n]] != 0).any())]
    assert len(moved) >= 5  # grown weights train
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """It would go on with what the model no longer has."""
    model = network()
    sparse = sparsify(model, mask_of(model))
    before = copy.deepcopy(sparse.state_dict())
    with pytest.raises(ValueError, match=r"optimizer must hold values of the layers in mask \(say stem.weight\)"):
        update_mask(sparse, mask_of(model, 0.2), torch.optim.SGD(model.parameters(), 0.1))
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    optimizer = torch.optim.SGD([sparse.head[3].values, *sparse.norm.parameters()], 0.1)  # type: ignore[index, union-attr]
    update_mask(sparse, mask_of(model, 0.2), optimizer)  # of one layer, the others frozen
    assert sparse.head[3].values is optimizer.param_groups[0]["params"][0]  # type: ignore[index, union-attr]


def test_pruning_to_one_weight_keeps_step_counts() -> None:
    layer = sparsify(nn.Linear(4, 3), Mask({"weight": torch.ones(3, 4).bool()}))
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    for count in (12, 1, 0, 3):
        update_mask(layer, Mask({"weight": (torch.arange(12) < count).view(3, 4)}), optimizer)
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert layer.values.shape == (count,)
    assert float(optimizer.state[layer.values]["step"]) == 4.0  # type: ignore[index]


def test_auto_chooses_again_after_an_update() -> None:
    model = nn.Conv2d(32, 4, 3)
    sparse = sparsify(model, Mask.dense(model))
    assert sparse.path == "dense"
    update_mask(sparse, global_magnitude(model, 0.1))
    assert sparse.path == "sparse"


def test_a_refused_update_changes_nothing() -> None:
    model = network()
    sparse = sparsify(model, mask_of(model))
    before = copy.deepcopy(sparse.state_dict())
    wrong = Mask({"stem.weight": torch.ones(4, 2, 3, 3).bool(), "wide.weight": torch.ones(2).bool()})
    with pytest.raises(ValueError, match=r"mask must have shape \[3, 6, 3, 3\] for wide.weight, got \[2\]"):
        update_mask(sparse, wrong)
    optimizer = torch.optim.LBFGS(sparse.parameters())
    x, y = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(sparse(x), y)
        value.backward()
        return value

    assert Mask.from_model(sparse) == mask_of(model)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    optimizer.step(closure)  # type: ignore[arg-type]
    after = copy.deepcopy(sparse.state_dict())
    with pytest.raises(ValueError, match="optimizer must keep state of the shape of its parameter"):
        update_mask(sparse, mask_of(model, 0.2), optimizer)
    assert all(torch.equal(value, after[name]) for name, value in sparse.state_dict().items())


def test_controls() -> None:
    model = network()
    mask = global_magnitude(model, 0.3)
    shuffled = shuffle_layerwise(mask, seeded(1))
    assert shuffled.counts == mask.counts and shuffled != mask and shuffled == shuffle_layerwise(mask, seeded(1))
    sparse = sparsify(model, mask)
    drawn, same, other = (reinitialize(sparse, seeded(s)) for s in (1, 1, 2))
    assert Mask.from_model(drawn) == mask and Mask.from_model(sparse) == mask
    assert torch.equal(drawn.stem.values, same.stem.values)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(drawn.stem.values, other.stem.values)  # type: ignore[arg-type, union-attr]
    dense = reinitialize(model, seeded(1))  # one draw, whatever is pruned of it
    expected = masked(dense, mask).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in densify(drawn).state_dict().items())
    assert bool((dense.norm.running_mean == 0).all()) and bool((dense.norm.weight == 1).all())  # type: ignore[union-attr, operator]
    bound = 1 / (4 * 6 / 2) ** 0.5  # nn.Conv2d's own: U(+-1/sqrt(fan_in)), body has 2 x 3 x 2 inputs
    assert 0.5 * bound < float(dense.body.weight.detach().abs().max()) <= bound  # type: ignore[union-attr, operator, arg-type]
    state = torch.random.get_rng_state()
    reinitialize(model, seeded(1))
    assert torch.equal(state, torch.random.get_rng_state())


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    prune.l1_unstructured(model[1], "weight", 0.5)
    return model


def _normalized(how: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(how(nn.Linear(5, 4)))


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: nn.Sequential(NTKLinear(2, 2)), TypeError, "reset_parameters, got NTKLinear"),
        (_pruned, TypeError, "reset_parameters draws all their parameters, got 1.weight_orig"),
        (lambda: _normalized(nn.utils.spectral_norm), TypeError, "draws all their parameters, got 0.weight_orig"),
        (lambda: _normalized(nn.utils.weight_norm), TypeError, "draws all their parameters, got 0.weight_g"),
        (lambda: _normalized(nn.utils.parametrizations.weight_norm), TypeError, "got ParametrizationList"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), ValueError, "got a lazy parameter 0.weight: run it once"),
    ],
)
def test_what_reset_parameters_would_not_draw_is_refused(model: Any, error: type[Exception], match: str) -> None:
    """It came back with the old weights, silently."""
    with pytest.raises(error, match=match):
        reinitialize(model(), seeded())


def test_the_ordinary_loop_trains_sparse_networks_and_resumes(tmp_path: Any) -> None:
    from curvlab.training import CheckpointFile

    data, recipe = dataset(dtype=torch.float32), Recipe(3, 64, 0.1)
    model = MLP(9, in_features=20, generator=generator(0, "init"))
    mask = global_magnitude(model, 0.5)

    def fresh() -> nn.Module:
        return sparsify(model, mask)

    whole = fresh()
    result = train(whole, data, recipe, seed=0)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] and Mask.from_model(whole) == mask

    class Cut(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Cut

    file, again = CheckpointFile(tmp_path / "c", every_seconds=0), fresh()
    with pytest.raises(Cut):
        train(again, data, recipe, seed=0, checkpoint=file, progress=stop)
    resumed = fresh()
    train(resumed, data, recipe, seed=0, checkpoint=file)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    elsewhere = sparsify(model, shuffle_layerwise(mask, seeded()))
    elsewhere.load_state_dict({k: v for k, v in fresh().state_dict().items() if "indices" not in k}, strict=False)
    with pytest.raises(ValueError, match=r"checkpoint .* is of another run: initial_network"):
        train(elsewhere, data, recipe, seed=0, checkpoint=file)


@pytest.mark.parametrize("kind", ["sparse", "pruned by torch", "hooked"])
def test_networks_that_no_stack_computes_train_one_by_one(kind: str) -> None:
    """Pruned ones came out of order (weight_orig stands behind the bias), sparse ones have no weight."""

    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output

    def fresh() -> nn.Module:
        model = MLP(9, in_features=20, generator=generator(0, "init"))
        if kind == "sparse":
            return sparsify(model, global_magnitude(model, 0.3))
        for layer in model.linear_layers():
            if kind == "hooked":
                layer.register_forward_hook(doubled)
            else:
                prune.l1_unstructured(layer, "weight", 0.7)
        return model

    data, recipe, models = dataset(dtype=torch.float32), Recipe(2, 64, 0.1), [fresh(), fresh()]
    assert train_group(models[:1], data, recipe, seeds=[0]).engine == "one-by-one"
    train(models[1], data, recipe, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(*[model.parameters() for model in models], strict=True))


def test_pruning_of_layers_that_the_mask_does_not_name_goes_on() -> None:
    """It was made permanent there too, and the zeros grew back."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(F64)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[2], "weight", 0.5)
    mask = Mask.from_prune(model)
    sparse = sparsify(model, Mask({"2.weight": mask["2.weight"]}))
    assert isinstance(sparse[2], MaskedLinear) and Mask.from_prune(sparse) == Mask({"0.weight": mask["0.weight"]})  # type: ignore[index]
    x = torch.randn(6, 5, dtype=F64, generator=seeded())
    assert torch.allclose(sparse(x), model(x), rtol=1e-12)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    sparse(x)
    assert not sparse[0].weight[~mask["0.weight"]].any()  # type: ignore[index, union-attr]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: output)
    return model


def _parametrized_bias() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), "bias")


def _alias() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, layer)


def _named(name: str, *shape: int) -> Mask:
    return Mask({name: torch.ones(shape).bool()})


@pytest.mark.parametrize(
    ("model", "mask", "error", "match"),
    [
        (Tied, _named("one.weight", 3, 3), ValueError, "got one.weight, which layers share"),
        (
            _hooked,
            _named("0.weight", 3, 3),
            ValueError,
            "no hooks on the layers to replace, got one on",
        ),
        (lambda: nn.Sequential(NTKLinear(3, 3)), _named("0.weight", 3, 3), TypeError, "own forward, got NTKLinear"),
        (lambda: CNN(1, image_size=8), _named("features.0.bias", 1), ValueError, r"\('bias' cannot be pruned\)"),
        (lambda: CNN(1, image_size=8), _named("nowhere.weight", 1), ValueError, "no parameter of CNN"),
        (lambda: CNN(1, image_size=8), _named("features.1.weight", 1), ValueError, "of BatchNorm2d"),
        (lambda: CNN(1, image_size=8), _named("features.0.weight", 2), ValueError, r"shape \[1, 3, 3, 3\]"),
        (lambda: nn.MultiheadAttention(4, 2), _named("out_proj.weight", 4, 4), ValueError, "NonDynamicallyQuantizable"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            _named("weight", 2, 2),
            ValueError,
            "parametrized",
        ),
        (_parametrized_bias, _named("weight", 2, 2), ValueError, "parametrized"),
        (lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2).bool()}, TypeError, "mask must be a Mask, got dict"),
        (lambda: 3, _named("weight", 2, 2), TypeError, "model must be an nn.Module, got int"),
        (lambda: nn.LazyLinear(2), _named("weight", 2, 2), ValueError, "got a lazy parameter weight: run it once"),
        (
            lambda: _normalized(nn.utils.spectral_norm),
            _named("0.weight", 4, 5),
            ValueError,
            "got '0.weight', which Linear computes",
        ),
        (_alias, _named("1.weight", 3, 3), ValueError, r"got '1.weight', which is another name of 0.weight"),
    ],
)
def test_what_cannot_be_sparsified_is_refused(model: Any, mask: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sparsify(model(), mask)


def test_bad_updates_are_refused() -> None:
    model = network()
    for call, error, match in (
        (lambda: update_mask(model, mask_of(model)), ValueError, "must name sparse layers of the model"),
        (lambda: update_mask(model, 0.5), TypeError, "mask must be a Mask"),  # type: ignore[arg-type]
        (lambda: update_mask(model, mask_of(model), optimizer=0.1), TypeError, "torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda: update_mask(3, mask_of(model)), TypeError, "update_mask: model must be an nn.Module"),  # type: ignore[arg-type]
        (lambda: densify(3), TypeError, "densify: model must be an nn.Module"),  # type: ignore[arg-type]
        (lambda: reinitialize(3), TypeError, "reinitialize: model must be an nn.Module"),  # type: ignore[arg-type]
        (lambda: reinitialize(model, 3), TypeError, "reinitialize: generator must be a torch.Generator"),  # type: ignore[arg-type]
        (lambda: shuffle_layerwise(model), TypeError, "shuffle_layerwise: mask must be a Mask, got Residual"),  # type: ignore[arg-type]
        (lambda: sparsify(model, mask_of(model), kernels="fast"), ValueError, "kernels must be"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=match):
            call()
