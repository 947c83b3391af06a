# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole products: captured once for each kind of product and number of directions, then replayed.

A product of a small network is hundreds of kernels of a few microseconds; replaying them needs one call.  Everything in
a product is static: buffers, chunk sizes, no value is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Replays"]

_MOST_GRAPHS = 8  # each holds the memory of one product


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    rows: Tensor
    result: Tensor


class Replays:
    """Calls functions of rows, on CUDA through captured graphs.

    Attributes:
        note: what reports should say; "" on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[tuple[str, tuple[int, ...]], _Graph] = {}
        self.note = ""
        self._usable = device.type == "cuda"

    def clear(self) -> None:
        """Forget all graphs: what they read has changed."""
        self._graphs.clear()

    def __call__(self, key: str, rows: Tensor, function: Callable[[Tensor], Tensor], capturable: bool) -> Tensor:
        """``function(rows)``; the second call with one key and shape captures, later ones replay."""
        if not self._usable:
            return function(rows)
        with torch.cuda.device(self._device):  # graphs record and replay on streams of the *current* device
            return self._call(key, rows, function, capturable)

    def _call(self, key: str, rows: Tensor, function: Callable[[Tensor], Tensor], capturable: bool) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return function(rows)
        if not capturable:
            self.note = "no CUDA graph: the loss is differentiated by autograd"
            return function(rows)
        name = (key, tuple(rows.shape))
        if name in self._graphs:
            own = self._graphs[name]
            own.rows.copy_(rows)
            own.graph.replay()
            return own.result.clone()
        if len(self._graphs) >= _MOST_GRAPHS:
            return function(rows)
        try:
            self._graphs[name] = self._capture(rows, function)
        except RuntimeError as error:
            self._usable = False
            self.note = f"no CUDA graph: {str(error).splitlines()[0]}"
            return function(rows)
        self.note = "products are replayed as CUDA graphs"
        return self._call(key, rows, function, capturable)

    def _capture(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> _Graph:
        static = rows.clone()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            function(static)  # libraries choose algorithms and workspaces on their first call
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # PyTorch's default stream for captures stays on the device of the process' first capture.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)):
            result = function(static)
        return _Graph(graph, static, result)
