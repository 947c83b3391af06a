# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import errno
import math
import os
import re
from html.parser import HTMLParser

import pytest

from curvlab.runs.report import Claim, Study, write_report
from curvlab.runs.report.page import _paper
from curvlab.runs.stats import Estimate, Survives, Verdict
from curvlab.runs.store import RunStoreError


class Page(HTMLParser):
    """Checks nesting while it collects ids, addresses and visible text."""

    VOID = ("meta", "link", "br", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_study):
    return Page(write_report([make_study(), make_study("other")], tmp_path_factory.mktemp("report")).read_text())


def test_page_is_well_formed_and_self_contained(page):
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        assert address.startswith("#") or address == "data:," or re.fullmatch(r"figures/[a-z_-]+\.pdf", address), (
            address
        )
        assert not address.startswith("#") or address[1:] in page.ids
    assert page.tags.count("script") == 1 and "img" not in page.tags


def test_page_explains_every_verdict_and_what_a_prediction_is(page):
    text = " ".join(page.text.split())
    for verdict in (Verdict.REPRODUCED, Verdict.DIRECTION_ONLY, Verdict.NOT_REPRODUCED):
        assert str(verdict) in text
    legend = text[text.index("Reproduced: the interval excludes") :]
    for words in ("Without a published value", "no number of the paper was met or missed", "scaled down"):
        assert words in legend
    assert all(f"{str(answer).capitalize()}:" in legend for answer in Survives)


def test_words_in_the_papers_column_carry_no_unit():
    assert _paper("not tested", "points") == "not tested" and _paper("theory: < 1", "×") == "theory: < 1×"
    assert _paper("0", "points") == "0 points" and _paper(11.3, "×") == "11.3×" and _paper(None, "×") == "–"
    assert _paper("3.86 (32, 1024)", "×") == "3.86 (32, 1024)"
    assert _paper("0.51× at σ = 0.05", "×") == "0.51× at σ = 0.05"


def test_rows_are_linked_and_every_control_has_a_line(tmp_path, make_study):
    study = make_study()
    told = "one (1.0 [0.5, 1.5], n=3; asked: above 0); other (not measured; asked: above 0)"
    claims = [dataclasses.replace(study.claims[0], control=told)]
    text = write_report([dataclasses.replace(study, claims=claims, rows="ntk_width.parquet")], tmp_path).read_text()
    assert '<a href="ntk_width.parquet">' in text
    assert "<small>one (1.0 [0.5, 1.5], n=3; asked: above 0)</small><small>other (not measured" in text


def test_page_shows_an_undecided_control(tmp_path, make_study):
    study = make_study()
    claims = [dataclasses.replace(claim, survives=Survives.UNDECIDED) for claim in study.claims]
    shown = Page(write_report([dataclasses.replace(study, claims=claims)], tmp_path).read_text())
    assert "? undecided" in " ".join(shown.text.split())


def test_page_says_it_all(tmp_path, page, make_study, hostile):
    text = " ".join(page.text.split())
    for words in (
        "From width 32 to 4096 the relative movement falls 11.3-fold",
        "11.3×",
        "n=3+1",
        "SD pooled over groups (df=12)",
        "✓ Reproduced",
        "○ Not testable at this preset",
        "✕ no",
        "absolute movement is constant",
        "21 min",
        "python -m experiments run ntk_width --preset cpu",
        "preset cpu",
        "arXiv 2604.07603, experiment 5",
        "4 Reproduced",
        "numpy 2.4, torch 2.14",
        hostile,
    ):
        assert words in text, words
    assert "Not the published data" not in text
    warned = write_report([make_study(published=False)], tmp_path / "b").read_text()
    assert warned.count("ot the published data") == 6  # the banner and every verdict


def test_a_range_claims_no_level(tmp_path, make_study):
    study = make_study()
    measured = Estimate(-0.1, -0.1, 0.2, 9, "worst; range", level=math.nan)
    claims = [dataclasses.replace(study.claims[0], measured=measured)]
    text = write_report([dataclasses.replace(study, claims=claims)], tmp_path).read_text()
    assert "<small>worst; range</small>" in text


def test_only_verdicts_on_other_data_are_marked(tmp_path, make_study):
    study = make_study(published=False)
    claims = [dataclasses.replace(claim, dataset="mnist") for claim in study.claims[1:]]
    claims.insert(0, dataclasses.replace(study.claims[0], dataset="cifar10"))
    mixed = dataclasses.replace(study, claims=claims, unpublished=("cifar10",))
    text = write_report([mixed, make_study("other", published=False)], tmp_path).read_text()
    assert text.count("ot the published data") == 1 + 1 + 5  # one banner for both; one verdict here, all of the other
    warning = Page(text).text
    assert "the data that were used" in " ".join(warning.split())


def test_hostile_texts_are_escaped(tmp_path, make_study, hostile):
    text = write_report([make_study()], tmp_path, title=hostile).read_text()
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert") > 5


def test_same_studies_same_bytes_and_all_figures(tmp_path, make_study):
    first = write_report([make_study()], tmp_path / "a")
    second = write_report([make_study()], tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.*"))
    assert names == ["figures/ntk_width-laziness.pdf", "figures/ntk_width-movement.pdf", "index.html"]
    for name in names:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


def test_full_disk_keeps_the_old_page(tmp_path, make_study, monkeypatch):
    path = write_report([make_study()], tmp_path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunStoreError, match="the disk is full"):
            write_report([make_study(published=False)], tmp_path)
    assert path.read_bytes() == old and not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStoreError, match="a file stands where a folder is needed"):
        write_report([make_study()], tmp_path / "file")


def test_bad_studies(tmp_path, make_study):
    with pytest.raises(ValueError, match=r"studies must be at least one, .* got \[\]"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match="each with its own name, got"):
        write_report([make_study(), make_study()], tmp_path)
    claim = Claim("a", "text", None, None, Verdict.NOT_TESTABLE)
    with pytest.raises(ValueError, match="every claim needs a name of its own, got 'a' twice"):
        Study("x", "t", "q", "s", "cpu", [claim, claim])
    with pytest.raises(ValueError, match="Study: name must be"):
        Study("X y", "t", "q", "s", "cpu", [])
    assert "1 Not testable" in write_report([Study("x", "t", "q", "s", "cpu", [claim])], tmp_path).read_text()
