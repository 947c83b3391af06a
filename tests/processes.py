# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo that run one function each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch


def _in_group(rank: int, folder: str, body: Callable[[int, str], None]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        body(rank, folder)
    finally:
        # A group that something still holds ends with the interpreter, whose exit its threads then abort.
        gc.collect()
        torch.distributed.destroy_process_group()


def in_two_processes(body: Callable[[int, str], None], folder: Path) -> None:
    """``body(rank, folder)`` in each of two processes of one group; a function that a module holds."""
    torch.multiprocessing.spawn(_in_group, (str(folder), body), nprocs=2)
