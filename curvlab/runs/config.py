# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses as run names: canonical form, content hash, readable slug, and ``field=value`` overrides.

The hash covers the class name, the context (for example data and code fingerprints) and the fields that differ from
their default, so a new field whose default means "off" never renames a run that already exists:

    ``hash = sha256(json({"class", "context", "fields"}))[:8]``, keys sorted, floats by ``repr``.

Idea: open_lth's hyperparameter hashes (defaults are left out); eight hex digits and a readable slug instead of an MD5.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import hashlib
import io
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

ConfigT = TypeVar("ConfigT")

# Linux allows 255 bytes a name; 120 leaves room for suffixes and for reading a listing in one terminal line.
MAX_NAME_LENGTH = 120


def canonical(config: Any) -> dict[str, Any]:
    """All fields of a frozen dataclass as JSON-able values, in declaration order.

    Tuples become lists, enums their name, paths POSIX text, numpy scalars Python ones; an int in a field annotated
    ``float`` becomes a float (``lr=1`` and ``lr=1.0`` are one run), and -0.0 becomes 0.0.

    Raises:
        TypeError: ``config`` is not a frozen dataclass instance, or a value has a type with no canonical form.
        ValueError: a value is NaN (it equals nothing, so no name could be found again).
    """
    hints = _hints(config, "canonical")
    return {f.name: _canonical_value(getattr(config, f.name), hints[f.name], f.name) for f in _fields(config)}


def identity(config: Any, context: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the hash covers: ``{"class", "context", "fields"}`` with the non-default fields only.

    Context entries that are empty strings mean "off" and are left out, like defaults.
    """
    fields = _non_default_fields(config, "identity")
    return {"class": type(config).__name__, "context": _canonical_context(context), "fields": fields}


def identity_hash(identity_dict: Mapping[str, Any]) -> str:
    """First 8 hex digits of the sha256 of an :func:`identity`, as compact JSON with sorted keys."""
    text = json.dumps(identity_dict, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def config_hash(config: Any, context: Mapping[str, str] | None = None) -> str:
    """Content hash of a configuration: 8 hex digits over class name, non-default fields and context."""
    return identity_hash(identity(config, context))


def run_name(config: Any, context: Mapping[str, str] | None = None) -> str:
    """Readable slug of the non-default fields, then the hash: ``width=128,parametrization=ntk-1a2b3c4d``.

    Safe as a file name (letters, digits and ``._+=,-`` only), at most 120 characters; a slug that is too long is cut
    after a whole ``field=value`` and ends in ``,etc``. All defaults: ``default-<hash>``.
    """
    digest = config_hash(config, context)
    parts = [f"{_safe(key)}={_safe(text)}" for key, text in _slug_parts(_non_default_fields(config, "run_name"), "")]
    room = MAX_NAME_LENGTH - len(digest) - 1
    if len(",".join(parts)) > room:
        while parts and len(",".join(parts)) > room - len(",etc"):
            parts.pop()
        parts.append("etc")
    return f"{','.join(parts) or 'default'}-{digest}"


def parse_overrides(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """A copy of ``config`` with ``field=value`` strings applied; nested fields are written ``recipe.lr=0.02``.

    Values are parsed by tyro against the field's annotation. Tuples are written ``widths=32,64`` or ``widths='32 64'``.

    Raises:
        ValueError: unknown field (the message lists the fields and the nearest match), a value that does not parse
            (it names field, expected type and got), a field given twice, or whatever ``__post_init__`` refuses.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        path, separator, text = override.partition("=")
        path = path.strip().lstrip("-").replace("-", "_")
        if not separator or not path:
            raise ValueError(f"parse_overrides: override must be field=value, got {override!r}")
        if path in changes:
            raise ValueError(f"parse_overrides: field {path} is given twice, the second time as {override!r}")
        changes[path] = _parse_value(_hint_at(config, path), text, path)
    for path in changes:
        if any(other.startswith(f"{path}.") for other in changes):
            raise ValueError(f"parse_overrides: {path} and one of its fields are both given")
    changed = _replace(config, changes)
    canonical(changed)
    return changed


# ---------------------------------------------------------------------------------------------- canonical values


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)


def _hints(config: Any, caller: str) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{caller}: config must be an instance of a frozen dataclass, got {type(config).__name__}")
    if not type(config).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{caller}: dataclass {type(config).__name__} must be frozen=True: its content is its name")
    return typing.get_type_hints(type(config))


def _canonical_value(value: Any, hint: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return _canonical_number(value, hint, name)
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        hints = _item_hints(hint, len(value))
        return [_canonical_value(item, h, f"{name}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True))]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _canonical_value(value[key], Any, f"{name}[{key!r}]") for key in sorted(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return canonical(value)
    raise TypeError(
        f"canonical: field {name} must be a number, text, bool, None, enum, path, tuple, mapping with text keys or "
        f"frozen dataclass, got {type(value).__name__}"
    )


def _canonical_number(value: float, hint: Any, name: str) -> Any:
    wants_float = hint is float or (_is_union(hint) and float in typing.get_args(hint) and int not in _args(hint))
    if isinstance(value, int) and not wants_float:
        return value
    value = float(value) + 0.0  # -0.0 + 0.0 == 0.0: the two zeros are one setting
    if math.isnan(value):
        raise ValueError(f"canonical: field {name} must not be NaN: a NaN equals nothing, so its run is never found")
    return value if math.isfinite(value) else {"float": repr(value)}  # JSON has no infinity


def _item_hints(hint: Any, count: int) -> list[Any]:
    if _is_union(hint):
        hint = next((arg for arg in _args(hint) if typing.get_origin(arg) in (tuple, list)), Any)
    args = _args(hint)
    if typing.get_origin(hint) is tuple and len(args) == count and Ellipsis not in args:
        return list(args)
    return [args[0] if args else Any] * count


def _args(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _non_default_fields(config: Any, caller: str) -> dict[str, Any]:
    hints = _hints(config, caller)
    fields: dict[str, Any] = {}
    for field in _fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        form = _canonical_value(value, hint, field.name)
        default = _default(field)
        if default is not dataclasses.MISSING and _typed_equal(value, form, default, hint, field.name):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # The class is kept: of two nested classes with equal fields, each is its own setting.
            form = {"class": type(value).__name__, "fields": _non_default_fields(value, caller)}
        fields[field.name] = form
    return fields


def _typed_equal(value: Any, form: Any, default: Any, hint: Any, name: str) -> bool:
    # Through JSON text, since in Python 1 == True == 1.0 would merge three settings.
    same_class = type(value) is type(default) or not dataclasses.is_dataclass(value)
    return same_class and json.dumps(form) == json.dumps(_canonical_value(default, hint, name))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _canonical_context(context: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (context or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"config_hash: context must map text to text, got {key!r}: {value!r}")
    return {key: value for key, value in sorted((context or {}).items()) if value}


# ---------------------------------------------------------------------------------------------- slugs


def _slug_parts(fields: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    for key, value in fields.items():
        if isinstance(value, dict) and set(value) == {"class", "fields"}:
            parts += _slug_parts(value["fields"], f"{prefix}{key}.") or [(prefix + key, value["class"])]
        else:
            parts.append((prefix + key, _slug_text(value)))
    return parts


def _slug_text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_slug_text(item) for item in value)
    if isinstance(value, dict):
        return "+".join(str(item) for item in value.values())
    return str(value)


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)


# ---------------------------------------------------------------------------------------------- overrides


def _hint_at(config: Any, path: str) -> Any:
    owner: Any = config
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        _check_field(owner, name, ".".join(parents[: depth + 1]))
        owner = getattr(owner, name)
        if not dataclasses.is_dataclass(owner):
            raise ValueError(f"parse_overrides: field {'.'.join(parents[: depth + 1])} has no fields of its own")
    _check_field(owner, last, path)
    return _hints(owner, "parse_overrides")[last]


def _check_field(owner: Any, name: str, path: str) -> None:
    _hints(owner, "parse_overrides")
    names = [f.name for f in _fields(owner) if f.init]
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"parse_overrides: {type(owner).__name__} has no field {path}{guess}; its fields are: {', '.join(names)}"
    )


def _parse_value(hint: Any, text: str, path: str) -> Any:
    import tyro  # half a second to import, and only a command line needs it

    if dataclasses.is_dataclass(hint):
        names = ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(hint))
        raise ValueError(f"parse_overrides: field {path} is set through its own fields ({names}), got {text!r}")
    tokens = _tokens(hint, text.strip())
    holder = dataclasses.make_dataclass("Override", [("value", tyro.conf.Positional[hint])])
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            # "--" ends the options, so that -0.5 is a value.
            return tyro.cli(holder, args=["--", *tokens], add_help=False).value
    except SystemExit:
        pass
    raise ValueError(f"parse_overrides: field {path} must be {type_text(hint)}, got {text!r}")


def _tokens(hint: Any, text: str) -> list[str]:
    options = _args(hint) if _is_union(hint) else (hint,)
    if str not in options and text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    if not any(typing.get_origin(option) in (tuple, list) or option in (tuple, list) for option in options):
        return [text]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        text = text[1:-1]
    return [token for token in re.split(r"[,\s]+", text) if token]


def type_text(hint: Any) -> str:
    """A type annotation as a user would write it: ``int``, ``tuple[int, ...]``, ``'standard' or 'ntk'``."""
    if hint is None or hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(arg) for arg in _args(hint))
    if _is_union(hint):
        return " or ".join(type_text(arg) for arg in _args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"{hint.__name__} ({', '.join(hint.__members__)})"
    return hint.__name__ if isinstance(hint, type) and not _args(hint) else str(hint).replace("typing.", "")


def _replace(config: Any, changes: Mapping[str, Any]) -> Any:
    direct = {path: value for path, value in changes.items() if "." not in path}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        if "." in path:
            head, _, rest = path.partition(".")
            nested.setdefault(head, {})[rest] = value
    for head, inner in nested.items():
        direct[head] = _replace(getattr(config, head), inner)
    return dataclasses.replace(config, **direct)
