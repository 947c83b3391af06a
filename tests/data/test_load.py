# SPDX-License-Identifier: Apache-2.0
"""Loading from folders: structure checks, what counts as published, and pickles that may run nothing."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curvlab.data import Dataset, files, formats, load

TRAIN, TEST = 12, 5


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_contents(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    contents = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        contents[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28), np.uint8))
        contents[f"{prefix}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, count).astype(np.uint8))
    return contents


def write_mnist(root: Path, contents: dict[str, bytes], *, packed: bool = False) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def batch(seed: int, count: int = 4, **changes: object) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    fields = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "labels": rng.integers(0, 10, count).tolist()}
    return {key: value for key, value in (fields | changes).items() if value is not None}


def write_cifar(root: Path, *, protocol: int = 2, byte_keys: bool = True) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate((*formats.CIFAR_TRAIN, formats.CIFAR_TEST)):
        fields = {(key.encode() if byte_keys else key): value for key, value in batch(seed).items()}
        (folder / name).write_bytes(pickle.dumps(fields, protocol=protocol))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has an empty cache, and no folder named outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CURVLAB_DATA", raising=False)


def test_digits_come_with_scikit_learn():
    data = load("digits", download=False)
    assert data.train_x.shape == (1438, 1, 8, 8) and data.test_x.shape == (359, 1, 8, 8)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert abs(data.train_x.mean().item()) < 1e-3 and abs(data.train_x.std().item() - 1) < 1e-3
    assert data.published and data.fingerprint == "4c69b0ea71686586" and "scikit-learn" in data.source
    assert set(data.test_y.tolist()) == set(range(10))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_environment", [False, True])
def test_mnist_from_a_named_folder(tmp_path, monkeypatch, packed, by_environment):
    contents = mnist_contents()
    write_mnist(tmp_path, contents, packed=packed)
    if by_environment:
        monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
        data = load("mnist")
    else:
        data = load("mnist", root=tmp_path)
    assert data.train_x.shape == (TRAIN, 1, 28, 28) and data.test_y.shape == (TEST,)
    raw = np.frombuffer(contents["train-images-idx3-ubyte"], np.uint8, offset=16).reshape(TRAIN, 1, 28, 28)
    expected = (torch.tensor(raw / 255.0) - 0.1307) / 0.3081
    torch.testing.assert_close(data.train_x.double(), expected, rtol=0, atol=1e-6)
    assert data.train_y.tolist() == list(contents["train-labels-idx1-ubyte"][8:])
    assert not data.published and "NOT the published archive" in data.source and str(tmp_path) in data.source


def test_files_directly_in_the_folder_are_found(tmp_path):
    folder = write_mnist(tmp_path, mnist_contents())
    assert load("mnist", root=folder).train_x.shape[0] == TRAIN


def test_published_bytes_are_recognized_packed_and_plain(tmp_path, monkeypatch):
    contents = mnist_contents()
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(files.PUBLISHED_MD5, "mnist", md5s)
    write_mnist(tmp_path / "a", contents)
    write_mnist(tmp_path / "b", contents, packed=True)
    for part in "ab":
        data = load("mnist", root=tmp_path / part)
        assert data.published and "NOT" not in data.source
    changed = contents | {"t10k-labels-idx1-ubyte": idx(np.zeros(TEST, np.uint8))}
    write_mnist(tmp_path / "a", changed)
    assert not load("mnist", root=tmp_path / "a").published


def test_fingerprint_is_of_the_content_not_of_the_folder(tmp_path):
    write_mnist(tmp_path / "a", mnist_contents())
    write_mnist(tmp_path / "b", mnist_contents(), packed=True)
    write_mnist(tmp_path / "c", mnist_contents(1))
    a, b, c = (load("mnist", root=tmp_path / part).fingerprint for part in "abc")
    assert a == b != c and len(a) == 16


def test_subset_takes_the_first_samples_and_has_its_own_fingerprint(tmp_path):
    write_mnist(tmp_path, mnist_contents())
    data = load("mnist", root=tmp_path)
    part = data.subset(7)
    assert isinstance(part, Dataset) and torch.equal(part.train_x, data.train_x[:7]) and len(part.train_y) == 7
    assert torch.equal(part.test_x, data.test_x)
    assert len({data.fingerprint, part.fingerprint, data.subset(8).fingerprint}) == 3
    assert data.subset(TRAIN) is data
    for wrong in (0, -1, TRAIN + 1, 2.5, True):
        with pytest.raises(ValueError, match=rf"in 1..{TRAIN} \(mnist\), got"):
            data.subset(wrong)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "train-images-idx3-ubyte",
            idx(np.zeros((TRAIN, 28, 28), np.uint8))[:-1],
            r"must hold 9408 bytes .* got 9407 \(truncated",
        ),
        ("train-images-idx3-ubyte", b"", "IDX magic 00 00 08 03 .* got an empty file"),
        ("train-images-idx3-ubyte", b"<html>not found</html>", "IDX magic .* got 3c 68 74 6d"),
        ("train-images-idx3-ubyte", idx(np.zeros((TRAIN, 27, 28), np.uint8)), "28x28 images, got 27x28"),
        ("train-labels-idx1-ubyte", idx(np.zeros(TRAIN + 1, np.uint8)), f"each of {TRAIN} images .* got {TRAIN + 1}"),
        ("t10k-labels-idx1-ubyte", idx(np.full(TEST, 10, np.uint8)), "labels 0..9, got 10"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((0, 28, 28), np.uint8)), "one label for each of 0 images"),
    ],
)
def test_corrupt_mnist_files_are_named(tmp_path, name, content, match):
    folder = write_mnist(tmp_path, mnist_contents() | {name: content})
    with pytest.raises(ValueError, match=match) as caught:
        load("mnist", root=tmp_path)
    assert str(folder) in str(caught.value)


def test_a_truncated_gzip_is_named(tmp_path):
    folder = write_mnist(tmp_path, mnist_contents(), packed=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz must be a whole gzip file"):
        load("mnist", root=tmp_path)


def test_half_a_data_set_is_told_not_replaced(tmp_path):
    folder = write_mnist(tmp_path, mnist_contents())
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="missing: t10k-images-idx3-ubyte"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("byte_keys", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar10_pickles_of_any_age(tmp_path, protocol, byte_keys):
    write_cifar(tmp_path, protocol=protocol, byte_keys=byte_keys)
    data = load("cifar10", root=tmp_path)
    assert data.train_x.shape == (20, 3, 32, 32) and data.test_x.shape == (4, 3, 32, 32)
    first = batch(0)
    pixel = (first["data"][0, 1024] / 255 - 0.4822) / 0.1994  # the first green one
    assert data.train_x[0, 1, 0, 0].item() == pytest.approx(pixel, abs=1e-5)
    assert data.train_y[:4].tolist() == first["labels"]
    assert not data.published


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_both_names_of_numpys_constructor_are_read(tmp_path, module):
    folder = write_cifar(tmp_path)
    path = folder / "test_batch"
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    path.write_bytes(
        content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(b"numpy.core.multiarray", module)
    )
    assert load("cifar10", root=tmp_path).test_x.shape[0] == 4


def test_python_2_strings_are_read(tmp_path):
    """As the published batches have them: BINSTRING opcodes, no bytes, no unicode."""

    def short(text: bytes) -> bytes:
        return pickle.BINSTRING + struct.pack("<i", len(text)) + text

    array = pickle.dumps(np.arange(3072, dtype=np.uint8).reshape(1, 3072), protocol=2)[2:-1]
    content = b"\x80\x02}(" + short(b"labels") + b"]K\x03a" + short(b"data") + array + short(b"name\xe9") + b"K\x01u."
    path = tmp_path / "batch"
    path.write_bytes(content)
    images, labels = formats.read_batch(path)
    assert images.shape == (1, 3, 32, 32) and labels.tolist() == [3]


class Evil:
    """A pickle that runs code where it is loaded by ``pickle.load``."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.mkdir, eval, getattr], ids=["mkdir", "eval", "getattr"])
def test_a_malicious_pickle_runs_nothing(tmp_path, call, protocol):
    mark = tmp_path / "ran"
    arguments = {os.mkdir: (str(mark),), eval: (f"__import__('os').mkdir({str(mark)!r})",), getattr: (Path, "mkdir")}[
        call
    ]
    path = write_cifar(tmp_path) / "data_batch_3"
    path.write_bytes(pickle.dumps(batch(0) | {"data": Evil(call, *arguments)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_3 must be a CIFAR-10 batch .* refused to load"):
        load("cifar10", root=tmp_path)
    assert not mark.exists()
    if call is os.mkdir:  # the file is the attack that it is meant to be
        pickle.loads(path.read_bytes())
        assert mark.exists()


UINT8_STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
WIDE_STATE = b"(K\x03U\x01|NNNM\x00\x10K\x01K\x00t"  # an item size of 4096


def dtype(code: bytes, state: bytes) -> bytes:
    """A dtype with that state, kept as number 0."""
    return b"cnumpy\ndtype\n(U" + bytes([len(code)]) + code + b"\x89\x88tR" + b"q\x00" + state + b"b0"


BYTES = b"c_codecs\nencode\n(X\x00\x10\x00\x00" + b"A" * 4096 + b"X\x06\x00\x00\x00latin1tR"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
HEAP_ATTACKS = {
    # numpy.ndarray(4, d) whose item size becomes 4096 after the memory was taken; then a[0] = 4096 bytes.
    "wide": (
        b"\x80\x02cnumpy\ndtype\n(U\x02V8\x89\x88tRq\x00cnumpy\nndarray\n(K\x04h\x00tRq\x01h\x00"
        + WIDE_STATE
        + b"b0K\x00"
        + BYTES
        + b"s.",
        "refused an array of type 'V8'",
    ),
    "state": (b"\x80\x02" + dtype(b"u1", WIDE_STATE) + b"N.", "refused a state of dtype"),
    "shape": (
        b"\x80\x02" + dtype(b"u1", UINT8_STATE) + b"cnumpy\nndarray\n(K\x04h\x00tR.",
        "refused to make an array without",
    ),
    "short": (
        b"\x80\x02" + dtype(b"u1", UINT8_STATE) + EMPTY + b"(K\x01J\x00\x00\x00\x10\x85h\x00\x89U\x01xtb.",
        r"refused an array of shape \[268435456\] with 1 bytes",
    ),
    "item": (b"\x80\x02" + EMPTY + b"K\x00" + BYTES + b"s.", "TypeError: .* item assignment"),
    "function": (b"\x80\x02c_codecs\nencode\n}b.", "refused to change a function"),
    "codec": (
        b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        "refused to encode with 'rot13'",
    ),
}


def test_a_pickle_that_writes_past_an_array_is_refused(tmp_path):
    """In a process of its own: NumPy's own types would let some of these end it with SIGSEGV."""
    for name, (content, _) in HEAP_ATTACKS.items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from curvlab.data.formats import read_batch\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: read_batch(path)\n"
        "    except ValueError as error: print(error)\n"
    )
    paths = [str(tmp_path / name) for name in HEAP_ATTACKS]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, path, (_, why) in zip(lines, paths, HEAP_ATTACKS.values(), strict=True):
        assert re.match(rf"load: {re.escape(path)} must be a CIFAR-10 batch .*{why}", line), line


def test_cifar10_files_may_be_packed(tmp_path):
    folder = write_cifar(tmp_path)
    expected = load("cifar10", root=tmp_path).fingerprint
    for path in list(folder.iterdir())[::2]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load("cifar10", root=tmp_path).fingerprint == expected
    (folder / "test_batch").unlink(missing_ok=True)
    (folder / "test_batch.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
    with pytest.raises(ValueError, match=r"test_batch.gz must be a whole gzip file"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "EOFError"),
        (pickle.dumps(batch(0), protocol=2)[:3000], "corrupt, truncated or foreign"),
        (b"PK\x03\x04 a zip file", "corrupt, truncated or foreign"),
        (pickle.dumps([1]), "must hold a dict, got list"),
        (pickle.dumps({"data": 1}), "labels missing"),
        (pickle.dumps(batch(0, data=np.zeros((4, 3072)))), "refused an array of type 'f8': only 'u1'"),
        (pickle.dumps(batch(0, data=np.asfortranarray(batch(0)["data"])), protocol=2), "refused an array in Fortran"),
        (pickle.dumps(batch(0, data=np.asfortranarray(batch(0)["data"])), protocol=5), "refused an array in order 'F'"),
        (pickle.dumps(batch(0), protocol=2).replace(b"M\x00\x0c", b"M\x01\x0c"), r"shape \[4, 3073\] with 12288 bytes"),
        (pickle.dumps(batch(0, data=7)), r"uint8 \[n, 3072\], got int"),
        (pickle.dumps(batch(0, data=np.zeros((4, 99), np.uint8))), r"got uint8 \[4, 99\]"),
        (pickle.dumps(batch(0, labels=[1, 2, 3])), "each of 4 images .* got 3"),
        (pickle.dumps(batch(0, labels=[1, 2, 3, 11])), "labels 0..9, got 11"),
        (pickle.dumps(batch(0, labels=[1, 2, 3, -1])), "list of ints"),
        (pickle.dumps(batch(0, labels="1234")), "list of ints"),
    ],
)
def test_corrupt_cifar_batches_are_named(tmp_path, content, match):
    path = write_cifar(tmp_path) / "data_batch_2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        load("cifar10", root=tmp_path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="one of mnist, cifar10, digits, got 'imagenet'"):
        load("imagenet")
    with pytest.raises(FileNotFoundError, match=r"root must be an existing folder, got .*nowhere"):
        load("mnist", root=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="root must be a folder, got the file"):
        load("mnist", root=tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match=r"download is off: .*has no MNIST/raw.*train-images-idx3-ubyte.gz .is not there"
    ):
        load("mnist", root=tmp_path, download=False)


def test_a_wrong_folder_in_the_environment_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="CURVLAB_DATA must be an existing folder"):
        load("mnist")
