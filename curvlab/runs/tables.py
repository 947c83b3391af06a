# SPDX-License-Identifier: Apache-2.0
"""One table, four faces: Markdown for a README, HTML for the report, CSV for machines, rich for the terminal.

Cells are text, numbers, booleans, None (shown as a dash), enums or :class:`~curvlab.runs.stats.Estimate`, which reads
``0.934 [0.921, 0.947], n=3``. Digits: an interval's half-width gets two significant digits and the value as many
decimals; a number without interval gets four significant digits, and none that it does not have (0.005, 93.3).
"""

from __future__ import annotations

import csv
import enum
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curvlab.runs.estimates import Estimate

if TYPE_CHECKING:
    import rich.table

MISSING = "–"


def format_number(value: float, digits: int = 4) -> str:
    """``digits`` significant digits, thousands separated, no exponent between 1e-4 and 1e15; integers in full.

    A number that ends before (a learning rate, a rounded percentage) gets no zeros behind it.
    """
    if isinstance(value, bool) or value is None:
        return MISSING if value is None else ("yes" if value else "no")
    if not math.isfinite(value):
        return {"nan": MISSING, "inf": "∞", "-inf": "−∞"}[repr(float(value))]
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return _minus(f"{int(value):,}" if abs(value) >= 10000 else f"{int(value)}")
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 4 and float(f"{value:.{digits - 1}g}") == value:
        return _minus(f"{value:.{digits - 1}g}")
    if exponent < -4 or exponent >= 15:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(
        f"{value:,.{max(0, digits - 1 - exponent)}f}" if abs(value) >= 10000 else _fixed(value, digits, exponent)
    )


def format_estimate(estimate: Estimate, *, with_n: bool = True) -> str:
    """``0.934 [0.921, 0.947], n=3``; without interval ``0.934 [no interval], n=1``."""
    tail = f", n={estimate.n_text}" if with_n else ""
    if not estimate.has_interval:
        return f"{format_number(estimate.value)} [no interval]{tail}"
    half = (estimate.high - estimate.low) / 2
    if not (math.isfinite(half) and half > 0):
        return f"{format_number(estimate.value)} [{format_number(estimate.low)}, {format_number(estimate.high)}]{tail}"
    shown = [_decimals(x, half) for x in (estimate.value, estimate.low, estimate.high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{tail}"


def format_seconds(seconds: float | None) -> str:
    """``48 s``, ``12 min 30 s``, ``2 h 5 min``; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min" + (f" {total % 60} s" if total % 60 else "")
    minutes = round(total / 60)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def format_cell(cell: Any) -> str:
    """Any cell as text."""
    if cell is None:
        return MISSING
    if isinstance(cell, Estimate):
        return format_estimate(cell)
    if isinstance(cell, enum.Enum):
        return str(cell.value)
    if isinstance(cell, (bool, int, float)):
        return format_number(cell)
    return str(cell)


def sort_key(cell: Any) -> float | str:
    """What a column is sorted by: the number of a number or an estimate, else the text."""
    if isinstance(cell, Estimate):
        return float(cell.value)
    if isinstance(cell, (bool, int, float)):
        return float(cell)
    return "" if cell is None else format_cell(cell)


@dataclass(frozen=True)
class Table:
    """Rows of cells below named columns.

    Raises:
        ValueError: a row does not have one cell per column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table {self.title!r}: row {index} must have {len(self.columns)} cells, got {len(row)}"
                )

    def is_numeric(self, column: int) -> bool:
        """Whether every cell that is there is a number or an estimate: such columns align right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(c, (Estimate, int, float)) and not isinstance(c, bool) for c in cells)

    def to_markdown(self) -> str:
        """A GitHub table, caption below; pipes and newlines in cells are escaped."""
        shown = [[_markdown(format_cell(cell)) for cell in row] for row in self.rows]
        heads = [_markdown(name) for name in self.columns]
        widths = [max([3, len(head), *(len(row[i]) for row in shown)]) for i, head in enumerate(heads)]
        right = [self.is_numeric(i) for i in range(len(heads))]
        rules = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
        lines = [_markdown_line(cells, widths, right) for cells in (heads, rules, *shown)]
        return "\n".join(lines) + "\n" + (f"\n{self.caption}\n" if self.caption else "")

    def to_html(self) -> str:
        """A ``<table class="sortable">``; every text is escaped; cells carry ``data-sort``."""
        right = [self.is_numeric(i) for i in range(len(self.columns))]
        css = [' class="num"' if r else "" for r in right]
        heads = "".join(f'<th scope="col"{c}>{html.escape(n)}</th>' for n, c in zip(self.columns, css, strict=True))
        body = "".join(
            "<tr>" + "".join(_html_cell(cell, c) for cell, c in zip(row, css, strict=True)) + "</tr>\n"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f'<table class="sortable">{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>'

    def to_csv(self) -> str:
        """Full precision; an estimate's column becomes ``x, x low, x high, x n``."""
        estimates = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            [
                part
                for name, wide in zip(self.columns, estimates, strict=True)
                for part in ([name, f"{name} low", f"{name} high", f"{name} n"] if wide else [name])
            ]
        )
        for row in self.rows:
            writer.writerow([p for cell, wide in zip(row, estimates, strict=True) for p in _csv_cells(cell, wide)])
        return out.getvalue()

    def to_rich(self) -> rich.table.Table:
        """For a terminal; markup in cells is shown as it stands."""
        import rich.box
        import rich.table
        from rich.text import Text

        table = rich.table.Table(title=Text(self.title), caption=Text(self.caption), box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(self.columns):
            table.add_column(Text(name), justify="right" if self.is_numeric(i) else "left")
        for row in self.rows:
            table.add_row(*[Text(format_cell(cell)) for cell in row])
        return table


def _minus(text: str) -> str:
    # The minus sign, as wide as a digit; a hyphen beside digits reads as a dash. Also in exponents, for one look.
    return text.replace("-", "−")


def _fixed(value: float, digits: int, exponent: int) -> str:
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def _decimals(value: float, half: float) -> str:
    if not math.isfinite(value):
        return format_number(value)
    exponent = math.floor(math.log10(half))
    decimals = 1 - exponent
    if value and (abs(value) < 1e-4 or abs(value) >= 1e15 or decimals > 12):
        digits = max(1, math.floor(math.log10(abs(value))) - exponent + 1)
        return _minus(f"{value:.{min(digits, 12)}e}")
    text = f"{value:,.{max(0, decimals)}f}" if abs(value) >= 10000 else f"{value:.{max(0, decimals)}f}"
    return _minus(text) if float(text.replace(",", "")) != 0 else text.lstrip("-")


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _markdown_line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return "| " + " | ".join(padded) + " |"


def _html_cell(cell: Any, css: str) -> str:
    return f'<td{css} data-sort="{html.escape(str(sort_key(cell)))}">{html.escape(format_cell(cell))}</td>'


def _csv_cells(cell: Any, wide: bool) -> list[Any]:
    if isinstance(cell, Estimate):
        return [repr(cell.value), *("" if math.isnan(x) else repr(x) for x in (cell.low, cell.high)), cell.n]
    text = "" if cell is None else cell.value if isinstance(cell, enum.Enum) else cell
    return [text, "", "", ""] if wide else [text]
