# SPDX-License-Identifier: Apache-2.0
"""The commands end to end: run, skip, resume after kill -9, fail clearly, report, verify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curvlab.runs.store import RunStore, collect
from tests.experiments.conftest import ROOT, TINY, command

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
TIMINGS = ("train_seconds", "measure_seconds")


def rows_of(out: Path) -> list[dict]:
    """All rows but the clock's, by run and key."""
    rows = collect(RunStore(out), "ntk_width")
    return sorted((r for r in rows if r["metric"] not in TIMINGS), key=lambda r: json.dumps(r, sort_keys=True))


def test_a_run_ends_with_report_rows_and_manifest(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    assert "Are wider networks lazier" in page and "Not testable at this preset" in page
    assert (finished / "report" / "ntk_width.parquet").stat().st_size > 1000
    assert sorted(p.name for p in (finished / "report" / "figures").glob("*.pdf"))
    (manifest,) = (finished / "ntk_width").glob("smoke-*.json")
    stored = json.loads(manifest.read_text())
    assert stored["overrides"] == list(TINY) and len(stored["runs"]) == 6
    metrics = {row["metric"] for row in rows_of(finished)}
    assert metrics >= {"relative_movement", "absolute_movement", "initial_norm", "kernel_drift", "linearization_error"}
    epochs = {row["epoch"] for row in rows_of(finished) if row["metric"] == "relative_movement"}
    assert epochs == {0, 1, 2}


def test_the_same_command_skips_what_is_finished(finished: Path, cli: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("rows.jsonl")}
    again = cli("run", "ntk_width", "--threads", "1", "--out", str(finished), *TINY)
    assert again.returncode == 0, again.stderr
    assert "6 of 6 units are finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("rows.jsonl")} == before


KILLED = """
import os, signal, sys
from curvlab.training.checkpoint import CheckpointFile
from experiments.base.cli import main

saves, save = [0], CheckpointFile.save
def save_and_die(self, tensors, header):
    save(self, tensors, header)
    saves[0] += 1
    if saves[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointFile.save = save_and_die
CheckpointFile.due = lambda self: True
sys.exit(main(sys.argv[2:]))
"""


def test_kill_in_the_middle_of_a_unit_then_resume_gives_the_same_bits(tmp_path: Path, cli: Cli) -> None:
    config = ["widths=8,16,32", "arms=standard", "epochs=4", "num_train=256", "kernel_samples=8", "function_samples=9"]
    words = ["run", "ntk_width", "--threads", "1", *config]
    whole = cli(*words, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    # Four saves a unit: the seventh is the third epoch of the second unit.
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, "7", *words, "--out", str(out)], cwd=ROOT, timeout=200
    )
    assert killed.returncode == -signal.SIGKILL
    store = RunStore(out)
    done = [run for run in store.runs("ntk_width") if run.finished]
    stopped = [run for run in store.runs("ntk_width") if run.checkpoint_path.exists()]
    assert len(done) == 1 and len(stopped) == 1
    untouched = {path: path.stat().st_mtime_ns for path in done[0].path.iterdir()}
    resumed = cli(*words, "--out", str(out))
    assert resumed.returncode == 0, resumed.stderr
    assert "1 of 3 units are finished already" in resumed.stdout and "(resumed)" in resumed.stdout
    assert {path: path.stat().st_mtime_ns for path in done[0].path.iterdir()} == untouched
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert not stopped[0].checkpoint_path.exists()


def test_a_failing_unit_is_reported_and_the_others_go_on(tmp_path: Path, cli: Cli) -> None:
    words = ["run", "ntk_width", "--threads", "1", "--out", str(tmp_path), *TINY, "arms=standard"]
    first = cli(*words)
    assert first.returncode == 0, first.stderr
    broken = next(iter(RunStore(tmp_path).runs("ntk_width")))
    (broken.path / "done.json").unlink()
    broken.checkpoint_path.write_bytes(b"not a checkpoint")
    again = cli(*words)
    assert again.returncode == 1
    assert "FAILED: ValueError" in again.stdout and "2 of 3 units are finished" in again.stdout
    assert "Traceback" in (broken.path / "error.txt").read_text()
    assert "Traceback" not in again.stderr


def test_ctrl_c_is_clean_and_the_same_command_goes_on(tmp_path: Path, cli: Cli) -> None:
    words = ["run", "ntk_width", "--threads", "1", "--out", str(tmp_path), "arms=standard", "widths=8,16,32"]
    words += ["epochs=150", "kernel_samples=8", "function_samples=9", "num_train=1000"]
    # A test-suite that runs in the background of a shell hands on an ignored SIGINT, which Python then leaves ignored.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*words), cwd=ROOT, preexec_fn=heed, **pipes)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "ntk_width").glob("*/lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "the same command goes on from here" in out and "Traceback" not in err
    assert cli(*words).returncode == 0


INTERRUPTED = """
import os, signal, sys
from experiments import ntk_width
from experiments.base.cli import main

def run(unit, run, tools):
    exec("os.kill(os.getpid(), signal.SIGINT)\\nwhile True: pass", {"os": os, "signal": signal})

ntk_width.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_within_an_exec_of_text_ends_with_the_exit_status_too(tmp_path: Path) -> None:
    """Dataclasses and named tuples are made by exec: CPython notes an interrupt there as unhandled, caught or not.

    It looks at the note only where a module is run by ``-m``, as the commands are.
    """
    words = ["run", "ntk_width", "--threads", "1", "--out", str(tmp_path / "out"), *TINY]
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    start = [sys.executable, "-W", "ignore", "-m", "interrupted"]
    ended = subprocess.run(
        [*start, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 130, ended.stdout + ended.stderr
    assert "stopped: 0 of 6 units" in ended.stdout and "Traceback" not in ended.stderr


def test_interrupts_are_the_callers_again_afterwards() -> None:
    from experiments.base.cli import Stopped, clean_interrupts

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(Stopped), clean_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with clean_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a shell
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "ntk_widht"), "did you mean ntk_width?"),
        (("run", "ntk_width", "--preset", "smok"), "did you mean smoke?"),
        (("run", "ntk_width", "epoch=3"), "did you mean epochs?"),
        (("run", "ntk_width", "epochs=three"), "epochs must be int"),
        (("run", "ntk_width", "epochs=0"), "epochs must be"),
        (("run", "ntk_width", "arms=mup"), "arms"),
        (("run", "ntk_width", "kernel_samples=2000"), "at most num_train"),
        (("run", "ntk_width", "num_train=5000"), "in 1..1438"),
        (("run", "ntk_width", "--seeds", "0"), "seeds"),
        (("run", "ntk_width", "--threads", "0"), "--threads must be at least 1"),
        (("run", "ntk_width", "--preset", "cpu", "--data", "/nowhere"), "/nowhere"),
        (("report", "ntk_width", "--preset", "cpuu"), "did you mean cpu?"),
        (("verify", "nothing"), "there is no study"),
        (("verify", "ntk_width", "lr=1"), "only `run` and `estimate`"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(words: tuple[str, ...], expected: str, tmp_path: Path, capfd) -> None:
    from experiments.base.cli import main

    assert main([*words, "--out", str(tmp_path)]) == 2
    err = capfd.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from experiments.base.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "ntk_width", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "no usable CUDA device" in capfd.readouterr().err


def test_an_unwritable_folder_is_named(tmp_path: Path, capfd) -> None:
    from experiments.base.cli import main

    (tmp_path / "file").write_text("")
    assert main(["run", "ntk_width", "--out", str(tmp_path / "file"), *TINY]) == 1
    assert "--out DIR" in (err := capfd.readouterr().err) or "a file stands where a folder is needed" in err


def test_each_study_runs_as_a_file(cli: Cli) -> None:
    shown = cli("--preset", "smoke", "--help", script="experiments/ntk_width.py")
    assert shown.returncode == 0 and "--preset" in shown.stdout and "--threads" in shown.stdout
    wrong = cli("--preset", "smokee", script="experiments/ntk_width.py")
    assert wrong.returncode == 2 and "did you mean smoke?" in wrong.stderr


def test_list(cli: Cli) -> None:
    names = cli("list", "--names").stdout.split()
    assert names == sorted(names) and {"batch_size", "ntk_width", "optimizers"} <= set(names)
    assert "Are wider networks lazier?" in cli("list").stdout


def test_estimate_forecasts_every_unit(cli: Cli, tmp_path: Path) -> None:
    shown = cli("estimate", "ntk_width", "--threads", "1", "--out", str(tmp_path), *TINY)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("2 seeds") == 6 and "all" in shown.stdout
    assert not list(tmp_path.iterdir())
