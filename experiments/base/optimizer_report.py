# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the optimizer study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from curvlab.runs import figures as draw
from curvlab.runs.store import Row
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from experiments.base import paper
from experiments.base.rows import counted
from experiments.base.settings import RESULTS, RESULTS_CAPTION, gap, gap_table, results, values

Arms = Mapping[str, tuple[Recipe, int]]  # arm -> how it trains, on how many images

PAPERS: dict[str, Sequence[float]] = {
    "sgd-32": paper.BATCH_ACCURACY[32],
    "sgd-128": paper.BATCH_ACCURACY[128],
    "adam": paper.ADAM_ACCURACY,
    "full-batch": paper.FULL_BATCH_ACCURACY,
}

PAIRS = [
    ("adam", "sgd-32"), ("adam", "sgd-128"), ("sam", "sgd-128"), ("plain-sgd", "sgd-128"),
    ("full-batch", "sgd-128"), ("full-batch-tuned", "sgd-few"),
]  # fmt: skip


def where(arm: str) -> dict[str, str]:
    """The setting of an arm."""
    return {"arm": arm}


def optimizer_tables(rows: Sequence[Row], arms: Arms, *, show_paper: bool) -> list[Table]:
    """Every arm; then the gaps with their tests."""
    lines = []
    for arm, (recipe, images) in arms.items():
        updates = recipe.epochs * recipe.steps_per_epoch(images)
        about = PAPERS.get(arm, ()) if show_paper else ()
        start = [arm, images, recipe.batch_size, recipe.lr, recipe.epochs, updates]
        lines.append([*start, round(statistics.mean(about), 2) if about else None, *results(rows, where(arm))])
    columns = ["arm", "images", "batch", "lr", "epochs", "updates", "paper %", *RESULTS]
    caption = f"{RESULTS_CAPTION} The paper's numbers: CNN(32), 80 epochs, 50,000 images (full-batch: 5,000)."
    gaps = {
        pair: found for pair in PAIRS if (found := gap(rows, *map(where, pair))) is not None and set(pair) <= set(arms)
    }
    return [Table("Accuracy by optimizer", columns, lines, caption), gap_table(gaps, ["arm", "minus"], "Differences")]


def optimizer_figure(rows: Sequence[Row], arms: Arms, *, show_paper: bool) -> draw.Figure:
    """Test accuracy by arm; training loss through the updates."""
    figure, (left, right) = draw.new_figure(1, 2, size=(11.6, 4.4))
    shown = [arm for arm in arms if values(rows, "test_accuracy", where(arm))]
    for place, arm in enumerate(shown):
        accuracies = [100 * value for value in values(rows, "test_accuracy", where(arm))]
        draw.plot_groups(left, {float(place): accuracies}, series=list(arms).index(arm), connect=False)
    marks = [(place, about) for place, arm in enumerate(shown) for about in PAPERS.get(arm, ())] if show_paper else []
    if marks:
        draw.plot_published(left, [x for x, _ in marks], [y for _, y in marks], label="paper")
        draw.add_legend(left)
    draw.set_axes(left, title="Last epoch", ylabel="test accuracy (%)", x_ticks=list(range(len(shown))))
    left.set_xticklabels(shown, rotation=35, ha="right")
    for arm in shown:
        loss_curve(right, rows, arm, list(arms).index(arm))
    draw.set_axes(right, title="Training", xlabel="updates", ylabel="training loss (nats)", log_x=True, log_y=True)
    draw.add_legend(right, fontsize=7.5)
    fewer = {images for _, images in arms.values()}
    few = [f"{arm}: {images:,}" for arm, (_, images) in arms.items() if images < max(fewer)]
    caption = (
        f"Left: dots are seeds ({counted(values(rows, 'test_accuracy', where(arm)) for arm in shown)}), markers means "
        "with 95 % t intervals over seeds"
        + ("; hollow diamonds: the paper's seeds" if marks else "")
        + f". Training images: {max(fewer):,}"
        + (f" ({', '.join(few)})" if few else "")
        + ". Right: running training loss of seed 0 after each epoch; it is taken before the updates of its batches."
    )
    return draw.Figure("optimizers", "Test accuracy and training by optimizer", caption, figure)


def loss_curve(axes: Any, rows: Sequence[Row], arm: str, series: int) -> None:
    """Running training loss of seed 0 against the updates made."""
    line = sorted(
        (row["step"], row["value"])
        for row in rows
        if row["metric"] == "train_loss" and row["arm"] == arm and row["seed"] == 0 and row["value"] > 0
    )
    color, style = draw.SERIES[series % len(draw.SERIES)], "-" if series < len(draw.SERIES) else "--"
    axes.plot([x for x, _ in line], [y for _, y in line], color=color, linestyle=style, linewidth=1.4, label=arm)
