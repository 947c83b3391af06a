# SPDX-License-Identifier: Apache-2.0
"""The front door: the root of a checkout runs the built package, an unbuilt tree says what to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import curvlab
from curvlab import _build, ops

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(ops.__file__).resolve().parent.parent
COMPILED = ("*.so", "*.pyd", "__pycache__")


def site_without_curvlab(folder: Path) -> Path:
    """This environment's packages, linked, without curvlab: what a user has before building."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("platlib")).iterdir():
        if "curvlab" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def checkout(folder: Path) -> Path:
    """The files of a fresh clone, nothing built."""
    for name in ("curvlab", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*COMPILED))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, path: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", *arguments]  # -S: only the packages of PYTHONPATH
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [("-m", "curvlab"), ("-m", "experiments", "list"), ("-m", "benchmarks", "norms"), ("-m", "pytest", "tests")],
    ids=lambda a: a[1],
)
def test_an_unbuilt_tree_says_what_to_type(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    site = site_without_curvlab(tmp_path / "site")
    result = run(checkout(tmp_path / "tree"), [site], *arguments)
    lines = (result.stdout + result.stderr).strip().splitlines()
    assert result.returncode != 0
    assert len(lines) == 1, lines
    assert "type: pip install ." in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "curvlab"),
        ("-m", "experiments", "list"),
        ("-m", "benchmarks", "--help"),
        ("-m", "pytest", "-q", "tests/norms", "-k", "known_numbers"),
    ],
    ids=lambda a: a[1],
)
def test_the_root_of_a_checkout_runs_the_installed_build(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    site = site_without_curvlab(tmp_path / "site")
    shutil.copytree(BUILT, site / "curvlab", ignore=shutil.ignore_patterns("__pycache__"))
    tree = checkout(tmp_path / "tree")
    where = run(tree, [site], "-c", "import curvlab.ops; print(curvlab.ops.__file__)")
    assert where.stdout.strip().startswith(str(site)), where.stderr
    result = run(tree, [site], *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_checkout_that_differs_from_the_build_is_told(tmp_path: Path) -> None:
    site = site_without_curvlab(tmp_path / "site")
    shutil.copytree(BUILT, site / "curvlab", ignore=shutil.ignore_patterns("__pycache__"))
    tree = checkout(tmp_path / "tree")
    if not _build.stale_files(tree / "curvlab", site / "curvlab"):
        assert "differ" not in run(tree, [site], "-c", "import curvlab").stderr
    with (tree / "curvlab" / "norms.py").open("a") as file:
        file.write("\n# edited\n")
    assert "norms.py" in " ".join(_build.stale_files(tree / "curvlab", site / "curvlab"))
    assert "type: pip install ." in run(tree, [site], "-W", "always", "-c", "import curvlab").stderr


def test_the_bug_report_is_complete() -> None:
    result = subprocess.run([sys.executable, "-m", "curvlab", "--json"], cwd=ROOT, capture_output=True, text=True)
    facts = json.loads(result.stdout)
    assert facts["versions"]["curvlab"] == curvlab.__version__
    assert facts["build"]["flags"].startswith("-O3")
    assert facts["machine"]["CPU capability in use"] == ops.cpu_capability()
    assert facts["settings"]["threads"][0].isdigit()
    text = subprocess.run([sys.executable, "-m", "curvlab"], cwd=ROOT, capture_output=True, text=True).stdout
    for section, rows in facts.items():
        assert section in text
        assert all(key in text for key in rows)


def test_public_names_are_one_list() -> None:
    for name in curvlab.__all__:
        assert getattr(curvlab, name).__module__.startswith("curvlab.")
    assert curvlab.data.NAMES  # rooms too, without an import of their own
    with pytest.raises(AttributeError, match="its public names"):
        curvlab.no_such_name  # noqa: B018
