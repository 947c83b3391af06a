# SPDX-License-Identifier: Apache-2.0
"""MNIST, CIFAR-10 and scikit-learn's digits as tensors that live on the device.

    data = load("mnist", device="cuda").subset(5000)

Where the bytes come from, in this order: the folder given (``root`` or the environment variable ``CURVLAB_DATA``), the
cache (``$XDG_CACHE_HOME/curvlab``, else ``~/.cache/curvlab``), a download with checksums into the cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.data import files, formats

__all__ = ["NAMES", "Dataset", "load"]

NAMES = ("mnist", "cifar10", "digits")

# Channel means and standard deviations of the training pixels in 0..1.  MNIST and CIFAR-10: the usual published
# constants (arXiv 2604.07603 uses them; CIFAR-10's 0.2023 is the mean of per-image deviations, kept for the protocol).
# digits: measured on the 1,438 training images of the split below.
_MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "digits": ((0.3058,), (0.3764,)),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as tensors on one device.

    Attributes:
        name: "mnist", "cifar10" or "digits".
        train_x: float32 ``[N, C, H, W]``, ``(pixel / scale - mean) / std`` with the published channel constants.
        train_y: int64 ``[N]``, 0 .. num_classes-1.
        test_x: as train_x.
        test_y: as train_y.
        num_classes: number of classes.
        published: the bytes read carry the published checksums.
        fingerprint: 16 hex digits of a sha256 over all pixels and labels (of a subset: over its parent's and the size).
        source: a sentence for the report: where the data come from, and whether they are the published ones.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    published: bool
    fingerprint: str
    source: str

    def subset(self, num_train: int) -> Dataset:
        """The first ``num_train`` training samples (views, no copy), with the whole test set.

        Raises:
            ValueError: num_train below one or above the number of training samples.
        """
        total = len(self.train_x)
        if isinstance(num_train, bool) or not isinstance(num_train, int) or not 1 <= num_train <= total:
            raise ValueError(f"Dataset.subset: num_train must be an int in 1..{total} ({self.name}), got {num_train!r}")
        if num_train == total:
            return self
        return replace(
            self,
            train_x=self.train_x[:num_train],
            train_y=self.train_y[:num_train],
            fingerprint=hashlib.sha256(f"{self.fingerprint}[:{num_train}]".encode()).hexdigest()[:16],
        )


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    download: bool = True,
) -> Dataset:
    """The data set ``name`` on ``device``.

    Args:
        name: "mnist", "cifar10" or "digits" (ships with scikit-learn: no files).
        root: folder with ``MNIST/raw/*-ubyte[.gz]`` or ``cifar-10-batches-py/`` (torchvision's layouts, or those files
            directly in it); default ``CURVLAB_DATA``.  Its files are checked for structure only.  A folder without this
            data set is passed over for the cache and the download, and ``source`` says which it was.
        device: where the tensors live.
        download: allow the download.

    Raises:
        ValueError: unknown name; a file that is corrupt, truncated or of another structure (it is named).
        FileNotFoundError: root does not exist, or the data is nowhere and download is off.
        NotADirectoryError: root is a file.
        OSError: the cache cannot be written, or every mirror failed (each is listed with what went wrong, and so are
            corrupt files in the cache).

    Warns:
        UserWarning: a corrupt file in the cache was replaced by a download (it is named).
    """
    if name not in NAMES:
        raise ValueError(f"load: name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        return _assemble(name, _digits(), True, "digits: the 1,797 images that ship with scikit-learn", device)
    found = files.locate(name, root=root, download=download)
    read: Callable[[Path], formats.Arrays] = formats.read_mnist if name == "mnist" else formats.read_cifar10
    arrays = read(found.folder)
    published = found.origin != "folder" or files.is_published(name, found.folder)
    verdict = "the published bytes" if published else "NOT the published archive (checked for structure only)"
    where = {"folder": f"folder {found.folder}", "cache": f"cache {found.folder}"}.get(found.origin, found.origin)
    return _assemble(name, arrays, published, f"{name} from {where}: {verdict}", device)


def _digits() -> formats.Arrays:
    from sklearn.datasets import load_digits  # half a second to import, and only this data set needs it

    bunch: Any = load_digits()
    images = np.asarray(bunch.images, np.uint8)[:, None]
    labels = np.asarray(bunch.target, np.uint8)
    # Every fifth sample is a test sample: the file is ordered by writer and class, so that this keeps both balanced.
    test = np.arange(len(images)) % 5 == 4
    return formats.Arrays(images[~test], labels[~test], images[test], labels[test])


def _assemble(name: str, arrays: formats.Arrays, published: bool, source: str, device: torch.device | str) -> Dataset:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    means, stds = _MEAN_STD[name]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (means, stds))
    scale = 16.0 if name == "digits" else 255.0

    def pixels(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).div_(scale).sub_(mean).div_(std).to(device)

    def labels(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return Dataset(
        name=name,
        train_x=pixels(arrays.train_images),
        train_y=labels(arrays.train_labels),
        test_x=pixels(arrays.test_images),
        test_y=labels(arrays.test_labels),
        num_classes=10,
        published=published,
        fingerprint=digest.hexdigest()[:16],
        source=source,
    )
