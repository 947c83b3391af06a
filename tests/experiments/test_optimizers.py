# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the optimizer study on synthetic rows whose laws are known: right both ways; its arms and units."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvlab.runs.stats import Survives, Verdict
from curvlab.runs.store import RunStore
from experiments import batch_size
from experiments import optimizers as study
from experiments.base import tuning
from experiments.base.study import configure, load_study
from tests.experiments.gaps import network_rows

CPU = study.PRESETS["cpu"]
FULL = study.Config(seeds=3)
PAPERS = {
    "sgd-32": 85.5, "sgd-128": 84.7, "plain-sgd": 84.7, "adam": 85.5, "sam": 85.6, "full-batch": 32.7,
    "full-batch-tuned": 62.0, "sgd-few": 61.8,
}  # fmt: skip


def synthetic(changes: dict[str, float] | None = None, *, seeds: int = 3, noise: float = 0.05) -> list[dict]:
    rows = []
    for arm, accuracy in (PAPERS | (changes or {})).items():
        for seed in range(seeds):
            wiggle = noise * ((seed * 5 + len(arm)) % 3 - 1)
            more = {"train_accuracy": 0.367 + wiggle / 100} if arm == "full-batch" else {}
            rows += network_rows({"arm": arm}, seed, accuracy + wiggle, **more)
    return rows + tuned()


def tuned(best: dict[str, float] | None = None) -> list[dict]:
    """Rows of the tuning networks: training losses that are lowest at the given rates (as taken: 0.1)."""
    best = dict.fromkeys(study.PAIR, 0.1) | (best or {})
    losses = {(arm, lr): 0.5 + abs(math.log(lr / best[arm])) for arm in study.PAIR for lr in FULL.tuning}
    return [
        row
        for (arm, lr), loss in losses.items()
        for row in network_rows({"arm": f"tune-{arm}", "recipe.lr": lr}, tuning.SEED, 40.0, fit_loss=loss)
    ]


def verdicts(rows: list[dict], config: study.Config = FULL) -> dict[str, tuple[Verdict, Survives]]:
    return {claim.id: (claim.verdict, claim.survives) for claim in study.claims(rows, config)}


def test_the_papers_numbers_reproduce_and_the_tuned_pair_overturns_the_reading() -> None:
    found = verdicts(synthetic())
    assert found["adam"][0] is found["adam_batch"][0] is found["undertrained"][0] is Verdict.REPRODUCED
    assert found["full_batch"] == (Verdict.REPRODUCED, Survives.NO)
    assert {found[name][0] for name in ("full_batch_tuned", "momentum", "sam")} == {Verdict.REPRODUCED}


def test_noise_that_is_needed_survives() -> None:
    found = verdicts(synthetic({"full-batch-tuned": 20.0}))
    assert found["full_batch"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["full_batch_tuned"][0] is Verdict.NOT_REPRODUCED
    between = verdicts(synthetic({"full-batch-tuned": 61.8 - 26.0}))  # half the gap as written
    assert between["full_batch"][1] is Survives.UNDECIDED
    turned = verdicts(synthetic({"full-batch": 86.0}))  # no gap as written: nothing that could survive
    assert turned["full_batch"] == (Verdict.NOT_REPRODUCED, Survives.NOT_TESTED)


def test_full_batch_descent_that_is_better_is_no_worse() -> None:
    assert verdicts(synthetic({"full-batch-tuned": 66.0}))["full_batch_tuned"][0] is Verdict.REPRODUCED


def test_equivalence_is_claimed_by_test_only() -> None:
    assert verdicts(synthetic({"adam": 83.0}))["adam"][0] is Verdict.NOT_REPRODUCED
    assert verdicts(synthetic({"adam": 87.0}))["adam"][0] is Verdict.NOT_REPRODUCED
    assert verdicts(synthetic({"adam": 86.2}, noise=0.9))["adam"][0] is Verdict.DIRECTION_ONLY
    found = verdicts(synthetic({"adam": 84.0, "sam": 84.0, "plain-sgd": 80.0}))
    assert {found[name][0] for name in ("adam_batch", "sam", "momentum")} == {Verdict.NOT_REPRODUCED}


def test_scaled_protocols_and_other_data() -> None:
    found = verdicts(synthetic(), CPU)
    assert {verdict for verdict, _ in found.values()} == {Verdict.DIRECTION_ONLY}  # the controls no more than the rest
    assert all("scaled protocol" in claim.note for claim in study.claims(synthetic(), CPU))
    assert found["full_batch"][1] is Survives.NO
    smoke = study.PRESETS["smoke"]
    assert {verdict for verdict, _ in verdicts(synthetic(), smoke).values()} == {Verdict.NOT_TESTABLE}
    assert {verdict for verdict, _ in verdicts([]).values()} == {Verdict.NOT_TESTABLE}
    single = verdicts(synthetic(seeds=1))
    assert Verdict.REPRODUCED not in {single[name][0] for name in ("adam", "adam_batch", "full_batch", "momentum")}


def test_unlike_fits_are_told() -> None:
    """Adam's training accuracy beside that of SGD, and the training losses of the tuned pair."""
    rows = synthetic()
    for row in rows:
        if row["arm"] == "adam" and row["metric"] == "train_accuracy":
            row["value"] = 0.897
        if row["arm"] == "sgd-few" and row["metric"] == "fit_loss":
            row["value"] = 0.29
    found = {claim.id: claim for claim in study.claims(rows, CPU)}
    assert "training accuracy: 89.7 % (adam), 100.0 % (sgd-32)" in found["adam"].note
    assert "training accuracy: 89.7 % (adam), 100.0 % (sgd-128)" in found["adam_batch"].note
    assert all("training accuracy: 100.0 % (" in found[name].note for name in ("momentum", "sam", "full_batch"))
    text = next(claim.text for claim in study.claims(rows, CPU) if claim.id == "full_batch_tuned")
    assert "both tuned (training loss 0.001 against 0.29)" in text


def test_both_arms_of_the_pair_take_the_best_of_one_grid() -> None:
    """A comparison in which one side alone is tuned is decided by that."""
    assert [law.holds for law in study.laws(synthetic(), CPU)] == [True, True, True]
    for arm, place in zip(study.PAIR, (1, 2), strict=True):
        rows = [row for row in synthetic() if "tune-" not in row["arm"]] + tuned({arm: 0.03})
        assert [law.holds for law in study.laws(rows, CPU)] == [index != place for index in range(3)]
    units = [unit for unit in study.expand(CPU) if unit.arm.startswith("tune-")]
    budgets = {unit.recipe.epochs * unit.recipe.steps_per_epoch(unit.num_train) for unit in units}
    assert budgets == {tuning.UPDATES} and {unit.num_train for unit in units} == {CPU.few_images}
    assert {unit.recipe.lr for unit in units} == set(CPU.tuning) and len(units) == 8
    assert {unit.seed for unit in units} == {tuning.SEED} and tuning.SEED not in range(FULL.seeds)
    assert {unit.channels for unit in study.expand(FULL) if unit.arm.startswith("tune-")} == {8}
    assert any("smaller network" in note for note in study.notes([], FULL))
    assert not any("smaller network" in note for note in study.notes([], CPU))
    for change in ({"tuning": ()}, {"arms": ("adam", "sgd-few")}):
        config = study.Config(**change)  # type: ignore[arg-type]
        assert study.grid(config) is None and not any(u.arm.startswith("tune-") for u in study.expand(config))
    dead = [row for row in synthetic() if row["arm"] != "tune-sgd-few"]
    assert [law.holds for law in study.laws(dead, CPU)] == [True, True, False]  # nothing chose its rate
    table = study.tables(synthetic(), CPU)[-1]
    assert (
        table.title == "Tuning" and table.rows[1][-2] == pytest.approx(0.5 + math.log(3)) and table.rows[1][-1] == 0.1
    )


def test_arms_are_what_they_say() -> None:
    full = study.Config()
    recipes = {arm: study.recipe_of(full, arm) for arm in study.ARMS}
    assert recipes["full-batch"][0].batch_size == recipes["full-batch"][1] == 5000
    for config, steps in ((full, 80), (CPU, 80), (study.PRESETS["smoke"], 8)):  # the paper's steps at cpu too
        recipe, images = study.recipe_of(config, "full-batch")
        assert recipe.epochs * recipe.steps_per_epoch(images) == steps
    assert not study.is_as_written(study.Config(full_batch_steps=20))
    assert recipes["plain-sgd"][0].lr == 0.1 and recipes["plain-sgd"][0].momentum == 0
    assert (recipes["adam"][0].optimizer, recipes["sam"][0].optimizer) == ("adam", "sam")
    for config in (full, CPU, study.PRESETS["smoke"]):
        tuned, few = study.recipe_of(config, "full-batch-tuned"), study.recipe_of(config, "sgd-few")
        assert tuned[0].steps_per_epoch(tuned[1]) == 1 and tuned[1] == few[1]
        assert tuned[0].epochs == few[0].epochs * few[0].steps_per_epoch(few[1])
    assert study.is_as_written(full) and not study.is_as_written(CPU) and study.has_papers_rates(CPU)


def test_the_stages_are_those_of_the_batch_size_study() -> None:
    mine = {unit.stage for unit in study.expand(CPU) if unit.arm in ("sgd-32", "sgd-128")}
    assert len(mine) == 6 and mine <= {unit.stage for unit in batch_size.expand(batch_size.PRESETS["cpu"])}
    sam = study.Unit("sam", *study.recipe_of(CPU, "sam"), 0)
    assert study.cost(sam) > 1.5 * study.cost(study.Unit("adam", *study.recipe_of(CPU, "adam"), 0))


def test_two_studies_share_their_networks(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Through the command line: the second study finds what the first one trained, and both end with a report."""
    tiny = ("--preset", "smoke", "--threads", "1", "--out", str(tmp_path), "num_train=64", "epochs=1", "seeds=1",
            "channels=2")  # fmt: skip
    first = cli("run", "batch_size", *tiny, "batches=16,64", "lrs=0.01,0.02", "arms=as-written")
    assert first.returncode == 0, first.stdout + first.stderr
    trained = sorted(path.name for path in (tmp_path / "stages").iterdir())
    assert len(trained) == 2
    arms = "arms=sgd-32,sgd-128,full-batch"
    second = cli("run", "optimizers", *tiny, "full_batch_images=64", "full_batch_steps=1", "few_images=32", arms)
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(list((tmp_path / "stages").iterdir())) == 3
    summaries = [run.summary for run in RunStore(tmp_path).runs("optimizers")]
    assert sorted(s["stage"] for s in summaries if s["loaded"]) == trained
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Does the batch size decide" in page and "Which optimizers generalize" in page


def test_tables_figures_and_laws() -> None:
    rows = synthetic()
    table, gaps, _ = study.tables(rows, CPU)
    assert len(table.rows) == 8 and len(gaps.rows) == 6
    assert [line[table.columns.index("paper %")] for line in table.rows[:4]] == [85.52, 84.72, None, 85.47]
    (figure,) = study.figures(rows, FULL)
    assert "full-batch-tuned" in figure.svg() and "paper" in figure.svg()
    assert study.laws(rows, CPU)[0].holds
    for row in rows:
        if row["metric"] == "updates" and row["arm"] == "sgd-few":
            row["value"] = 101.0
    assert not study.laws(rows, CPU)[0].holds
    assert all(note for note in study.notes(rows, CPU))


def test_overrides_parse_and_nonsense_is_refused() -> None:
    config = configure(load_study("optimizers"), "cpu", ["seeds=1", "arms=adam,sam", "rho=0.1"])
    assert (config.seeds, config.arms, config.rho) == (1, ("adam", "sam"), 0.1)
    for change in (
        {"seeds": 0},
        {"few_images": 60_000},
        {"arms": ("lbfgs",)},
        {"arms": ()},
        {"rho": 0.0},
        {"full_batch_steps": 0},
        {"tuning": (0.1, 0.1)},
        {"tuning": (0.0,)},
    ):
        with pytest.raises(ValueError, match=r"Config|Recipe"):
            study.Config(**change)  # type: ignore[arg-type]
