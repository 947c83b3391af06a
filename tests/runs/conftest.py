# SPDX-License-Identifier: Apache-2.0
"""For the tests of figures and report: a made-up study with every verdict, hostile texts, and a wide figure."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from curvlab.runs.figures import (
    Figure,
    add_legend,
    new_figure,
    plot_fit,
    plot_groups,
    plot_guide,
    plot_published,
    set_axes,
)
from curvlab.runs.report import Claim, Study
from curvlab.runs.stats import (
    Survives,
    Verdict,
    geometric_mean_interval,
    log_ratio_interval,
    loglog_fit,
    mean_interval,
    pooled_log_sd,
)
from curvlab.runs.tables import Table

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PUBLISHED = (0.9356, 0.6861, 0.4899, 0.3485, 0.2477, 0.1743, 0.1212, 0.0831)
HOSTILE = "<script>alert('no')</script> & \"quotes\""


def movement_groups(seed: int = 0, power: float = -0.5, scale: float = 5.4) -> dict[float, list[float]]:
    rng = np.random.default_rng(seed)
    return {w: list(scale * w**power * np.exp(0.01 * rng.standard_normal(3 if w <= 1024 else 1))) for w in WIDTHS}


def movement_figure(name: str = "movement") -> Figure:
    groups = movement_groups()
    x, y = [w for w in groups for _ in groups[w]], [v for values in groups.values() for v in values]
    pooled = pooled_log_sd(groups)
    figure, (axes,) = new_figure()
    set_axes(axes, xlabel="width", ylabel="relative movement  ‖θ − θ₀‖ / ‖θ₀‖", log_x=True, log_y=True, x_ticks=WIDTHS)
    intervals = {w: geometric_mean_interval(v, pooled_sd=pooled.sd, df=pooled.df) for w, v in groups.items()}
    plot_groups(axes, groups, label="measured", geometric=True, connect=False, intervals=intervals)
    plot_fit(axes, loglog_fit(x, y), 28, 4700)
    plot_published(axes, WIDTHS, PUBLISHED)
    add_legend(axes)
    return Figure(
        name, "Movement falls as one over the root of the width", "Dots: seeds. Bars: 95 % intervals.", figure
    )


def panels_figure() -> Figure:
    figure, panels = new_figure(1, 2)
    titles = ("Absolute movement", "Kernel drift")
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        set_axes(axes, title=title, xlabel="width", log_x=True, log_y=True, x_ticks=(32, 128, 512, 2048))
        for series, label in enumerate(("standard", "NTK")):
            groups = movement_groups(series, -0.5 * index, 5.0 - series)
            plot_groups(axes, groups, series=series, label=label, geometric=True)
        plot_guide(axes, WIDTHS, [4 * w ** (-0.5 * index) for w in WIDTHS], label="theory")
        add_legend(axes)
    return Figure("laziness", "Two views of laziness", "Only the first is flat.", figure)


def sample_study(name: str = "ntk_width", *, published: bool = True) -> Study:
    groups = movement_groups()
    pooled = pooled_log_sd(groups)
    x, y = [w for w in groups for _ in groups[w]], [v for values in groups.values() for v in values]
    ratio = log_ratio_interval(groups[32], groups[4096], pooled_sd=pooled.sd, df=pooled.df)
    command = "python -m experiments run ntk_width --preset cpu"
    claims = [
        Claim("ratio", "From width 32 to 4096 the relative movement falls 11.3-fold", 11.3, ratio, Verdict.REPRODUCED,
              unit="×", survives=Survives.NO, control="absolute movement is constant: the ratio is that of ‖θ₀‖",
              cost_seconds=1260.0, command=command),
        Claim("slope", "The log–log slope of relative movement on width is −0.50", -0.5, loglog_fit(x, y).slope,
              Verdict.REPRODUCED, note="within ±0.03, so is the whole interval", cost_seconds=1260.0, command=command),
        Claim("accuracy", "Wider networks are more accurate", "91.6 → 93.9", mean_interval([2.1, 2.6, 1.8]),
              Verdict.DIRECTION_ONLY, unit="pt", survives=Survives.NOT_TESTED, cost_seconds=48.0, command=command),
        Claim("single", "One seed has no interval", 5.0, mean_interval([4.2]), Verdict.NOT_REPRODUCED, command=command),
        Claim("hostile", HOSTILE, None, None, Verdict.NOT_TESTABLE, survives=Survives.YES, control=HOSTILE),
    ]  # fmt: skip
    rows = [
        (w, groups[w] and mean_interval(groups[w]), p, 27562 * w, HOSTILE if w == 64 else None)
        for w, p in zip(WIDTHS, PUBLISHED, strict=True)
    ]
    return Study(
        name=name,
        title="Width and the neural tangent kernel",
        question="Do wider networks train more lazily, or is it only that their weights start larger?",
        source="arXiv 2604.07603, experiment 5",
        preset="cpu",
        claims=claims,
        tables=[
            Table(
                "Movement by width", ("width", "movement", "paper", "parameters", "remark"), rows, "Means over seeds."
            )
        ],
        figures=[movement_figure(), panels_figure()],
        notes=["Under PyTorch's initialization ‖θ₀‖ grows as the root of the width.", HOSTILE],
        environment={
            "python": "3.11.9",
            "cpu": "A processor",
            "threads": 2,
            "packages": {"numpy": "2.4", "torch": "2.14"},
        },
        data_source="MNIST, the first 5,000 training images, from a folder given by the user.",
        data_published=published,
    )


@pytest.fixture(scope="session")
def make_study():
    return sample_study


@pytest.fixture
def make_figure():
    return movement_figure


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def python_here(request: pytest.FixtureRequest) -> tuple[list[str], Path]:
    """How a test starts a fresh Python that finds this very package: command and folder."""
    return [sys.executable, "-c"], request.config.rootpath
