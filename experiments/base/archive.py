# SPDX-License-Identifier: Apache-2.0
"""From finished runs to a page, a committed result, and back: manifests, reports, ``publish`` and ``verify``.

``OUT/<study>/<variant>.json`` is the manifest of one configuration: which runs it consists of. ``experiments/results/
<study>/`` holds what is committed: ``rows.parquet``, ``verdicts.json``, the tables and the figures.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvlab.data import Dataset
from curvlab.runs.config import canonical
from curvlab.runs.figures import Figure
from curvlab.runs.journal import atomic_write, read_json
from curvlab.runs.report import Claim, write_report
from curvlab.runs.report import Study as StudyPage
from curvlab.runs.store import Row, RunStore, RunStoreError, collect, export_parquet
from experiments.base.study import FOLDER, StudyModule, description, load_study, variant

RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Manifest:
    """One configuration of one study, run to its end.

    Attributes:
        study: its name.
        preset: the preset it started from.
        overrides: ``field=value`` strings on top.
        config: canonical form of the configuration.
        runs: names of its runs in the store.
        data: ``source`` (a sentence without folders), ``published``, ``fingerprint`` of the data sets; ``unpublished``:
            the names of those that are not published ones.
        environment: versions, processor, threads, device.
        protocol: the study's ``PROTOCOL``.
        wall_seconds: of all its units together.
    """

    study: str
    preset: str
    overrides: tuple[str, ...]
    config: Mapping[str, Any]
    runs: tuple[str, ...]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    protocol: int
    wall_seconds: float

    @property
    def command(self) -> str:
        """What to type to get it again."""
        return shlex.join(["python", "-m", "experiments", "run", self.study, "--preset", self.preset, *self.overrides])

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**dataclasses.asdict(self), "overrides": list(self.overrides), "runs": list(self.runs)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: Path) -> Manifest:
        """Back from :meth:`to_json`.

        Raises:
            RunStoreError: a field is missing; ``path`` is named.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in stored]
        if missing:
            raise RunStoreError(
                f"{path} is not a manifest of this version (no {missing[0]!r}); move it away and run again"
            )
        picked = {name: stored[name] for name in names}
        return cls(**{**picked, "overrides": tuple(picked["overrides"]), "runs": tuple(picked["runs"])})


def restore_config(study: StudyModule, stored: Mapping[str, Any]) -> Any:
    """The configuration behind a canonical form (flat fields; lists were tuples), whatever the presets say today."""
    known = {field.name for field in dataclasses.fields(study.Config)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items() if key in known}
    return study.Config(**values)


def save_manifest(manifest: Manifest, store: RunStore, study: StudyModule) -> Path:
    """Write it beside the runs."""
    label = variant(study, manifest.preset, restore_config(study, manifest.config))
    path = store.root / manifest.study / f"{label}.json"
    atomic_write(path, _json(manifest.to_json()))
    return path


def manifests(store: RunStore, name: str, study: StudyModule) -> list[Manifest]:
    """Manifests whose runs are all there and were made by today's protocol, the most faithful preset first.

    Order: a preset as it stands before one with overrides, later presets of ``PRESETS`` before earlier ones.
    """
    finished = {run.name for run in store.runs(name) if run.finished}
    found: list[Manifest] = []
    for path in sorted((store.root / name).glob("*.json")):
        manifest = Manifest.from_json(read_json(path), path)
        if finished >= set(manifest.runs) and manifest.protocol == study.PROTOCOL and manifest.preset in study.PRESETS:
            found.append(manifest)
    order = list(study.PRESETS)
    return sorted(found, key=lambda m: (len(m.overrides), -order.index(m.preset), m.overrides))


def claims_of(study: StudyModule, rows: Sequence[Row], manifest: Manifest) -> list[Claim]:
    """The study's verdicts, with the command that gives them and what they cost.

    The whole run's cost where a claim states none; nothing where nothing was measured.
    """
    config = restore_config(study, manifest.config)
    return [
        dataclasses.replace(
            claim,
            command=manifest.command,
            preset=manifest.preset,
            cost_seconds=_cost(claim, manifest),
        )
        for claim in study.claims(rows, config)
    ]


def _cost(claim: Claim, manifest: Manifest) -> float | None:
    if claim.measured is None:
        return None
    return manifest.wall_seconds if claim.cost_seconds is None else claim.cost_seconds


def page(study: StudyModule, rows: Sequence[Row], manifest: Manifest) -> StudyPage:
    """What the report shows of one study."""
    words, config = description(study), restore_config(study, manifest.config)
    laws = [f"{'holds' if law.holds else 'VIOLATED'}: {law.text}" for law in study.laws(rows, config)]
    return StudyPage(
        name=manifest.study,
        title=words["title"],
        question=words["question"],
        source=words["source"],
        preset=" ".join([manifest.preset, *manifest.overrides]),
        claims=claims_of(study, rows, manifest),
        tables=list(study.tables(rows, config)),
        figures=list(study.figures(rows, config)),
        notes=[f"Prediction: {words['prediction']}", *study.notes(rows, config), *(f"Law {text}" for text in laws)],
        environment=dict(manifest.environment),
        data_source=str(manifest.data["source"]),
        data_published=bool(manifest.data["published"]),
        unpublished=tuple(manifest.data.get("unpublished", ())),
    )


@dataclass(frozen=True)
class Finished:
    """A study run to its end, with its rows.

    Attributes:
        manifest: of its configuration.
        rows: long rows of all its runs.
        is_committed: they are those of ``experiments/results``, and no run of this machine.
    """

    manifest: Manifest
    rows: list[Row]
    is_committed: bool = False


def finished(manifest: Manifest, store: RunStore) -> Finished:
    """A run of this machine."""
    return Finished(manifest, collect(store, manifest.study, manifest.runs))


def committed(name: str, results: Path = RESULTS) -> Finished | None:
    """What is committed of a study; None where nothing is, or it is of another version of its protocol or presets.

    Raises:
        RunStoreError: a committed file is missing its pair or is corrupt.
    """
    folder, study = results / name, load_study(name)
    if not (folder / "verdicts.json").exists():
        return None
    manifest = Manifest.from_json(read_json(folder / "verdicts.json"), folder / "verdicts.json")
    if manifest.protocol != study.PROTOCOL or manifest.preset not in study.PRESETS:
        return None
    return Finished(manifest, read_rows(folder / "rows.parquet"), is_committed=True)


def report(found: Sequence[Finished], folder: Path) -> Path:
    """One HTML page of these studies, their figures as PDF, one Parquet file a study; returns the page's path."""
    pages = []
    for one in found:
        study = load_study(one.manifest.study)
        export_parquet(one.rows, folder / f"{one.manifest.study}.parquet")
        shown = page(study, one.rows, one.manifest)
        where = {"rows": "committed in experiments/results, not run on this machine"} if one.is_committed else {}
        pages.append(
            dataclasses.replace(shown, rows=f"{one.manifest.study}.parquet", environment={**where, **shown.environment})
        )
    return write_report(pages, folder)


def publish(found: Finished, results: Path = RESULTS) -> list[Path]:
    """Lay a run's rows, verdicts, tables and figures where they are committed; returns the files.

    Of what is committed already the rows stay, and the rest is made anew from them: after a change of how it is shown.
    """
    manifest, rows = found.manifest, found.rows
    shown, folder = page(load_study(manifest.study), rows, manifest), results / manifest.study
    written = [] if found.is_committed else [export_parquet(rows, folder / "rows.parquet")]
    record = {**manifest.to_json(), "claims": [claim_record(claim) for claim in shown.claims]}
    texts = {"verdicts.json": _json(record)}
    for index, table in enumerate(shown.tables):
        stem = "table" if index == 0 else f"table_{index + 1}"
        texts[f"{stem}.md"] = f"**{table.title}**\n\n{table.to_markdown()}".encode()
        texts[f"{stem}.csv"] = table.to_csv().encode()
    for file, text in texts.items():
        atomic_write(folder / file, text)
        written.append(folder / file)
    for figure in shown.figures:
        written += save_figure(figure, folder)
    return written


def save_figure(figure: Figure, folder: Path) -> list[Path]:
    """The figure as SVG and as PNG (for a README)."""
    return [figure.save_svg(folder / f"{figure.name}.svg"), figure.save_png(folder / f"{figure.name}.png", dpi=130)]


def claim_record(claim: Claim) -> dict[str, Any]:
    """A claim as JSON: what ``verify`` compares (verdict, survives), and the numbers beside it."""
    measured = None
    if claim.measured is not None:
        estimate = claim.measured
        ends = [None if end != end else end for end in (estimate.low, estimate.high)]  # NaN is no JSON
        measured = {
            "value": estimate.value,
            "low": ends[0],
            "high": ends[1],
            "n": estimate.n_text,
            "how": estimate.method,
        }
    return {
        "id": claim.id,
        "text": claim.text,
        "paper": claim.paper,
        "measured": measured,
        "verdict": str(claim.verdict),
        "survives": str(claim.survives),
    }


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`: where the rows came from, what was compared, what changed."""

    study: str
    rows_from: str
    compared: int
    changes: tuple[str, ...]


def verify(name: str, store: RunStore, results: Path = RESULTS) -> Verification:
    """Recompute the verdicts and compare them with the committed ones.

    Rows: this machine's finished run of the same configuration, else the committed ones.

    Raises:
        RunStoreError: a committed file is missing its pair or is corrupt.
    """
    study, folder = load_study(name), results / name
    if not (folder / "verdicts.json").exists():
        return Verification(name, "nothing is committed", 0, ())
    stored = read_json(folder / "verdicts.json")
    recorded = Manifest.from_json(stored, folder / "verdicts.json")
    local = [m for m in manifests(store, name, study) if m.config == recorded.config]
    if local:
        rows, manifest, origin = collect(store, name, local[0].runs), local[0], f"the run in {store.root}"
    else:
        rows, manifest, origin = read_rows(folder / "rows.parquet"), recorded, "the committed rows"
    now = {claim.id: claim_record(claim) for claim in claims_of(study, rows, manifest)}
    before = {claim["id"]: claim for claim in stored["claims"]}
    changes = []
    for claim_id in [*before, *(new for new in now if new not in before)]:
        old, new = before.get(claim_id), now.get(claim_id)
        if old is None or new is None:
            changes.append(f"{claim_id}: {'is new' if old is None else 'is gone'}")
            continue
        changes += [
            f"{claim_id}: {key} was {old[key]!r}, is {new[key]!r}"
            for key in ("verdict", "survives")
            if old[key] != new[key]
        ]
    return Verification(name, origin, len(now), tuple(changes))


def read_rows(path: Path) -> list[Row]:
    """Rows from an exported Parquet file, without the empty cells that the table form added.

    Raises:
        RunStoreError: the file is missing or is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunStoreError(f"{path} cannot be read: {error}") from error
    return [{key: value for key, value in row.items() if value is not None} for row in table.to_pylist()]


def make_manifest(
    name: str,
    preset: str,
    overrides: Sequence[str],
    config: Any,
    *,
    study: StudyModule,
    runs: Sequence[Any],
    data: Sequence[Dataset],
) -> Manifest:
    """The manifest of runs that are all finished; ``data`` are their data sets, the configuration's own first."""
    done = [run.done for run in runs]
    return Manifest(
        study=name,
        preset=preset,
        overrides=tuple(overrides),
        config=canonical(config),
        runs=tuple(run.name for run in runs),
        data={
            "source": "; ".join(map(_source, data)),
            "published": all(one.published for one in data),
            "unpublished": [one.name for one in data if not one.published],
            "fingerprint": "+".join(one.fingerprint for one in data),
        },
        environment=_environment([one["environment"] for one in done]),
        protocol=study.PROTOCOL,
        wall_seconds=sum(one["wall_seconds"] for one in done),
    )


def _source(data: Dataset) -> str:
    """``mnist: the published bytes``: the folder in between is nobody's business in a committed file."""
    where, _, verdict = data.source.rpartition(": ")
    return f"{data.name}: {verdict}" if where else data.source


def _environment(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last unit's; says so where others ran elsewhere or by other code."""
    others = sum(one != found[-1] for one in found)
    return {**found[-1], **({"other units": f"{others} of {len(found)} ran in another one"} if others else {})}


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
