# SPDX-License-Identifier: Apache-2.0
"""Rows: flat dicts of scalars, as lines of JSON and as one Parquet file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curvlab.runs.journal import atomic_save, explain

Row = dict[str, Any]

# JSON has no NaN and no infinity, and a diverged loss is a result: in `value`, and only there, they are these texts.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_row(row: Mapping[str, Any], index: int) -> Row:
    """A checked row, ready for JSON; see :meth:`curvlab.runs.store.Run.append` for what is refused."""
    for name in ("metric", "value"):
        if name not in row:
            raise ValueError(f"Run.append: row {index} must have 'metric' and 'value', got {sorted(row)}")
    encoded = {name: _scalar(name, value, index) for name, value in row.items()}
    if not isinstance(encoded["metric"], str):
        raise TypeError(f"Run.append: row {index}: metric must be text, got {encoded['metric']!r}")
    value = encoded["value"]
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"Run.append: row {index}: value must be a number, got {value!r}")
    if not math.isfinite(value):
        encoded["value"] = next(text for text, number in _NON_FINITE.items() if repr(number) == repr(float(value)))
    return encoded


def _scalar(name: str, value: Any, index: int) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(name, str) or not (value is None or isinstance(value, (bool, int, float, str))):
        raise TypeError(
            f"Run.append: row {index}: {name} must be a number, text, bool or None, got {type(value).__name__}"
        )
    if name != "value" and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Run.append: row {index}: factor {name} must be finite, got {value}")
    return value


def decode_row(row: Row) -> Row:
    """The row as it was given to :func:`encode_row`."""
    value = row.get("value")
    return {**row, "value": _NON_FINITE[value]} if isinstance(value, str) and value in _NON_FINITE else row


def flat_factors(unit: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A canonical unit as scalars: nested fields joined by dots, sequences written ``32,64``."""
    flat: dict[str, Any] = {}
    for name, value in unit.items():
        if isinstance(value, dict) and set(value) == {"float"}:
            flat[prefix + name] = float(value["float"])
        elif isinstance(value, dict):
            flat.update(flat_factors(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return flat


def export_parquet(rows: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Write rows as one Parquet file, atomically: factors in order of appearance, then step, metric, value (float64).

    Raises:
        ValueError: a column mixes text with numbers.
        RunStoreError: full disk, no permission and the like; nothing is left half written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in ("step", "metric", "value") if name in names or name != "step"]
    columns = [name for name in names if name not in last] + last
    fields = []
    for name in columns:
        kinds = {type(row[name]) for row in rows if row.get(name) is not None}
        fields.append(pa.field(name, _arrow_type(name, kinds, pa)))
    arrays = [pa.array([row.get(f.name) for row in rows], type=f.type) for f in fields]
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, path.parent, "make the folder") from error
    atomic_save(path, lambda temporary: pq.write_table(table, temporary))
    return path


def _arrow_type(name: str, kinds: set[type], pa: Any) -> Any:
    if name == "value":
        kinds = kinds | {float}
    if kinds <= {bool}:
        return pa.bool_() if kinds else pa.string()
    if kinds <= {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    if kinds <= {str}:
        return pa.string()
    listed = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"export_parquet: column {name} must hold one kind of scalar, got {listed}")
