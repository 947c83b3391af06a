# SPDX-License-Identifier: Apache-2.0
"""Readers of the two file formats: IDX (MNIST) and CIFAR-10's pickled batches.  Nothing is used unchecked.

Errors are ValueErrors that name the file, what was expected and what was found.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np

__all__ = ["CIFAR_TEST", "CIFAR_TRAIN", "MNIST_FILES", "Arrays", "read_batch", "read_cifar10", "read_idx", "read_mnist"]

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST = "test_batch"


class Arrays(NamedTuple):
    """uint8 images ``[N, C, H, W]`` and uint8 labels ``[N]``, for training and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked when its name ends in ``.gz``."""
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"load: {path} must be a whole gzip file, got a corrupt or truncated one ({error})") from error


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic ``00 00 08 ndim``, ndim big-endian uint32 sizes, then the bytes.

    Source: http://yann.lecun.com/exdb/mnist/ (the file format section).
    """
    content = read_bytes(path)
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"load: {path} must start with the IDX magic 00 00 08 {ndim:02x} (unsigned bytes, {ndim} dimensions), "
            f"got {content[:4].hex(' ') or 'an empty file'}"
        )
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"load: {path} must hold {math.prod(shape)} bytes after its header of shape {list(shape)}, "
            f"got {len(content) - start} (truncated or corrupt)"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _check_labels(path: Path, labels: np.ndarray, count: int) -> None:
    if len(labels) != count or count == 0:
        raise ValueError(
            f"load: {path} must hold one label for each of {count} images (at least one), got {len(labels)}"
        )
    if labels.max() > 9:
        raise ValueError(f"load: {path} must hold labels 0..9, got {int(labels.max())}")


def read_mnist(folder: Path) -> Arrays:
    """The four MNIST files of ``folder``, unpacked or ``.gz``."""
    arrays = []
    for images_name, labels_name in (MNIST_FILES[:2], MNIST_FILES[2:]):
        images_path, labels_path = pick(folder, images_name), pick(folder, labels_name)
        images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
        if images.shape[1:] != (28, 28):
            raise ValueError(f"load: {images_path} must hold 28x28 images, got {images.shape[1]}x{images.shape[2]}")
        _check_labels(labels_path, labels, len(images))
        arrays += [images[:, None], labels]
    return Arrays(*arrays)


def pick(folder: Path, name: str) -> Path:
    """``folder/name`` if it is there, else ``folder/name.gz``."""
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"refused {what[:200]}")  # the file chose parts of it, and their length


class _Function:
    """A function that a pickle may call but not change: a plain one has attributes that BUILD could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        _refuse("to change a function")


class _Dtype:
    """Stands in for ``numpy.dtype``: uint8 and nothing else."""

    __slots__ = ()

    def __new__(cls, *arguments: Any) -> _Dtype:
        if not arguments or arguments[0] not in ("u1", "|u1"):
            _refuse(f"an array of type {', '.join(map(repr, arguments[:1])) or '(none)'}: only 'u1' (uint8) is read")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        # The last three are item size, alignment and flags.  NumPy's own dtype believes them, also when they are wrong.
        if not isinstance(state, tuple) or state[1:] != ("|", None, None, None, -1, -1, 0):
            _refuse("a state of dtype that is not the one of uint8")


class _Array:
    """Stands in for ``numpy.ndarray``: holds a uint8 array once shape and bytes have come and fit each other."""

    __slots__ = ("array",)
    array: np.ndarray | None

    def __new__(cls, *arguments: Any) -> _Array:
        if arguments:
            _refuse("to make an array without its content")
        self = super().__new__(cls)
        self.array = None
        return self

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            _refuse("an array whose state is not (version, shape, dtype, order, bytes)")
        _, shape, dtype, fortran, content = state
        if fortran not in (False, 0):
            _refuse("an array in Fortran order")
        self.fill(shape, dtype, content)

    def fill(self, shape: Any, dtype: Any, content: Any) -> None:
        """Take ``content`` (bytes, or the latin1 text that Python 2's strings become) as the array's bytes."""
        if not isinstance(dtype, _Dtype):
            _refuse("an array without a dtype")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            _refuse("an array whose shape is not a tuple of sizes")
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(shape):
            got = f"{len(content)} bytes" if isinstance(content, bytes | bytearray) else type(content).__name__
            _refuse(f"an array of shape {list(shape)} with {got}")
        # A copy: the pickle may still hold and change the bytes.
        self.array = np.frombuffer(content, np.uint8).reshape(shape).copy()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array or shape != (0,) or code not in ("b", b"b"):
        _refuse("to reconstruct anything but an empty array")
    return _Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if order != "C":
        _refuse(f"an array in order {order!r}")
    array = _Array()
    array.fill(shape, dtype, content)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    # Python 3 writes bytes in this way in old protocols.
    if not isinstance(text, str) or encoding != "latin1":
        _refuse(f"to encode with {encoding!r}")
    return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows stand-ins for NumPy's array constructors and nothing else, so that a file runs no code.

    ``find_class`` is the only way by which a pickle reaches a name; what it does not allow, the file cannot call.
    NumPy's own types are not handed out: a pickle can set a dtype's item size and then write past an array's end.
    """

    _table: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),
        ("numpy._core.multiarray", "_reconstruct"): _Function(_reconstruct),
        ("numpy.core.numeric", "_frombuffer"): _Function(_from_buffer),
        ("numpy._core.numeric", "_frombuffer"): _Function(_from_buffer),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Function(_encode),
    }

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name, or an error."""
        try:
            return self._table[module, name]
        except KeyError:
            _refuse(f"to load {module}.{name}")


def _load_pickle(path: Path) -> Any:
    content = read_bytes(path)
    try:
        return ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly any type (IndexError, KeyError, MemoryError, ...)
        raise ValueError(
            f"load: {path} must be a CIFAR-10 batch (a pickled dict), got a corrupt, truncated or foreign file: "
            f"{type(error).__name__}: {error}"
        ) from error


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One CIFAR-10 batch: uint8 images ``[n, 3, 32, 32]`` and uint8 labels ``[n]``.

    Python 2 strings are read as latin1, so keys are str; batches pickled with bytes keys are taken as well.
    """
    batch = _load_pickle(path)
    if not isinstance(batch, dict):
        raise ValueError(f"load: {path} must hold a dict, got {type(batch).__name__}")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    missing = {"data", "labels"} - set(fields)
    if missing:
        raise ValueError(f"load: {path} must have the keys data and labels, {' and '.join(sorted(missing))} missing")
    data = fields["data"].array if isinstance(fields["data"], _Array) else None
    if data is None or data.ndim != 2 or data.shape[1] != 3072:
        got = type(fields["data"]).__name__ if data is None else f"uint8 {list(data.shape)}"
        raise ValueError(f"load: {path} must hold data as uint8 [n, 3072], got {got}")
    labels = fields["labels"]
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 255 for label in labels):
        raise ValueError(f"load: {path} must hold labels as a list of ints 0..9")
    labels = np.asarray(labels, np.uint8)
    _check_labels(path, labels, len(data))
    return data.reshape(-1, 3, 32, 32), labels


def read_cifar10(folder: Path) -> Arrays:
    """The five training batches and the test batch of ``folder``, unpacked or ``.gz``."""
    batches = [read_batch(pick(folder, name)) for name in CIFAR_TRAIN]
    images = np.concatenate([batch[0] for batch in batches])
    labels = np.concatenate([batch[1] for batch in batches])
    return Arrays(images, labels, *read_batch(pick(folder, CIFAR_TEST)))
