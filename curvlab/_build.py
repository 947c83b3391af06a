# SPDX-License-Identifier: Apache-2.0
"""Where the built package lies.

At the root of a checkout, Python finds this source folder first. After ``pip install -e .`` the compiled modules lie in
it; after ``pip install .`` they lie in site-packages, and the package's ``__path__`` is turned there, so that
``python -m curvlab``, ``pytest`` and the studies run what was built. An unbuilt tree says in one line what to type.
"""

from __future__ import annotations

import filecmp
import sys
import warnings
from collections.abc import MutableSequence
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HOW_TO_BUILD = "curvlab is not built; type: pip install .   (or `make demo`, which does all the set-up)"


def _version() -> str:
    try:
        return metadata.version("curvlab")
    except metadata.PackageNotFoundError:
        return "0+unbuilt"


VERSION = _version()


def is_built(folder: Path) -> bool:
    """Whether ``folder`` holds the compiled CPU module, for this Python."""
    return any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def find_installed(other_than: Path) -> Path | None:
    """The first built ``curvlab`` on ``sys.path`` besides ``other_than``, or None."""
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "curvlab"
        if folder != other_than and is_built(folder):
            return folder
    return None


def stale_files(source: Path, installed: Path) -> list[str]:
    """Python files of ``source`` that ``installed`` lacks or holds with other contents."""
    names = [str(path.relative_to(source)) for path in sorted(source.rglob("*.py"))]
    _, mismatch, missing = filecmp.cmpfiles(source, installed, names, shallow=False)
    return sorted([*mismatch, *missing])


def use_built_package(package_path: MutableSequence[str]) -> None:
    """Turn the package's search path to the folder that holds the compiled modules.

    Args:
        package_path: ``curvlab.__path__``, changed in place.

    Raises:
        ImportError: nothing is built, neither here nor elsewhere on ``sys.path``.
    """
    source = Path(__file__).resolve().parent
    if is_built(source):
        return
    installed = find_installed(other_than=source)
    if installed is None:
        raise ImportError(HOW_TO_BUILD, name="curvlab")
    if stale := stale_files(source, installed):
        warnings.warn(
            f"curvlab runs the package built in {installed}, and {len(stale)} file(s) of this checkout differ from it "
            f"(first: {stale[0]}); type: pip install .",
            stacklevel=4,
        )
    package_path[:] = [str(installed)]
