# SPDX-License-Identifier: Apache-2.0
"""Replays share their buffers: products on several streams and from several threads must not meet in them."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab.operators import HessianOperator, Problem
from curvlab.operators.engines.graph_capture import Replays

ROWS = (2, 3)


class Event:
    """Remembers what stood on a stream when it was recorded last, as CUDA's events do."""

    def __init__(self) -> None:
        self.behind: tuple[Stream, int] | None = None
        self.synchronized = 0

    def record(self, stream: Stream) -> None:
        self.behind = (stream, len(stream.work))

    def synchronize(self) -> None:
        self.synchronized += 1


class Stream:
    """Work that is done later, in order; a wait holds back what follows it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object] | tuple[Stream, int] | None] = []
        self.done = 0

    def wait_event(self, event: Event) -> None:
        self.work.append(event.behind)

    @property
    def ready(self) -> bool:
        if self.done == len(self.work):
            return False
        head = self.work[self.done]
        return not isinstance(head, tuple) or head[0].done >= head[1]

    def step(self) -> None:
        head = self.work[self.done]
        if callable(head):
            head()
        self.done += 1


class Deaf(Stream):
    """Does not wait: what the simulation must find."""

    def wait_event(self, event: Event) -> None:
        pass


class FakeRuntime:
    """A device whose streams run when :meth:`finish` says, in any order that the waits allow."""

    def __init__(self, kind: type[Stream] = Stream, count: int = 2) -> None:
        self.streams = [kind() for _ in range(count)]
        self.current = self.streams[0]
        self.events: list[Event] = []
        self.captures = 0
        self.capturing = False
        self.error = ""

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def is_capturing(self) -> bool:
        return self.capturing

    def current_stream(self) -> Stream:
        return self.current

    def new_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def capture(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if self.error:
            raise RuntimeError(self.error)
        self.captures += 1
        static, result = rows.clone(), torch.full_like(rows, float("nan"))

        def replay(rows: Tensor) -> Tensor:
            given, out = rows.clone(), torch.full_like(rows, float("nan"))
            for work in (
                lambda: static.copy_(given),
                lambda: result.copy_(function(static)),
                lambda: out.copy_(result),
            ):
                self.current.work.append(work)
            return out

        return replay

    def finish(self, seed: int) -> None:
        order = random.Random(seed)
        while ready := [stream for stream in self.streams if stream.ready]:
            order.choice(ready).step()
        assert all(stream.done == len(stream.work) for stream in self.streams)


def double(rows: Tensor) -> Tensor:
    return 2.0 * rows


def products(runtime: FakeRuntime, replays: Replays, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(found, expected) of products that take turns on the streams, done in an order drawn from the seed."""
    pairs = []
    for i, stream in enumerate(itertools.islice(itertools.cycle(runtime.streams), 8)):
        runtime.current = stream
        rows = torch.full(ROWS, float(i))
        pairs.append((replays("hessian", rows, double, True), double(rows)))
    runtime.finish(seed)
    return pairs


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_replays_of_several_streams_do_not_meet(seed, count):
    runtime = FakeRuntime(count=count)
    replays = Replays(torch.device("cpu"), runtime)
    for found, expected in products(runtime, replays, seed):
        torch.testing.assert_close(found, expected)
    assert runtime.captures == 1 and replays.note == "products are replayed as CUDA graphs"
    assert len(runtime.events) == 1


def test_the_simulation_finds_streams_that_do_not_wait():
    wrong = 0
    for seed in range(10):
        runtime = FakeRuntime(Deaf)
        pairs = products(runtime, Replays(torch.device("cpu"), runtime), seed)
        wrong += any(not torch.equal(found, expected) for found, expected in pairs)
    assert wrong >= 5


def test_every_kind_of_product_waits_and_is_waited_for():
    """Plain calls too: they share what the engine keeps with the graphs."""
    runtime = FakeRuntime()
    replays = Replays(torch.device("cpu"), runtime)
    for i, capturable in enumerate((True, False, True)):
        runtime.current = runtime.streams[1 - i % 2]
        replays("hessian", torch.zeros(ROWS), double, capturable)
    for width in range(20):  # more shapes than graphs
        runtime.current = runtime.streams[width % 2]
        before = len(runtime.current.work)
        replays("hessian", torch.zeros(1, width + 1), double, True)
        other = runtime.streams[1 - width % 2]
        assert runtime.current.work[before] == (other, len(other.work))
        assert runtime.events[0].behind == (runtime.current, len(runtime.current.work))
    assert runtime.captures == 8


def test_a_failed_capture_is_said_and_products_go_on():
    runtime = FakeRuntime()
    runtime.error = "operation not permitted when stream is capturing\nmore"
    replays = Replays(torch.device("cpu"), runtime)
    rows = torch.ones(ROWS)
    for _ in range(2):
        torch.testing.assert_close(replays("hessian", rows, double, True), double(rows))
        runtime.error = ""  # it is not tried again
    assert replays.note == "no CUDA graph: operation not permitted when stream is capturing"
    assert runtime.captures == 0 and len(runtime.streams[0].work) == 2


def test_an_error_of_the_function_leaves_the_order_intact():
    runtime = FakeRuntime()
    replays = Replays(torch.device("cpu"), runtime)

    def fails(rows: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        replays("hessian", torch.ones(ROWS), fails, False)
    assert runtime.events[0].behind == (runtime.streams[0], 1)
    torch.testing.assert_close(replays("hessian", torch.ones(ROWS), double, False), torch.full(ROWS, 2.0))


def test_a_callers_capture_is_left_alone():
    runtime = FakeRuntime()
    runtime.capturing = True
    torch.testing.assert_close(
        Replays(torch.device("cpu"), runtime)("hessian", torch.ones(ROWS), double, True), torch.full(ROWS, 2.0)
    )
    assert runtime.captures == 0 and not runtime.events and not runtime.current.work


def test_clear_waits_for_the_last_replay_and_captures_anew():
    runtime = FakeRuntime()
    replays = Replays(torch.device("cpu"), runtime)
    replays.clear()
    replays("hessian", torch.ones(ROWS), double, True)
    replays.clear()
    assert runtime.events[0].synchronized == 1
    out = replays("hessian", torch.ones(ROWS), lambda rows: 3.0 * rows, True)
    runtime.finish(0)
    torch.testing.assert_close(out, torch.full(ROWS, 3.0))
    assert runtime.captures == 2


def test_two_host_threads_take_turns():
    """Between one thread's wait and its record no other thread may give a stream work."""
    log: list[tuple[str, int]] = []

    class Slow(Stream):
        def wait_event(self, event: Event) -> None:
            log.append(("wait", threading.get_ident()))
            time.sleep(0.002)

    class SlowEvent(Event):
        def record(self, stream: Stream) -> None:
            log.append(("record", threading.get_ident()))

    runtime = FakeRuntime(Slow)
    runtime.new_event = SlowEvent  # type: ignore[method-assign]
    replays = Replays(torch.device("cpu"), runtime)

    def work() -> None:
        for _ in range(10):
            replays("hessian", torch.ones(ROWS), double, False)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({ident for _, ident in log}) == 2
    assert [what for what, _ in log] == ["wait", "record"] * 20
    assert all(log[i][1] == log[i + 1][1] for i in range(0, 40, 2))


def test_cpu_products_are_plain_calls():
    replays = Replays(torch.device("cpu"))
    torch.testing.assert_close(replays("hessian", torch.ones(ROWS), double, True), torch.full(ROWS, 2.0))
    assert replays.note == ""
    replays.clear()


@pytest.mark.cuda
def test_products_on_two_cuda_streams_are_those_of_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    data = (torch.randn(512, 64, device="cuda"), torch.randint(10, (512,), device="cuda"))
    operator = HessianOperator(Problem(model, nn.CrossEntropyLoss(), data), engine="fused")
    rows = torch.randn(16, 2, operator.shape[1], device="cuda")
    expected = [operator.apply_rows(v).clone() for v in rows]
    assert "replayed" in str(getattr(operator.engine, "notes", ()))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i, v in enumerate(rows):
        with torch.cuda.stream(streams[i % 2]):
            if i % 2 == 0:
                torch.cuda._sleep(2_000_000)  # about a millisecond: the other stream is ready long before
            found.append(operator.apply_rows(v))
    torch.cuda.synchronize()
    for product, same in zip(found, expected, strict=True):
        torch.testing.assert_close(product, same, rtol=0, atol=0)
