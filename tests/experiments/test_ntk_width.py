# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the NTK width study on synthetic rows whose laws are known: right both ways."""

from __future__ import annotations

import math

import pytest
import torch

from curvlab.data import Dataset, load
from curvlab.runs.stats import Survives, Verdict
from experiments import ntk_width
from experiments.base import paper
from experiments.base.study import Tools, configure, load_study

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PUBLISHED = {width: sum(pair) / 2 for width, pair in paper.NTK_MOVEMENT.items()}
LAZY = {"kernel_drift": lambda w: 2.0 * (w / 32) ** -0.5, "linearization_error": lambda w: 0.9 * (w / 32) ** -0.4}
RICH = {"kernel_drift": lambda w: 300.0, "linearization_error": lambda w: 0.95}
LEVEL = {"kernel_drift": lambda w: 300 * (w / 32) ** -0.3, "linearization_error": lambda w: 0.97 * (w / 32) ** -0.02}


def synthetic(standard: dict, other: dict = LAZY, *, movement=PUBLISHED.get, accuracy=None) -> list[dict]:
    """Rows of all arms at all widths; each quantity a law of the width, with seeds ±0.5 % apart."""
    accuracy = accuracy or (lambda w: 0.916 + 0.023 * math.log2(w / 32) / 7)
    rows = []
    for arm in ntk_width.ARMS:
        for width in WIDTHS:
            for seed in range(3 if width < 2048 else 1):
                wiggle = 1 + 0.005 * (seed - 1) * (1 if width % 3 else -1)
                moved = movement(width) * wiggle
                values = {
                    "relative_movement": moved,
                    "initial_norm": math.sqrt(width + 4) * wiggle,
                    "absolute_movement": moved * math.sqrt(width + 4),
                    "test_accuracy": accuracy(width) * (1 + 0.0005 * (seed - 1)),
                    "diverged": 0.0,
                    "train_seconds": 1.0,
                    "measure_seconds": 0.5,
                    "kernel_growth": 500.0,
                    "kernel_alignment": 0.5,
                }
                values |= {
                    name: law(width) * wiggle for name, law in (standard if arm == "standard" else other).items()
                }
                factors = {"run": f"{arm}{width}", "width": width, "parametrization": arm, "seed": seed}
                rows += [{**factors, "epoch": 30, "metric": name, "value": value} for name, value in values.items()]
    return rows


def verdicts(rows: list[dict], config: ntk_width.Config | None = None) -> dict[str, tuple[Verdict, Survives]]:
    claims = ntk_width.claims(rows, config or ntk_width.PRESETS["cpu"])
    return {claim.id: (claim.verdict, claim.survives) for claim in claims}


def test_the_papers_numbers_reproduce_and_the_audit_overturns_the_reading() -> None:
    found = verdicts(synthetic(RICH))
    assert found["ratio"] == (Verdict.REPRODUCED, Survives.NO)
    assert found["slope"] == (Verdict.REPRODUCED, Survives.NO)
    assert found["means"][0] is Verdict.REPRODUCED
    assert found["accuracy"][0] is Verdict.REPRODUCED
    assert found["lazier"] == (Verdict.DIRECTION_ONLY, Survives.UNDECIDED)  # neither measure falls nor rises
    assert found["regime"] == (Verdict.NOT_REPRODUCED, Survives.NOT_TESTED)  # there is nothing to survive
    assert found["absolute"][0] is Verdict.REPRODUCED
    assert found["initial_norm"][0] is Verdict.REPRODUCED
    assert found["lazier_ntk"] == (Verdict.REPRODUCED, Survives.YES)


def test_a_lazy_network_is_called_lazy() -> None:
    found = verdicts(synthetic(LAZY, RICH))
    assert found["lazier"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["regime"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["lazier_ntk_he"][1] is Survives.UNDECIDED


def test_a_kernel_that_moves_less_while_the_function_leaves_it_does_not_survive() -> None:
    rising = LAZY | {"linearization_error": lambda w: 0.1 * (w / 32) ** 0.3}
    assert verdicts(synthetic(rising))["lazier"] == (Verdict.REPRODUCED, Survives.NO)


def test_lazier_is_not_yet_lazy() -> None:
    found = verdicts(synthetic(LEVEL))
    assert found["lazier"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["regime"] == (Verdict.DIRECTION_ONLY, Survives.NO)


def test_a_movement_that_truly_falls_survives_its_control() -> None:
    found = verdicts(synthetic(RICH, movement=lambda w: 0.9356 * (w / 32) ** -1.0))
    assert found["ratio"] == (Verdict.DIRECTION_ONLY, Survives.YES)  # 128 is not 11.3 ± 1
    assert found["slope"] == (Verdict.DIRECTION_ONLY, Survives.YES)  # −1.0 is not −0.50 ± 0.03
    assert found["means"][0] is Verdict.NOT_REPRODUCED
    assert found["absolute"][0] is Verdict.NOT_REPRODUCED


def test_the_published_movement_gives_the_published_ratio() -> None:
    assert verdicts(synthetic(RICH))["ratio"][0] is Verdict.REPRODUCED


def test_two_widths_are_no_trend() -> None:
    rows = [row for row in synthetic(RICH) if row["width"] in (32, 4096)]
    claim = next(claim for claim in ntk_width.claims(rows, ntk_width.PRESETS["cpu"]) if claim.id == "accuracy")
    assert claim.verdict is Verdict.DIRECTION_ONLY and "three widths" in claim.note


def test_test_images_widen_the_interval_of_the_accuracy_gain() -> None:
    claim = next(c for c in ntk_width.claims(synthetic(RICH), ntk_width.PRESETS["cpu"]) if c.id == "accuracy")
    assert claim.measured is not None and "test images" in claim.measured.method
    # binomial: sqrt((91.6 * 8.4 + 93.9 * 6.1) / 10,000) = 0.37 points, times 1.96
    assert (claim.measured.high - claim.measured.low) / 2 >= 0.71


def test_wrong_directions_are_not_reproduced() -> None:
    found = verdicts(synthetic(RICH, movement=lambda w: 0.1 * (w / 32) ** 0.2, accuracy=lambda w: 0.93 - 1e-6 * w))
    assert {found[name][0] for name in ("ratio", "slope", "means", "accuracy")} == {Verdict.NOT_REPRODUCED}


def test_one_width_six_percent_off_fails_the_means() -> None:
    off = synthetic(RICH, movement=lambda w: PUBLISHED[w] * (1.06 if w == 512 else 1.0))
    claim = next(claim for claim in ntk_width.claims(off, ntk_width.PRESETS["cpu"]) if claim.id == "means")
    assert claim.verdict is Verdict.NOT_REPRODUCED and "512" in claim.note
    assert claim.measured is not None and claim.measured.value == pytest.approx(6.0, abs=0.5)
    assert not all(law.holds for law in ntk_width.laws(off, ntk_width.PRESETS["cpu"]))
    assert all(law.holds for law in ntk_width.laws(synthetic(RICH), ntk_width.PRESETS["cpu"]))


def test_the_single_seed_has_an_interval_and_its_n_is_shown() -> None:
    claim = ntk_width.claims(synthetic(RICH), ntk_width.PRESETS["cpu"])[0]
    assert claim.measured is not None and claim.measured.n_text == "3+1" and claim.measured.has_interval
    assert claim.measured.contains(11.26)
    assert claim.cost_seconds == pytest.approx(1.5 * (6 * 3 + 2))


def test_another_protocol_or_missing_widths_cannot_be_tested() -> None:
    rows = synthetic(RICH)
    changed = configure(load_study("ntk_width"), "cpu", ["lr=0.02"])
    assert {verdict for verdict, _ in verdicts(rows, changed).values()} == {Verdict.NOT_TESTABLE}
    assert {verdict for verdict, _ in verdicts(rows, ntk_width.PRESETS["smoke"]).values()} == {Verdict.NOT_TESTABLE}
    narrow = verdicts([row for row in rows if row["width"] < 4096])
    assert narrow["ratio"][0] is narrow["accuracy"][0] is Verdict.NOT_TESTABLE
    assert narrow["slope"][0] is Verdict.REPRODUCED
    assert {verdict for verdict, _ in verdicts([]).values()} == {Verdict.NOT_TESTABLE}


def test_one_seed_everywhere_never_says_reproduced_of_an_effect() -> None:
    rows = [row for row in synthetic(RICH) if row["seed"] == 0]
    assert verdicts(rows)["ratio"][0] is Verdict.DIRECTION_ONLY


def test_a_diverged_seed_is_counted_and_not_averaged() -> None:
    rows = synthetic(RICH)
    for row in rows:
        if (row["width"], row["seed"], row["parametrization"]) == (64, 0, "standard"):
            row["value"] = 1.0 if row["metric"] == "diverged" else math.nan
    table = ntk_width.tables(rows, ntk_width.PRESETS["cpu"])[0]
    line = next(line for line in table.rows if line[:2] == ["standard", 64])
    assert line[table.columns.index("Δ")].n == 2
    lazy = ntk_width.tables(rows, ntk_width.PRESETS["cpu"])[1]
    assert [line[lazy.columns.index("diverged")] for line in lazy.rows[:3]] == [0, 1, 0]
    assert ntk_width.figures(rows, ntk_width.PRESETS["cpu"])[0].svg()


def test_tables_and_figures_hold_the_papers_values() -> None:
    rows, config = synthetic(RICH), ntk_width.PRESETS["cpu"]
    table, lazy, slopes = ntk_width.tables(rows, config)
    assert len(table.rows) == len(lazy.rows) == 24 and len(slopes.rows) == 5
    assert [line[table.columns.index("paper's Δ")] for line in table.rows[:8]] == pytest.approx(
        list(PUBLISHED.values())
    )
    assert abs(table.rows[0][table.columns.index("deviation %")].value) < 0.1
    assert [figure.name for figure in ntk_width.figures(rows, config)] == ["laziness", "accuracy"]
    assert "ntk-he: slope −0.50" in ntk_width.figures(rows, config)[0].svg()


def test_presets_are_the_issues() -> None:
    smoke, cpu, full = (ntk_width.PRESETS[name] for name in ("smoke", "cpu", "paper"))
    assert cpu == ntk_width.Config(seeds=3, one_seed_from=2048) and full == ntk_width.Config(seeds=5)
    assert full.widths == WIDTHS and smoke.dataset == "digits"
    units = ntk_width.expand(cpu)
    assert [(u.width, u.seeds, u.lr) for u in units[5:8]] == [
        (1024, (0, 1, 2), 0.01),
        (2048, (0,), 0.01),
        (4096, (0,), 0.01),
    ]
    assert len(units) == 24 and len(ntk_width.expand(full)[7].seeds) == 5
    assert ntk_width.cost(units[7]) > 20 * ntk_width.cost(units[0])


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits").subset(64)


def test_arms_start_where_they_say(digits: Dataset) -> None:
    standard, ntk, he = (
        ntk_width.initial_model(ntk_width.Unit(16, arm, (0,), dataset="digits"), 0, digits) for arm in ntk_width.ARMS
    )
    x = digits.train_x
    with torch.no_grad():
        assert torch.allclose(standard(x), ntk(x), atol=1e-6)
        weight = he.layers[1].weight * he.layers[1].affine_scale  # type: ignore[operator,union-attr]
        # U(±a) of gain √2: variance 2/fan_in, largest value a = √(6/fan_in)
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / 16), rel=0.03)


def test_movement_rows_agree_with_the_definition(digits: Dataset, tmp_path) -> None:
    from curvlab.runs.store import RunStore

    unit = ntk_width.Unit(8, "standard", (0, 1), dataset="digits", num_train=64, epochs=2, kernel_samples=4,
                          function_samples=6)  # fmt: skip
    run = RunStore(tmp_path).open("ntk_width", unit)
    kept = {}
    measure = ntk_width.final_values

    def spy(unit, seed, model, data):
        kept[seed] = [param.detach().clone() for param in model.parameters()]
        return measure(unit, seed, model, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ntk_width, "final_values", spy)
        ntk_width.run(unit, run, Tools())
    rows = {(row["seed"], row["epoch"], row["metric"]): row["value"] for row in run.rows()}
    for seed in (0, 1):
        start = [param.detach() for param in ntk_width.initial_model(unit, seed, digits).parameters()]
        moved = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(kept[seed], start, strict=True)))
        norm = math.sqrt(sum(float(b.double().square().sum()) for b in start))
        assert rows[seed, 2, "absolute_movement"] == pytest.approx(moved, rel=1e-6)
        assert rows[seed, 2, "relative_movement"] == pytest.approx(moved / norm, rel=1e-6)
        assert rows[seed, 0, "relative_movement"] == 0.0
        assert rows[seed, 2, "linearization_error"] > 0 and rows[seed, 2, "kernel_drift"] > 0


def test_overrides_parse_and_nonsense_is_refused() -> None:
    study = load_study("ntk_width")
    config = configure(study, "smoke", ["seeds=3", "widths=16,32", "arms=standard", "lr=0.02"])
    assert (config.seeds, config.widths, config.arms, config.lr) == (3, (16, 32), ("standard",), 0.02)
    for wrong in ({"seeds": 0}, {"widths": (32, 32)}, {"arms": ()}, {"widths": (0,)}, {"kernel_samples": 0}):
        with pytest.raises(ValueError, match="Config"):
            ntk_width.Config(**wrong)
