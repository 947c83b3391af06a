# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors as safetensors, everything else as a JSON header, written whole or not at all.  No pickle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["CheckpointFile"]

_KEY = "curvlab"


class CheckpointFile:
    """One checkpoint on disk, replaced atomically at each save.

    The file is a safetensors file whose metadata holds a JSON header.  It is written under a temporary name in the same
    folder, flushed to the disk and renamed: a reader finds the old one or the new one, whole, also after a ``kill -9``.

    Args:
        path: the file.  Its folder is made when the first save comes.
        every_seconds: the training loop saves at the first epoch end after this time, so that writing a wide network
            (a group of three at width 4096 is 0.9 GB) never takes a noticeable share; 0 saves at every epoch end.

    Raises:
        ValueError: every_seconds negative.
    """

    def __init__(self, path: str | os.PathLike[str], *, every_seconds: float = 60.0) -> None:
        if not every_seconds >= 0:
            raise ValueError(f"CheckpointFile: every_seconds must be 0 or more, got {every_seconds!r}")
        self.path = Path(path)
        self.every_seconds = every_seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether ``every_seconds`` have passed since the last save (or since this object was made)."""
        return time.monotonic() - self._last >= self.every_seconds

    def save(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Write tensors (any device, any strides) and a JSON-able header.

        Raises:
            OSError: the folder cannot be written or the disk is full; the checkpoint before stays as it was.
            TypeError: the header is not JSON-able.
        """
        payload = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        # safetensors refuses tensors that share memory; views of one buffer (stacked networks) are written out apart.
        owners: set[int] = set()
        for name, tensor in payload.items():
            where = tensor.untyped_storage().data_ptr()
            payload[name] = tensor.clone() if where in owners else tensor
            owners.add(where)
        text = json.dumps(header)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            save_file(payload, scratch, metadata={_KEY: text})
            with open(scratch, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(scratch, self.path)
        except SafetensorError as error:
            raise OSError(f"CheckpointFile.save: {self.path} could not be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and header of the last save, or ``None`` when there is no file.

        Raises:
            ValueError: the file is not a checkpoint of this form (it is named; nothing of it is used).
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt", device="cpu") as handle:
                header = json.loads((handle.metadata() or {})[_KEY])
                return {name: handle.get_tensor(name) for name in handle.keys()}, header  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"CheckpointFile.load: {self.path} must be a checkpoint written by curvlab, got {error!r}; "
                "delete it to start anew"
            ) from error

    def remove(self) -> None:
        """Delete the file if it is there."""
        self.path.unlink(missing_ok=True)
