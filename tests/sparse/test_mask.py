# SPDX-License-Identifier: Apache-2.0
"""Masks: counted exactly, nested or not, immutable, and the same through files and torch.nn.utils.prune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from curvlab.sparse import Mask, sparsify
from tests.sparse.samples import batch, mask_of, network


def example() -> Mask:
    return Mask({"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([False, False, True])})


def test_counts_and_densities_are_exact() -> None:
    mask = example()
    assert mask.counts == {"a": 3, "b": 1} and mask.sizes == {"a": 4, "b": 3}
    assert (mask.num_kept, mask.num_total, mask.density) == (4, 7, 4 / 7)
    assert mask.layer_densities() == {"a": 0.75, "b": 1 / 3}
    assert list(mask) == ["a", "b"] and len(mask) == 2
    assert "4 of 7" in repr(mask) and str(mask).splitlines()[-1].split() == ["total", "4", "of", "7", "0.5714"]


def test_a_mask_cannot_be_changed_from_outside() -> None:
    source = {"a": torch.tensor([True, False])}
    mask = Mask(source)
    source["a"].fill_(True)
    mask["a"].fill_(True)
    assert mask.counts == {"a": 1} and mask["a"].tolist() == [True, False]
    with pytest.raises(TypeError):
        mask["a"] = torch.tensor([True, True])  # type: ignore[index]


def test_nesting_and_combinations() -> None:
    one = example()
    fewer = Mask({"a": torch.tensor([[True, False], [False, True]]), "b": torch.tensor([False, False, True])})
    other = Mask({"a": torch.tensor([[True, True], [False, False]]), "b": torch.tensor([False, False, False])})
    assert fewer.is_nested_in(one) and not one.is_nested_in(fewer) and one.is_nested_in(one)
    assert not other.is_nested_in(one)
    assert (one & other).counts == {"a": 1, "b": 0} and (one | other).counts == {"a": 4, "b": 1}
    assert (one & fewer) == fewer and (one | fewer) == one and one != fewer and hash(one) == hash(one.to("cpu"))
    with pytest.raises(ValueError, match=r"Mask &: other must be of the same weights, got b: \[3\] and None"):
        one & Mask({"a": one["a"]})


def test_a_mask_survives_a_file(tmp_path: Path) -> None:
    mask = mask_of(network())
    mask.save(tmp_path / "deep" / "mask.safetensors")
    loaded = Mask.load(tmp_path / "deep" / "mask.safetensors")
    assert loaded == mask and list(loaded) == list(mask)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mask.safetensors"]
    (tmp_path / "other").write_bytes(b"no mask")
    with pytest.raises(ValueError, match=r"Mask\.load: .*other must be a file written by Mask\.save"):
        Mask.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        Mask.load(tmp_path / "missing")


def test_masks_of_models() -> None:
    model = network()
    whole = Mask.dense(model)
    assert whole.density == 1.0
    assert list(whole) == [f"{n}.weight" for n in ("stem", "body", "side", "wide", "head.1", "head.3")]
    mask = mask_of(model)
    mask.apply_(model)
    assert Mask.from_zeros(model) == mask
    sparse = sparsify(model, mask)
    assert Mask.from_model(sparse) == mask == Mask.from_zeros(sparse)
    assert list(Mask.dense(model, "head.*")) == ["head.1.weight", "head.3.weight"]
    assert list(Mask.dense(model, lambda name, weight: weight.ndim == 2)) == ["head.1.weight", "head.3.weight"]


def test_apply_sets_zeros_whatever_stood_there() -> None:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -1.0, 2.0]]))
    Mask({"weight": torch.tensor([[False, False, True]])}).apply_(model)
    assert model.weight.tolist() == [[0.0, 0.0, 2.0]]
    assert not torch.signbit(model.weight.detach()).any()  # no -0, which a product with the mask would leave


def test_interoperates_with_torch_prune() -> None:
    model = network()
    prune.global_unstructured([(model.stem, "weight"), (model.body, "weight")], prune.L1Unstructured, amount=0.5)  # type: ignore[list-item]
    prune.random_unstructured(model.head[1], "bias", amount=2)  # type: ignore[index, arg-type]
    mask = Mask.from_prune(model)
    assert set(mask) == {"stem.weight", "body.weight", "head.1.bias"}
    assert mask.counts["stem.weight"] + mask.counts["body.weight"] == 72  # half of 72 + 72
    assert torch.equal(mask["stem.weight"], model.stem.weight_mask.bool())  # type: ignore[union-attr]

    weights = Mask({name: mask[name] for name in ("stem.weight", "body.weight")})
    x = batch()[0]
    sparse = sparsify(model.eval(), weights)  # straight from the pruned model
    assert torch.allclose(sparse(x), model(x), rtol=1e-12, atol=1e-12)
    assert "weight_orig" in dict(model.stem.named_parameters())  # the caller's model stays pruned

    again = network()
    weights.to_prune(again)
    assert Mask.from_prune(again) == weights
    assert torch.equal(again.stem.weight, model.stem.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Mask({}), ValueError, "at least one tensor"),
        (lambda: Mask([1]), TypeError, "must map names"),  # type: ignore[arg-type]
        (lambda: Mask({"a": torch.ones(2)}), TypeError, r"boolean tensors, got torch\.float32 for 'a'"),
        (lambda: Mask({1: torch.ones(2).bool()}), TypeError, "names must be strings"),  # type: ignore[dict-item]
        (lambda: Mask.dense(nn.ReLU()), ValueError, "Mask.dense: model must have weights"),
        (lambda: Mask.dense(network(), "nothing"), ValueError, "'nothing', which matches none"),
        (lambda: Mask.dense(network(), []), ValueError, "got none"),
        (lambda: Mask.dense(3), TypeError, "must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: Mask.dense(nn.LazyLinear(2)), ValueError, "lazy parameter weight"),
        (lambda: Mask.from_model(network()), ValueError, "sparse layers"),
        (lambda: Mask.from_model(3), TypeError, "Mask.from_model: model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: Mask.from_prune(3), TypeError, "Mask.from_prune: model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: example().apply_(3), TypeError, r"Mask.apply_: model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: example().to_prune(3), TypeError, r"Mask.to_prune: model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: Mask.from_prune(network()), ValueError, "pruned by torch.nn.utils.prune"),
        (lambda: example().apply_(network()), ValueError, "must have a of shape .* no such parameter"),
        (lambda: example().to_prune(network()), ValueError, "must have a of shape .* no such parameter"),
        (lambda: example().is_nested_in(None), TypeError, "must be a Mask"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_refused_mask_changes_nothing() -> None:
    model = network()
    before = [param.clone() for param in model.parameters()]
    mask = Mask({"stem.weight": torch.zeros(4, 2, 3, 3).bool(), "wide.weight": torch.zeros(2).bool()})
    for call in (mask.apply_, mask.to_prune):
        with pytest.raises(ValueError, match=r"wide\.weight of shape \[2\], got \[3, 6, 3, 3\]"):
            call(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_prune_mask_that_is_no_mask_is_refused() -> None:
    layer = nn.Linear(2, 2)
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.5, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="zeros and ones, got others for weight"):
        Mask.from_prune(layer)
