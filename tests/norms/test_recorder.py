# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from curvlab.norms import NormRecorder, parameter_norms


def train(*recorders: NormRecorder, steps: int = 7) -> tuple[nn.Module, nn.Module]:
    """A small loop with the protocol of curvlab.training; returns the network and its start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    start = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    start.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    state = SimpleNamespace(step=0, epoch=0, params=list(net.parameters()), model=net)
    for recorder in recorders:
        recorder.on_start(state)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        state.step += 1
        for recorder in recorders:
            recorder.on_step(state)
    for recorder in recorders:
        recorder.on_end(state)
    return net, start


def test_rows_of_a_run() -> None:
    recorder = NormRecorder(reference="start")
    net, start = train(recorder)
    rows = recorder.rows()
    assert [row["step"] for row in rows] == list(range(8)) == list(recorder.steps)
    assert rows[0]["distance"] == 0 and rows[0]["cosine"] == pytest.approx(1)
    moved = [row["relative_movement"] for row in rows]
    assert all(later > earlier for earlier, later in pairwise(moved[:5]))
    with torch.no_grad():
        want = parameter_norms(net, start).total
    assert rows[-1]["distance"] == want.distance and rows[-1]["cosine"] == want.cosine
    assert rows[-1]["relative_movement"] == want.relative_movement and rows[-1]["l1"] == want.l1
    assert recorder.table().shape == (8, 7) and not recorder.table().requires_grad


def test_every_third_step_and_the_last() -> None:
    recorder, without = NormRecorder(every=3), NormRecorder()
    train(recorder, without)
    assert recorder.steps == (0, 3, 6, 7)
    assert torch.equal(recorder.table().nan_to_num(-1), without.table()[[0, 3, 6, 7]].nan_to_num(-1))
    assert recorder.table()[:, 4:].isnan().all()


@pytest.mark.parametrize("reference", ["start", None])
def test_generators_serve_every_run(reference: str | None) -> None:
    params = [torch.full((3,), 2.0), torch.ones(5)]
    recorder = NormRecorder((p for p in params), reference=reference)
    for _ in range(2):
        recorder.on_start(SimpleNamespace(step=0, params=[]))
        assert recorder.rows()[0]["l1"] == 11
    recorder = NormRecorder(params, reference=(p * 2 for p in params))
    for _ in range(2):
        recorder.on_start(SimpleNamespace(step=0, params=[]))
        assert recorder.rows()[0]["relative_movement"] == 0.5


def test_buffer_grows() -> None:
    recorder = NormRecorder(reference="start")
    net, start = train(recorder, steps=600)
    assert recorder.steps == tuple(range(601))
    with torch.no_grad():
        assert torch.equal(recorder.table()[-1], parameter_norms(net, start).total.values)
    assert recorder.table().isfinite().all()


def test_a_checkpoint_holds_the_rows() -> None:
    whole = NormRecorder(reference="start")
    train(whole)
    saved = json.loads(json.dumps(whole.state_dict()))
    resumed = NormRecorder(reference="start")
    train(resumed, steps=0)
    resumed.load_state_dict(saved)
    assert resumed.steps == whole.steps and torch.equal(resumed.table(), whole.table())
    resumed.on_end(SimpleNamespace(step=8, params=[]))
    assert resumed.steps == (*whole.steps, 8)


def test_errors() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        NormRecorder(every=0)
    with pytest.raises(ValueError, match="reference must be tensors, 'start' or None, got 'begin'"):
        NormRecorder(reference="begin")
    with pytest.raises(RuntimeError, match="on_start"):
        NormRecorder().on_step(SimpleNamespace(step=0, params=[]))
    state = SimpleNamespace(step=0, params=[torch.ones(3)])
    with pytest.raises(ValueError, match="NormRecorder: reference must have 1 tensors like params, got 2"):
        NormRecorder(reference=[torch.ones(3), torch.ones(3)]).on_start(state)


@pytest.mark.cuda
def test_no_synchronization_while_training() -> None:
    params = [torch.randn(1000, device="cuda"), torch.randn(3, device="cuda")]
    state, recorder = SimpleNamespace(step=0, params=params), NormRecorder(reference="start")
    try:
        torch.cuda.set_sync_debug_mode("error")
        recorder.on_start(state)
        for step in range(1, 300):
            state.step = step
            recorder.on_step(state)
        recorder.on_end(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(recorder.rows()) == 300 and recorder.table().is_cuda
