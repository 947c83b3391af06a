# SPDX-License-Identifier: Apache-2.0
r"""Slices of the loss surface, drawn through theta: L(theta + a d_1) on a line, L(theta + a d_1 + b d_2) on a plane.

With filter-normalized directions (:func:`curvlab.sharpness.filter_normalized`; Li et al. 2018) one unit of a or b is a
perturbation as large as the network's own filters, so that slices of networks with other weight norms can be compared.
Points are evaluated many at once in float64 (:mod:`curvlab.sharpness.evaluation`); with a ``folder`` tile by tile, so
that an interrupted plane goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from curvlab.operators.problem import Problem
from curvlab.sharpness.directions import random_directions
from curvlab.sharpness.evaluation import DEFAULT_BUDGET, LossEvaluator, Way, check_row, parameter_row
from curvlab.sharpness.tiles import TileFolder, write_arrays

__all__ = ["LossSlice", "linear_barrier", "loss_slice"]

Extent = float | tuple[float, float]


@dataclass(frozen=True)
class LossSlice:
    """Losses on a line or a plane.

    Attributes:
        coordinates: one or two arrays of coefficients, ``[n]`` and ``[m]``.
        losses: float64 ``[n]`` or ``[n, m]``, first axis along the first direction; may be infinite or NaN far away.
        accuracies: shares in 0..1 of the same shape, or None.
        cosine: between the two directions; NaN for a line.
    """

    coordinates: tuple[np.ndarray, ...]
    losses: np.ndarray
    accuracies: np.ndarray | None
    cosine: float = float("nan")

    @property
    def barrier(self) -> float:
        r"""Height above the chord between a line's ends, max over a of L(a) - ((1-t) L(first) + t L(last)), t in 0..1.

        0 where no point lies above it (the ends do). A point that overflows makes it infinite.

        Raises:
            ValueError: a plane.
        """
        return _height(self.coordinates, self.losses)

    @property
    def accuracy_barrier(self) -> float:
        """Depth of the accuracy below the chord between its ends (a share); NaN without accuracies.

        Raises:
            ValueError: a plane.
        """
        return float("nan") if self.accuracies is None else _height(self.coordinates, -self.accuracies)

    def __repr__(self) -> str:
        kind = "line" if len(self.coordinates) == 1 else "plane"
        finite = self.losses[np.isfinite(self.losses)]
        span = f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "none finite"
        lost = self.losses.size - finite.size
        beside = f", {lost} not finite" if lost and finite.size else ""
        return f"{kind} of {' x '.join(map(str, self.losses.shape))} points, losses {span}{beside}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """An ``.npz`` file, whole or not at all."""
        arrays = {f"axis_{i}": axis for i, axis in enumerate(self.coordinates)}
        arrays |= {"losses": self.losses, "cosine": np.float64(self.cosine)}
        if self.accuracies is not None:
            arrays["accuracies"] = self.accuracies
        write_arrays(Path(path), arrays)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossSlice:
        """What :meth:`save` wrote (nothing in the file is executed)."""
        with np.load(path, allow_pickle=False) as stored:
            axes = tuple(stored[f"axis_{i}"] for i in range(stored["losses"].ndim))
            accuracies = stored["accuracies"] if "accuracies" in stored.files else None
            return cls(axes, stored["losses"], accuracies, float(stored["cosine"]))


def _height(coordinates: tuple[np.ndarray, ...], values: np.ndarray) -> float:
    if len(coordinates) != 1:
        raise ValueError(f"LossSlice.barrier: needs a line, got {len(coordinates)} directions")
    (a,) = coordinates
    t = (a - a[0]) / (a[-1] - a[0])
    above = values - ((1.0 - t) * values[0] + t * values[-1])
    if np.isfinite(values[[0, -1]]).all():
        above = np.where(np.isnan(values), np.inf, above)
    return float(np.max(above))


def _axis(extent: Extent, num_points: int) -> np.ndarray:
    low, high = (-extent, extent) if isinstance(extent, (int, float)) else extent
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"loss_slice: extent must be positive, or (low, high) with low < high, got {extent!r}")
    axis = np.linspace(low, high, num_points)
    if low == -high and num_points % 2:
        axis[num_points // 2] = 0.0  # linspace may leave 1e-17 there, and theta itself is to be on the grid
    return axis


def loss_slice(
    problem: Problem,
    directions: Tensor | int = 1,
    *,
    extent: Extent = 1.0,
    num_points: int | Sequence[int] = 51,
    folder: str | os.PathLike[str] | None = None,
    tile_points: int = 64,
    generator: torch.Generator | None = None,
    way: Way = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> LossSlice:
    """The loss on a regular grid along one or two directions.

    Args:
        problem: network, loss and data; theta is the origin.
        directions: rows ``[P]``, ``[1, P]`` or ``[2, P]``, taken as they are; or 1 or 2: that many random
            filter-normalized ones.
        extent: coefficients from -extent to extent, or (low, high), along every direction.
        num_points: grid points along every direction, or one number each; odd numbers have theta on the grid.
        folder: keep finished tiles there and take up those that exist. The same network, data, directions and grid must
            come again (a generator in the same state); results are the same with and without.
        tile_points: points a tile.
        generator: source of random directions.
        way: see :mod:`curvlab.sharpness.evaluation`.
        memory_budget: bytes for the points of one sweep.
        progress: show a bar.

    Raises:
        ValueError: directions of another shape or number, an empty extent, fewer than two points, a folder that holds
            another slice or comes with a process group.
    """
    if isinstance(directions, int):
        if directions not in (1, 2):
            raise ValueError(f"loss_slice: directions must be 1 or 2 in number, got {directions}")
        directions = random_directions(problem, directions, generator=generator)
    check_row("loss_slice", "directions", directions, problem)
    rows = torch.atleast_2d(directions).to(problem.device, problem.dtype)
    if len(rows) not in (1, 2):
        raise ValueError(f"loss_slice: directions must be 1 or 2 in number, got {len(rows)}")
    counts = [num_points] * len(rows) if isinstance(num_points, int) else list(num_points)
    if len(counts) != len(rows) or min(counts) < 2:
        raise ValueError(f"loss_slice: num_points must be 2 or more for each direction, got {num_points!r}")
    if folder is not None and problem.process_group is not None:
        raise ValueError("loss_slice: folder must be None with a process group, got one: let one process keep tiles")
    if tile_points < 1:
        raise ValueError(f"loss_slice: tile_points must be at least 1, got {tile_points}")
    axes = tuple(_axis(extent, count) for count in counts)
    points = np.stack([axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij")], 1)
    tiles = None if folder is None else TileFolder(folder, _description(problem, rows, points, tile_points))
    evaluator = LossEvaluator(problem, way=way, memory_budget=memory_budget)
    losses, accuracies = _evaluate(evaluator, rows, points, tiles, tile_points, progress)
    cosine = torch.cosine_similarity(rows[0].double(), rows[1].double(), dim=0).item() if len(rows) == 2 else np.nan
    shape = tuple(counts)
    return LossSlice(
        axes, losses.reshape(shape), None if np.isnan(accuracies).all() else accuracies.reshape(shape), float(cosine)
    )


def _evaluate(
    evaluator: LossEvaluator,
    rows: Tensor,
    points: np.ndarray,
    tiles: TileFolder | None,
    tile_points: int,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies (NaN: none) of all points, tile by tile."""
    theta = parameter_row(evaluator.problem)
    starts = range(0, len(points), tile_points)
    losses, accuracies = np.empty(len(points)), np.full(len(points), np.nan)
    for index, start in enumerate(_shown(starts, progress)):
        part = slice(start, min(start + tile_points, len(points)))
        length = part.stop - part.start
        found = tiles.load(index, length) if tiles is not None else None
        if found is None:
            found = {"losses": np.empty(length), "accuracies": np.full(length, np.nan)}
            step = evaluator.points_at_once
            for first in range(0, length, step):
                here = points[part][first : first + step]
                coefficients = torch.as_tensor(here, device=theta.device).to(theta.dtype)
                # Summed direction by direction: a matrix product may round differently with the number of its rows.
                block = theta + coefficients[:, :1] * rows[0]
                if len(rows) == 2:
                    block += coefficients[:, 1:] * rows[1]
                result = evaluator(block)
                found["losses"][first : first + step] = result.losses.numpy()
                if result.accuracies is not None:
                    found["accuracies"][first : first + step] = result.accuracies.numpy()
            if tiles is not None:
                tiles.save(index, found)
        losses[part], accuracies[part] = found["losses"], found["accuracies"]
    return losses, accuracies


def _shown(items: Any, progress: bool) -> Any:
    if not progress:
        return items
    from rich.progress import track

    return track(items, description="loss slice")


def _description(problem: Problem, rows: Tensor, points: np.ndarray, tile_points: int) -> dict[str, Any]:
    """What the numbers depend on, with a hash over all of it: parameters, buffers, data, directions, grid."""
    digest = hashlib.sha256()

    def add(*tensors: Tensor) -> None:
        for tensor in tensors:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    for values in (problem.params, problem.fixed, problem.buffers):
        for name, tensor in values.items():
            digest.update(name.encode())
            add(tensor)
    for inputs, targets in problem.batches():
        add(*[leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)], targets)
    add(rows)
    digest.update(points.tobytes())
    for name, value in sorted(vars(problem.loss).items()):
        add(value) if isinstance(value, Tensor) else digest.update(f"{name}={_text(value)}".encode())
    digest.update(_text(problem.model).encode())  # the same weights with another activation are another network
    facts: dict[str, Any] = {"loss": type(problem.loss).__name__, "reduction": problem.reduction}
    facts |= {"batch_norm": problem.batch_norm, "tile_points": tile_points}
    digest.update(repr(sorted(facts.items())).encode())
    counts = {"num_params": problem.num_params, "num_samples": problem.num_samples, "points": len(points)}
    return {"hash": digest.hexdigest(), **facts, **counts, "directions": len(rows)}


def _text(value: Any) -> str:
    """A description that the next process gives as well: functions by name and code, without their address."""
    code = getattr(value, "__code__", None)
    of_code = "" if code is None else f"{code.co_code.hex()} {code.co_names} {code.co_consts!r}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{value!r} {of_code}")


def linear_barrier(
    first: Problem,
    second: Problem,
    *,
    num_points: int = 25,
    way: Way = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> LossSlice:
    r"""Loss and accuracy on the straight line (1-a) theta_1 + a theta_2, a = 0..1, between two solutions.

    ``.barrier`` of the result is the height over the chord (Frankle et al. 2020: linearly connected where it is about
    0). BatchNorm's running statistics belong to their networks: in mode "eval" buffers are interpolated with the
    parameters, where 0 < a < 1 then measures an average of statistics too; modes "frozen" and "batch" take the
    statistics of the data at each point.

    Args:
        first: at a = 0; loss, data and modes are this problem's.
        second: the same network with other values.
        num_points: points on the line, both ends included.
        way: see :mod:`curvlab.sharpness.evaluation`.
        memory_budget: bytes for the points of one sweep.

    Raises:
        ValueError: parameters or buffers of other names or shapes, fewer than two points.
    """
    if num_points < 2:
        raise ValueError(f"linear_barrier: num_points must be at least 2, got {num_points}")
    for kind in ("params", "buffers", "fixed"):
        one, two = getattr(first, kind), getattr(second, kind)
        if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in two.items()}:
            raise ValueError(f"linear_barrier: second must have the {kind} of first (names and shapes), got others")
    for name, value in first.fixed.items():
        if not torch.equal(value, second.fixed[name].to(value)):
            raise ValueError(f"linear_barrier: second must share the parameters that stay fixed, got another {name}")
    axis = np.linspace(0.0, 1.0, num_points)
    starts, ends = parameter_row(first), parameter_row(second).to(first.device, first.dtype)
    moving = [n for n, t in first.buffers.items() if t.is_floating_point() and not torch.equal(t, second.buffers[n])]
    if first.batch_norm == "batch" or (first.batch_norm == "eval" and not moving):
        evaluator = LossEvaluator(first, way=way, memory_budget=memory_budget)
        # lerp is exact at both ends; theta + 1 * (theta' - theta) is not.
        weights = torch.as_tensor(axis, device=starts.device).to(starts.dtype)[:, None]
        parts = [evaluator(torch.lerp(starts, ends, part)) for part in weights.split(evaluator.points_at_once)]
        losses = np.concatenate([part.losses.numpy() for part in parts])
        accuracies = [part.accuracies for part in parts]
    else:
        found = [_between(first, second, starts, ends, moving, a, way, memory_budget) for a in axis.tolist()]
        losses = np.array([one.losses.item() for one in found])
        accuracies = [one.accuracies for one in found]
    has_accuracy = all(part is not None for part in accuracies)
    shares = np.concatenate([part.numpy() for part in accuracies if part is not None]) if has_accuracy else None
    return LossSlice((axis,), losses, shares)


def _between(
    first: Problem, second: Problem, starts: Tensor, ends: Tensor, moving: list[str], a: float, way: Way, budget: int
) -> Any:
    buffers = {n: torch.lerp(first.buffers[n], second.buffers[n].to(first.buffers[n]), a) for n in moving}
    there = first.with_params(first.rows_to_params(torch.lerp(starts, ends, a)), buffers=buffers)
    return LossEvaluator(there, way=way, memory_budget=budget).base()
