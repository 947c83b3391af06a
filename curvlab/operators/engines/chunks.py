# SPDX-License-Identifier: Apache-2.0
"""How many samples and directions a pass takes: few enough for the caches and the memory budget, no fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from curvlab.operators.engines.rules import Program
from curvlab.operators.engines.steps import Slot, Step

__all__ = ["Plan", "make_plan", "split"]

# Elements of the largest tangent of a pass. Measured, one thread with 2 MB of L2, CNN of 32 to 128 channels: chunks of
# 16, 32, 64 and 128 images took 277, 247, 233 and 220 ms, and in a second run 128 and 256 took 230 and 215: calls cost
# more than caches save.
_TARGET_ELEMENTS = 1 << 23
_FEW_SAMPLES = 16


@dataclass(frozen=True)
class Plan:
    """Samples a chunk, directions a pass, and what they cost in bytes."""

    samples: int
    directions: int
    kept: int
    """Kept between products, all samples together."""
    per_pass: int
    """Tangents and signals of one pass."""
    primal: int
    """The float64 pass over one chunk, before the first product."""
    fixed: int
    """Copies of weights."""

    def bytes(self, count: int, num_params: int, itemsize: int) -> int:
        """Bytes of one call with ``count`` directions at once, its result and copies of directions included."""
        return self.kept + self.fixed + max(self.per_pass, self.primal) + 4 * count * num_params * itemsize


def split(total: int, size: int) -> list[int]:
    """Chunk sizes that add up to ``total``, of nearly equal size at most ``size``."""
    count = -(-total // size)
    return [total // count + (i < total % count) for i in range(count)]


def _kept_bytes(steps: Sequence[Step], slots: Sequence[Slot], itemsize: int, second: bool) -> int:
    shared: dict[tuple[str, int], int] = {}
    for step in steps:
        shared.update(step.kept_bytes(slots, itemsize, second))
    return sum(shared.values())


def make_plan(
    program: Program,
    steps: Sequence[Step],
    batch_sizes: Sequence[int],
    *,
    num_params: int,
    itemsize: int,
    second: bool,
    whole_batches: bool,
    budget: int | None,
    count: int,
) -> Plan:
    """The plan for products of ``count`` directions at once.

    Raises:
        ValueError: the budget does not hold what must be kept and one pass; says what would fit.
    """
    active = [slot for slot in program.slots if slot.active]
    widest = max(slot.size for slot in active)
    tangents = sum(slot.size for slot in active) + 2 * widest
    primal = sum(slot.size for slot in program.slots) * 8 * 3
    largest = max(batch_sizes)
    total = sum(batch_sizes)
    kept_one = _kept_bytes(steps, program.slots, itemsize, second)
    fixed = 4 * num_params * itemsize

    def plan(samples: int, directions: int) -> Plan:
        per_pass = samples * directions * tangents * itemsize
        return Plan(samples, directions, kept_one * total, per_pass, samples * primal, fixed)

    samples = largest
    if not whole_batches:
        samples = min(largest, max(_TARGET_ELEMENTS // widest, _FEW_SAMPLES))
        samples = max(split(largest, samples))
    directions = max(1, min(count, _TARGET_ELEMENTS // (samples * widest)))
    chosen = plan(samples, directions)
    if budget is None:
        return chosen

    def fits(candidate: Plan) -> bool:
        return candidate.bytes(1, num_params, itemsize) <= budget

    while not fits(chosen) and (chosen.directions > 1 or (chosen.samples > 1 and not whole_batches)):
        fewer = chosen.directions > 1
        chosen = plan(chosen.samples, chosen.directions // 2) if fewer else plan((chosen.samples + 1) // 2, 1)
    if not fits(chosen):
        needed = chosen.bytes(1, num_params, itemsize)
        room = budget - (needed - chosen.kept)
        hold = max(0, room // max(kept_one, 1))
        raise ValueError(
            f"fused: memory_budget must be at least {needed} bytes for {total} samples ({kept_one} kept a sample), "
            f"got {budget}, which holds {hold} samples"
        )
    return chosen


def rows_at_once(plan: Plan, count: int, num_params: int, itemsize: int, budget: int | None) -> int:
    """How many of ``count`` directions one call may hold within the budget."""
    if budget is None:
        return count
    room = budget - plan.bytes(0, num_params, itemsize)
    return max(1, min(count, room // max(1, 4 * num_params * itemsize)))


def product_dtype(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """The dtype of factors: that of the problem, or bfloat16."""
    return torch.bfloat16 if precision == "bf16" else dtype
