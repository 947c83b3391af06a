# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the lottery-ticket study on synthetic rows whose laws are known: right both ways; its cells and units."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from curvlab.data import load
from curvlab.runs.stats import Survives, Verdict
from curvlab.sparse import global_magnitude
from curvlab.training.recipe import Recipe
from experiments import lottery_ticket as study
from experiments.base import paper
from experiments.base.study import configure, load_study
from experiments.base.tickets import (
    Cell,
    LeNet,
    Ticket,
    decode_counts,
    dense,
    dense_step,
    early_stop,
    encode_counts,
    kept_after,
    step_seconds,
)
from experiments.base.tickets_report import LAYERS
from tests.experiments.gaps import network_rows

CPU, FULL = study.PRESETS["cpu"], study.Config(seeds=3)
Law = Callable[[Cell], float]
NUMBER = 10_000  # weights of each synthetic layer


def as_published(cell: Cell) -> float:
    """The paper's losses; re-initialized and shuffled 2.8 points below the ticket, random masks 5."""
    loss = {"ticket": 0.0, "rewind": 0.0, "reinit": 2.8, "shuffle": 2.8, "random": 5.0}[cell.control]
    top = 97.0 if cell.network == "lenet" else 84.87
    return top - 0.115 * max(0.0, 1 / cell.kept - 1) - loss * (cell.kept < 0.45)


def only_the_mask(cell: Cell) -> float:
    """Initial weights do not matter."""
    return as_published(cell) + (2.8 if cell.control == "reinit" else 0.0)


def layers_of(cell: Cell, kept: float) -> dict[str, float]:
    """Shares that add up to ``kept``: the first layer denser than the last."""
    layers = LAYERS[cell.network]
    tilt = min(kept, 1 - kept) / 2
    middle = (len(layers) - 1) / 2
    return {layer: kept + tilt * (middle - place) / middle for place, layer in enumerate(layers)}


def synthetic(config: study.Config, law: Law, *, seeds: int = 3, stop: float = 0.6) -> list[dict]:
    rows = []
    for cell in study.cells(config):
        for seed in range(seeds):
            wiggle = 0.05 * ((seed * 7 + round(100 * cell.kept)) % 3 - 1)
            total = NUMBER * len(LAYERS[cell.network])
            share = 1.0 if cell.pruning == "none" else stop if cell.control == "ticket" else 1.2
            more = {
                "kept_weights": math.floor(cell.kept * total + 0.5 + 1e-9), "weights": total, "pruned_nonzero": 0.0,
                "early_stop_step": 1000.0 * share * math.exp(wiggle),
            }  # fmt: skip
            found = network_rows(cell.where, seed, law(cell) + wiggle, **more)
            head = {key: found[0][key] for key in ("run", "seed", *cell.where)} | {"epoch": 20}
            found += [
                head | {"metric": "layer_kept", "layer": layer, "weights": NUMBER, "value": value}
                for layer, value in layers_of(cell, cell.kept).items()
            ]
            ours = 0.01 * (0.4 + cell.kept) * math.exp(wiggle)
            for engine, value in (("sparse", ours), ("masked dense", 0.011), ("dense", 0.01)):
                found.append(head | {"metric": "step_seconds", "engine": engine, "value": value})
            if cell.network == "lenet" and cell.control == "ticket" and cell.pruning != "none":
                counts = encode_counts(torch.arange(784) % 300)
                found.append(head | {"metric": "pixel_kept", "value": 0.0, "counts": counts})
            rows += found
    return rows


def verdicts(rows: list[dict], config: study.Config) -> dict[str, tuple[Verdict, Survives]]:
    return {claim.id: (claim.verdict, claim.survives) for claim in study.claims(rows, config)}


def test_the_papers_tickets_are_reproduced_and_survive_when_rounds_agree() -> None:
    found = verdicts(synthetic(FULL, as_published), FULL)
    assert {found[name][0] for name in ("kept_50", "kept_20", "kept_10")} == {Verdict.REPRODUCED}
    assert found["cnn_init"] == found["lenet_init"] == (Verdict.REPRODUCED, Survives.YES)
    names = ("cnn_shuffle", "lenet_shuffle", "cnn_random", "lenet_random", "layers", "cnn_speed", "lenet_speed")
    assert {found[name][0] for name in names} == {Verdict.REPRODUCED}
    assert found["early_stop"] == (Verdict.REPRODUCED, Survives.YES)
    same = ("cnn_rounds", "lenet_rounds", "cnn_shuffle_reinit", "lenet_shuffle_reinit", "lenet_rewind")
    assert {found[name][0] for name in same} == {Verdict.REPRODUCED}
    assert found["cnn_rewind"][0] is not Verdict.REPRODUCED  # nothing gained here
    assert found["lenet_loss"][0] is Verdict.NOT_REPRODUCED  # this law loses a point at a tenth


def test_a_gain_that_rounds_do_not_show_does_not_survive() -> None:
    def only_cut_once(cell: Cell) -> float:
        return only_the_mask(cell) if (cell.network, cell.pruning) == ("cnn", "iterative") else as_published(cell)

    assert verdicts(synthetic(FULL, only_cut_once), FULL)["cnn_init"] == (Verdict.REPRODUCED, Survives.NO)


def test_initial_weights_that_do_not_matter_are_not_reproduced() -> None:
    found = verdicts(synthetic(FULL, only_the_mask), FULL)
    assert found["cnn_init"][0] is not Verdict.REPRODUCED and found["cnn_init"][1] is not Survives.YES
    assert found["cnn_shuffle_reinit"][0] is found["lenet_shuffle_reinit"][0] is Verdict.NOT_REPRODUCED
    assert found["cnn_shuffle"][0] is Verdict.REPRODUCED


def test_no_loss_is_a_test_with_the_papers_margin() -> None:
    def lossy(cell: Cell) -> float:
        return as_published(cell) - 2.0 * (cell.kept < 1)

    found = verdicts(synthetic(FULL, lossy), FULL)
    assert {found[name][0] for name in ("kept_50", "kept_20", "kept_10")} == {Verdict.NOT_REPRODUCED}
    claims = {claim.id: claim for claim in study.claims(synthetic(FULL, as_published), FULL)}
    assert "margin 1.65" in claims["kept_10"].text and "margin 0.90" in claims["kept_20"].text
    assert claims["kept_10"].paper == -1.15 and "non-inferiority, margin 1.65" in claims["kept_10"].note
    one = verdicts(synthetic(FULL, as_published, seeds=1), FULL)
    assert one["kept_10"][0] is Verdict.DIRECTION_ONLY  # one seed is no test
    assert one["cnn_init"] == (Verdict.DIRECTION_ONLY, Survives.NOT_TESTED)


def test_stopping_later_is_not_stopping_earlier() -> None:
    assert verdicts(synthetic(FULL, as_published, stop=1.1), FULL)["early_stop"][0] is Verdict.NOT_REPRODUCED


def test_a_scaled_protocol_shows_directions_at_best() -> None:
    rows = synthetic(CPU, as_published)
    found = verdicts(rows, CPU)
    assert found.pop("kept_50")[0] is found.pop("cnn_rounds")[0] is Verdict.NOT_TESTABLE
    assert Verdict.REPRODUCED not in {verdict for verdict, _ in found.values()}
    assert found["kept_10"][0] is found["cnn_init"][0] is found["lenet_init"][0] is Verdict.DIRECTION_ONLY
    assert found["cnn_init"][1] is Survives.NOT_TESTED  # no rounds for the CNN at this preset
    assert found["lenet_init"][1] is Survives.YES
    about = {claim.id: claim.note for claim in study.claims(rows, CPU)}
    assert "scaled protocol (CNN(8), 5,000 images, 10 epochs)" in about["cnn_init"]
    smoke = study.PRESETS["smoke"]
    assert {verdict for verdict, _ in verdicts(synthetic(smoke, as_published), smoke).values()} == {
        Verdict.NOT_TESTABLE
    }
    assert {verdict for verdict, _ in verdicts([], CPU).values()} == {Verdict.NOT_TESTABLE}


def test_laws_fail_where_a_weight_is_too_many_or_moves_or_a_layer_differs() -> None:
    def broken(metric: str, **where: object) -> list[bool]:
        rows = synthetic(CPU, as_published, seeds=1)
        row = next(r for r in rows if r["metric"] == metric and all(r.get(k) == v for k, v in where.items()))
        row["value"] += 1
        return [law.holds for law in study.laws(rows, CPU)]

    assert [law.holds for law in study.laws(synthetic(CPU, as_published), CPU)] == [True, True, True]
    assert broken("kept_weights", control="random") == [False, True, True]
    assert broken("pruned_nonzero") == [True, False, True]
    assert broken("layer_kept", control="shuffle") == [True, True, False]
    assert [law.holds for law in study.laws([], CPU)] == [False, False, False]


def test_cells_and_units_are_the_protocols() -> None:
    full = study.cells(study.Config())
    as_written = {c.kept for c in full if (c.network, c.pruning, c.control) == ("cnn", "one-shot", "ticket")}
    assert as_written >= {0.7, 0.5, 0.3, 0.2, 0.1, 0.05} and {100.0, *(100 * k for k in as_written)} >= {
        *paper.TICKET_ACCURACY
    }
    units = study.expand(CPU)
    assert len(units) == len({unit.level for unit in units}) == 3 * 23 + 2 * 7
    assert {unit.seed for unit in units if unit.network == "cnn"} == {0, 1}
    by = {(u.network, u.pruning, u.control, u.kept): u for u in units if u.seed == 0}
    rounds = by["lenet", "iterative", "ticket", kept_after(3)].level
    assert rounds.densities == (0.8, 0.64, 0.512) and rounds.rewind_step == 0 and rounds.held_out == 5000
    assert rounds.recipe == Recipe(8, 60, 1.2e-3, schedule="constant", optimizer="adam")
    late = by["lenet", "one-shot", "rewind", kept_after(10)].level
    assert (late.rewind_step, late.control, late.densities) == (167, "ticket", (kept_after(10),))
    rewound = {c: rounds for c, rounds in full.items() if (c.pruning, c.control) == ("iterative", "rewind")}
    assert [rounds for c, rounds in rewound.items() if c.network == "lenet"] == [*range(1, 17)]
    cut = by["cnn", "one-shot", "reinit", 0.1].level
    assert (cut.densities, cut.control, cut.held_out) == ((0.1,), "reinit", 0) and cut.recipe.schedule == "cosine"
    assert by["cnn", "none", "ticket", 1.0].level.densities == ()
    assert study.cost(study.expand(study.Config())[-1]) > 50 * study.cost(units[-1])


def test_presets_are_the_papers_and_its_scaled_copy() -> None:
    full = study.PRESETS["paper"]
    assert full == study.Config() and full.cuts_as_written and full.is_full_lenet
    assert (
        not CPU.cuts_as_written
        and not CPU.is_full_lenet
        and study.Config(seeds=1, kept=(0.1,), control_kept=()).cuts_as_written
    )
    config = configure(load_study("lottery_ticket"), "cpu", ["seeds=2", "kept=0.2,0.1", "image_seeds=1"])
    assert (config.seeds, config.seeds_of_images, config.kept) == (2, 1, (0.2, 0.1))
    wrong: list[dict] = [
        {"compared_rounds": (17,)}, {"compared_rounds": (4, 4)}, {"kept": (1.5,)}, {"control_kept": (0.4,)},
        {"seeds": 0}, {"rewind_step": -1}, {"image_rounds": 3}, {"epochs": 0}, {"lr": 0.0}, {"held_out": 0},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match=r"Config|Recipe"):
            study.Config(**change)
    with pytest.raises(ValueError, match="Cell: kept"):
        Cell("cnn", "one-shot", "ticket", 1.0)


def test_tables_and_figures() -> None:
    rows = synthetic(CPU, as_published)
    tables = study.tables(rows, CPU)
    accuracy, gaps, *layers, times = tables
    assert len(accuracy.rows) == len(study.cells(CPU)) == len(times.rows)
    assert [line[3] for line in accuracy.rows if line[0] == "CNN" and line[1] == "one-shot, ticket"] == [84.47, 83.72]
    assert [line[3] for line in accuracy.rows if line[1] == "one-shot, re-initialized"][-1] == 80.92
    smoke = study.PRESETS["smoke"]  # handwritten digits: the paper's numbers are not about them
    assert not any(line[3] for line in study.tables(synthetic(smoke, as_published), smoke)[0].rows)
    assert ("CNN", "one-shot: ticket − re-initialized", "10") in {tuple(line[:3]) for line in gaps.rows}
    assert ("LeNet-300-100", "iterative − one-shot", "10.7") in {tuple(line[:3]) for line in gaps.rows}
    assert {len(table.rows) for table in layers} == {3, 8} and layers[
        0
    ].title == "Kept by layer, LeNet-300-100, one-shot, ticket"
    assert times.rows[0][3:5] == [pytest.approx(14.0, rel=0.06), None] and times.rows[0][-1] == pytest.approx(
        -0.3, abs=0.1
    )
    figures = study.figures(rows, CPU)
    assert [figure.name for figure in figures] == ["accuracy", "layers", "pixels", "early_stop"]
    assert "late rewinding" in figures[0].svg() and "paper" not in figures[0].svg()
    assert "paper" in study.figures(synthetic(FULL, as_published), FULL)[0].svg()
    assert study.figures([], CPU) == [] and all(study.notes(rows, CPU))
    assert any("directions at best" in note for note in study.notes(rows, CPU))


def test_lenet_is_drawn_from_its_seed_alone() -> None:
    data = load("digits").subset(50)
    state = torch.get_rng_state()
    one, again, other = (LeNet().build(data, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [list(p.shape) for p in one.parameters()] == [[300, 64], [300], [100, 300], [100], [10, 100], [10]]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_early_stop_is_the_first_least_held_out_loss() -> None:
    lines = [{"step": 10 * i, "held_loss": loss} for i, loss in enumerate((3.0, 1.0, 1.0, 2.0), start=1)]
    assert early_stop(lines) == 20
    assert early_stop([{"step": 10}]) is None
    counts = torch.tensor([0, 300, 65535])
    assert decode_counts(encode_counts(counts)).tolist() == counts.tolist()


def test_the_masked_dense_step_moves_no_pruned_weight() -> None:
    data = load("digits").subset(60)
    model = LeNet().build(data, 0)
    mask = global_magnitude(model, 0.3)
    mask.apply_(model)
    dense_step(model, Recipe(1, 60, 0.1), data.train_x, data.train_y, mask)()
    grads = {name: param.grad for name, param in model.named_parameters()}
    for name, keep in mask.items():
        grad = grads[name]
        assert grad is not None and not grad[~keep].any() and grad[keep].any()
    times = step_seconds(model.eval(), mask, Recipe(1, 60, 0.1), data)
    assert set(times) == {"sparse", "masked dense", "dense"} and min(times.values()) > 0


def test_a_tiny_study_runs_to_its_laws(cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    changed = ("seeds=1", "num_train=200", "epochs=1", "rounds=1", "compared_rounds=1", "rewind_step=2",
               "num_images=96", "image_epochs=1", "image_rewind_step=1")  # fmt: skip
    done = cli("run", "lottery_ticket", "--preset", "smoke", "--threads", "1", "--out", str(tmp_path), *changed)
    assert done.returncode == 0 and done.stdout.count("law holds") == 3, done.stdout + done.stderr
    assert isinstance(study.expand(CPU)[0], Ticket) and dense("cnn").arm == "dense"
