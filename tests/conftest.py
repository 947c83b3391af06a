# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: an unbuilt tree says in one line what to type; GPU tests skip where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

try:
    import torch

    import curvlab
except ImportError as error:
    sys.exit(str(error))  # pytest.exit would show the traceback of this import around the one line


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that two threads mostly wait for each other on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> str:
    return f"curvlab {curvlab.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("cuda_build") and torch.version.cuda is None:
            item.add_marker(pytest.mark.skip(reason="fake CUDA tensors need a CUDA build of torch"))
