# SPDX-License-Identifier: Apache-2.0
"""The room knows no networks: every module of it imports with torch blocked, and names no other room."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from pathlib import Path

import pytest

SPEC = importlib.util.find_spec("curvlab.runs")
assert SPEC is not None and SPEC.submodule_search_locations
ROOM = Path(SPEC.submodule_search_locations[0])
FILES = sorted(ROOM.rglob("*.py"))
MODULES = [
    ".".join(("curvlab", "runs", *path.relative_to(ROOM).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_stay_in_the_room(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in ("torch", "torchvision")
            assert not name.startswith("curvlab") or name.startswith("curvlab.runs.")


def test_all_modules_import_without_torch(python_here):
    command, folder = python_here
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Block())
import importlib
for name in {MODULES!r}:
    importlib.import_module(name)
assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    assert len(MODULES) > 10
    result = subprocess.run([*command, code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_page_parts_are_shipped():
    for name in ("page.html.j2", "style.css", "script.js"):
        text = (ROOM / "report" / name).read_text()
        assert "http://" not in text and "https://" not in text
