# SPDX-License-Identifier: Apache-2.0
"""Verdicts of the sharpness study on synthetic rows; slices and densities that come back from rows as they went in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from curvlab.data import load
from curvlab.models import CNN
from curvlab.runs.config import config_hash
from curvlab.runs.stats import Survives, Verdict
from curvlab.runs.store import RunStore, collect
from curvlab.sharpness import loss_slice
from curvlab.spectra import SpectralDensity
from curvlab.training.recipe import Recipe
from curvlab.training.seeding import generator
from curvlab.training.stages import Network, Samples, TrainStage
from experiments import batch_size, sharpness
from experiments.base import flatness, paper
from experiments.base.networks import encode_hits
from experiments.base.study import Tools

FULL = sharpness.PRESETS["paper"]
CPU = sharpness.PRESETS["cpu"]
EQUAL = dict.fromkeys(flatness.MEASURES, 1.0)


def synthetic(config: sharpness.Config, ratios: dict, *, noise=None, power=1.0, mark=True, seeds=3) -> list[dict]:
    """Rows of all measuring units: every measure of batch b is 2 · ratio^(log b / log range), seeds 1 % apart."""
    noise = noise or dict.fromkeys(config.sigmas, 12.0)
    small, large = sharpness.pair(config)
    rows = []
    for unit in sharpness.expand(config):
        if not isinstance(unit, sharpness.Measures) or unit.seed >= seeds:
            continue
        share = math.log(unit.batch_size / small) / math.log(large / small)
        wiggle = 1 + 0.01 * (unit.seed - 1)
        factors = {name: getattr(unit, name) for name in ("batch_size", "lr", "epochs", "seed", "point")}
        factors["run"] = str(unit)
        reached = mark or unit.point == "last"
        values = {"diverged": 0.0, "reached": float(reached)}
        if reached:
            values |= {name: 2.0 * wiggle * ratio**share for name, ratio in (EQUAL | ratios).items()}
            values |= {"test_accuracy": 0.9 - 0.02 * share, "hessian_loss": 1e-4 * 3.86**share, "trace": 9.0}
            values |= {"lambda_residual": 1e-4, "power_lambda": power * values["sharpness"], "measure_seconds": 1.0}
            hits = torch.arange(1000) < 1000 * (0.9 - 0.02 * share) + unit.seed
            bits = {"metric": "test_hits", "value": int(hits.sum()), "images": 1000, "bits": encode_hits(hits)}
            rows.append({**factors, **bits})
            for sigma in unit.sigmas:
                for metric, factor in (("noise_percent", 1.0), ("noise_increase", 3.86)):
                    grown = 5.0 * wiggle * (factor * noise[sigma]) ** share
                    rows.append({**factors, "sigma": sigma, "metric": metric, "value": grown})
        rows += [{**factors, "metric": name, "value": value} for name, value in values.items()]
    return rows


def verdicts(rows: list[dict], config: sharpness.Config) -> dict[str, tuple[Verdict, Survives]]:
    return {claim.id: (claim.verdict, claim.survives) for claim in sharpness.claims(rows, config)}


# ------------------------------------------------------------------------------------------------ verdicts


def test_a_sharpness_that_is_loss_and_scale_reproduces_and_does_not_survive() -> None:
    ratios = {"sharpness": 11.8, "relative_sharpness": 3.0}
    found = verdicts(synthetic(FULL, ratios | {"filter_sharpness": 0.8}), FULL)
    assert found["lambda"] == (Verdict.REPRODUCED, Survives.NO)  # sharper at equal loss, flatter by adaptive sharpness
    assert found["relative_sharpness"][0] is Verdict.REPRODUCED
    found = verdicts(synthetic(FULL, ratios), FULL)
    assert found["lambda"] == (Verdict.REPRODUCED, Survives.UNDECIDED)  # adaptive sharpness is 1, on neither side
    assert found["filter_sharpness"][0] is not Verdict.REPRODUCED
    assert found["equal_loss"][0] is Verdict.REPRODUCED


def test_a_sharpness_that_every_measure_sees_survives() -> None:
    ratios = dict.fromkeys(flatness.MEASURES, 4.0) | {"sharpness": 11.8, "half_accuracy_noise": 0.5}
    found = verdicts(synthetic(FULL, ratios), FULL)
    assert found["lambda"] == (Verdict.REPRODUCED, Survives.YES)
    assert found["noise"] == (Verdict.REPRODUCED, Survives.YES)
    names = (
        "filter_sharpness",
        "element_sharpness",
        "norm_sharpness",
        "filter_flatness",
        "half_accuracy_noise",
        "equal_updates",
    )
    assert {found[name][0] for name in names} == {Verdict.REPRODUCED}


def test_flatter_large_batches_are_not_reproduced() -> None:
    found = verdicts(synthetic(FULL, {"sharpness": 0.5, "relative_sharpness": 0.5, "filter_sharpness": 0.5}), FULL)
    names = ("lambda", "relative_sharpness", "filter_sharpness", "equal_loss")
    assert {found[name][0] for name in names} == {Verdict.NOT_REPRODUCED}
    assert found["lambda"][1] is Survives.NOT_TESTED  # there is nothing to survive


def test_a_scaled_protocol_shows_directions_only() -> None:
    found = verdicts(synthetic(CPU, {"sharpness": 11.8, "relative_sharpness": 3.0, "filter_sharpness": 2.0}), CPU)
    assert found["lambda"] == (Verdict.DIRECTION_ONLY, Survives.YES)
    assert Verdict.REPRODUCED not in {verdict for verdict, _ in found.values()}
    smoke = sharpness.PRESETS["smoke"]
    assert {v for v, _ in verdicts(synthetic(smoke, {}), smoke).values()} == {Verdict.NOT_TESTABLE}
    assert {v for v, _ in verdicts([], FULL).values()} == {Verdict.NOT_TESTABLE}


def test_one_noise_level_against_the_claim_decides_every_sigma() -> None:
    noise = dict.fromkeys(FULL.sigmas, 12.0)
    assert verdicts(synthetic(FULL, {}, noise=noise), FULL)["every_sigma"][0] is Verdict.REPRODUCED
    turned = synthetic(FULL, {}, noise=noise | {0.05: 0.51})
    claim = next(claim for claim in sharpness.claims(turned, FULL) if claim.id == "every_sigma")
    assert claim.verdict is Verdict.NOT_REPRODUCED and "0.05" in claim.note
    for row in turned:
        if row["metric"] == "noise_percent" and row["sigma"] == 0.0005:
            row["value"] = -1.0  # noise can lower the loss: then there is no ratio, and no verdict
    claim = next(claim for claim in sharpness.claims(turned, FULL) if claim.id == "every_sigma")
    assert claim.verdict is Verdict.NOT_TESTABLE and "0.0005" in claim.note


def test_power_iteration_is_held_to_the_eigenvalue() -> None:
    assert verdicts(synthetic(FULL, {}, power=0.97), FULL)["power"][0] is Verdict.REPRODUCED
    assert verdicts(synthetic(FULL, {}, power=0.9), FULL)["power"][0] is Verdict.NOT_REPRODUCED


def test_a_network_that_two_arms_share_is_audited_once() -> None:
    claim = next(claim for claim in sharpness.claims(synthetic(CPU, {}), CPU) if claim.id == "power")
    assert claim.measured is not None and claim.measured.n == 3 * len(CPU.batches)
    for row in (rows := synthetic(CPU, {})):
        if row["epochs"] != CPU.epochs and row["metric"] == "power_lambda":
            row["value"] = 0.0  # what stands at equal updates is not of this claim
    assert verdicts(rows, CPU)["power"][0] is Verdict.DIRECTION_ONLY  # 5,000 images are not the paper's networks
    for row in rows:
        if row["epochs"] == CPU.epochs and row["metric"] == "power_lambda" and row["seed"] == 2:
            row["value"] *= 0.9
    assert verdicts(rows, CPU)["power"][0] is Verdict.NOT_REPRODUCED


def test_the_gap_is_held_to_the_papers_gap_of_the_same_pair() -> None:
    def gap(config: sharpness.Config):
        return next(claim for claim in sharpness.claims(synthetic(config, {}), config) if claim.id == "gap")

    means = [sum(paper.BATCH_ACCURACY[batch]) / 3 for batch in (32, 512)]
    assert gap(CPU).paper == round(means[0] - means[1], 2) != paper.GEOMETRY_GAP
    assert gap(FULL).paper == paper.GEOMETRY_GAP and "1024 and 32" in gap(FULL).text


def test_ratios_are_of_common_seeds() -> None:
    """Seeds a factor 10 apart move both batches alike: seed by seed the ratio is known, between groups it is not."""
    rows = synthetic(CPU, {"sharpness": 4.0})
    for row in rows:
        if row["metric"] in ("sharpness", "half_accuracy_noise"):
            row["value"] *= 10.0 ** row["seed"]
    claims = {claim.id: claim for claim in sharpness.claims(rows, CPU)}
    measured = claims["lambda"].measured
    assert measured is not None and measured.n == 3
    assert (measured.low, measured.value, measured.high) == pytest.approx((4.0, 4.0, 4.0))
    assert "Welch on logs: 4" in claims["lambda"].note
    lone = [row for row in rows if not (row["batch_size"] == 512 and row["seed"] == 2)]
    half = {claim.id: claim for claim in sharpness.claims(lone, CPU)}["half_accuracy_noise"].measured
    assert half is not None and half.n == 2 and half.value == pytest.approx(1.0)


def test_equal_updates_are_read_against_the_losses() -> None:
    rows = synthetic(CPU, {"sharpness": 0.06, "relative_sharpness": 28.0, "filter_flatness": 2.0})
    claims = {claim.id: claim for claim in sharpness.claims(rows, CPU)}
    assert "the losses' ratio is 3.86" in claims["equal_updates"].note
    assert claims["equal_updates"].verdict is Verdict.NOT_REPRODUCED
    for name, value in (("equal_updates_over_loss", 28.0), ("equal_updates_filter_flatness", 2.0)):
        measured = claims[name].measured
        assert measured is not None and measured.value == pytest.approx(value)


def test_networks_that_never_came_down_are_in_no_comparison_and_are_named() -> None:
    rows = synthetic(CPU, {"sharpness": 2.0}, mark=False)
    claim = next(claim for claim in sharpness.claims(rows, CPU) if claim.id == "equal_loss")
    assert claim.verdict is Verdict.NOT_TESTABLE and "0 networks" in claim.note
    assert any("as-written, batch 512: 3 of 3" in note for note in sharpness.notes(rows, CPU))


def test_laws_know_what_must_move() -> None:
    def rows(moved: float, adaptive: float) -> list[dict]:
        pairs = {"moved_sharpness": moved, "moved_filter_sharpness": adaptive}
        return [
            {"run": "a", "seed": 0, "symmetry": "relu_rescaling", "metric": m, "value": v} for m, v in pairs.items()
        ]

    assert [law.holds for law in sharpness.laws(rows(80.0, 1.0), FULL)] == [True, True]
    assert [law.holds for law in sharpness.laws(rows(30.0, 1.01), FULL)] == [False, False]


# ------------------------------------------------------------------------------------------------ units, rows, figures


@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_the_networks_are_those_of_the_batch_size_study(preset: str) -> None:
    theirs = {unit.stage for unit in batch_size.expand(batch_size.PRESETS[preset])}
    mine = set(sharpness.expand(sharpness.PRESETS[preset]))
    own = {unit for unit in mine if isinstance(unit, sharpness.Measures) and unit.loss_mark != sharpness.LOSS_MARK}
    assert mine and {unit.stage for unit in mine - own} <= theirs
    # where the mark is another one the same networks are trained again, with the same bits
    assert {replace(unit.stage, loss_mark=sharpness.LOSS_MARK) for unit in own} <= theirs
    assert {unit.point for unit in own} == ({"mark"} if preset == "cpu" else set())
    assert TrainStage(Network("cnn", 1), Samples("digits"), Recipe(1, 1, 0.1), 0).loss_mark == sharpness.LOSS_MARK


def test_names_of_stored_runs_do_not_move() -> None:
    """Names of runs that stand in stores and in committed results: classes and fields of the units must keep them."""
    measures = next(unit for unit in sharpness.expand(CPU) if isinstance(unit, sharpness.Measures))
    unit = batch_size.expand(batch_size.PRESETS["cpu"])[0]
    found = [config_hash(one) for one in (measures, sharpness.expand(CPU)[0], sharpness.expand(CPU)[-1], unit)]
    assert found == ["8080f414", "7b2d1ccf", "a30e4041", "1d4f20d6"] and config_hash(unit.stage) == "7aab65d6"


def test_the_papers_pair_and_the_protocol() -> None:
    assert sharpness.pair(FULL) == (32, 1024) and sharpness.is_as_written(FULL)
    assert sharpness.pair(CPU) == (32, 512) and not sharpness.is_as_written(CPU)
    for change in ({"lrs": tuple(2 * lr for lr in FULL.lrs)}, {"draws": 1}, {"channels": 8}):
        assert not sharpness.is_as_written(sharpness.Config(**change))
    assert tuple(paper.GEOMETRY_NOISE) == FULL.sigmas
    for wrong in (
        {"reference": 100},
        {"seeds": 0},
        {"hessian_samples": 10**6},
        {"points": ("mark",)},
        {"lrs": (0.1,)},
        {"loss_mark": 0.0},
    ):
        with pytest.raises(ValueError, match="Config"):
            sharpness.Config(**wrong)


def test_slices_and_densities_come_back_from_rows() -> None:
    data = load("digits").subset(20)
    model = CNN(1, in_channels=1, image_size=8, generator=generator(0, "init")).eval()
    problem = flatness.problem_of(model, data.train_x, data.train_y)
    plane = loss_slice(problem, 2, num_points=(3, 5), generator=generator(0, "plane"))
    back = flatness.slice_of(flatness.slice_rows(plane, "plane"), "plane")
    assert back is not None and np.array_equal(back.losses, plane.losses)
    assert back.accuracies is not None and np.array_equal(back.accuracies, plane.accuracies)
    assert all(np.array_equal(a, b) for a, b in zip(back.coordinates, plane.coordinates, strict=True))
    rows = flatness.spectrum(problem, probes=2, steps=4)
    density = flatness.density_of(rows)
    assert isinstance(density, SpectralDensity) and density.nodes.shape == (2, 4)
    assert density.weights.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert flatness.density_of([]) is None and flatness.slice_of([], "line") is None


def test_a_network_in_the_store_is_found_and_measured_once(tmp_path) -> None:
    config = sharpness.Config(
        dataset="digits", num_train=100, channels=1, batches=(20, 50), lrs=(0.02, 0.05), reference=50, epochs=2,
        seeds=1, arms=("as-written",), hessian_samples=20, probes=2, power_iterations=3, noise_samples=20,
        sigmas=(0.01,), draws=2, density_probes=1, density_steps=4, slice_samples=20, line_points=3, plane_points=3,
    )  # fmt: skip
    store = RunStore(tmp_path)
    for unit in sharpness.expand(config):
        run = store.open("sharpness", unit)
        with run.lock():
            run.finish(sharpness.run(unit, run, Tools()))
    assert len(list((tmp_path / "stages").iterdir())) == 2
    loaded = [run.summary["loaded"] for run in store.runs("sharpness")]
    assert loaded.count(False) == 2
    rows = collect(store, "sharpness")
    here = {row["metric"]: row["value"] for row in rows if row.get("point") == "last" and row["batch_size"] == 20}
    assert here["lambda_residual"] <= 1e-3 * here["sharpness"]
    assert here["relative_sharpness"] == pytest.approx(here["sharpness"] / here["hessian_loss"])
    assert all(row["metric"] in ("diverged", "reached") for row in rows if row.get("point") == "mark")
    figures = [figure.name for figure in sharpness.figures(rows, config)]
    assert figures == ["ratios", "noise", "spectra", "planes", "lines"]
    assert [table.title for table in sharpness.tables(rows, config)][-1] == "Symmetries"
