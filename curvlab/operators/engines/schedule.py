# SPDX-License-Identifier: Apache-2.0
"""How the map of one kind is carried out over the data: the route, the size of the parts, and which maps are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvlab.operators.engines.derivatives import Derivatives, LinearMap, wants_channels_last
from curvlab.operators.engines.pieces import MemoryModel, Piece, is_splittable, pieces
from curvlab.operators.engines.tape import LinearProgram, record
from curvlab.operators.precision import relative_error
from curvlab.operators.problem import Problem

__all__ = ["Product", "Route", "Schedule"]

# Samples of the two trial maps whose sizes give the memory of any number of samples.
TRIAL = (2, 4)
BLOCK = 8
# Results of one operation, on average, below which the call costs more than the arithmetic: eight directions in one
# call then take 1.6 ms in place of 2.9 (MLP 784-32-32-32-10, N=128: 10 KB); at 500 KB (the MLP at N=64) 124 in place
# of 76, because a batched matrix product forms the transposes that single ones only name.
BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class Route:
    """How a map is built: which derivative, recorded or with its autograd graph kept, in which memory format."""

    kind: str
    recorded: bool
    channels_last: bool

    def __str__(self) -> str:
        how = "recorded" if self.recorded else "autograd graph kept"
        what = "forward over reverse" if self.kind == "forward" else self.kind
        return f"{what}, {how}{', channels-last' if self.channels_last else ''}"


@dataclass
class Product:
    """The map of one piece; ``shape`` is that of its first argument, ``kept`` and ``peak`` are bytes.

    ``outputs`` is the size of a first result that does not depend on the argument, which comes as None.
    """

    apply: LinearMap
    shape: torch.Size
    kept: int
    peak: int
    outputs: int = 0
    _block: LinearMap | None = field(default=None, repr=False)
    _tried: bool = field(default=False, repr=False)

    def block(self, like: list[Tensor], room: int) -> LinearMap | None:
        """The map of :data:`BLOCK` directions in one call, where calls are what it costs; else None."""
        if not self._tried:
            self._tried = True
            single = self.apply
            if isinstance(single, LinearProgram) and single.recording_bytes <= BLOCK_BYTES * single.num_steps:
                fits = 2 * BLOCK * single.temporary_bytes <= room
                self._block = _record_block(single, like) if fits else None
        return self._block


def _record_block(single: LinearMap, like: list[Tensor]) -> LinearMap | None:
    """``single`` batched over :data:`BLOCK` directions, or None where that has no rule or another result."""
    generator = torch.Generator(like[0].device).manual_seed(0)
    rows = [torch.randn((BLOCK, *t.shape), generator=generator, dtype=t.dtype, device=t.device) for t in like]
    expected = single(*(row[1] for row in rows))
    reached = [i for i, part in enumerate(expected) if part is not None]
    if not reached:
        return None

    def batched(*args: Tensor) -> list[Tensor | None]:
        results = torch.vmap(lambda *v: [part for part in single(*v) if part is not None])(*args)
        found = dict(zip(reached, results, strict=True))
        return [found.get(i) for i in range(len(expected))]

    try:
        program, results = record(batched, rows)
    except RuntimeError:  # no batching rule: directions go one by one
        return None
    if isinstance(single, LinearProgram) and 2 * program.num_steps > BLOCK * single.num_steps:
        return None  # some operation was unrolled, and calls are what there was to save
    # PyTorch 2.14 batches the second derivative of normalization layers wrong (2 to 10 %): so the block is compared.
    same = _error([None if part is None else part[1] for part in results], expected)
    return program if same <= 1e3 * torch.finfo(like[0].dtype).eps else None


def _error(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The relative error of all tensors as one vector."""
    flat: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in zip(got, expected, strict=True):
        some = next((part for part in pair if part is not None), None)
        if some is not None:
            for side, part in zip(flat, pair, strict=True):
                side.append((torch.zeros_like(some) if part is None else part).reshape(-1))
    return relative_error(torch.cat(flat[0]), torch.cat(flat[1])) if flat[0] else 0.0


class Schedule:
    """The maps of one kind (``"hessian"``, ``"ggn:loss"``, ``"jacobian"``, ``"transposed"``) over all pieces.

    Args:
        problem: whose data.
        derivatives: channels_last -> builder of maps.
        kind: which map.
        budget: bytes for what is kept and what is made while building.
        rounded: lower dtype that recorded maps multiply in.

    Attributes:
        route: how the maps are built.
        notes: why not in the ways that come before it.

    Raises:
        ValueError: the budget does not hold one sample, or a batch that cannot be taken in parts.
    """

    def __init__(
        self,
        problem: Problem,
        derivatives: Callable[[bool], Derivatives],
        kind: str,
        budget: int,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.problem, self.kind, self.budget, self._rounded = problem, kind, budget, rounded
        self._derivatives = derivatives
        self._kept: dict[int, Product] = {}
        self._complete = False
        self._owned = {tensor.untyped_storage()._cdata for tensor in problem.params.values()}
        first = next(pieces(problem))
        self.notes: list[str] = []
        self.route, self._memory = self._choose(first)
        self._part_size = self._parts(len(first))
        self._first_size = min(len(first), self._part_size or len(first))

    @property
    def kept_bytes(self) -> int:
        """Constants of the maps that are kept."""
        return sum(product.kept for product in self._kept.values())

    @property
    def is_complete(self) -> bool:
        """Whether all maps are kept: the data is not looked at again."""
        return self._complete

    @property
    def wanted_bytes(self) -> int:
        """What building the first piece takes."""
        return self._memory.peak(self._first_size)

    def drop(self) -> None:
        """Give the kept maps back; they are built again when they are needed."""
        self._kept.clear()
        self._complete = False

    def products(self, room: int) -> Iterator[Product]:
        """The map of each piece in turn; those that do not fit into ``room`` bytes beside the others are not kept."""
        if self._complete:
            # By number: a piece that found room later than its successors was put in behind them.
            yield from (self._kept[number] for number in range(len(self._kept)))
            return
        count = 0
        for piece in pieces(self.problem, self._part_size):
            yield self._kept[count] if count in self._kept else self._make(piece, count, room)
            count += 1
        self._complete = len(self._kept) == count

    def _make(self, piece: Piece, number: int, room: int) -> Product:
        n = len(piece)
        need = self._memory.peak(n)
        if self._part_size is None and need > self.budget:
            raise ValueError(
                f"LinearizedEngine: memory_budget must be at least {need} ({need / 2**30:.2f} GiB) for a batch of {n} "
                f"samples, which cannot be taken in parts, got {self.budget}; a batch of "
                f"{self._memory.fitting(self.budget)} would fit"
            )
        # While the next piece is built, this one is held: nothing follows only when the piece is all there is.
        follows = 0 if n == self.problem.num_samples else need
        if self.kept_bytes + max(need, self._memory.kept(n) + follows) <= room:
            product = self._build(self.route, piece.owned())
            self._kept[number] = product
            return product
        reverse = Route(self.kind, recorded=False, channels_last=self.route.channels_last)
        return self._build(reverse, piece)

    def _build(self, route: Route, piece: Piece) -> Product:
        apply, arguments = self._derivatives(route.channels_last).build(route.kind, piece)
        if not route.recorded:
            return Product(apply, arguments[0].shape, self._memory.kept(len(piece)), self._memory.peak(len(piece)))
        program, results = record(apply, arguments, rounded=self._rounded)
        kept = program.bytes_besides(self._owned)
        outputs = 0 if results[0] is None else results[0].numel()
        return Product(program, arguments[0].shape, kept, kept + program.recording_bytes, outputs)

    def _parts(self, first: int) -> int | None:
        """Largest number of samples of a piece; None: batches must stay whole."""
        if not is_splittable(self.problem):
            return None
        fitting = self._memory.fitting(self.budget)
        if fitting < 1:
            need = self._memory.peak(1)
            raise ValueError(
                f"LinearizedEngine: memory_budget must be at least {need} bytes for one sample, got {self.budget}"
            )
        # Half of the budget to what is kept, half to the piece that is being worked on.
        return fitting if fitting >= first else max(self._memory.fitting(self.budget // 2), 1)

    def _choose(self, first: Piece) -> tuple[Route, MemoryModel]:
        """The first route that works on a few samples and agrees with the double backward, and what it takes."""
        last = wants_channels_last(self.problem) and isinstance(first.inputs, Tensor) and first.inputs.ndim == 4
        kinds = ["forward", "hessian"] if self.kind == "hessian" else [self.kind]
        routes = [Route(kind, True, c) for kind in kinds for c in ([True, False] if last else [False])]
        trials = [first.head(n) for n in TRIAL] if len(first) > TRIAL[1] else [first]
        for route in routes:
            try:
                return route, self._try(route, trials)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.notes.append(f"not {route}: {str(error).strip().splitlines()[0]}")
        return Route(self.kind, False, False), self._saved(trials)

    def _try(self, route: Route, trials: list[Piece]) -> MemoryModel:
        products = [self._build(route, trial) for trial in trials]
        generator = torch.Generator(self.problem.device).manual_seed(0)
        apply, arguments = self._derivatives(False).build(self.kind, trials[-1])
        some = [torch.randn(a.shape, generator=generator, dtype=a.dtype, device=a.device) for a in arguments]
        error = _error(products[-1].apply(*some), apply(*some))
        if not error <= (0.2 if self._rounded else 1e5 * torch.finfo(self.problem.dtype).eps):
            raise RuntimeError(f"off the double backward by {error:.1e}")
        return _memory([(len(t), p.kept, p.peak) for t, p in zip(trials, products, strict=True)])

    def _saved(self, trials: list[Piece]) -> MemoryModel:
        """What an autograd graph keeps; the last route, so that errors of the model come out here."""
        sizes = []
        for trial in trials:
            seen: dict[int, int] = {}

            def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._owned:
                    seen[storage._cdata] = storage.nbytes()
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor):
                self._derivatives(False).build(self.kind, trial)
            sizes.append((len(trial), sum(seen.values()), 2 * sum(seen.values())))
        return _memory(sizes)


def _memory(sizes: list[tuple[int, int, int]]) -> MemoryModel:
    if len(sizes) == 1:
        n, kept, peak = sizes[0]
        return MemoryModel(0.0, kept / n, 0.0, peak / n)
    return MemoryModel.fit(*sizes)
