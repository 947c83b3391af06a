# SPDX-License-Identifier: Apache-2.0
"""What a report is made of, and the writing of it."""

from __future__ import annotations

import base64
import enum
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from curvlab.runs.estimates import Estimate
from curvlab.runs.figures import Figure
from curvlab.runs.journal import atomic_write, explain
from curvlab.runs.tables import MISSING, Table, format_number, format_seconds
from curvlab.runs.verdicts import Survives, Verdict


@dataclass(frozen=True)
class Claim:
    """One line of the landing table."""

    id: str  # short and stable, for links and `verify`: "ratio"
    text: str  # the claim in words
    paper: str | float | None  # the paper's number
    measured: Estimate | None  # None: this preset cannot
    verdict: Verdict
    unit: str = ""  # behind the numbers: "%", "×"
    survives: Survives = Survives.NOT_TESTED
    control: str = ""  # what the control is and what it showed
    cost_seconds: float | None = None
    command: str = ""  # what to type to get this number
    preset: str = ""  # the preset at which the verdict was reached
    note: str = ""  # below the verdict: "within ±5 %, so is the whole interval"


@dataclass(frozen=True)
class Study:
    """One study's section."""

    name: str  # as in `run NAME`
    title: str
    question: str
    source: str  # the paper and the section
    preset: str
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    data_source: str = ""
    data_published: bool = True


def write_report(studies: Sequence[Study], folder: Path | str, *, title: str = "curvlab: reproduced or not") -> Path:
    """Write ``folder/index.html`` (self-contained) and ``folder/figures/<study>-<figure>.pdf``, atomically each.

    Returns the path of the page. The page makes no network request, and the same studies give the same bytes.

    Raises:
        ValueError: no study, or two studies of one name.
        RunStoreError: unwritable folder, full disk.
    """
    raise NotImplementedError
