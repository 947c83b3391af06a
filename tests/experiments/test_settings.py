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
from curvlab.runs.stats import Estimate, Verdict, log_ratio_interval
from curvlab.runs.store import RunStore
from curvlab.training import Network, Recipe, Samples, TrainStage
from experiments.base.networks import correct, decode_hits, encode_hits, forecast_stage, radial_cosine, run_stage
from experiments.base.rows import counted
from experiments.base.settings import (
    above,
    cap,
    gap,
    gap_controls,
    gap_table,
    mean,
    ratio,
    results,
    seconds,
    values,
)
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
    other = gap(rows, ONE, {"batch_size": 64})
    assert other is None


def test_holm_counts_a_comparison_once_however_often_it_is_shown() -> None:
    rows = pair((85.0, 86.0), (84.0, 83.0))
    for seed, accuracy in enumerate((84.9, 85.8)):
        rows += network_rows({"batch_size": 128}, seed, accuracy)
    one, back, other = gap(rows, ONE, OTHER), gap(rows, OTHER, ONE), gap(rows, ONE, {"batch_size": 128})
    assert one is not None and back is not None and other is not None
    found = {
        ("as-written", "512"): one,
        ("equal-ratio", "512"): one,
        ("back", "32"): back,
        ("as-written", "128"): other,
    }
    table = gap_table(found, ["arm", "minus"], "Differences")
    smallest = min(one.paired.p_value, other.paired.p_value)
    assert min(line[-1] for line in table.rows) == pytest.approx(min(1.0, 2 * smallest))  # two, not four
    assert len({line[-1] for line in table.rows[:3]}) == 1
    assert "2 different comparisons (2 of the rows repeat one" in table.caption


def test_a_ratio_is_taken_seed_by_seed() -> None:
    """Seeds that differ tenfold but agree about the ratio: Welch's interval would hold 1."""
    rows = []
    for seed, size in enumerate((1.0, 10.0, 100.0)):
        rows += network_rows(ONE, seed, 85.0, norm=2.0 * size * (1 + 0.01 * seed))
        rows += network_rows(OTHER, seed, 84.0, norm=size)
    found = ratio(rows, "norm", ONE, OTHER)
    assert found is not None and found.n == 3 and "paired" in found.method
    assert 1.9 < found.low < found.value < found.high < 2.2
    welch = log_ratio_interval(values(rows, "norm", ONE), values(rows, "norm", OTHER))
    assert welch.low < 1 < welch.high
    lonely = [row for row in rows if row["batch_size"] == 32 or row["seed"] == 0]
    one = ratio(lonely, "norm", ONE, OTHER)
    assert one is not None and one.value == pytest.approx(2.0) and not one.has_interval
    assert ratio([row for row in rows if (row["batch_size"], row["seed"]) in {(32, 0), (512, 1)}],
                 "norm", ONE, OTHER) is None  # fmt: skip


def test_a_share_reaches_no_further_than_one() -> None:
    rows = []
    for seed, share in enumerate((1.0, 0.999, 0.98)):
        rows += network_rows(ONE, seed, 85.0, train_accuracy=share)
    found = mean(rows, "train_accuracy", ONE, factor=100)
    assert found is not None and found.high == 100.0 and found.low < 99 and found.value == pytest.approx(99.3)
    assert mean(rows, "norm", ONE).high == 20.0


def test_gap_controls_judge_by_the_interaction_of_the_same_seeds() -> None:
    """Control gaps that are half of those written in every seed, although seeds differ widely."""
    settings = {name: {"arm": name} for name in ("small", "large", "small'", "large'", "none")}
    rows = []
    for seed, (written, kept) in enumerate(((4.0, 3.0), (1.0, 0.8), (2.5, 2.0))):
        for name, accuracy in {"small": 80 + written, "large": 80, "small'": 82 + kept, "large'": 82.0}.items():
            rows += network_rows(settings[name], seed, accuracy)
    small, large, small2, large2, none = settings.values()
    arms = {"equal updates": (small2, large2), "never run": None, "no rows": (none, large)}
    controls = gap_controls(rows, (small, large), arms)
    assert [control.found is None for control in controls] == [False, False, True, True, True, True]
    there, kept = controls[:2]
    assert there.found.value == pytest.approx(5.8 / 3, abs=1e-6)
    assert kept.found.value == pytest.approx(5.8 / 3 - 7.5 / 6, abs=1e-6)
    assert "0.5 × as written" in kept.name and there.found.n == kept.found.n == 3
    # The seeds' common part falls out: the written gap alone is anywhere between 0 and 6.
    assert kept.found.high - kept.found.low < 0.5 * (gap(rows, small, large).estimate.high - there.found.low)
    one = [row for row in rows if row["seed"] == 0]
    assert not gap_controls(one, (small, large), {"x": (small2, large2)})[1].is_known


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


def test_captions_count_the_seeds() -> None:
    assert counted([[1.0, 2.0], [3.0, 4.0]]) == "n = 2"
    assert counted([[1.0, 2.0, 3.0], [], [4.0]]) == "n = 1 to 3" and counted([]) == "n = 0"
