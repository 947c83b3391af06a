# SPDX-License-Identifier: Apache-2.0
"""Results of a long evaluation in pieces on disk: a piece that exists is not computed again.

A folder holds ``grid.json`` (what is evaluated, with a hash) and ``tile_00000.npz``, ... Each file is written under a
temporary name, flushed and renamed, so that it is whole or not there; a tile that cannot be read is computed again. A
folder that belongs to another evaluation is refused.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TileFolder"]

Arrays = dict[str, np.ndarray]


class TileFolder:
    """The tiles of one evaluation.

    Args:
        folder: made where it is missing.
        description: JSON-able; what the results depend on. Its ``"hash"`` entry is what is compared.

    Raises:
        ValueError: the folder holds another evaluation, or a description that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "grid.json"
        if path.exists():
            try:
                found = json.loads(path.read_text()).get("hash")
            except (ValueError, AttributeError):
                found = "unreadable"
            if found != description["hash"]:
                raise ValueError(
                    f"TileFolder: folder must be empty or hold this evaluation ({description['hash'][:12]}), "
                    f"got {self.folder} of another ({str(found)[:12]}): network, data, directions or grid differ"
                )
        else:
            _write_whole(path, lambda scratch: scratch.write_text(json.dumps(dict(description), indent=1) + "\n"))

    def path(self, index: int) -> Path:
        """Where tile ``index`` lies."""
        return self.folder / f"tile_{index:05d}.npz"

    def load(self, index: int, length: int) -> Arrays | None:
        """The arrays of a tile, each of ``length`` entries; None where it is missing or damaged."""
        try:
            with np.load(self.path(index), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        return arrays if arrays and all(a.shape == (length,) for a in arrays.values()) else None

    def save(self, index: int, arrays: Arrays) -> None:
        """Write a tile, whole or not at all."""
        write_arrays(self.path(index), arrays)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An ``.npz`` file, whole or not at all."""

    def write(scratch: Path) -> None:
        with open(scratch, "wb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())

    _write_whole(path, write)


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
