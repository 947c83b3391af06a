# SPDX-License-Identifier: Apache-2.0
"""Trained networks as rows, and differences between settings: bits, intervals, survival, the radial identity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from curvlab.data import Dataset, load
from curvlab.runs.stats import Estimate, Survives, Verdict
from curvlab.runs.store import RunStore
from curvlab.training import Network, Recipe, Samples, TrainStage
from experiments.base.networks import correct, decode_hits, encode_hits, forecast_stage, radial_cosine, run_stage
from experiments.base.settings import above, cap, gap, gap_table, mean, ratio, results, seconds, survival, values
from experiments.base.study import Tools
from tests.experiments.gaps import IMAGES, network_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ONE, OTHER = {"batch_size": 32}, {"batch_size": 512}


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value, low, high, 3, "made up")


@pytest.mark.parametrize("count", [1, 7, 8, 359, 1000])
def test_hits_are_one_bit_an_image(count: int) -> None:
    hits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.7
    text = encode_hits(hits)
    assert np.array_equal(decode_hits(text, count), hits.numpy()) and len(text) <= 4 * math.ceil(count / 24)


def pair(ones: tuple[float, ...], others: tuple[float, ...]) -> list[dict]:
    rows = []
    for setting, accuracies in ((ONE, ones), (OTHER, others)):
        for seed, accuracy in enumerate(accuracies):
            rows += network_rows(setting, seed, accuracy)
    return rows


def test_a_gap_is_the_mean_difference_with_the_noise_of_seeds_and_images() -> None:
    found = gap(pair((85.0, 85.4, 85.2), (84.0, 84.2, 84.4)), ONE, OTHER)
    assert found is not None
    assert found.estimate.value == pytest.approx(1.0, abs=1e-9) and found.estimate.n == 3
    assert found.paired.effect is not None and found.paired.effect.value == pytest.approx(1.0)
    # wider than seeds alone would be where seeds agree: the images' noise is in it
    close = gap(pair((85.0, 85.01, 85.02), (84.0, 84.01, 84.02)), ONE, OTHER)
    assert close is not None and close.paired.effect is not None
    assert close.estimate.high - close.estimate.low > close.paired.effect.high - close.paired.effect.low
    assert close.estimate.low > 0.5
    back = gap(pair((85.0, 85.4, 85.2), (84.0, 84.2, 84.4)), OTHER, ONE)
    assert back is not None and back.estimate.value == pytest.approx(-1.0)


def test_a_gap_takes_common_seeds_and_one_seed_has_no_interval() -> None:
    found = gap(pair((85.0, 90.0), (84.0,)), ONE, OTHER)
    assert found is not None and found.estimate.value == pytest.approx(1.0) and not found.estimate.has_interval
    assert gap(pair((85.0,), ()), ONE, OTHER) is None


def test_survival_has_three_outcomes() -> None:
    written = estimate(1.0, 2.0, 3.0)
    yes = {"a": estimate(0.1, 1.0, 1.9), "b": estimate(0.5, 2.0, 3.5)}
    assert survival(written, yes)[0] is Survives.YES  # smaller, and still there in both
    assert survival(written, yes | {"b": estimate(0.1, 0.3, 0.5)})[0] is Survives.NO  # there, but not half of it
    assert survival(written, yes | {"b": estimate(-1.0, 0.2, 1.4)})[0] is Survives.NO
    assert survival(written, yes | {"b": estimate(-3.0, -2.0, -1.0)})[0] is Survives.NO
    assert survival(written, yes | {"b": estimate(-1.0, 1.0, 3.0)})[0] is Survives.NOT_TESTED
    assert survival(written, yes | {"b": None})[0] is Survives.NOT_TESTED
    assert survival(None, yes)[0] is Survives.NOT_TESTED
    assert survival(estimate(-1, -0.5, 0), {"a": estimate(-0.4, -0.3, -0.2)})[0] is Survives.NO
    assert survival(written, {"a": estimate(-0.1, 1.0, 1.9)})[0] is Survives.NO  # smaller, and perhaps gone


def test_verdict_helpers() -> None:
    assert (
        cap(Verdict.REPRODUCED, False) is Verdict.DIRECTION_ONLY and cap(Verdict.REPRODUCED, True) is Verdict.REPRODUCED
    )
    assert cap(Verdict.NOT_REPRODUCED, False) is Verdict.NOT_REPRODUCED
    assert (
        above(estimate(1.1, 2, 3), 1) is Verdict.REPRODUCED and above(estimate(0.9, 2, 3), 1) is Verdict.DIRECTION_ONLY
    )
    assert above(estimate(-1, 0.5, 3), 1) is Verdict.NOT_REPRODUCED and above(None, 1) is Verdict.NOT_TESTABLE


def test_tables_count_diverged_networks_and_do_not_average_them() -> None:
    rows = pair((85.0, 86.0), (84.0, 83.0))
    sick = {"run": "sick", "seed": 2, "epoch": 3, "batch_size": 32}
    rows += [sick | {"metric": "diverged", "value": 1.0}, sick | {"metric": "train_accuracy", "value": math.nan}]
    cells = results(rows, ONE)
    assert cells[0].value == pytest.approx(85.5) and cells[0].n == 2 and cells[1] == pytest.approx(math.sqrt(0.5))
    assert cells[2].n == 2 and cells[-2] == 1
    assert values(rows, "test_accuracy", ONE) == [0.85, 0.86] and seconds(rows, [ONE, OTHER]) == pytest.approx(10)
    assert mean(rows, "nothing", ONE) is None
    both = ratio(rows, "norm", ONE, OTHER)
    assert both is not None and both.value == pytest.approx(1.0) and ratio(rows, "norm", ONE, None) is None
    one = gap(rows, ONE, OTHER)
    assert one is not None
    table = gap_table({("32", "512"): one, ("again", "512"): one}, ["arm", "minus"], "Differences")
    assert table.rows[0][-1] == pytest.approx(min(1.0, 2 * one.paired.p_value))  # Holm over two rows


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_a_unit_stores_what_it_measured(digits: Dataset, tmp_path: Path) -> None:
    stage = TrainStage(Network("cnn", 2), Samples("digits", 300), Recipe(2, 64, 0.05), seed=3)
    tools, store = Tools(), RunStore(tmp_path)
    run = store.open("study", stage)
    with run.lock():
        summary = run_stage(stage, run, tools)
    assert not summary["loaded"] and (tmp_path / "stages" / summary["stage"]).is_dir()
    rows = run.rows()
    final = {row["metric"]: row for row in rows if row["epoch"] == 2 and "layer" not in row}
    assert final["updates"]["value"] == 10 and final["diverged"]["value"] == 0 and all(row["seed"] == 3 for row in rows)
    hits = decode_hits(final["test_hits"]["bits"], int(final["test_hits"]["images"]))
    assert hits.sum() == final["test_hits"]["value"] == round(final["test_accuracy"]["value"] * len(digits.test_y))
    assert {row["layer"] for row in rows if row["metric"] == "weight_norm"} >= {
        "features.0.weight",
        "classifier.1.weight",
    }
    again = store.open("study", TrainStage(stage.network, stage.samples, stage.recipe, 3, loss_mark=0.02))
    other = run_stage(stage, again, tools)
    assert other["loaded"]
    layers = [row["value"] for row in rows if row["metric"] == "weight_norm" and row["layer"].startswith("features")]
    assert final["conv_norm"]["value"] == pytest.approx(math.sqrt(sum(x * x for x in layers)))
    assert forecast_stage(stage, tools) > 0


def test_gradients_have_no_part_along_normalized_weights(digits: Dataset) -> None:
    bare = Network("cnn", 4, batch_norm=False).build(digits, 0)
    normalized = Network("cnn", 4).build(digits, 0)
    assert radial_cosine(normalized, digits) < 1e-3 < 0.02 < radial_cosine(bare, digits)


def test_correct_is_the_argmax_in_the_order_given(digits: Dataset) -> None:
    model = Network("cnn", 2).build(digits, 0).eval()
    found = correct(model, digits.test_x, digits.test_y, batch_size=100)
    with torch.no_grad():
        logits = model(digits.test_x)
    assert torch.equal(found, logits.argmax(1) == digits.test_y)
    assert F.cross_entropy(logits, digits.test_y).item() > 0 and IMAGES == 10_000
