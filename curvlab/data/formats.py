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
from typing import Any, NamedTuple

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


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, by which Python 3 writes bytes in old protocols: latin1 and nothing else."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"refused to encode with {encoding!r}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    reconstruct: Callable[..., Any] = np.ndarray.__reduce__(np.zeros(0))[0]  # type: ignore[assignment]
    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows NumPy's array constructors and nothing else, so that a file can run no code.

    ``find_class`` is the only way by which a pickle reaches a name; what it does not allow, the file cannot call.
    """

    _table = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name, or an error."""
        try:
            return self._table[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One CIFAR-10 batch: uint8 images ``[n, 3, 32, 32]`` and uint8 labels ``[n]``.

    Python 2 strings are read as latin1, so keys are str; batches pickled with bytes keys are taken as well.
    """
    try:
        batch = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError:
        raise
    except (
        Exception
    ) as error:  # a damaged pickle raises nearly any type (IndexError, KeyError, UnicodeDecodeError, ...)
        raise ValueError(
            f"load: {path} must be a CIFAR-10 batch (a pickled dict), got a corrupt, truncated or foreign file: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"load: {path} must hold a dict, got {type(batch).__name__}")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    missing = {"data", "labels"} - set(fields)
    if missing:
        raise ValueError(f"load: {path} must have the keys data and labels, {' and '.join(sorted(missing))} missing")
    data = fields["data"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        shape = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"load: {path} must hold data as uint8 [n, 3072], got {shape}")
    labels = fields["labels"]
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 255 for label in labels):
        raise ValueError(f"load: {path} must hold labels as a list of ints 0..9")
    labels = np.asarray(labels, np.uint8)
    _check_labels(path, labels, len(data))
    return data.reshape(-1, 3, 32, 32), labels


def read_cifar10(folder: Path) -> Arrays:
    """The five training batches and the test batch of ``folder``."""
    batches = [read_batch(folder / name) for name in CIFAR_TRAIN]
    images = np.concatenate([batch[0] for batch in batches])
    labels = np.concatenate([batch[1] for batch in batches])
    return Arrays(images, labels, *read_batch(folder / CIFAR_TEST))
