# SPDX-License-Identifier: Apache-2.0
"""Do small subnetworks train as well as the whole, and what makes them?

Question: A tenth of the weights, cut once from the trained network and rewound, is said to test nearly as well. Is it
the initial weights, the mask, or only how many weights each layer keeps?

Source: arXiv 2604.07603, experiment 4 (CNN(32) with batch normalization, CIFAR-10, 60 epochs, batch 128, lr 0.01, three
seeds; masks on all weights of two or more dimensions, one global threshold of |w|). Its text says iterative; its code
cuts every level from the same trained network. Controls after Frankle & Carbin (2019; LeNet-300-100 on MNIST, Adam
1.2e-3, batch 60, 20 % a round) and Frankle et al. (2020, 2021: late rewinding, layer-wise shuffling).

Prediction: As written 10 % kept loses 1.15 points, and re-initialized 2.80 more. Iterative tickets of LeNet match the
dense network at a tenth of the weights and stop earlier (by 38 % at 21 % kept); one cut of the trained network does
worse than rounds. Shuffling a ticket's mask within its layers does about as much harm as re-initializing it.

Arms. ``dense``. ``one-shot``: cut once from the trained network. ``iterative``: 20 % of what is left, round by round,
each round trained. Both start from the initial weights again, or (``late rewinding``) from those after the first
epochs. ``re-initialized``: the ticket's mask, other initial weights, the same order of the data. ``layers shuffled``:
each layer's mask permuted, the initial weights kept. ``random mask``: the same number of weights, drawn from all
layers. All train on the sparse layers of ``curvlab.sparse``.
"""

import sys

if __name__ == "__main__":  # run as a file: the checkout's root takes this folder's place on the path
    import runpy
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.argv[1:1] = ["run", Path(__file__).stem]
    runpy.run_module("experiments", run_name="__main__")

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from curvlab.runs import figures as draw
from curvlab.runs.report import Claim
from curvlab.runs.store import Row, Run
from curvlab.runs.tables import Table
from curvlab.training.recipe import Recipe
from experiments.base import Law, Tools
from experiments.base.tickets import (
    Cell,
    Control,
    Ticket,
    dense,
    forecast_ticket,
    kept_after,
    run_ticket,
)
from experiments.base.tickets_claims import Tickets, ticket_claims, ticket_laws, ticket_notes
from experiments.base.tickets_report import ticket_figures, ticket_tables

PROTOCOL = 1


@dataclass(frozen=True)
class Config:
    """The paper's protocol and the controls; presets and ``field=value`` change it."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """Of LeNet-300-100."""
    image_dataset: Literal["cifar10", "digits"] = "cifar10"
    """Of the CNN."""
    seeds: int = 5
    image_seeds: int | None = None
    """Of the CNN; None: as many."""
    num_train: int = 55_000
    held_out: int = 5_000
    """Training images behind those that train, by whose loss LeNet's early-stop step is found."""
    epochs: int = 55
    batch_size: int = 60
    lr: float = 1.2e-3
    """Of Adam, constant."""
    rounds: int = 16
    """Of iterative pruning, 20 % each."""
    compared_rounds: tuple[int, ...] = (4, 7, 10, 13, 16)
    """After these the controls are run, at the same kept shares."""
    rewind_step: int = 500
    """Of late rewinding, in updates."""
    rewound: Literal["iterative", "one-shot"] = "iterative"
    """Whether LeNet is rewound late in every round (a second sequence of rounds) or after one cut."""
    num_images: int = 50_000
    channels: int = 32
    image_epochs: int = 60
    image_batch: int = 128
    image_lr: float = 0.01
    kept: tuple[float, ...] = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
    """Shares at which the CNN is cut once, as written."""
    control_kept: tuple[float, ...] = (0.2, 0.1, 0.05)
    """Those of them at which the controls are run."""
    image_rounds: int = 13
    """Of iterative pruning; 0: none."""
    image_compared_rounds: tuple[int, ...] = (7, 10, 13)
    image_rewind_step: int = 2_000

    @property
    def datasets(self) -> tuple[str, ...]:
        """All data sets."""
        return (self.dataset, self.image_dataset)

    @property
    def seeds_of_images(self) -> int:
        """Seeds of the CNN."""
        return self.seeds if self.image_seeds is None else self.image_seeds

    @property
    def cuts_as_written(self) -> bool:
        """Whether the CNN's one-shot arm follows the paper's protocol (its shares and seeds may be fewer)."""
        names = ("image_dataset", "num_images", "channels", "image_epochs", "image_batch", "image_lr")
        papers = Config()
        return all(getattr(self, name) == getattr(papers, name) for name in names)

    @property
    def is_full_lenet(self) -> bool:
        """Whether LeNet's arms follow Frankle & Carbin's protocol (their 50,000 updates are 55 epochs)."""
        names = ("dataset", "num_train", "held_out", "epochs", "batch_size", "lr")
        papers = Config()
        return all(getattr(self, name) == getattr(papers, name) for name in names)

    def __post_init__(self) -> None:
        for name, tops in (("compared_rounds", self.rounds), ("image_compared_rounds", self.image_rounds)):
            compared = getattr(self, name)
            if len(set(compared)) != len(compared) or not all(1 <= done <= tops for done in compared):
                raise ValueError(f"Config: {name} must be different rounds within 1..{tops}, got {compared}")
        if min(self.seeds, self.num_train, self.held_out, self.num_images, self.channels, self.seeds_of_images) < 1:
            raise ValueError(f"Config: seeds, numbers of images and channels must be at least 1, got {self}")
        if self.rounds < 1 or min(self.image_rounds, self.rewind_step, self.image_rewind_step) < 0:
            raise ValueError(f"Config: rounds must be at least 1, rewinding not negative, got {self}")
        if not all(0 < share < 1 for share in self.kept) or len(set(self.kept)) != len(self.kept):
            raise ValueError(f"Config: kept must be different shares within (0, 1), got {self.kept}")
        if not set(self.control_kept) <= set(self.kept):
            raise ValueError(f"Config: control_kept must be some of kept, got {self.control_kept}")
        Recipe(self.epochs, self.batch_size, self.lr)
        Recipe(self.image_epochs, self.image_batch, self.image_lr)


PRESETS: dict[str, Config] = {
    "smoke": Config(
        dataset="digits", image_dataset="digits", seeds=2, num_train=1000, held_out=400, epochs=8, rounds=4,
        compared_rounds=(4,), rewind_step=20, num_images=400, channels=4, image_epochs=8, image_batch=32, kept=(0.1,),
        control_kept=(0.1,), image_rounds=0, image_compared_rounds=(), image_rewind_step=4,
    ),
    "cpu": Config(
        seeds=3, image_seeds=2, num_train=10_000, epochs=8, rounds=10, compared_rounds=(7, 10), rewind_step=167,
        rewound="one-shot", num_images=5_000, channels=8, image_epochs=10, kept=(0.2, 0.1), control_kept=(0.1,),
        image_rounds=0, image_compared_rounds=(), image_rewind_step=40,
    ),
    "paper": Config(),
}  # fmt: skip

ONE_SHOT_CONTROLS: tuple[Control, ...] = ("reinit", "shuffle", "random", "rewind")
ITERATIVE_CONTROLS: tuple[Control, ...] = ("reinit", "shuffle")


def cells(config: Config) -> dict[Cell, int]:
    """Every way to make a network, with the rounds of iterative pruning that it takes."""
    return _lenet_cells(config) | _cnn_cells(config)


def _lenet_cells(config: Config) -> dict[Cell, int]:
    found = {dense("lenet"): 0}
    for done in range(1, config.rounds + 1):
        found[Cell("lenet", "iterative", "ticket", kept_after(done))] = done
    for done in config.compared_rounds:
        kept = kept_after(done)
        found |= {Cell("lenet", "iterative", control, kept): done for control in ITERATIVE_CONTROLS}
        found |= {Cell("lenet", "one-shot", control, kept): 0 for control in ("ticket", "reinit", "random")}
    if config.rewound == "one-shot":
        return found | {Cell("lenet", "one-shot", "rewind", kept_after(done)): 0 for done in config.compared_rounds}
    for done in range(1, max(config.compared_rounds, default=0) + 1):
        found[Cell("lenet", "iterative", "rewind", kept_after(done))] = done
    return found


def _cnn_cells(config: Config) -> dict[Cell, int]:
    found = {dense("cnn"): 0} | {Cell("cnn", "one-shot", "ticket", kept): 0 for kept in config.kept}
    found |= {Cell("cnn", "one-shot", c, kept): 0 for kept in config.control_kept for c in ONE_SHOT_CONTROLS}
    for done in range(1, config.image_rounds + 1):
        found[Cell("cnn", "iterative", "ticket", kept_after(done))] = done
    for done in config.image_compared_rounds:
        kept = kept_after(done)
        found |= {Cell("cnn", "iterative", control, kept): done for control in ITERATIVE_CONTROLS}
        # Cut once at the same share, so that rounds are compared with one cut and not with one of other size.
        found[Cell("cnn", "one-shot", "ticket", kept)] = 0
    for done in range(1, max(config.image_compared_rounds, default=0) + 1):
        found[Cell("cnn", "iterative", "rewind", kept_after(done))] = done
    return found


def expand(config: Config) -> list[Ticket]:
    """One unit for every cell and seed, in the order in which masks come to be."""
    lenet: dict[str, Any] = {
        "dataset": config.dataset, "num_train": config.num_train, "held_out": config.held_out, "epochs": config.epochs,
        "batch_size": config.batch_size, "lr": config.lr, "optimizer": "adam", "schedule": "constant",
    }  # fmt: skip
    cnn: dict[str, Any] = {
        "dataset": config.image_dataset, "num_train": config.num_images, "held_out": 0, "epochs": config.image_epochs,
        "batch_size": config.image_batch, "lr": config.image_lr, "optimizer": "sgd", "schedule": "cosine",
        "channels": config.channels,
    }  # fmt: skip
    late = {"lenet": config.rewind_step, "cnn": config.image_rewind_step}
    seeds = {"lenet": config.seeds, "cnn": config.seeds_of_images}
    return [
        Ticket(
            cell.network, cell.pruning, cell.control, cell.kept, seed, rounds,
            late[cell.network] if cell.control == "rewind" else 0,
            **(lenet if cell.network == "lenet" else cnn),
        )
        for network in ("lenet", "cnn")
        for seed in range(seeds[network])
        for cell, rounds in cells(config).items()
        if cell.network == network
    ]  # fmt: skip


def run(unit: Ticket, run: Run, tools: Tools) -> dict[str, Any]:
    """Train the network (or find it) and append its rows."""
    return run_ticket(unit, run, tools)


def cost(unit: Ticket) -> float:
    """Seconds on one slow core, roughly."""
    steps = unit.epochs * -(-unit.num_train // unit.batch_size)
    return 0.5 + steps * (1.4e-3 if unit.network == "lenet" else 0.045 * (unit.channels / 8) ** 1.5)


def forecast(unit: Ticket, tools: Tools) -> float:
    """From a few timed steps."""
    return forecast_ticket(unit, tools)


# ------------------------------------------------------------------------------------------------ from rows alone


def read(rows: Sequence[Row], config: Config) -> Tickets:
    """The rows with what the verdicts ask of the configuration."""
    return Tickets(
        rows,
        tuple(cells(config)),
        as_written=config.cuts_as_written,
        full_lenet=config.is_full_lenet,
        real={"lenet": config.dataset == "mnist", "cnn": config.image_dataset == "cifar10"},
        protocol={
            "lenet": f"{config.num_train:,} images, {config.epochs} epochs",
            "cnn": f"CNN({config.channels}), {config.num_images:,} images, {config.image_epochs} epochs",
        },
    )


def claims(rows: Sequence[Row], config: Config) -> list[Claim]:
    """The paper's claims with their controls; then the controls as claims of their own."""
    lenet = ("lenet", "early_stop")
    return [
        replace(claim, dataset=config.dataset if claim.id.startswith(lenet) else config.image_dataset)
        for claim in ticket_claims(read(rows, config))
    ]


def laws(rows: Sequence[Row], config: Config) -> list[Law]:
    """Exact counts and zeros anywhere; at the smoke preset also what a small network shows."""
    return ticket_laws(read(rows, config))


def tables(rows: Sequence[Row], config: Config) -> list[Table]:
    """T4: accuracy by kept share and arm; the gaps with their tests; kept shares by layer; time a step."""
    return ticket_tables(read(rows, config))


def figures(rows: Sequence[Row], config: Config) -> list[draw.Figure]:
    """F5: accuracy against kept share; F6: masks by layer and by pixel; early stop and time a step."""
    return ticket_figures(read(rows, config))


def notes(rows: Sequence[Row], config: Config) -> list[str]:
    """Rules and limits."""
    return ticket_notes(read(rows, config))
