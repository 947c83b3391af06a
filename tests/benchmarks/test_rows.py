# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark that is measured again in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import updated


def row(case: str, ratio: float, threads: int = 1) -> dict:
    return {"benchmark": "norms", "threads": threads, "case": case, "ratio": ratio}


def test_cases_measured_again_replace_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a", 1.0), row("a", 2.0), row("b", 3.0), row("a", 4.0, threads=2)]))
    assert updated(path, [row("a", 5.0)]) == [row("b", 3.0), row("a", 4.0, threads=2), row("a", 5.0)]
    assert updated(tmp_path / "none.json", [row("a", 5.0)]) == [row("a", 5.0)]


@pytest.mark.parametrize("text", ["no rows", "[1, 2]", '[{"case": "a"}]'])
def test_files_of_something_else_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"--only: .*rows.json must hold the rows"):
        updated(path, [row("a", 5.0)])
    assert path.read_text() == text
