# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole products: captured once for each kind of product and number of directions, then replayed.

A product of a small network is hundreds of kernels of a few microseconds; replaying them needs one call.  Everything in
a product is static: buffers, chunk sizes, no value is read by the host.

All products of one engine read and write the same buffers: a graph its input and its result, graphs and plain calls
what the engine keeps.  On one stream they follow each other; on two, the second would overwrite the first one's input.
So each product waits, on its own stream, for the event behind the one before it.  The host never waits for a product.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaRuntime", "Replays", "Runtime"]

_MOST_GRAPHS = 8  # each holds the memory of one product

Function = Callable[[Tensor], Tensor]


class Runtime(Protocol):
    """What :class:`Replays` needs of a device that has streams; a test gives one that reorders them."""

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the current one: graphs record and replay on streams of the *current* device."""
        ...

    def is_capturing(self) -> bool:
        """Whether a caller records the current stream, where events from outside may not be waited for."""
        ...

    def current_stream(self) -> Any:
        """A stream, with ``wait_event(event)``."""
        ...

    def new_event(self) -> Any:
        """An event, with ``record(stream)`` and ``synchronize()``; waiting for one never recorded is no wait."""
        ...

    def capture(self, rows: Tensor, function: Function) -> Function:
        """``function`` for rows of this shape, as a replay on the current stream."""
        ...


class CudaRuntime:
    """Streams, events and graphs of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """See :class:`Runtime`."""
        return torch.cuda.device(self._device)

    def is_capturing(self) -> bool:
        """See :class:`Runtime`."""
        return torch.cuda.is_current_stream_capturing()

    def current_stream(self) -> Any:
        """See :class:`Runtime`."""
        return torch.cuda.current_stream(self._device)

    def new_event(self) -> Any:
        """See :class:`Runtime`."""
        return torch.cuda.Event()

    def capture(self, rows: Tensor, function: Function) -> Function:
        """See :class:`Runtime`.

        Raises:
            RuntimeError: the function does what no graph can hold.
        """
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

        def replay(rows: Tensor) -> Tensor:
            static.copy_(rows)
            graph.replay()
            return result.clone()

        return replay


class Replays:
    """Calls functions of rows, on CUDA through captured graphs and one after the other, whatever their streams.

    Args:
        device: where the rows are.
        runtime: None: that of ``device``; CPU devices have none.

    Attributes:
        note: what reports should say; "" on the CPU.
    """

    def __init__(self, device: torch.device, runtime: Runtime | None = None) -> None:
        self._runtime = CudaRuntime(device) if runtime is None and device.type == "cuda" else runtime
        self._graphs: dict[tuple[str, tuple[int, ...]], Function] = {}
        self._behind_last: Any = None  # the event behind the last product
        self._lock = threading.RLock()  # wait, product and record of two host threads must not interleave
        self._usable = True
        self.note = ""

    def clear(self) -> None:
        """Forget all graphs: what they read has changed. Waits for the last product, which may still read them."""
        with self._lock:
            if self._graphs:
                self._behind_last.synchronize()
            self._graphs.clear()

    def __call__(self, key: str, rows: Tensor, function: Function, capturable: bool) -> Tensor:
        """``function(rows)``; the first call with one key and shape captures, later ones replay."""
        if self._runtime is None:
            return function(rows)
        with self._runtime.guard():
            if self._runtime.is_capturing():
                return function(rows)
            with self._in_turn(self._runtime):
                return self._fastest(self._runtime, key, rows, function, capturable)(rows)

    @contextlib.contextmanager
    def _in_turn(self, runtime: Runtime) -> Iterator[None]:
        """The current stream waits for the last product, and what it is given here is the next one's last."""
        with self._lock:
            stream = runtime.current_stream()
            if self._behind_last is None:
                self._behind_last = runtime.new_event()
            stream.wait_event(self._behind_last)
            try:
                yield
            finally:
                self._behind_last.record(stream)

    def _fastest(self, runtime: Runtime, key: str, rows: Tensor, function: Function, capturable: bool) -> Function:
        """The graph for these rows, captured if there is none yet; or ``function`` itself where there can be none."""
        if not self._usable:
            return function
        if not capturable:
            self.note = "no CUDA graph: the loss is differentiated by autograd"
            return function
        name = (key, tuple(rows.shape))
        if name not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                return function
            try:
                self._graphs[name] = runtime.capture(rows, function)
            except RuntimeError as error:
                self._usable = False
                self.note = f"no CUDA graph: {str(error).splitlines()[0]}"
                return function
            self.note = "products are replayed as CUDA graphs"
        return self._graphs[name]
