# SPDX-License-Identifier: Apache-2.0
"""The commands: ``list``, ``run``, ``estimate``, ``report``, ``verify``.

Exit status: 0 fine; 1 a unit failed, a law is violated or a verdict changed; 2 wrong usage; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from curvlab.runs.store import RunStore, RunStoreError
from curvlab.runs.tables import Table, format_seconds
from experiments.base import archive
from experiments.base.scheduler import Outcome, open_runs, run_units
from experiments.base.study import (
    StudyModule,
    Tools,
    UsageError,
    choose_device,
    configure,
    context_of,
    dataset_names,
    description,
    load_study,
    study_names,
)

# `field=value`, a command line's only bare words besides the study's name; "--data=DIR" begins with a dash.
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.S)


@dataclass(frozen=True)
class List:
    """List the studies with their questions and presets."""

    names: bool = False
    """Print the names alone, one a line."""


@dataclass(frozen=True)
class Run:
    """Run a study, write the report, print the verdicts. The same command again goes on where it was stopped."""

    name: tyro.conf.Positional[str]
    """The study."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes of the configuration, as field=value."""
    preset: str = "smoke"
    """smoke (seconds), cpu (minutes), paper (GPU)."""
    seeds: int | None = None
    """Number of seeds; the same as seeds=N."""
    data: Path | None = None
    """Folder of the data sets (default: CURVLAB_DATA, the cache, a download)."""
    out: Path = Path("runs")
    """Where runs and reports are kept."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    threads: int | None = None
    """Compute threads (default: PyTorch's)."""


@dataclass(frozen=True)
class Estimate(Run):
    """Time a few steps of every unit and print what the study will take; nothing is kept."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page of all studies, their figures as PDF, one Parquet file a study.

    A study that was not run here is shown from the committed rows.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Studies (default: all)."""
    preset: str | None = None
    """Show the runs of this preset (default: the most faithful one that is finished here)."""
    out: Path = Path("runs")
    """Where runs and reports are kept."""
    publish: bool = False
    """Also lay rows, verdicts, tables and figures into experiments/results/, to be committed. Of a study that was not
    run here: its verdicts, tables and figures anew, from the rows that are there."""


@dataclass(frozen=True)
class Verify:
    """Recompute the committed verdicts from rows; exit status 1 if one has changed."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Studies (default: all)."""
    out: Path = Path("runs")
    """Where runs are kept; without a finished run there, the committed rows are used."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Estimate, tyro.conf.subcommand("estimate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every foreseen failure into one line on stderr."""
    # torch.func imports torch.jit, which warns about itself: nothing that the user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Bare words last: a parser may end a positional list at the first option, and `--preset cpu lr=0.02` is natural.
    bare = [word for word in words if _OVERRIDE.fullmatch(word)]
    words = [word for word in words if not _OVERRIDE.fullmatch(word)]
    command: Any = tyro.cli(Command, args=words, prog="python -m experiments", description=__doc__)  # type: ignore[call-overload]
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a log file: 80 columns would fold the verdicts to a word a line
    try:
        if bare and not isinstance(command, Run):
            raise UsageError(f"{bare[0]}: only `run` and `estimate` take field=value")
        with clean_interrupts():
            return _dispatch(command, bare, console)
    except UsageError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except (RunStoreError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("experiments: stopped", file=sys.stderr)
        return 130


class Stopped(KeyboardInterrupt):
    """Ctrl-C; see :func:`clean_interrupts`."""


@contextmanager
def clean_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise :class:`Stopped`, so that one which is caught leaves no mark on the interpreter.

    CPython notes a plain ``KeyboardInterrupt`` that leaves an ``exec`` of text as unhandled, although a caller further
    up may catch it, and then ends the process by SIGINT in place of its exit status. Making a dataclass or a named
    tuple is such an ``exec``, and so are imports of modules that hold them: a matter of when the signal comes. The note
    is made for that very class, not for one derived from it. An ignored SIGINT, or a handler of the caller, stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it is interrupted
        return

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.getsignal(signal.SIGINT)
    is_pythons = before is signal.default_int_handler
    if is_pythons:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if is_pythons:
            signal.signal(signal.SIGINT, before)


def _dispatch(command: Any, overrides: list[str], console: Console) -> int:
    if isinstance(command, List):
        return list_studies(command, console)
    if isinstance(command, Run):
        return run_study(command, overrides, console)
    if isinstance(command, Report):
        return write_report(command, console)
    return verify_studies(command, console)


def list_studies(command: List, console: Console) -> int:
    """``list``."""
    if command.names:
        print("\n".join(study_names()))
        return 0
    rows = []
    for name in study_names():
        study = load_study(name)
        words = description(study)
        presets = ", ".join(f"{preset} ({len(study.expand(study.PRESETS[preset]))} units)" for preset in study.PRESETS)
        rows.append((name, words["title"], words["source"], presets))
    console.print(Table("", ("study", "question", "source", "presets"), rows).to_rich())
    return 0


def run_study(command: Run, bare: Sequence[str], console: Console) -> int:
    """``run`` and ``estimate``."""
    study = load_study(command.name)
    overrides = [*command.overrides, *bare, *([] if command.seeds is None else [f"seeds={command.seeds}"])]
    config = configure(study, command.preset, overrides)
    if command.threads is not None:
        if command.threads < 1:
            raise UsageError(f"--threads must be at least 1, got {command.threads}")
        torch.set_num_threads(command.threads)
    tools = Tools(device=choose_device(command.device), data_root=command.data)
    try:
        tools.dataset(config.dataset, getattr(config, "num_train", None))
        loaded = [tools.dataset(name) for name in dataset_names(config)]
    except (OSError, ValueError) as error:
        raise UsageError(f"the data of {command.name} cannot be had: {error}") from None
    if isinstance(command, Estimate):
        return forecast(study, config, tools, console)
    store = RunStore(command.out)
    context = partial(context_of, study, config, tools=tools)
    pairs = open_runs(study, command.name, config, store=store, context=context)
    where = f"{tools.device.type}, {torch.get_num_threads()} threads"
    console.print(f"{command.name}, preset {command.preset}: {len(pairs)} units on {where}", markup=False)
    outcome = run_units(study, command.name, pairs, tools, console)
    if not outcome.complete:
        return _say_unfinished(outcome, console)
    runs = [run for _, run in pairs]
    manifest = archive.make_manifest(
        command.name,
        command.preset,
        overrides,
        config,
        study=study,
        runs=runs,
        data=loaded,
    )
    archive.save_manifest(manifest, store, study)
    return _say_finished(study, manifest, store, console)


def _say_unfinished(outcome: Outcome, console: Console) -> int:
    done = sum(run.finished for run in outcome.runs)
    for label, line in outcome.failures:
        console.print(f"failed: {label}: {line}", markup=False, style="red")
    verb = "stopped" if outcome.interrupted else "not complete"
    console.print(f"{verb}: {done} of {len(outcome.runs)} units are finished; the same command goes on from here")
    return 130 if outcome.interrupted else 1


def _say_finished(study: StudyModule, manifest: archive.Manifest, store: RunStore, console: Console) -> int:
    """Report, verdicts, laws; 1 if a law is violated."""
    shown = [archive.finished(manifest, store)]
    for name in study_names():
        if name != manifest.study:
            shown += [archive.finished(one, store) for one in archive.manifests(store, name, load_study(name))[:1]]
    path, rows = archive.report(shown, store.root / "report"), shown[0].rows
    config = archive.restore_config(study, manifest.config)
    console.print(verdict_table(archive.claims_of(study, rows, manifest), manifest).to_rich())
    laws = list(study.laws(rows, config))
    for law in laws:
        style = "green" if law.holds else "bold red"
        console.print(f"law {'holds' if law.holds else 'VIOLATED'}: {law.text}", style=style, markup=False)
    console.print(f"{format_seconds(manifest.wall_seconds)} of work; report: {path.resolve()}", markup=False)
    return 0 if all(law.holds for law in laws) else 1


def verdict_table(claims: Sequence[archive.Claim], manifest: archive.Manifest) -> Table:
    """The page's landing table, for a terminal."""
    columns = ("claim", "paper", "measured", "verdict", "survives control?")
    rows = [(c.text, c.paper, c.measured, c.verdict, c.survives) for c in claims]
    return Table(f"{manifest.study}, preset {manifest.preset}", columns, rows)


def forecast(study: StudyModule, config: Any, tools: Tools, console: Console) -> int:
    """``estimate``: seconds of every unit from a few timed steps, and their sum."""
    rows, total = [], 0.0
    for unit in study.expand(config):
        seconds = study.forecast(unit, tools)
        total += seconds
        rows.append((str(unit), format_seconds(seconds)))
    console.print(Table("forecast", ("unit", "time"), [*rows, ("all", format_seconds(total))]).to_rich())
    return 0


def _named(names: Sequence[str]) -> list[tuple[str, StudyModule]]:
    return [(name, load_study(name)) for name in (names or study_names())]


def write_report(command: Report, console: Console) -> int:
    """``report``."""
    store, shown = RunStore(command.out), list[archive.Finished]()
    studies = _named(command.names)
    if command.preset is not None and not any(command.preset in study.PRESETS for _, study in studies):
        configure(studies[0][1], command.preset, [])  # says so, with near matches
    for name, study in studies:
        found = [m for m in archive.manifests(store, name, study) if command.preset in (None, m.preset)]
        if found:
            shown.append(archive.finished(found[0], store))
            continue
        there = archive.committed(name)
        if there is not None and command.preset in (None, there.manifest.preset):
            shown.append(there)
            words = f"{name}: not run here, shown from the committed rows (preset {there.manifest.preset})"
            console.print(words, markup=False)
            continue
        hint = f"python -m experiments run {name} --preset {command.preset or next(iter(study.PRESETS))}"
        console.print(f"{name}: no finished run in {store.root}; type: {hint}", markup=False)
    if not shown:
        return 1
    console.print(f"report: {archive.report(shown, store.root / 'report').resolve()}", markup=False)
    for one in shown if command.publish else []:
        publish_study(one, console, is_asked=command.preset is not None)
    return 0


def publish_study(found: archive.Finished, console: Console, *, is_asked: bool) -> None:
    """Publish, but let no quick run take the place of a longer one's committed results unless its preset was named."""
    name, preset = found.manifest.study, found.manifest.preset
    there, order = archive.committed(name), list(load_study(name).PRESETS)
    if there is not None and not is_asked and order.index(preset) < order.index(there.manifest.preset):
        words = f"{name}: preset {there.manifest.preset} is committed and stays; to replace it: --preset {preset}"
        console.print(words, markup=False)
        return
    for path in archive.publish(found):
        console.print(f"published: {path}", markup=False)


def verify_studies(command: Verify, console: Console) -> int:
    """``verify``."""
    store, changed = RunStore(command.out), False
    for name, _ in _named(command.names):
        result = archive.verify(name, store)
        changed |= bool(result.changes)
        state = "CHANGED" if result.changes else "unchanged" if result.compared else "not checked"
        console.print(f"{name}: {state} ({result.compared} claims, from {result.rows_from})", markup=False)
        for change in result.changes:
            console.print(f"  {change}", markup=False, style="red")
    return int(changed)
