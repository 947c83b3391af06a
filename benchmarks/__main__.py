# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks NAME [--threads 1] [--quick] [--json FILE]``: print a benchmark's table, write its rows."""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import harness

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def load(name: str) -> ModuleType:
    """The module of benchmark ``name``."""
    return importlib.import_module(f"benchmarks.bench_{name}")


def _figure(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def print_table(title: str, rows: list[dict[str, Any]], *, settings: str) -> None:
    """One line a peer: medians of processor time, wall times beside them, the machine's limit where there is one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=settings, title_justify="left", caption_justify="left")
    table.add_column("case", overflow="fold")
    table.add_column("peer", overflow="fold")
    with_memory = any(row["ours_mb"] is not None for row in rows)
    for column in ("ours ms", "peer ms", "ratio", "wall ms", "peer", "ratio", "limit ms", "x limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("ours MB", "peer MB") if with_memory else ():
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in rows:
        limit = ("", "") if row["limit_ms"] is None else (_figure(row["limit_ms"]), f"{row['times_limit']:.2f}")
        table.add_row(
            "" if row["case"] == last else row["case"],
            f"({row['peer']})" if row["not_counted"] else row["peer"],
            *(_figure(row[key]) for key in ("ours_ms", "peer_ms")),
            f"[bold]{row['ratio']:.2f}[/bold]",
            *(_figure(row[key]) for key in ("ours_wall_ms", "peer_wall_ms")),
            f"{row['wall_ratio']:.2f}",
            *limit,
            *("" if row[key] is None else _figure(row[key]) for key in ("ours_mb", "peer_mb") if with_memory),
        )
        last = row["case"]
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for case, peer, why in sorted(
        {(row["case"], row["peer"], row["not_counted"]) for row in rows if row["not_counted"]}
    ):
        print(f"not counted in '{case}': {peer}: {why}")
    print_shares(harness.shares(rows))
    for limit in sorted({row["limit"] for row in rows if row["limit"]}):
        print(f"limit: {limit}")
    for name, note in {row["case"]: row["note"] for row in rows if row["note"]}.items():
        print(f"note on '{name}': {note}")


def print_shares(shares: list[dict[str, Any]]) -> None:
    """Our time as a share of the best counted peer's, against what must hold and what is aimed at."""
    for share in shares:
        reached = "reaches the goal" if share["share"] <= share["goal"] else "holds"
        if share["share"] > 1.03 * share["must"]:  # 3 % is noise
            reached = "DOES NOT HOLD"
        print(
            f"{share['case']}: {share['share']:.2f} of the best peer ({share['best']}); must hold {share['must']:.2f}, "
            f"goal {share['goal']:.2f}: {reached}"
        )


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` to ``path``, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(rows, indent=1))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def updated(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``path`` but those of the cases in ``rows``, then ``rows``.

    Raises:
        ValueError: path holds no rows.
    """
    case = operator.itemgetter("benchmark", "threads", "case")
    measured = {case(row) for row in rows}
    try:
        kept = [row for row in json.loads(path.read_text()) if case(row) not in measured] if path.exists() else []
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--only: {path} must hold the rows of an earlier --json, got {error!r}") from error
    return kept + rows


def run(name: str, options: argparse.Namespace, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure the cases of benchmark ``name`` and print their table; rows are written case by case, behind ``before``.

    Returns:
        The rows of this benchmark.
    """
    module = load(name)
    rounds, seconds, budget = (7, 0.05, 15.0) if options.quick else (25, 0.2, 60.0)
    budget = options.budget or budget
    rows: list[dict[str, Any]] = []
    for case in module.cases(quick=options.quick):
        if options.only and options.only not in case.name:
            continue
        if sys.stderr.isatty():
            print(f"\r{name}: {case.name} …\033[K", end="", file=sys.stderr, flush=True)
        for row in harness.measure(case, rounds=rounds, seconds=seconds, budget=budget):
            rows.append({"benchmark": name, "threads": options.threads, **row})
        if options.json:  # minutes of measuring are not lost to what comes after
            found = before + rows
            write_json(options.json, updated(options.json, found) if options.only else found)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    settings = (
        f"{options.threads} thread(s); medians of up to {rounds} rounds, engines alternating in one process; "
        f"ours/peer/limit ms: processor time a call, wall ms: wall time; ratio = peer / ours\n"
        f"allocator: {harness.allocator_settings()}"
    )
    if rows or not options.only:
        print_table(module.TITLE, rows, settings=settings)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare curvlab with its peers.")
    found.add_argument("name", choices=[*names(), "all"], help="which comparison")
    found.add_argument("--threads", type=int, default=1, help="threads of every engine (default 1)")
    found.add_argument("--quick", action="store_true", help="fewer rounds and sizes; ends within 5 minutes")
    found.add_argument("--budget", type=float, metavar="SECONDS", help="for the rounds of a case (60; with --quick 15)")
    found.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT; other rows of FILE stay")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    return found


def main() -> int:
    """Run one benchmark, or all."""
    options = parser().parse_args()
    if options.threads < 1:
        parser().error(f"--threads must be at least 1, got {options.threads}")
    if options.budget is not None and not options.budget > 0:
        parser().error(f"--budget must be above 0 seconds, got {options.budget:g}")
    if options.json and not os.access(options.json.parent, os.W_OK):  # now, not after minutes of measuring
        parser().error(f"--json: {options.json.parent} must be a folder that can be written to")
    if options.only and options.json:
        try:
            updated(options.json, [])
        except ValueError as error:
            parser().error(str(error))
    try:
        import torch

        import curvlab  # noqa: F401
    except ImportError as error:
        sys.exit(str(error))
    harness.keep_pages()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in names() if options.name == "all" else [options.name]:
        rows += run(name, options, rows)
    if options.only and not rows:
        parser().error(f"--only: no case of {options.name} contains {options.only!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
