# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk that survive ``kill -9`` and a full disk: an append-only journal, atomic files, a writer's lock.

What is promised after a kill at any byte: every line that was appended before is intact, at most the last line is
torn, and a torn line is dropped by readers and cut off before the next append. JSONL and not Parquet or SQLite while a
run is alive, since one ``write`` + ``fsync`` of whole lines needs no recovery code but "cut at the last newline".
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class RunStoreError(Exception):
    """A run on disk cannot be read or written; the message names the file and says what to do."""


def explain(error: OSError, path: Path, doing: str) -> RunStoreError:
    """The user's words for an ``OSError`` while ``doing`` something to ``path``."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space and run again, finished rows are kept",
        errno.EDQUOT: "your disk quota is used up; free some space and run again, finished rows are kept",
        errno.EFBIG: "the file reached the largest size allowed here (ulimit -f)",
        errno.EACCES: "no permission; choose a folder that you may write to (--out DIR)",
        errno.EPERM: "no permission; choose a folder that you may write to (--out DIR)",
        errno.EROFS: "the file system is read-only; choose another folder (--out DIR)",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EEXIST: "a file stands where a folder is needed",
    }.get(error.errno or 0, error.strerror or str(error))
    return RunStoreError(f"RunStore: cannot {doing} {path}: {advice}")


def fsync_folder(folder: Path) -> None:
    """Make a new or renamed entry of ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """``os.write`` until all is written: one call may write less, for example when the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary neighbor, fsync, rename over ``path``: readers see the old or the new, whole.

    Raises:
        RunStoreError: disk full, no permission and the like; the old file stays and no temporary is left.
    """
    atomic_save(path, lambda temporary: _write_new(temporary, data))


def atomic_save(path: Path, save: Callable[[Path], Any]) -> None:
    """Like :func:`atomic_write` for a ``save(temporary_path)`` that writes the file itself."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, "write") from error
    finally:
        with suppress(OSError):  # gone after the rename, or never made
            temporary.unlink()


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        RunStoreError: unreadable, not JSON, or not an object; the message names the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise explain(error, path, "read") from error
    except ValueError as error:
        raise RunStoreError(f"RunStore: {path} is corrupt or not ours ({error}); move it away and run again") from error
    if not isinstance(value, dict):
        raise RunStoreError(f"RunStore: {path} must hold a JSON object, got {type(value).__name__}; move it away")
    return value


class Journal:
    """Append-only lines of JSON. One writer at a time (see :func:`writer_lock`), any number of readers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, objects: list[dict[str, Any]]) -> None:
        """Append one line an object, then fsync: after return they survive a power cut.

        Raises:
            RunStoreError: the disk is full or the like; the file is cut back to what it held before.
        """
        data = "".join(json.dumps(item, separators=(",", ":"), allow_nan=False) + "\n" for item in objects).encode()
        is_new = not self.path.exists()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explain(error, self.path, "open") from error
        try:
            size = self._cut_torn_line(descriptor)
            try:
                os.lseek(descriptor, size, os.SEEK_SET)
                write_all(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
            if is_new:
                fsync_folder(self.path.parent)
        except OSError as error:
            raise explain(error, self.path, "append to") from error
        finally:
            os.close(descriptor)

    @staticmethod
    def _cut_torn_line(descriptor: int) -> int:
        """Size up to and with the last newline, to which the file is cut."""
        end = os.lseek(descriptor, 0, os.SEEK_END)
        position, whole = end, 0
        while position > 0 and not whole:  # backwards by blocks: a journal may have millions of lines
            start = max(0, position - 65536)
            newline = os.pread(descriptor, position - start, start).rfind(b"\n")
            whole = start + newline + 1 if newline >= 0 else 0
            position = start
        if whole != end:
            os.ftruncate(descriptor, whole)
        return whole

    def whole_bytes(self) -> bytes:
        """All whole lines; a torn last line is dropped. Empty when there is no file yet."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise explain(error, self.path, "read") from error
        return data[: data.rfind(b"\n") + 1]

    def read(self) -> list[dict[str, Any]]:
        """The object of every whole line.

        Raises:
            RunStoreError: a whole line is not a JSON object: not a torn write, so the file was edited or damaged.
        """
        objects = []
        for number, line in enumerate(self.whole_bytes().splitlines(), start=1):
            try:
                item = json.loads(line)
            except ValueError:
                item = None
            if not isinstance(item, dict):
                raise RunStoreError(
                    f"RunStore: {self.path} line {number} is not a row ({line[:60]!r}): the file was edited or "
                    "damaged; move its folder away and run again"
                )
            objects.append(item)
        return objects


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive right to write beside ``path``, by ``flock``: the kernel drops it with a killed process.

    Raises:
        RunStoreError: another process holds it; the message names its pid.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise explain(error, path, "open") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunStoreError(f"RunStore: {path.parent} is being written by {_holder(descriptor)}") from None
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise explain(error, path, "write") from error
        yield
        # The file stays, empty: unlinking a lock file lets two processes lock two different files of one name.
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 32, 0).strip()
    if not text.isdigit():
        return "another process; wait for it or stop it"
    pid = int(text)
    if pid == os.getpid():
        return f"this very process (pid {pid}), which locked it before"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return f"a child of pid {pid}, which has ended; stop that child"
    except PermissionError:
        pass
    return f"another process (pid {pid}); wait for it or stop it"
