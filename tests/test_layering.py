# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: every arrow that the house does not draw fails here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANY = ("*",)

# room -> modules of this project that it may import; a room may always import itself. Longest prefix decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "curvlab": ANY,  # __init__ and __main__: the front door
    "curvlab._build": (),
    "curvlab.ops": ("curvlab._C", "curvlab._C_cuda", "curvlab._host", "curvlab._build"),
    "curvlab.operators": ("curvlab.ops",),
    "curvlab.sparse": (  # its layers' rules inherit the formulas of the dense ones
        "curvlab.ops",
        "curvlab.operators.params",
        "curvlab.operators.engines.rules",
        "curvlab.operators.engines.layer_rules",
        "curvlab.operators.engines.steps",
    ),
    "curvlab.norms": ("curvlab.ops", "curvlab.operators.params"),
    "curvlab.spectra": ("curvlab.operators",),
    "curvlab.sharpness": ("curvlab.operators", "curvlab.spectra", "curvlab.norms"),
    "curvlab.models": (),
    "curvlab.data": (),
    "curvlab.training": ("curvlab.sparse", "curvlab.data", "curvlab.models", "curvlab.runs.store"),
    "curvlab.runs": (),
    "experiments": ("curvlab",),
    "experiments.__main__": ("experiments", "curvlab"),
    "benchmarks": ("curvlab",),
}
CSRC_MAY_INCLUDE = (
    "ATen/",
    "c10/",
    "torch/library.h",
    "torch/extension.h",
    "torch/csrc/",
    "pybind11/",
    "sys/mman.h",
    "common/",
    "cuda",
    "sys/mman.h",
)


def room_of(module: str) -> str:
    parts = module.split(".")
    return next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MAY_IMPORT)


def imports_of(path: Path, module: str, *, is_package: bool) -> set[str]:
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from curvlab import norms` names a module, `from curvlab.norms import total_norm` a thing in one
            found |= {f"{stem}.{alias.name}" if stem == "curvlab" else stem for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("curvlab", "experiments", "benchmarks", "tests")}


def is_allowed(room: str, imported: str) -> bool:
    allowed = MAY_IMPORT[room]
    if allowed == ANY or imported == room or imported.startswith(room + "."):
        return True
    return any(imported == name or imported.startswith(name + ".") for name in allowed)


def python_modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("curvlab", "experiments", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def violations(module: str, path: Path) -> list[str]:
    room = room_of(module)
    seen = imports_of(path, module, is_package=path.name == "__init__.py")
    bad = [name for name in sorted(seen) if not is_allowed(room, name)]
    if room == "experiments" and module.count(".") == 1:  # studies never import each other, only what they share
        shared = [name for name in seen if f"{name}.".startswith("experiments.base.")]
        bad += sorted({name for name in seen if name.startswith("experiments.")} - set(shared))
    return bad


@pytest.mark.parametrize(
    ("module", "path"), python_modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_follow_the_house(module: str, path: Path) -> None:
    assert violations(module, path) == []


def test_a_wrong_arrow_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from curvlab.training import loop\nfrom curvlab import sharpness\nimport curvlab.ops\n")
    assert violations("curvlab.operators.wrong", wrong) == ["curvlab.sharpness", "curvlab.training"]
    relative = tmp_path / "relative.py"
    relative.write_text("from ..norms import total_norm\n")
    assert violations("curvlab.models.relative", relative) == ["curvlab.norms"]


@pytest.mark.parametrize("path", sorted((ROOT / "curvlab" / "runs").rglob("*.py")), ids=lambda p: p.name)
def test_runs_knows_no_networks(path: Path) -> None:
    names = {
        n.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for n in node.names
    }
    names |= {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[ch]*")), ids=lambda p: p.name)
def test_csrc_families_stay_apart(path: Path) -> None:
    """A family includes ATen, c10, csrc/common, the standard library and itself; kernels and launchers no torch."""
    includes = re.findall(r'^\s*#include\s+([<"][^>"]+)[>"]', path.read_text(), re.M)
    relative = path.relative_to(ROOT / "csrc")
    families = {folder.name for folder in (ROOT / "csrc").iterdir() if folder.is_dir() and folder.name != "common"}
    own = relative.parts[0] if len(relative.parts) > 1 else None
    for include in (i[1:] for i in includes):
        family = include.split("/")[0]
        if own and family in families:
            assert family == own, f"{relative} includes {include} of another family"
        if "/" in include and family not in families:
            assert include.startswith(CSRC_MAY_INCLUDE), f"{relative} includes {include}"
        if path.name.endswith(("_kernel.cuh", "_cuda.cu", "_cuda.h", "_cpu.h")):
            assert not include.startswith(("ATen/", "c10/", "torch/")), f"{relative} must stay free of torch headers"
