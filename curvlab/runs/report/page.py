# SPDX-License-Identifier: Apache-2.0
"""What a report is made of, and the writing of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from curvlab.runs.estimates import Estimate
from curvlab.runs.figures import Figure
from curvlab.runs.journal import atomic_write, explain
from curvlab.runs.tables import MISSING, Table, format_cell, format_estimate, format_seconds
from curvlab.runs.verdicts import Survives, Verdict

# Shape and word besides color, so that a badge reads in print and to color-blind eyes.
_BADGES = {
    Verdict.REPRODUCED: ("good", "✓"),
    Verdict.DIRECTION_ONLY: ("partly", "↗"),
    Verdict.NOT_REPRODUCED: ("bad", "✕"),
    Verdict.NOT_TESTABLE: ("open", "○"),
    Survives.YES: ("good", "✓"),
    Survives.NO: ("bad", "✕"),
    Survives.UNDECIDED: ("partly", "?"),
    Survives.NOT_TESTED: ("open", "○"),
}
# Wider than one panel of figures.new_figure (446 SVG units): such a figure takes the page's whole width.
_WIDE = 520.0


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
    control: str = ""  # what the control is and what it showed; several: "name (what it showed); name (..)"
    cost_seconds: float | None = None
    command: str = ""  # what to type to get this number
    preset: str = ""  # the preset at which the verdict was reached; the study's where empty
    note: str = ""  # below the verdict: "within ±5 %, so is the whole interval"
    dataset: str = ""  # its data, where a study has several: "mnist"


@dataclass(frozen=True)
class Study:
    """One study's section."""

    name: str  # as in `run NAME`: lower-case letters, digits, - and _
    title: str
    question: str
    source: str  # the paper and the section
    preset: str
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    rows: str = ""  # address of the raw rows, from the page's folder: "ntk_width.parquet"
    data_source: str = ""
    data_published: bool = True  # all its data are the published ones
    unpublished: Sequence[str] = ()  # where not: the data sets that are not; none named: no claim's are

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"Study: name must be lower-case letters, digits, - and _, got {self.name!r}")
        for kind, names in (("claim", [c.id for c in self.claims]), ("figure", [f.name for f in self.figures])):
            doubled = [name for name, count in Counter(names).items() if count > 1]
            if doubled:
                raise ValueError(f"Study {self.name}: every {kind} needs a name of its own, got {doubled[0]!r} twice")


def write_report(studies: Sequence[Study], folder: Path | str, *, title: str = "curvlab: reproduced or not") -> Path:
    """Write ``folder/index.html`` (self-contained) and ``folder/figures/<study>-<figure>.pdf``, each atomically.

    Returns the path of the page. The page makes no network request, and the same studies give the same bytes.

    Raises:
        ValueError: no study, or two studies of one name.
        RunStoreError: unwritable folder, full disk.
    """
    folder = Path(folder)
    page = render_page(studies, title=title)
    figures = [(f"{study.name}-{figure.name}.pdf", figure) for study in studies for figure in study.figures]
    try:
        (folder / "figures" if figures else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, folder, "make the folder") from error
    for name, figure in figures:
        figure.save_pdf(folder / "figures" / name)
    atomic_write(folder / "index.html", page.encode())  # last: a page never points to a figure that is not there
    return folder / "index.html"


def render_page(studies: Sequence[Study], *, title: str) -> str:
    """The page as text; see :func:`write_report`."""
    names = [study.name for study in studies]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"write_report: studies must be at least one, each with its own name, got {names}")
    here = resources.files("curvlab.runs.report")
    text = {name: (here / name).read_text(encoding="utf-8") for name in ("page.html.j2", "style.css", "script.js")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(paper=_paper, seconds=format_seconds, cell=format_cell)
    template = environment.from_string(text["page.html.j2"])
    # The policy forbids every request and every script but this one, whatever a caption may hold.
    digest = base64.b64encode(hashlib.sha256(text["script.js"].encode()).digest()).decode()
    return template.render(
        title=title,
        studies=studies,
        claims=[_claim_view(study, claim) for study in studies for claim in study.claims],
        tally=_tally(studies),
        figure=_figure_view,
        table=lambda table: Markup(table.to_html()),
        environment_rows=_environment_rows,
        unpublished=_unpublished(studies),
        style=Markup(text["style.css"]),
        script=Markup(text["script.js"]),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        missing=MISSING,
    )


def _paper(value: str | float | None, unit: str = "") -> str:
    """The paper's number as it prints it: no zeros added, since digits claim precision.

    Words carry no unit, and what has one gets no second.
    """
    if value is None:
        return MISSING
    if isinstance(value, str) and (not value[-1:].isdigit() or (unit and unit in value)):
        return value or MISSING
    return _with_unit(value if isinstance(value, str) else f"{value:.10g}".replace("-", "−"), unit)


def _with_unit(text: str, unit: str) -> str:
    space = "" if unit in ("", "×") else " "
    return f"{text}{space}{unit}"


def _claim_view(study: Study, claim: Claim) -> dict[str, Any]:
    """What the template shows of a claim, with sort keys for its columns."""
    value = interval = ""
    if claim.measured is not None:
        value, _, interval = format_estimate(claim.measured, with_n=False).partition(" ")
        value = _with_unit(value, claim.unit)
    return {
        "study": study,
        "claim": claim,
        "anchor": f"{study.name}-{claim.id}",
        "value": value,
        "interval": interval,
        "paper_sort": claim.paper if isinstance(claim.paper, (int, float)) else "",
        "badge": _badge(claim.verdict),
        "controls": re.split(r"(?<=\)); ", claim.control) if claim.control else [],
        "survives": _badge(claim.survives),
        "preset": claim.preset or study.preset,
        "data_published": _has_published_data(study, claim),
    }


def _badge(value: Verdict | Survives) -> dict[str, Any]:
    css, sign = _BADGES[value]
    order = list(type(value)).index(value)  # type: ignore[arg-type]
    return {"css": css, "sign": sign, "text": value.value, "order": order}


def _has_published_data(study: Study, claim: Claim) -> bool:
    """Whether a claim is about the published data: of a study's data sets only one may be other."""
    known = bool(claim.dataset and study.unpublished)
    return study.data_published or (known and claim.dataset not in study.unpublished)


def _unpublished(studies: Sequence[Study]) -> list[tuple[str, list[Study]]]:
    """What the data are -> the studies on them, for one warning and not one a study."""
    found: dict[str, list[Study]] = {}
    for study in studies:
        if not study.data_published:
            found.setdefault(study.data_source or "the data's source is not known", []).append(study)
    return list(found.items())


def _tally(studies: Sequence[Study]) -> list[tuple[dict[str, Any], int]]:
    counts = Counter(claim.verdict for study in studies for claim in study.claims)
    return [(_badge(verdict), counts[verdict]) for verdict in Verdict if counts[verdict]]


def _figure_view(study: Study, figure: Figure) -> dict[str, Any]:
    svg = figure.svg(prefix=study.name)
    box = re.search(r'viewBox="\S+ \S+ (\S+) \S+"', svg)
    units = float(box.group(1)) if box else _WIDE
    return {
        "svg": Markup(svg),
        "pdf": f"figures/{study.name}-{figure.name}.pdf",
        "units": round(units),
        "wide": units > _WIDE,
    }


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        rows.append((str(key).replace("_", " "), str(value)))
    return rows
