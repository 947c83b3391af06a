# SPDX-License-Identifier: Apache-2.0
"""Parameter norms against stock PyTorch.

Sizes: an 11 M-parameter ResNet-18 for CIFAR-10 (62 tensors, 42.6 MiB) and 100 tiny tensors of 100 elements. "Six
quantities" are L1, L2, L-infinity, number of nonzeros, distance to and inner product with a reference list, per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case
from curvlab.models import CNN
from curvlab.norms import NormRecorder, NormTable, filter_norms, parameter_norms, total_norm

TITLE = "Parameter norms (float32)"
STREAM = "one read of the same bytes: torch.sum over flat copies"


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Parameter shapes of ResNet-18 with a 3x3 stem and 10 classes: 62 tensors, 11,173,962 elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (10, 512), (10,)]


def _lists(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(shape, generator=generator) for shape in shapes]  # noqa: E731
    return draw(), draw()


def stock_six(tensors: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
    """The six quantities as a careful user writes them with stock calls."""
    l1, l2 = torch._foreach_norm(tensors, 1), torch._foreach_norm(tensors, 2)
    linf = torch._foreach_norm(tensors, float("inf"))
    distance = torch._foreach_norm(torch._foreach_sub(tensors, reference), 2)
    inner = [product.sum() for product in torch._foreach_mul(tensors, reference)]
    nonzeros = [torch.count_nonzero(tensor) for tensor in tensors]
    return [torch.stack(list(part)) for part in (l1, l2, linf, distance, inner, nonzeros)]


def stock_four(tensors: list[Tensor]) -> list[Tensor]:
    """L1, L2, L-infinity and nonzeros with stock calls."""
    l1, l2 = torch._foreach_norm(tensors, 1), torch._foreach_norm(tensors, 2)
    linf = torch._foreach_norm(tensors, float("inf"))
    nonzeros = [torch.count_nonzero(tensor) for tensor in tensors]
    return [torch.stack(list(part)) for part in (l1, l2, linf, nonzeros)]


def stock_filter_norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of every filter with stock calls."""
    return [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors]


def _list_cases(label: str, shapes: list[tuple[int, ...]]) -> Iterator[Case]:
    tensors, reference = _lists(shapes)
    flat, flat_reference = (torch.cat([t.flatten() for t in part]) for part in (tensors, reference))
    table, plain_table = NormTable(tensors, reference), NormTable(tensors)
    stock = {"torch._foreach_*, sum, count_nonzero": lambda: stock_six(tensors, reference)}
    both: dict[str, Any] = {"limit": lambda: (flat.sum(), flat_reference.sum()), "limit_name": STREAM}
    one: dict[str, Any] = {"limit": flat.sum, "limit_name": STREAM}
    yield Case(f"{label}: six quantities, prepared table", table, stock, **both)
    yield Case(f"{label}: six quantities, plain lists", lambda: parameter_norms(tensors, reference), stock, **both)
    four = {"torch._foreach_norm, count_nonzero": lambda: stock_four(tensors)}
    yield Case(f"{label}: L1, L2, L-inf, nonzeros, prepared table", plain_table, four, **one)
    total = {
        "get_total_norm": lambda: torch.nn.utils.get_total_norm(tensors),
        "get_total_norm(foreach=False)": lambda: torch.nn.utils.get_total_norm(tensors, foreach=False),
        "loop of norm, stack": lambda: torch.stack([t.norm() for t in tensors]).norm(),
    }
    yield Case(f"{label}: L2 of everything, plain list", lambda: total_norm(tensors), total, **one)


def _filter_case() -> Case:
    tensors = [torch.randn(shape) for shape in resnet18_shapes() if len(shape) > 1]
    flat = torch.cat([t.flatten() for t in tensors])
    peers = {"torch.linalg.vector_norm per tensor": lambda: stock_filter_norms(tensors)}
    return Case(
        "ResNet-18: L2 of every filter, plain list",
        lambda: filter_norms(tensors),
        peers,
        limit=flat.sum,
        limit_name=STREAM,
    )


class _TrainingStep:
    """One step of the paper's CNN(32)+BN at batch 128 with momentum SGD: what the recorder's cost is a share of."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = CNN(32, generator=generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = torch.randn(128, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (128,), generator=generator)
        self.params: list[Tensor] = list(self.model.parameters())
        self.step = self.epoch = 0

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def _recorder_case() -> Case:
    training = _TrainingStep()
    recorder = NormRecorder(training.params, reference="start")
    recorder.on_start(training)

    def record() -> None:
        training.step += 1
        recorder.on_step(training)

    return Case(
        "recorder, every step, CNN(32)+BN",
        record,
        {"the training step itself, batch 128": training},
        note="not a race: 100 / ratio is the recorder's cost in percent of a training step",
    )


def cases(*, quick: bool) -> Iterator[Case]:
    """The comparisons; built one at a time, as the large lists take memory."""
    yield from _list_cases("ResNet-18, 62 tensors, 11.2 M", resnet18_shapes())
    yield from _list_cases("100 tensors of 100", [(100,)] * 100)
    yield _filter_case()
    if not quick:
        shapes = [(4096, 784), (4096,), *([(4096, 4096), (4096,)] * 2), (10, 4096), (10,)]
        yield from _list_cases("MLP of width 4096, 36.8 M", shapes)
    yield _recorder_case()
