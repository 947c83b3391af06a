# SPDX-License-Identifier: Apache-2.0
"""Downloads, from a server on this machine: good, corrupt, truncated, missing and interrupted files."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import ssl
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curvlab.data import files, load

FILES = {"train-images-idx3-ubyte": b"images" * 999, "t10k-labels-idx1-ubyte": b"labels" * 50}
BATCHES = {"data_batch_1": b"one" * 500, "test_batch": b"test" * 500}


@contextmanager
def serve(pages: dict[str, bytes], *, cut: int | None = None, endless: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A server of ``pages`` (404 for the rest).

    With ``cut``, the connection ends after that many bytes; with ``endless``, it never ends of itself.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = pages.get(self.path.rsplit("/", 1)[1])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            if not endless:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # until the other side has had enough
                while endless:
                    self.wfile.write(content)
            if not endless:
                self.wfile.write(content[:cut])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/data/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def packed(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}


def archive(contents: dict[str, bytes], *, folder: str = "cifar-10-batches-py") -> dict[str, bytes]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {"cifar-10-python.tar.gz": stream.getvalue()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CURVLAB_DATA", raising=False)
    for name, contents in (("mnist", FILES), ("cifar10", BATCHES)):
        md5s = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
        monkeypatch.setitem(files.PUBLISHED_MD5, name, md5s)
    monkeypatch.setattr(files, "TIMEOUT_SECONDS", 5.0)
    return tmp_path / "cache" / "curvlab"


def all_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_good_mirror_fills_the_cache_once(cache):
    with serve(packed(FILES)) as (url, asked):
        found = files.locate("mnist", mirrors=[url])
        assert found.origin == f"downloaded from {url}"
        assert {name: (found.folder / name).read_bytes() for name in FILES} == FILES
        again = files.locate("mnist", mirrors=[url])
        assert again.origin == "cache" and again.folder == found.folder
        assert len(asked) == len(FILES)
    assert all_files(cache) == sorted(FILES)
    assert files.locate("mnist", download=False).origin == "cache"


def test_a_good_archive_is_read_member_by_member(cache):
    with serve(archive(BATCHES | {"../../escaped": b"x"})) as (url, _):
        found = files.locate("cifar10", mirrors=[url])
    assert {name: (found.folder / name).read_bytes() for name in BATCHES} == BATCHES
    assert all_files(cache.parent.parent) == sorted(BATCHES)  # nothing else, nowhere


def truncated(pages: dict[str, bytes], by: int = 9) -> dict[str, bytes]:
    return {name: content[:-by] for name, content in pages.items()}


BAD = {
    "corrupt": (packed({name: content[::-1] for name, content in FILES.items()}), None, "md5 of .* must be .* got"),
    "truncated": (truncated(packed(FILES)), None, "not a whole archive"),
    "garbage": (dict.fromkeys(packed(FILES), b"<html>captive portal</html>"), None, "not a whole archive"),
    "missing": ({}, None, "404"),
    "interrupted": (packed(FILES), 20, "ended after 20 of|IncompleteRead"),
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_mirror_is_passed_over(cache, kind):
    pages, cut, _ = BAD[kind]
    with serve(pages, cut=cut) as (bad, asked), serve(packed(FILES)) as (good, _):
        found = files.locate("mnist", mirrors=[bad, good])
        assert len(asked) == len(FILES)
    assert found.origin == f"downloaded from {good}"
    assert {name: (found.folder / name).read_bytes() for name in FILES} == FILES
    assert all_files(cache) == sorted(FILES)


@pytest.mark.parametrize("kind", sorted(BAD))
def test_when_all_mirrors_fail_each_is_told_and_nothing_is_left(cache, kind):
    pages, cut, why = BAD[kind]
    dead = "http://127.0.0.1:9/"  # discard: nobody listens
    with serve(pages, cut=cut) as (bad, _), pytest.raises(OSError, match=why) as caught:
        files.locate("mnist", mirrors=[bad, dead])
    text = str(caught.value)
    assert bad in text and dead in text and "CURVLAB_DATA" in text
    assert all_files(cache) == []


@pytest.mark.parametrize(
    "pages", [archive(BATCHES, folder="elsewhere"), archive({"data_batch_1": b""}), truncated(archive(BATCHES), 60)]
)
def test_a_bad_archive_is_refused(cache, pages):
    with serve(pages) as (url, _), pytest.raises(OSError, match=r"cifar-10-python.tar.gz could not be downloaded"):
        files.locate("cifar10", mirrors=[url])
    assert all_files(cache) == []


def test_a_corrupt_cached_file_is_named_and_replaced_alone(cache):
    with serve(packed(FILES)) as (url, asked):
        folder = files.locate("mnist", mirrors=[url]).folder
        (folder / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
        with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte \(is corrupt: its md5"):
            load("mnist", download=False)
        with pytest.warns(UserWarning, match=r"corrupt in the cache.*replaced .*t10k-labels-idx1-ubyte$") as caught:
            assert files.locate("mnist", mirrors=[url]).origin.startswith("downloaded")
        assert len(caught) == 1 and "train-images" not in str(caught[0].message)
        assert [path.rsplit("/", 1)[1] for path in asked[2:]] == ["t10k-labels-idx1-ubyte.gz"]
    assert (folder / "t10k-labels-idx1-ubyte").read_bytes() == FILES["t10k-labels-idx1-ubyte"]


def test_a_corrupt_cached_file_is_named_when_all_mirrors_fail(cache):
    with serve(packed(FILES)) as (url, _):
        folder = files.locate("mnist", mirrors=[url]).folder
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"damaged")
    with serve({}) as (bad, _), pytest.raises(OSError, match=r"404.*corrupt in the cache: ") as caught:
        files.locate("mnist", mirrors=[bad])
    assert f"{path}." in str(caught.value) and "train-images" not in str(caught.value)
    assert path.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "error", [ssl.SSLError(1, "record layer failure"), OSError(errno.EHOSTUNREACH, "No route to host")], ids=str
)
def test_an_error_while_reading_is_passed_over(cache, monkeypatch, error):
    read = HTTPResponse.read

    with serve(packed(FILES)) as (bad, asked), serve(packed(FILES)) as (good, _):

        def broken(self: HTTPResponse, *arguments: int) -> bytes:
            if self.url.startswith(bad):
                raise error
            return read(self, *arguments)

        monkeypatch.setattr(HTTPResponse, "read", broken)
        assert files.locate("mnist", mirrors=[bad, good]).origin == f"downloaded from {good}"
        assert len(asked) == len(FILES)


LIMIT = 16_000


@pytest.mark.parametrize("kind", ["announced", "endless", "bomb", "tar bomb"])
def test_what_is_too_large_is_passed_over_unread(cache, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_BYTES", {"mnist": LIMIT, "cifar10": LIMIT})
    monkeypatch.setattr(files, "CHUNK", 1000)
    name, right = ("cifar10", archive(BATCHES)) if kind == "tar bomb" else ("mnist", packed(FILES))
    bomb = gzip.compress(bytes(100 * LIMIT))
    assert len(bomb) < LIMIT
    pages = dict.fromkeys(right, bomb if "bomb" in kind else bytes(LIMIT + 1))
    why = {"announced": "announced", "endless": "download .* got more"}.get(kind, "unpacked file .* got more")
    with serve(pages, endless=kind == "endless") as (bad, _), serve(right) as (good, _):
        with pytest.raises(OSError, match=rf"at most {LIMIT} bytes, .*{why}" if kind == "announced" else why):
            files.locate(name, mirrors=[bad])
        assert files.locate(name, mirrors=[bad, good]).origin == f"downloaded from {good}"


def test_a_member_that_is_no_plain_file_is_refused(cache):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in BATCHES:
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, name  # points at itself
            tar.addfile(member)
    with (
        serve({"cifar-10-python.tar.gz": stream.getvalue()}) as (url, _),
        pytest.raises(OSError, match="missing: data_batch_1"),
    ):
        files.locate("cifar10", mirrors=[url])


def test_a_cache_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"the cache .* must be writable \(set XDG_CACHE_HOME"):
        files.locate("mnist", mirrors=["http://127.0.0.1:9/"])


def test_a_full_disk_leaves_nothing_half_written(cache, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        serve(packed(FILES)) as (url, _),
        pytest.raises(OSError, match=r"No space left.*MiB free there.*XDG_CACHE_HOME"),
    ):
        files.locate("mnist", mirrors=[url])
    assert all_files(cache) == []


def test_default_mirrors_are_several_for_each_name():
    assert {name: len(urls) >= 2 for name, urls in files.MIRRORS.items()} == {"mnist": True, "cifar10": True}
    assert all(len(set(urls)) == len(urls) for urls in files.MIRRORS.values())


def test_published_checksums_are_the_ones_torchvision_knows(monkeypatch):
    monkeypatch.undo()
    cifar = pytest.importorskip("torchvision.datasets").CIFAR10
    expected = dict([*cifar.train_list, *cifar.test_list])
    assert files.PUBLISHED_MD5["cifar10"] == expected
