# SPDX-License-Identifier: Apache-2.0
"""Runs on disk, found by their content: ``root/experiment/width=128-1a2b3c4d/{run.json, rows.jsonl, done.json}``.

A *unit* (frozen dataclass) and its *context* (data and code fingerprints) give the folder's name. ``run.json`` holds
both, ``rows.jsonl`` grows while the run goes on, ``done.json`` appears once, whole, when it is finished. Whatever is
killed can be opened again: finished runs are skipped by the caller, unfinished ones go on from ``checkpoint_path``.

A row is a flat dict of scalars in long format: factors, optionally ``step``, then ``metric`` and ``value``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from curvlab.runs.config import canonical, identity, identity_hash, run_name
from curvlab.runs.environment import capture_environment
from curvlab.runs.journal import Journal, RunStoreError, atomic_write, explain, read_json, writer_lock
from curvlab.runs.rows import Row, decode_row, encode_row, export_parquet, flat_factors

__all__ = ["FORMAT", "Row", "Run", "RunStore", "RunStoreError", "collect", "export_parquet"]

# Version of the folder's layout, in run.json. Readers refuse any other, naming the file.
FORMAT = 1


class RunStore:
    """All runs below one folder. Nothing is written before :meth:`open`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def open(self, experiment: str, unit: Any, *, context: Mapping[str, str] | None = None) -> Run:
        """The run of ``unit`` (a frozen dataclass), made if it is not there yet.

        Args:
            experiment: name of the study, one folder below the root.
            unit: everything that decides the result.
            context: fingerprints of what the unit does not hold, such as data and code; part of the name.

        Raises:
            RunStoreError: the folder is unwritable, holds something else, or holds a run of *another* unit under this
                name (a hash collision, an edited ``run.json``, or a default that has been changed since).
        """
        if not experiment or experiment.startswith(".") or Path(experiment).name != experiment:
            raise ValueError(f"RunStore.open: experiment must be one plain folder name, got {experiment!r}")
        path = self.root / experiment / run_name(unit, context)
        record = {
            "format": FORMAT,
            "experiment": experiment,
            "identity": identity(unit, context),
            "unit": canonical(unit),
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, path, "make the folder") from error
        if not (path / "run.json").exists():
            if foreign := _contents(path):
                raise RunStoreError(f"RunStore: {path} has no run.json but holds {foreign[0]}; move it away")
            atomic_write(path / "run.json", _json_bytes(record))
        run = Run(path)
        _check_same(run, record)
        return run

    def runs(self, experiment: str) -> list[Run]:
        """All runs of ``experiment``, finished or not, sorted by name; empty if there is no such folder.

        Raises:
            RunStoreError: a sub-folder is no run, or a ``run.json`` is corrupt; the message names it.
        """
        folder = self.root / experiment
        try:
            entries = sorted(folder.iterdir()) if folder.exists() else []
        except OSError as error:
            raise explain(error, folder, "list") from error
        paths = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
        # A folder without run.json and otherwise empty was killed between its making and its first file.
        return [Run(path) for path in paths if (path / "run.json").exists() or _contents(path)]


class Run:
    """One run's folder. Made by :meth:`RunStore.open`; reading needs no lock, writing takes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        record = _read_record(path)
        self.experiment: str = record["experiment"]
        self.unit: dict[str, Any] = record["unit"]
        self.context: dict[str, str] = record["identity"]["context"]
        self._identity = record["identity"]
        self._journal = Journal(path / "rows.jsonl")
        self._session: tuple[float, float] | None = None  # wall and processor clock when the lock was taken

    @property
    def checkpoint_path(self) -> Path:
        """Where the training of this run keeps its state; removed by :meth:`finish`."""
        return self.path / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        """Whether ``done.json`` is there."""
        return (self.path / "done.json").exists()

    @property
    def done(self) -> dict[str, Any]:
        """``done.json``: ``summary``, ``wall_seconds``, ``cpu_seconds``, ``environment``, ``rows``, ``rows_sha256``.

        Raises:
            RunStoreError: the run is not finished, or the file is corrupt.
        """
        if not self.finished:
            raise RunStoreError(f"RunStore: {self.path} is not finished")
        done = read_json(self.path / "done.json")
        missing = {"format", "summary", "wall_seconds", "cpu_seconds", "environment", "rows", "rows_sha256"} - set(done)
        if missing or done["format"] != FORMAT:
            raise RunStoreError(
                f"RunStore: {self.path / 'done.json'} is corrupt or of another format (expected {FORMAT}, got "
                f"{done.get('format')!r}; missing: {', '.join(sorted(missing)) or 'nothing'}); move its folder away"
            )
        return done

    @property
    def summary(self) -> dict[str, Any]:
        """What :meth:`finish` was given."""
        return self.done["summary"]

    @contextmanager
    def lock(self) -> Iterator[Run]:
        """Be this run's only writer. A killed process never leaves it locked (``flock``).

        The time spent inside is added to the run's clock, over all sessions that worked on it.

        Raises:
            RunStoreError: another process writes this run; the message names its pid.
        """
        with writer_lock(self.path / "lock"):
            for leftover in self.path.glob(".*.json.*.tmp"):  # of a killed writer: we are the only one now
                with suppress(OSError):
                    leftover.unlink()
            self._session = (time.perf_counter(), time.process_time())
            try:
                yield self
            finally:
                self._tick()
                self._session = None

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows: flat dicts of scalars with ``metric`` (text) and ``value`` (a number, may be NaN or infinite).

        On return they are fsynced. Takes the lock for the call where the caller does not hold it.

        Raises:
            ValueError, TypeError: a row lacks ``metric`` or ``value``, or holds something that is no scalar; then
                nothing is written.
            RunStoreError: full disk, locked or finished run.
        """
        encoded = [encode_row(row, index) for index, row in enumerate(rows)]
        with self._writing("append to"):
            if encoded:
                self._journal.append(encoded)
                self._tick()

    def rows(self) -> list[Row]:
        """All rows in order of first appearance; of rows that differ in ``value`` alone, the last wins.

        A row torn by a kill is dropped (its step is repeated on resume, hence the doubles).

        Raises:
            RunStoreError: the file was edited or damaged, or does not match ``done.json`` any more.
        """
        if self.finished:
            done, data = self.done, self._journal.whole_bytes()
            if hashlib.sha256(data).hexdigest() != done["rows_sha256"]:
                raise RunStoreError(
                    f"RunStore: {self._journal.path} is not what {self.path / 'done.json'} vouches for ({done['rows']} "
                    f"rows, now {data.count(10)}): it was edited or damaged; move the folder away and run again"
                )
        unique: dict[str, Row] = {}
        for number, row in enumerate(map(decode_row, self._journal.read()), start=1):
            if "metric" not in row or "value" not in row:
                raise RunStoreError(f"RunStore: {self._journal.path} line {number} lacks metric or value: not our row")
            key = json.dumps({name: item for name, item in row.items() if name != "value"}, sort_keys=True)
            unique[key] = row
        return list(unique.values())

    def finish(
        self,
        summary: Mapping[str, Any],
        *,
        environment: Mapping[str, Any] | None = None,
        keep_checkpoint: bool = False,
    ) -> None:
        """Write ``done.json`` (atomically), after which the run is read-only, and remove the checkpoint.

        Args:
            summary: JSON-able facts of the whole run.
            environment: see :func:`curvlab.runs.environment.capture_environment`, the default.
            keep_checkpoint: leave the file at :attr:`checkpoint_path`.

        Raises:
            TypeError, ValueError: ``summary`` is not JSON-able (NaN included: put numbers into rows).
            RunStoreError: full disk, locked, or finished already.
        """
        with self._writing("finish"):
            data = self._journal.whole_bytes()
            wall, cpu = self._tick()
            done = {
                "format": FORMAT,
                "summary": dict(summary),
                "wall_seconds": wall,
                "cpu_seconds": cpu,
                "environment": dict(capture_environment() if environment is None else environment),
                "rows": data.count(b"\n"),
                "rows_sha256": hashlib.sha256(data).hexdigest(),
            }
            atomic_write(self.path / "done.json", _json_bytes(done))
            if not keep_checkpoint:
                with suppress(OSError):
                    self.checkpoint_path.unlink()

    @contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        if self._session is None:
            with self.lock(), self._writing(doing):
                yield
            return
        if self.finished:
            raise RunStoreError(f"RunStore: cannot {doing} {self.path}: it is finished; move it away to run it again")
        yield

    def _tick(self) -> tuple[float, float]:
        """Add the time since the last tick to ``clock.json`` and return wall and processor seconds in all."""
        now = (time.perf_counter(), time.process_time())
        start = self._session or now
        wall, cpu = self._clock()
        total = (wall + now[0] - start[0], cpu + now[1] - start[1])
        if self._session is not None:
            self._session = now
            # No fsync: after a power cut a clock that lags is no harm, and results do not depend on it.
            temporary = self.path / f".clock.json.{os.getpid()}.tmp"
            with suppress(OSError):
                temporary.write_text(json.dumps({"wall_seconds": total[0], "cpu_seconds": total[1]}))
                os.replace(temporary, self.path / "clock.json")
            with suppress(OSError):
                temporary.unlink()
        return total

    def _clock(self) -> tuple[float, float]:
        try:
            clock = json.loads((self.path / "clock.json").read_bytes())
            return float(clock["wall_seconds"]), float(clock["cpu_seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0, 0.0


def collect(store: RunStore, experiment: str, names: Iterable[str] | None = None) -> list[Row]:
    """Rows of the finished runs among ``names`` (default: all of ``experiment``), sorted by run, ready for a table.

    Each row gains ``run`` (the name) and the unit's fields that it does not hold itself; nested fields are joined by
    dots, sequences written ``32,64``.

    Raises:
        RunStoreError: a name is given that is no finished run.
    """
    wanted = None if names is None else set(names)
    rows: list[Row] = []
    for run in store.runs(experiment):
        if (wanted is None and not run.finished) or (wanted is not None and run.name not in wanted):
            continue
        if not run.finished:
            raise RunStoreError(f"RunStore: {run.path} is not finished; run the experiment again to resume it")
        factors = {"run": run.name, **flat_factors(run.unit)}
        rows += [{**factors, **row} for row in run.rows()]
        if wanted is not None:
            wanted.discard(run.name)
    if wanted:
        raise RunStoreError(f"RunStore: {store.root / experiment} holds no run named {sorted(wanted)[0]}")
    return rows


def _json_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def _contents(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.exists():
        raise RunStoreError(f"RunStore: {path} is no run (it has no run.json); move it out of the store")
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise RunStoreError(
            f"RunStore: {file} has format {record.get('format')!r}, this version reads {FORMAT}; move its folder away"
        )
    stored = record.get("identity")
    if not isinstance(stored, dict) or not isinstance(record.get("unit"), dict) or "experiment" not in record:
        raise RunStoreError(f"RunStore: {file} is corrupt: it lacks experiment, identity or unit; move its folder away")
    if not path.name.endswith(f"-{identity_hash(stored)}"):
        raise RunStoreError(
            f"RunStore: {file} does not match its folder's name (hash {identity_hash(stored)}): "
            "it was edited or renamed; move the folder away and run again"
        )
    return record


def _check_same(run: Run, record: Mapping[str, Any]) -> None:
    """Refuse to go on with a folder whose unit is not the one asked for.

    The hash alone cannot tell: eight digits may collide, and a changed default hides from it (defaults are left out).
    """
    asked = dict(record["unit"])
    stored = {name: value for name, value in run.unit.items() if name in asked}
    differing = [name for name, value in stored.items() if value != asked[name]]
    if run._identity != record["identity"] or differing:
        what = f"{differing[0]}={stored[differing[0]]!r}, not {asked[differing[0]]!r}" if differing else "another unit"
        raise RunStoreError(
            f"RunStore: {run.path / 'run.json'} holds a different run under the same name ({what}): a default was "
            "changed since, the file was edited, or two names collide; move the folder away and run again"
        )
    run.unit = asked
