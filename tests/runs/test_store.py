# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import errno
import getpass
import json
import math
import os
import platform
import random
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from curvlab.runs.environment import capture_environment
from curvlab.runs.journal import atomic_write
from curvlab.runs.store import RunStore, RunStoreError, collect, export_parquet


@dataclasses.dataclass(frozen=True)
class Unit:
    width: int = 32
    seeds: tuple[int, ...] = (0, 1)
    lr: float = 0.01


def row(step: int, value: float, metric: str = "loss") -> dict:
    return {"seed": 0, "step": step, "metric": metric, "value": value}


@pytest.fixture
def run(tmp_path):
    return RunStore(tmp_path).open("ntk", Unit(width=64), context={"data": "abc"})


def files_of(path) -> set[str]:
    return {p.name for p in path.rglob("*") if p.is_file()}


def test_life_of_a_run(tmp_path, run):
    assert not run.finished and run.rows() == [] and run.unit == {"width": 64, "seeds": [0, 1], "lr": 0.01}
    assert run.path == tmp_path / "ntk" / run.name and run.name.startswith("width=64-")
    with run.lock():
        run.append([row(0, 1.5), row(1, np.float32(0.5))])
        run.append([row(1, 0.25)])  # a repeated step: the last wins, in its first place
        run.checkpoint_path.write_bytes(b"state")
        run.finish({"seeds": 2}, environment={"python": "3"})
    assert run.rows() == [row(0, 1.5), row(1, 0.25)]
    again = RunStore(tmp_path).open("ntk", Unit(width=64), context={"data": "abc"})
    assert again.finished and again.summary == {"seeds": 2} and again.done["environment"] == {"python": "3"}
    assert again.done["wall_seconds"] > 0 and again.done["rows"] == 3
    assert files_of(tmp_path) == {"run.json", "rows.jsonl", "done.json", "lock", "clock.json"}
    with pytest.raises(RunStoreError, match="it is finished"):
        again.append([row(2, 1.0)])
    with pytest.raises(RunStoreError, match="it is finished"):
        again.finish({})


def test_non_finite_values_come_back_and_the_file_is_plain_json(run):
    values = [math.nan, math.inf, -math.inf, 1e-300, 0.1 + 0.2]
    run.append([row(i, v) for i, v in enumerate(values)])
    assert repr([r["value"] for r in run.rows()]) == repr(values)
    for line in (run.path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"metric": "loss"}, ValueError, "row 1 must have 'metric' and 'value'"),
        ({"metric": "loss", "value": "high"}, TypeError, "row 1: value must be a number, got 'high'"),
        ({"metric": "loss", "value": True}, TypeError, "value must be a number, got True"),
        ({"metric": 3, "value": 1}, TypeError, "metric must be text"),
        (
            {"metric": "loss", "value": 1, "width": [1]},
            TypeError,
            "width must be a number, text, bool or None, got list",
        ),
        ({"metric": "loss", "value": 1, "lr": math.nan}, ValueError, "factor lr must be finite"),
    ],
)
def test_bad_rows_are_refused_whole(run, bad, error, message):
    with pytest.raises(error, match=message):
        run.append([row(0, 1.0), bad])
    assert not (run.path / "rows.jsonl").exists()


def test_resume_after_a_cut_at_every_byte(run):
    rows = [row(i, i / 7, metric="näher") for i in range(2)]
    run.append(rows)
    file = run.path / "rows.jsonl"
    data = file.read_bytes()
    for cut in range(len(data) + 1):
        file.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        assert run.rows() == rows[:whole]
        run.append([row(9, 9.0)])
        assert run.rows() == [*rows[:whole], row(9, 9.0)]
        assert file.read_bytes().count(b"\n") == whole + 1


def test_torn_line_longer_than_a_block(run):
    run.append([row(0, 1.0)])
    with (run.path / "rows.jsonl").open("ab") as file:
        file.write(b'{"metric": "' + b"x" * 200_000)
    assert run.rows() == [row(0, 1.0)]
    run.append([row(1, 2.0)])
    assert run.rows() == [row(0, 1.0), row(1, 2.0)]
    assert (run.path / "rows.jsonl").stat().st_size < 200


WRITER = """
import dataclasses, os, signal, sys
from curvlab.runs.store import RunStore
@dataclasses.dataclass(frozen=True)
class Unit:
    width: int = 32
    seeds: tuple[int, ...] = (0, 1)
    lr: float = 0.01
run = RunStore(sys.argv[1]).open("ntk", Unit(), context={})
cut = int(sys.argv[2])
if cut >= 0:  # die inside a write, after `cut` bytes of it
    write = os.write
    def torn(descriptor, data):
        if b'"step":3' not in bytes(data):
            return write(descriptor, data)
        write(descriptor, bytes(data)[:cut])
        os.kill(os.getpid(), signal.SIGKILL)
    os.write = torn
with run.lock():
    step = len(run.rows())
    while True:
        run.append([{"step": step, "metric": "loss", "value": step / 3}])
        step += 1
        print(step, flush=True)
"""


def start_writer(python_here, root, cut: int = -1) -> subprocess.Popen:
    command, folder = python_here
    return subprocess.Popen([*command, WRITER, str(root), str(cut)], cwd=folder, stdout=subprocess.PIPE, text=True)


def test_kill_9_at_random_moments_loses_nothing(tmp_path, python_here):
    rng = random.Random(0)
    acknowledged = 0
    for _ in range(5):
        writer = start_writer(python_here, tmp_path)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        writer.kill()
        said = writer.communicate()[0].splitlines()
        acknowledged = max([acknowledged + 1, *(int(line) for line in said[:-1])])
        rows = RunStore(tmp_path).open("ntk", Unit(), context={}).rows()
        assert len(rows) >= acknowledged
        assert rows == [{"step": i, "metric": "loss", "value": i / 3} for i in range(len(rows))]
        acknowledged = len(rows)


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_kill_9_inside_a_write(tmp_path, python_here, cut):
    writer = start_writer(python_here, tmp_path, cut)
    writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL
    run = RunStore(tmp_path).open("ntk", Unit(), context={})
    assert [r["step"] for r in run.rows()] == [0, 1, 2]
    with run.lock():  # the killed process's lock is free
        run.append([{"step": 3, "metric": "loss", "value": 1.0}])
    assert [r["step"] for r in run.rows()] == [0, 1, 2, 3]


def test_second_writer_is_told_the_pid(tmp_path, python_here):
    writer = start_writer(python_here, tmp_path)
    assert writer.stdout is not None
    writer.stdout.readline()
    run = RunStore(tmp_path).open("ntk", Unit(), context={})
    try:
        with pytest.raises(RunStoreError, match=rf"is being written by another process \(pid {writer.pid}\)"):
            run.append([row(0, 1.0)])
    finally:
        writer.kill()
        writer.communicate()
    run.append([row(0, 1.0)])


def test_leftovers_of_a_killed_writer_are_swept(run):
    (run.path / ".done.json.99999.tmp").write_text("{")
    with run.lock():
        pass
    assert not list(run.path.glob(".*"))


def test_lock_is_not_taken_twice_by_one_process(run):
    with run.lock(), pytest.raises(RunStoreError, match=rf"this very process \(pid {os.getpid()}\)"), run.lock():
        pass
    with run.lock():
        pass


def fail_writes(monkeypatch, code: int, when=lambda data: True) -> None:
    write = os.write

    def failing(descriptor, data):
        if when(bytes(data)):
            write(descriptor, bytes(data)[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)


def test_full_disk_leaves_what_was_there(run, monkeypatch):
    run.append([row(0, 1.0)])
    before = files_of(run.path)
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.ENOSPC)
        with pytest.raises(RunStoreError, match=r"append to .*rows\.jsonl: the disk is full"):
            run.append([row(1, 2.0), row(2, 3.0)])
        with pytest.raises(RunStoreError, match=r"write .*done\.json: the disk is full"):
            run.finish({})
        with pytest.raises(RunStoreError, match=r"write .*run\.json: the disk is full"):
            RunStore(run.path.parents[1]).open("ntk", Unit(width=1), context={})
    assert (run.path / "rows.jsonl").read_bytes().count(b"\n") == 1 and files_of(run.path) == before
    assert not run.finished
    assert [r.name for r in RunStore(run.path.parents[1]).runs("ntk")] == [run.name]  # the empty folder is no run
    run.append([row(1, 2.0)])
    run.finish({})
    RunStore(run.path.parents[1]).open("ntk", Unit(width=1), context={})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file, table = tmp_path / "done.json", tmp_path / "rows.parquet"
    atomic_write(file, b"old")
    export_parquet([row(0, 1.0)], table)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def half_a_table(_, path):
        path.write_bytes(b"PAR1")
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(pq, "write_table", half_a_table)
        with pytest.raises(RunStoreError, match=r"cannot write .*done\.json: Input/output error"):
            atomic_write(file, b"new")
        with pytest.raises(RunStoreError, match=r"cannot write .*rows\.parquet: Input/output error"):
            export_parquet([row(0, 1.0), row(1, 1.0)], table)
    assert file.read_bytes() == b"old" and pq.read_table(table).num_rows == 1
    assert files_of(tmp_path) == {"done.json", "rows.parquet"}


def test_file_size_limit_for_real(tmp_path, python_here):
    # The kernel writes a part and then refuses (EFBIG): the same path as a full disk, without a mock.
    command, folder = python_here
    code = WRITER.replace("import dataclasses", "import resource, dataclasses").replace(
        "with run.lock():", "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nwith run.lock():"
    )
    result = subprocess.run(
        [*command, code, str(tmp_path), "-1"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert "RunStoreError" in result.stderr and "largest size allowed" in result.stderr
    run = RunStore(tmp_path).open("ntk", Unit(), context={})
    data = (run.path / "rows.jsonl").read_bytes()
    assert 2900 < len(data) <= 3000 and data.endswith(b"}\n") and len(run.rows()) == int(result.stdout.split()[-1])


def test_unwritable_folder(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:  # root may write anywhere: be nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(RunStoreError, match=r"cannot make the folder .*no permission; choose a folder"):
            RunStore(locked / "runs").open("ntk", Unit(), context={})
    finally:
        if is_root:
            os.seteuid(0)
        locked.chmod(0o700)
    assert list(locked.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunStoreError, match="a file stands where a folder is needed"):
        RunStore(tmp_path / "file").open("ntk", Unit(), context={})


def test_damaged_and_foreign_files_are_named(tmp_path, run):
    store = RunStore(tmp_path)
    run.append([row(0, 1.0), row(1, 2.0)])
    file = run.path / "rows.jsonl"
    file.write_bytes(file.read_bytes().replace(b'{"seed":0,"step":0', b'"seed":0,"step":0'))
    with pytest.raises(RunStoreError, match=r"rows\.jsonl line 1 is not a row"):
        run.rows()
    record = run.path / "run.json"
    file.write_text('{"step": 3}\n')
    with pytest.raises(RunStoreError, match=r"rows\.jsonl line 1 lacks metric or value"):
        run.rows()
    good = record.read_text()
    for bad, message in [
        ("{", r"run\.json is corrupt or not ours"),
        ("[]", r"run\.json must hold a JSON object, got list"),
        (good.replace('"format": 1', '"format": 2'), r"run\.json has format 2, this version reads 1"),
        (good.replace('"width": 64', '"width": 65'), r"run\.json does not match its folder's name"),
        ('{"format": 1}', r"run\.json is corrupt: it lacks"),
    ]:
        record.write_text(bad)
        with pytest.raises(RunStoreError, match=message):
            store.runs("ntk")
    record.unlink()
    with pytest.raises(RunStoreError, match=r"has no run\.json but holds"):
        store.open("ntk", Unit(width=64), context={"data": "abc"})
    with pytest.raises(RunStoreError, match=r"is no run \(it has no run\.json\)"):
        store.runs("ntk")


def test_rows_changed_after_the_end_are_detected(run):
    run.append([row(0, 1.0), row(1, 2.0)])
    run.finish({})
    file = run.path / "rows.jsonl"
    file.write_bytes(file.read_bytes().replace(b"2.0", b"3.0"))
    with pytest.raises(RunStoreError, match=r"rows\.jsonl is not what .*done\.json vouches for"):
        run.rows()
    (run.path / "done.json").write_text('{"format": 1}')
    with pytest.raises(RunStoreError, match=r"done\.json is corrupt .*missing: cpu_seconds"):
        run.rows()


def test_colliding_hashes_and_changed_defaults_are_detected(tmp_path, monkeypatch):
    import curvlab.runs.config as config
    import curvlab.runs.store as store_module

    store = RunStore(tmp_path)
    with monkeypatch.context() as patch:
        for module in (config, store_module):
            patch.setattr(module, "identity_hash", lambda _: "00000000")
            patch.setattr(module, "run_name", lambda *_: "same-00000000")
        store.open("ntk", Unit(width=1), context={})
        store.open("ntk", Unit(width=1), context={})
        with pytest.raises(RunStoreError, match=r"different run under the same name \(width=1, not 2\)"):
            store.open("ntk", Unit(width=2), context={})
        with pytest.raises(RunStoreError, match=r"different run under the same name"):
            store.open("ntk", Unit(width=1), context={"data": "other"})
    store.open("drift", Unit(), context={})
    fields = [("width", int, 32), ("seeds", tuple, (0, 1))]
    drifted = dataclasses.make_dataclass("Unit", [*fields, ("lr", float, 0.5)], frozen=True)
    with pytest.raises(RunStoreError, match=r"lr=0.01, not 0.5.*a default was changed"):
        store.open("drift", drifted(), context={})
    grown = dataclasses.make_dataclass("Unit", [*fields, ("lr", float, 0.01), ("dropout", float, 0.0)], frozen=True)
    assert store.open("drift", grown(), context={}).unit["dropout"] == 0.0


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "/abs"])
def test_experiment_is_one_folder_name(tmp_path, name):
    with pytest.raises(ValueError, match="experiment must be one plain folder name"):
        RunStore(tmp_path).open(name, Unit(), context={})


def test_clock_adds_up_over_sessions(run):
    for _ in range(2):
        with run.lock():
            time.sleep(0.03)
    run.finish({})
    assert 0.06 <= run.done["wall_seconds"] < 5


def test_collect_and_parquet(tmp_path):
    store = RunStore(tmp_path / "runs")
    names = []
    for width in (64, 32):
        run = store.open("ntk", Unit(width=width), context={})
        run.append([row(0, float(width)), {"seed": 1, "metric": "final", "value": 3}])
        run.finish({})
        names.append(run.name)
    unfinished = store.open("ntk", Unit(width=1), context={})
    rows = collect(store, "ntk")
    assert [r["width"] for r in rows] == [32, 32, 64, 64] and rows[0]["seeds"] == "0,1" and rows[0]["run"] == names[1]
    assert collect(store, "ntk", names[:1]) == rows[2:]
    with pytest.raises(RunStoreError, match="is not finished"):
        collect(store, "ntk", [unfinished.name])
    with pytest.raises(RunStoreError, match="no run named nothing"):
        collect(store, "ntk", ["nothing"])
    path = export_parquet(rows, tmp_path / "out" / "ntk.parquet")
    table = pq.read_table(path)
    assert table.column_names[-3:] == ["step", "metric", "value"] and table.num_rows == 4
    assert table.column("step").to_pylist() == [0, None, 0, None] and table.column("value").to_pylist() == [
        32.0,
        3.0,
        64.0,
        3.0,
    ]
    assert str(table.schema.field("width").type) == "int64"
    assert [p.name for p in path.parent.iterdir()] == ["ntk.parquet"]
    assert pq.read_table(export_parquet([], tmp_path / "empty.parquet")).num_rows == 0
    with pytest.raises(ValueError, match="column seed must hold one kind of scalar, got int, str"):
        export_parquet([{**row(0, 1.0), "seed": "a"}, row(1, 1.0)], path)
    assert pq.read_table(path).num_rows == 4


def test_environment_names_no_host_user_or_folder():
    facts = capture_environment({"numpy": np.__version__}, threads=2, device="cpu", commit="abc")
    expected = {"python", "implementation", "system", "cpu", "cpus", "threads", "device", "commit", "packages"}
    assert set(facts) == expected and facts["packages"] == {"numpy": np.__version__}
    words = " ".join(str(value) for value in facts.values()).split()
    for private in (platform.node(), getpass.getuser(), os.path.expanduser("~"), os.getcwd()):
        assert private not in words
