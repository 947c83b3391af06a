# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from curvlab.runs.config import MAX_NAME_LENGTH, canonical, config_hash, parse_overrides, run_name


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    lr: float = 0.01
    epochs: int = 30


@dataclasses.dataclass(frozen=True)
class Unit:
    width: int
    parametrization: Literal["standard", "ntk"] = "standard"
    recipe: Recipe = Recipe()
    widths: tuple[int, ...] = (32, 64)
    pair: tuple[float, float] = (1.0, 2.0)
    color: Color = Color.RED
    folder: Path = Path("a/b")
    on: bool = False
    limit: int | None = None
    note: str = ""


def unit_with_new_field(**values):
    """A class of the same name that has gained a field since, whose default means off."""

    @dataclasses.dataclass(frozen=True)
    class Grown(Unit):
        dropout: float = 0.0

    Grown.__name__ = "Unit"
    return Grown(**values)


def test_hashes_are_pinned():
    # Changing any of these renames runs that exist on users' disks.
    text = '{"class":"Unit","context":{},"fields":{"width":128}}'
    assert config_hash(Unit(width=128)) == hashlib.sha256(text.encode()).hexdigest()[:8] == "b0619b7c"
    assert config_hash(Unit(width=128, parametrization="ntk", recipe=Recipe(lr=0.1)), {"data": "abc"}) == "18db745a"
    assert run_name(Unit(width=128, parametrization="ntk")) == "width=128,parametrization=ntk-715146d3"


def test_new_field_with_off_default_renames_nothing():
    for values in ({"width": 32}, {"width": 64, "recipe": Recipe(epochs=2), "widths": (1,)}):
        assert run_name(unit_with_new_field(**values)) == run_name(Unit(**values))
    assert run_name(unit_with_new_field(width=32, dropout=0.5)) != run_name(Unit(width=32))


def test_every_field_and_the_context_count():
    base = Unit(width=32)
    changes = {
        "width": 33,
        "parametrization": "ntk",
        "recipe": Recipe(lr=0.2),
        "widths": (32,),
        "pair": (1.0, 3.0),
        "color": Color.BLUE,
        "folder": Path("c"),
        "on": True,
        "limit": 0,
        "note": "x",
    }
    hashes = {config_hash(dataclasses.replace(base, **{name: value})) for name, value in changes.items()}
    hashes |= {config_hash(base), config_hash(base, {"data": "1"}), config_hash(base, {"code": "1"})}
    assert len(hashes) == len(changes) + 3
    assert config_hash(base, {"data": ""}) == config_hash(base)


def test_numbers_are_canonical():
    assert config_hash(Unit(1, pair=(1, 2))) == config_hash(Unit(1))  # type: ignore[arg-type]
    assert config_hash(Unit(1, recipe=Recipe(lr=np.float64(0.01)))) == config_hash(Unit(1))  # type: ignore[arg-type]
    assert config_hash(Unit(1, pair=(-0.0, 2.0))) == config_hash(Unit(1, pair=(0.0, 2.0)))
    assert config_hash(Unit(1, limit=1)) != config_hash(Unit(1, limit=True))
    assert config_hash(Unit(1, on=0)) != config_hash(Unit(1))  # type: ignore[arg-type]
    assert config_hash(Unit(1, pair=(math.inf, 2.0))) != config_hash(Unit(1, pair=(-math.inf, 2.0)))


def test_canonical_is_json_in_declaration_order():
    form = canonical(Unit(width=3, color=Color.BLUE))
    assert list(form)[:3] == ["width", "parametrization", "recipe"]
    assert form["recipe"] == {"lr": 0.01, "epochs": 30} and form["color"] == "BLUE" and form["folder"] == "a/b"
    assert form["widths"] == [32, 64]


def test_refusals():
    with pytest.raises(ValueError, match="field lr must not be NaN"):
        canonical(Unit(1, recipe=Recipe(lr=math.nan)))
    with pytest.raises(TypeError, match="frozen dataclass, got dict"):
        config_hash({"width": 1})
    with pytest.raises(TypeError, match=r"note must be .* got set"):
        canonical(Unit(1, note={1}))  # type: ignore[arg-type]
    loose = dataclasses.make_dataclass("Loose", [("a", int, 1)])
    with pytest.raises(TypeError, match="Loose must be frozen=True"):
        canonical(loose())
    with pytest.raises(TypeError, match="context must map text to text"):
        config_hash(Unit(1), {"data": 3})  # type: ignore[dict-item]


def test_names_are_safe_and_short():
    long = Unit(width=1, note="../../etc /passwd\n" * 30, widths=tuple(range(100)))
    name = run_name(long)
    assert len(name) <= MAX_NAME_LENGTH and re.fullmatch(r"[A-Za-z0-9._+=,-]+", name)
    assert name.startswith("width=1,etc-")
    assert run_name(Unit(1, recipe=Recipe(lr=0.5))).startswith("width=1,recipe.lr=0.5-")
    assert run_name(Recipe()).startswith("default-")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("width=64", "width", 64),
        ("--width=64", "width", 64),
        ("parametrization=ntk", "parametrization", "ntk"),
        ("recipe.lr=2e-2", "recipe", Recipe(lr=0.02)),
        ("widths=32,64,128", "widths", (32, 64, 128)),
        ("widths=32 64 128", "widths", (32, 64, 128)),
        ("widths=(7,)", "widths", (7,)),
        ("widths=", "widths", ()),
        ("pair=-1,2.5", "pair", (-1.0, 2.5)),
        ("color=BLUE", "color", Color.BLUE),
        ("folder=/x/y", "folder", Path("/x/y")),
        ("on=true", "on", True),
        ("limit=3", "limit", 3),
        ("limit=none", "limit", None),
        ("note=a=b, --c", "note", "a=b, --c"),
        ("note=none", "note", "none"),
    ],
)
def test_overrides(override, field, value):
    changed = getattr(parse_overrides(Unit(width=1), [override]), field)
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "widht=3",
            r"Unit has no field widht \(did you mean width\?\); its fields are: width, parametrization, recipe",
        ),
        ("zzz=3", "Unit has no field zzz; its fields are"),
        ("recipe.lrr=3", r"Recipe has no field recipe\.lrr \(did you mean lr\?\)"),
        ("width.x=3", "field width has no fields of its own"),
        ("recipe=3", r"field recipe is set through its own fields \(recipe.lr, recipe.epochs\), got '3'"),
        ("width=3.5", r"field width must be int, got '3\.5'"),
        ("widths=a,b", r"field widths must be tuple\[int, \.\.\.\], got 'a,b'"),
        ("pair=1", r"field pair must be tuple\[float, float\], got '1'"),
        ("parametrization=mup", "must be 'standard' or 'ntk', got 'mup'"),
        ("color=GREEN", r"field color must be Color \(RED, BLUE\), got 'GREEN'"),
        ("on=maybe", "field on must be bool, got 'maybe'"),
        ("recipe.lr=nan", "must not be NaN"),
        ("width", "must be field=value, got 'width'"),
    ],
)
def test_bad_overrides_say_field_expected_and_got(override, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse_overrides(Unit(width=1), [override])
    assert capsys.readouterr() == ("", "")


def test_overrides_apply_together_and_doubles_are_refused():
    changed = parse_overrides(Unit(width=1), ["recipe.lr=1", "recipe.epochs=2", "width=3"])
    assert changed == Unit(width=3, recipe=Recipe(lr=1.0, epochs=2))
    with pytest.raises(ValueError, match="width is given twice"):
        parse_overrides(Unit(width=1), ["width=1", "width=2"])
