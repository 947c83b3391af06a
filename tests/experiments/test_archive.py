# SPDX-License-Identifier: Apache-2.0
"""Publishing and verifying: a committed verdict that no longer follows from its rows is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from curvlab.runs.store import RunStore, RunStoreError
from experiments.base import archive
from experiments.base.study import FOLDER, UsageError, configure, description, load_study, study_names, variant


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    study = load_study("ntk_width")
    (manifest,) = archive.manifests(RunStore(finished), "ntk_width", study)
    archive.publish(archive.finished(manifest, RunStore(finished)), tmp_path / "results")
    return tmp_path / "results"


def test_publish_lays_out_everything(results: Path) -> None:
    names = {path.name for path in (results / "ntk_width").iterdir()}
    assert names >= {"rows.parquet", "verdicts.json", "table.md", "table.csv", "laziness.svg", "laziness.png"}
    text = (results / "ntk_width" / "verdicts.json").read_text()
    assert "/" not in json.loads(text)["data"]["source"]  # no folder of this machine


def test_verify_from_committed_rows_alone(results: Path, tmp_path: Path) -> None:
    found = archive.verify("ntk_width", RunStore(tmp_path / "nothing"), results)
    assert found.rows_from == "the committed rows" and found.compared >= 8 and found.changes == ()


def test_verify_prefers_the_local_run(results: Path, finished: Path) -> None:
    found = archive.verify("ntk_width", RunStore(finished), results)
    assert str(finished) in found.rows_from and found.changes == ()


@pytest.mark.parametrize("key", ["verdict", "survives"])
def test_verify_finds_a_changed_verdict(
    results: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.base.cli import main

    file = results / "ntk_width" / "verdicts.json"
    stored = json.loads(file.read_text())
    monkeypatch.setattr(archive.verify, "__defaults__", (results,))
    assert main(["verify", "ntk_width", "--out", str(tmp_path / "nothing")]) == 0
    stored["claims"][1][key] = "yes"
    file.write_text(json.dumps(stored))
    assert main(["verify", "ntk_width", "--out", str(tmp_path / "nothing")]) == 1
    assert f"slope: {key} was 'yes'" in capsys.readouterr().out


def test_verify_finds_claims_that_came_or_went(results: Path, tmp_path: Path) -> None:
    file = results / "ntk_width" / "verdicts.json"
    stored = json.loads(file.read_text())
    stored["claims"][0]["id"] = "other"
    file.write_text(json.dumps(stored))
    changes = archive.verify("ntk_width", RunStore(tmp_path / "nothing"), results).changes
    assert "other: is gone" in changes and "ratio: is new" in changes


def test_verify_with_nothing_committed_is_no_change(tmp_path: Path) -> None:
    found = archive.verify("ntk_width", RunStore(tmp_path), tmp_path)
    assert found.compared == 0 and found.changes == ()


def test_a_damaged_committed_file_is_named(results: Path, tmp_path: Path) -> None:
    (results / "ntk_width" / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunStoreError, match=r"rows\.parquet cannot be read"):
        archive.verify("ntk_width", RunStore(tmp_path / "nothing"), results)
    (results / "ntk_width" / "verdicts.json").write_text("{}")
    with pytest.raises(RunStoreError, match="not a manifest of this version"):
        archive.verify("ntk_width", RunStore(tmp_path / "nothing"), results)


def test_committed_results_verify() -> None:
    committed = [path.parent.name for path in (FOLDER / "results").glob("*/verdicts.json")]
    assert "ntk_width" in committed
    for name in committed:
        found = archive.verify(name, RunStore(FOLDER / "no such folder"))
        assert found.compared > 0 and found.changes == ()


def test_an_unfinished_run_is_no_finished_study(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    store, study = RunStore(tmp_path / "copy"), load_study("ntk_width")
    assert len(archive.manifests(store, "ntk_width", study)) == 1
    (store.runs("ntk_width")[0].path / "done.json").unlink()
    assert archive.manifests(store, "ntk_width", study) == []


def test_report_shows_the_most_faithful_preset(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.base.cli import main

    assert main(["report", "--out", str(finished)]) == 0
    assert "index.html" in capsys.readouterr().out
    assert main(["report", "ntk_width", "--preset", "paper", "--out", str(finished)]) == 1
    assert "--preset paper" in capsys.readouterr().out


def test_report_shows_committed_rows_where_nothing_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.base.cli import main

    assert main(["report", "ntk_width", "double_descent", "--out", str(tmp_path)]) == 0
    assert "ntk_width: not run here, shown from the committed rows (preset cpu)" in capsys.readouterr().out
    text = (tmp_path / "report" / "index.html").read_text()
    assert text.count("committed in experiments/results, not run on this machine") == 2
    assert main(["report", "ntk_width", "--preset", "smoke", "--out", str(tmp_path)]) == 1


def test_publishing_what_is_committed_gives_the_committed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and verdicts are functions of the committed rows; last digits may be those of another SciPy."""
    monkeypatch.setattr(archive, "save_figure", lambda figure, folder: [folder / f"{figure.name}.svg"])  # 10 s of ink
    for name in study_names():
        shutil.copytree(FOLDER / "results" / name, tmp_path / name)
        found = archive.committed(name, tmp_path)
        assert found is not None
        written = archive.publish(found, tmp_path)
        there = {path.name for path in (tmp_path / name).iterdir() if path.suffix not in (".png", ".parquet")}
        assert {path.name for path in written} == there
        for path in written:
            if path.suffix == ".md":
                assert path.read_text() == (FOLDER / "results" / name / path.name).read_text(), path
        now, before = (json.loads((at / name / "verdicts.json").read_text()) for at in (tmp_path, FOLDER / "results"))
        keys = ("id", "text", "paper", "verdict", "survives")
        assert [[c[k] for k in keys] for c in now["claims"]] == [[c[k] for k in keys] for c in before["claims"]]
        assert {k: v for k, v in now.items() if k != "claims"} == {k: v for k, v in before.items() if k != "claims"}


def test_a_quick_run_does_not_replace_a_longer_one(
    results: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.base.cli import main

    file = results / "ntk_width" / "verdicts.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"preset": "cpu"}))
    for function in (archive.committed, archive.publish):
        monkeypatch.setattr(function, "__defaults__", (results,))
    assert main(["report", "ntk_width", "--publish", "--out", str(finished)]) == 0
    assert "preset cpu is committed and stays; to replace it: --preset smoke" in capsys.readouterr().out
    assert json.loads(file.read_text())["preset"] == "cpu"
    assert main(["report", "ntk_width", "--publish", "--preset", "smoke", "--out", str(finished)]) == 0
    assert json.loads(file.read_text())["preset"] == "smoke"


def test_only_claims_about_other_data_are_marked() -> None:
    found = archive.committed("double_descent")
    assert found is not None and found.manifest.data["unpublished"] == ["cifar10"]
    shown = archive.page(load_study("double_descent"), found.rows, found.manifest)
    about = {claim.id: claim.dataset for claim in shown.claims}
    assert about["mlp_gain"] == about["features_peak"] == "mnist" and about["cnn_dip"] == "cifar10"
    assert {claim.id for claim in shown.claims if claim.measured is None and claim.cost_seconds is not None} == set()


def test_configuration_survives_its_canonical_form() -> None:
    from curvlab.runs.config import canonical

    study = load_study("ntk_width")
    for preset in study.PRESETS:
        config = configure(study, preset, ["lr=0.02", "widths=32,64"])
        assert archive.restore_config(study, canonical(config)) == config
        assert variant(study, preset, config).startswith(f"{preset}-")
        assert variant(study, preset, study.PRESETS[preset]) == preset


def test_every_study_describes_itself() -> None:
    for name in study_names():
        words: Callable[[str], str] = description(load_study(name)).__getitem__
        assert all(words(key) for key in ("title", "question", "source", "prediction"))
    with pytest.raises(UsageError, match="did you mean ntk_width"):
        load_study("ntk-width")
