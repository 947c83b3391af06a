# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the batch size study on synthetic rows whose laws are known: right both ways; its arms and units."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from curvlab.runs.stats import Survives, Verdict
from experiments import batch_size as study
from experiments.base import paper
from experiments.base.batch_report import side_by_side
from experiments.base.image_networks import Cell
from experiments.base.study import configure, load_study
from tests.experiments.gaps import network_rows

CPU = study.PRESETS["cpu"]
FULL = study.Config(seeds=3)
Law = Callable[[Cell], float]


def fall(cell: Cell) -> float:
    """As the paper's rows: points a doubling of the batch, at equal epochs."""
    return 85.5 - 0.35 * math.log2(cell.batch_size / 32)


def by_updates(epochs: int) -> Law:
    """Accuracy that only the number of passes over the data at a given batch decides, that is the updates."""
    return lambda cell: 85.5 - 0.35 * math.log2(cell.batch_size / 32 * epochs / cell.epochs)


def synthetic(config: study.Config, law: Law, *, seeds: int = 3, noise: float = 0.05) -> list[dict]:
    rows = []
    for cell in dict.fromkeys(cell for arm in study.cells(config).values() for cell in arm.values()):
        for seed in range(seeds):
            wiggle = noise * ((seed * 7 + cell.batch_size) % 3 - 1)
            updates = cell.epochs * config.steps_per_epoch(cell.batch_size)
            loss = 1e-3 * cell.batch_size * cell.epochs / config.epochs * math.exp(wiggle)
            more = {"fit_loss": loss, "conv_norm": 10 * (updates / 1000) ** 0.1 * math.exp(wiggle / 9)}
            rows += network_rows(cell.where, seed, law(cell) + wiggle, updates=float(updates), **more)
    return rows


def verdicts(rows: list[dict], config: study.Config) -> dict[str, tuple[Verdict, Survives]]:
    return {claim.id: (claim.verdict, claim.survives) for claim in study.claims(rows, config)}


def test_the_papers_fall_is_reproduced_and_survives_when_only_the_batch_matters() -> None:
    found = verdicts(synthetic(FULL, fall), FULL)
    assert found["ends"] == found["gap"] == found["trend"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["equal_ratio"][0] is found["equal_updates"][0] is Verdict.REPRODUCED
    assert found["fit"][0] is Verdict.REPRODUCED
    assert found["loss"][0] is found["norms"][0] is Verdict.REPRODUCED


def test_a_gap_that_only_the_updates_made_does_not_survive() -> None:
    found = verdicts(synthetic(FULL, by_updates(FULL.epochs)), FULL)
    assert found["ends"] == found["gap"] == (Verdict.REPRODUCED, Survives.NO)
    assert found["trend"] == (Verdict.REPRODUCED, Survives.NO)
    assert found["equal_ratio"][0] is Verdict.REPRODUCED and found["equal_updates"][0] is not Verdict.REPRODUCED


def test_a_rise_is_not_reproduced() -> None:
    found = verdicts(synthetic(FULL, lambda cell: 80 + 0.3 * math.log2(cell.batch_size)), FULL)
    assert {found[name][0] for name in ("ends", "gap", "trend", "equal_ratio")} == {Verdict.NOT_REPRODUCED}
    assert {found[name][1] for name in ("ends", "gap", "trend")} == {Survives.NOT_TESTED}  # nothing that could survive


def test_a_control_that_was_not_run_leaves_survival_open() -> None:
    config = study.Config(seeds=3, arms=("as-written", "equal-ratio"))
    found = verdicts(synthetic(config, fall), config)
    assert {found[name] for name in ("ends", "gap", "trend")} == {(Verdict.REPRODUCED, Survives.NOT_TESTED)}


def test_a_scaled_protocol_shows_directions_at_best() -> None:
    found = verdicts(synthetic(CPU, fall), CPU)
    assert found["ends"][0] is found["fit"][0] is Verdict.NOT_TESTABLE
    assert found["gap"] == found["trend"] == (Verdict.DIRECTION_ONLY, Survives.YES)
    del found["ends"], found["fit"]
    assert {verdict for verdict, _ in found.values()} == {Verdict.DIRECTION_ONLY}  # audits and controls no more
    about = {claim.id: claim.note for claim in study.claims(synthetic(CPU, fall), CPU)}
    assert all("scaled protocol" in about[name] for name in found)
    claim = next(claim for claim in study.claims(synthetic(CPU, fall), CPU) if claim.id == "gap")
    assert claim.paper == pytest.approx(1.24, abs=0.01) and "scaled protocol" in claim.note and "paired t" in claim.note
    trend = next(claim for claim in study.claims(synthetic(CPU, fall), CPU) if claim.id == "trend")
    assert "on average per doubling" in trend.text  # a slope does not say that every step falls
    smoke = study.PRESETS["smoke"]
    assert {verdict for verdict, _ in verdicts(synthetic(smoke, fall), smoke).values()} == {Verdict.NOT_TESTABLE}
    assert {verdict for verdict, _ in verdicts([], CPU).values()} == {Verdict.NOT_TESTABLE}


def test_what_has_not_fitted_is_told() -> None:
    """Unfitted large batches as written; at equal updates unfitted small ones: a confound turned round, not removed."""
    rows = synthetic(CPU, fall)
    for row in rows:
        if row["metric"] == "train_accuracy" and row["epochs"] == 20 and row["batch_size"] == 512:
            row["value"] = 0.861
    (told,) = [note for note in study.notes(rows, CPU) if "slowest" in note]
    assert "86.1 %" in told and "neither" not in told and "not (training accuracy: 100.0 % (batch 32), 100.0 %" in told
    for row in rows:
        if row["metric"] == "train_accuracy" and row["epochs"] == 5:
            row["value"] = 0.622
    (told,) = [note for note in study.notes(rows, CPU) if "slowest" in note]
    words = "training accuracy: 62.2 % (batch 32), 100.0 % (batch 512)"
    assert f"turn round ({words}); neither arm compares fitted networks" in told
    found = {claim.id: claim.note for claim in study.claims(rows, CPU)}
    assert words in found["equal_updates"] and "86.1 % (batch 512)" in found["equal_ratio"]


def test_one_seed_is_a_direction() -> None:
    rows = synthetic(FULL, fall, seeds=1)
    found = verdicts(rows, FULL)
    assert found["ends"] == (Verdict.DIRECTION_ONLY, Survives.NOT_TESTED)
    assert found["trend"][0] is Verdict.DIRECTION_ONLY


def test_arms_hold_what_they_say_and_share_cells() -> None:
    arms = study.cells(study.Config())
    assert {b: c.lr for b, c in arms["as-written"].items()} == paper.BATCH_LR
    assert {round(c.lr / b / (0.01 / 128), 9) for b, c in arms["equal-ratio"].items()} == {1.0}
    for batch, cell in arms["equal-updates"].items():
        steps = math.ceil(50_000 / batch)
        assert cell.lr == paper.BATCH_LR[batch] and abs(cell.epochs * steps - 31_280) <= steps / 2
    assert all(arms["as-written"][b] == arms["equal-ratio"][b] for b in (128, 256, 512, 1024))
    units = study.expand(CPU)
    # 3 as written, batch 32 at half the rate, two more numbers of epochs: 6 cells of 3 seeds
    assert len(units) == 18 and len({unit.stage for unit in units}) == 18
    assert {(u.batch_size, u.lr, u.epochs) for u in units} >= {(32, 0.0025, 20), (32, 0.005, 5), (512, 0.04, 80)}
    assert units[0].stage.network.batch_norm and units[0].stage.samples.num_train == 5000


def test_presets_are_the_papers_and_its_scaled_copy() -> None:
    full = study.PRESETS["paper"]
    assert full == study.Config() and full.batches == (32, 64, 128, 256, 512, 1024, 2048) and full.epochs == 80
    assert full.trains_as_written and not CPU.trains_as_written and CPU.has_papers_rates
    other = study.Config(lrs=tuple(2 * lr for lr in full.lrs))
    assert not other.has_papers_rates and not other.trains_as_written
    assert (CPU.channels, CPU.num_train, CPU.seeds, CPU.batches) == (8, 5000, 3, (32, 128, 512))
    assert study.cost(study.expand(full)[0]) > 20 * study.cost(study.expand(CPU)[0])


def test_tables_figures_and_laws() -> None:
    rows = synthetic(CPU, fall)
    table, gaps = study.tables(rows, CPU)
    assert len(table.rows) == 9 and len(gaps.rows) == 9
    pairs = [("32", "128"), ("512", "128"), ("32", "512")]  # the last is the one that the claims are about
    assert [(line[1], line[2]) for line in gaps.rows] == 3 * pairs
    # 512 against 128 at the reference's own rate is as written: one test under two keys, eight in all
    assert gaps.rows[1][3:] == gaps.rows[4][3:] and "8 different comparisons" in gaps.caption
    assert table.rows[0][table.columns.index("paper %")] == 85.52
    assert [line[table.columns.index("updates")] for line in table.rows[-3:]] == [785, 800, 800]
    figures = study.figures(rows, CPU)
    assert [figure.name for figure in figures] == ["accuracy", "confounds"] and "equal-updates" in figures[0].svg()
    assert "paper" in study.figures(synthetic(FULL, fall), FULL)[0].svg()
    assert [law.holds for law in study.laws(rows, CPU)] == [True]
    for row in rows:
        if row["metric"] == "updates" and row["epochs"] == 80:
            row["value"] = 812.0
    assert [law.holds for law in study.laws(rows, CPU)] == [False]
    smoke = study.PRESETS["smoke"]
    good = synthetic(smoke, fall)
    assert [law.holds for law in study.laws(good, smoke)] == [True, True, False]  # the losses here rise with epochs
    assert all(note for note in study.notes(rows, CPU))


def test_points_move_only_where_they_would_hide_each_other() -> None:
    apart = [100.0, 1000.0, 200.0]
    assert side_by_side(apart) == apart
    shown = side_by_side([800.0, 200.0, 785.0, 3140.0, 800.0])
    assert shown[1] == 200.0 and shown[3] == 3140.0  # alone: where they belong
    near = [shown[2], shown[0], shown[4]]  # the order of the values, then that given
    step = (3140 / 200) ** 0.05
    assert near[1] / near[0] == pytest.approx(step) and near[2] / near[1] == pytest.approx(step)
    assert near[1] == pytest.approx((800 * 785 * 800) ** (1 / 3))  # around their middle
    assert side_by_side([64.0, 64.0]) == pytest.approx([64.0, 64.0])  # one value: no length to stand apart on


def test_overrides_parse_and_nonsense_is_refused() -> None:
    config = configure(load_study("batch_size"), "cpu", ["seeds=1", "batches=32,128", "lrs=0.01,0.02"])
    assert (config.seeds, config.batches, config.lrs) == (1, (32, 128), (0.01, 0.02))
    wrong: list[dict] = [
        {"batches": (32,), "lrs": (0.1,)}, {"batches": (128, 32)}, {"reference": 100}, {"seeds": 0}, {"arms": ()},
        {"arms": ("equal-ratio",)}, {"epochs": 0}, {"batches": (128, 128), "lrs": (0.1, 0.1)},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match=r"Config|Recipe"):
            study.Config(**change)
