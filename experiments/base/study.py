# SPDX-License-Identifier: Apache-2.0
"""What a study is, how studies are found, and what they are handed.

A study is one file ``experiments/<name>.py``. Its docstring begins with a title and holds the paragraphs
``Question:``, ``Source:`` and ``Prediction:``; its names are those of :class:`StudyModule`. Nothing is registered.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from curvlab import data
from curvlab.runs.config import canonical, config_hash, parse_overrides
from curvlab.runs.environment import capture_environment
from curvlab.runs.figures import Figure
from curvlab.runs.report import Claim
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table

FOLDER = Path(__file__).resolve().parent.parent
PARAGRAPHS = ("Question", "Source", "Prediction")

T = TypeVar("T")


class UsageError(Exception):
    """The user asked for something that does not exist or cannot be; printed as one line, exit status 2."""


class StudyModule(Protocol):
    """The names that a study's file defines.

    Attributes:
        __doc__: title, then ``Question:``, ``Source:``, ``Prediction:``.
        PROTOCOL: version of the study's code as far as it changes rows; raising it retires the runs made before.
        Config: frozen dataclass with at least ``dataset: str`` and ``seeds: int``; one of several data sets names the
            others in ``datasets: tuple[str, ...]`` (a field or a property), and its units have a field ``dataset``.
        PRESETS: configurations by name, the cheapest first, the most faithful last.
    """

    PROTOCOL: int
    Config: type
    PRESETS: Mapping[str, Any]

    def expand(self, config: Any) -> Sequence[Any]:
        """Units of at most ten minutes: frozen dataclasses that hold all that decides rows; ``str`` labels them."""
        ...

    def cost(self, unit: Any) -> float:
        """Relative price of a unit (any scale), for forecasts of the remaining time."""
        ...

    def run(self, unit: Any, run: Run, tools: Tools) -> Mapping[str, Any]:
        """Append the unit's rows to ``run``; returns JSON-able facts for its summary."""
        ...

    def forecast(self, unit: Any, tools: Tools) -> float:
        """Seconds that ``run`` will take, from a few timed steps."""
        ...

    def tables(self, rows: Sequence[Row], config: Any) -> Sequence[Table]:
        """Tables for the report."""
        ...

    def figures(self, rows: Sequence[Row], config: Any) -> Sequence[Figure]:
        """Figures for the report."""
        ...

    def claims(self, rows: Sequence[Row], config: Any) -> Sequence[Claim]:
        """Verdicts, from the rows alone."""
        ...

    def laws(self, rows: Sequence[Row], config: Any) -> Sequence[Law]:
        """What must hold at this configuration; ``run`` fails if one does not."""
        ...

    def notes(self, rows: Sequence[Row], config: Any) -> Sequence[str]:
        """What a reader must know beside the claims: rules, limits, audit."""
        ...


@dataclass(frozen=True)
class Law:
    """A statement that a run must satisfy, in words with its numbers, and whether it does."""

    text: str
    holds: bool


@dataclass
class Tools:
    """What a unit is handed besides its run.

    Attributes:
        device: where to train.
        data_root: folder of the data sets, or None for the defaults of :func:`curvlab.data.load`.
        progress: called as ``progress(done, total)``, for example by the training loop after each epoch.
        checkpoint_seconds: a unit saves its state at the first epoch end after this time.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_root: Path | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    checkpoint_seconds: float = 20.0
    _loaded: dict[str, data.Dataset] = field(default_factory=dict)

    def dataset(self, name: str, num_train: int | None = None) -> data.Dataset:
        """The data set on the device, read once; ``num_train`` keeps the first that many training samples."""
        if name not in self._loaded:
            self._loaded[name] = data.load(name, root=self.data_root, device=self.device)
        whole = self._loaded[name]
        return whole if num_train is None else whole.subset(num_train)

    def environment(self) -> dict[str, Any]:
        """Facts of this process: beside the results, never in a run's name."""
        words = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        packages = {"torch": str(torch.__version__)}
        return capture_environment(packages, threads=torch.get_num_threads(), device=words, commit=code_revision())


@functools.cache
def code_revision() -> str | None:
    """Commit of the checkout, with ``-dirty`` where files differ from it; None where git does not know it."""
    asked = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None


def choose_device(wish: str) -> torch.device:
    """``auto`` takes the GPU where one is usable.

    Raises:
        UsageError: ``cuda`` is asked for and there is none.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError("no usable CUDA device here: take --device cpu (or auto)")
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and torch.cuda.is_available()) else "cpu")


def study_names(folder: Path = FOLDER) -> list[str]:
    """Every file of the folder is a study."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load_study(name: str) -> StudyModule:
    """Import a study by name.

    Raises:
        UsageError: no such study; names the nearest.
    """
    pick("study", name, study_names())
    return importlib.import_module(f"experiments.{name}")  # type: ignore[return-value]


def pick(kind: str, name: str, options: Iterable[str]) -> str:
    """``name`` if it is one of ``options``.

    Raises:
        UsageError: it is not; one line with the nearest match and all options.
    """
    options = list(options)
    if name in options:
        return name
    near = difflib.get_close_matches(name, options, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"there is no {kind} {name!r}{guess}; there are: {', '.join(options)}")


def configure(study: StudyModule, preset: str, overrides: Sequence[str]) -> Any:
    """A preset's configuration with ``field=value`` strings applied.

    Raises:
        UsageError: unknown preset or field, or a value that the configuration refuses.
    """
    config = study.PRESETS[pick("preset", preset, study.PRESETS)]
    try:
        changed = parse_overrides(config, overrides)
        if not study.expand(changed):
            raise ValueError("this configuration has no units to run")
        return changed
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).removeprefix("parse_overrides: ")) from None


def variant(study: StudyModule, preset: str, config: Any) -> str:
    """``cpu``, or ``cpu-1a2b3c4d`` where the configuration is not the preset's own."""
    same = canonical(config) == canonical(study.PRESETS[preset])
    return preset if same else f"{preset}-{config_hash(config)}"


def description(study: Any) -> dict[str, str]:
    """``title`` and the paragraphs of the study's docstring, each as one line, keys in lower case."""
    title, *blocks = re.split(r"\n\s*\n", (study.__doc__ or "").strip())
    found = {"title": " ".join(title.split()).rstrip(".")}
    for block in blocks:
        head, colon, text = block.partition(":")
        if colon and head.strip() in PARAGRAPHS:
            found[head.strip().lower()] = " ".join(text.split())
    missing = [name for name in PARAGRAPHS if name.lower() not in found]
    if missing:
        raise ValueError(f"description: the docstring of {study.__name__} must hold {missing[0]}:, got none")
    return found


def dataset_names(config: Any) -> tuple[str, ...]:
    """All data sets of a configuration, ``config.dataset`` first: its ``datasets``, or that one alone."""
    return tuple(dict.fromkeys((config.dataset, *getattr(config, "datasets", ()))))


def context_of(study: StudyModule, config: Any, unit: Any, tools: Tools) -> dict[str, str]:
    """What names a run besides its unit: the bytes of *its* data set and the version of the study's protocol.

    A study of several data sets has units with a field ``dataset``; of the others all units share ``config.dataset``.
    """
    name = getattr(unit, "dataset", config.dataset)
    return {"data": tools.dataset(name).fingerprint, "protocol": str(study.PROTOCOL)}
