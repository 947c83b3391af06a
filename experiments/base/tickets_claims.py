# SPDX-License-Identifier: Apache-2.0
"""Verdicts on tickets. The rules stand here, before any run.

"No loss" is a non-inferiority test with a stated margin: the paper's own loss at that share plus half a point. "The
same" is an equivalence test (TOST) within half a point. What is larger is judged by its interval. All compare the last
epoch's test accuracy over common seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from curvlab.runs.report import Claim
from curvlab.runs.stats import Estimate, Survives, Verdict, geometric_mean_interval, judge
from curvlab.runs.store import Row
from experiments.base import paper
from experiments.base.rows import by_seed, finals
from experiments.base.settings import (
    Gap,
    above,
    cap,
    gap,
    gap_controls,
    interval,
    mean,
    no_worse,
    ratio,
    test_words,
    trained_words,
    values,
)
from experiments.base.study import Law
from experiments.base.survival import Control as Asked
from experiments.base.survival import survival
from experiments.base.tickets import Cell, dense

MARGIN = 0.5  # points: of "the same", and beyond the paper's loss
TENTH, FIFTH = 0.1, 0.21  # kept shares that the claims are about, or the nearest that was run
EARLY_STOP = 0.62  # Frankle & Carbin 2019: at 21 % kept LeNet stops 38 % earlier
NAMES = {"lenet": "LeNet-300-100", "cnn": "CNN"}


@dataclass(frozen=True)
class Tickets:
    """The study's rows and what the verdicts ask of its configuration.

    Attributes:
        rows: long rows.
        cells: every way to make a network.
        as_written: the CNN's one-shot arm follows the paper's protocol.
        full_lenet: LeNet's arms follow Frankle & Carbin's.
        real: network -> whether its data are the source's (MNIST, CIFAR-10).
        protocol: network -> its protocol in words, for what is scaled.
    """

    rows: Sequence[Row]
    cells: Sequence[Cell]
    as_written: bool
    full_lenet: bool
    real: Mapping[str, bool]
    protocol: Mapping[str, str]

    def faithful(self, network: str) -> bool:
        """Whether a verdict may be *Reproduced*."""
        return self.as_written if network == "cnn" else self.full_lenet

    def note(self, network: str, *parts: str) -> str:
        """Parts of a note, with what keeps the verdict below *Reproduced*."""
        scaled = f"scaled protocol ({self.protocol[network]}): at best Direction only"
        return "; ".join(filter(None, (*parts, "" if self.faithful(network) else scaled)))

    def cell(self, network: str, pruning: str, control: str, kept: float) -> Cell | None:
        """The cell of these names, None where it is not run."""
        found = [
            c for c in self.cells if (c.network, c.pruning, c.control, c.kept) == (network, pruning, control, kept)
        ]
        return found[0] if found else None

    def shares(self, network: str, pruning: str, control: str = "ticket") -> list[float]:
        """Kept shares of an arm, descending."""
        found = {c.kept for c in self.cells if (c.network, c.pruning, c.control) == (network, pruning, control)}
        return sorted(found, reverse=True)

    def nearest(self, network: str, pruning: str, share: float, control: str = "ticket") -> float | None:
        """The arm's kept share that is nearest (as a ratio) to ``share``."""
        found = self.shares(network, pruning, control)
        return min(found, key=lambda kept: abs(math.log(kept / share)), default=None)

    def gap(self, one: Cell | None, other: Cell | None) -> Gap | None:
        """Test accuracy of ``one`` minus ``other``."""
        return None if one is None or other is None else gap(self.rows, one.where, other.where)

    def seconds(self, *cells: Cell | None) -> float:
        """Training and measuring of these cells, all seeds."""
        spent = ("train_seconds", "measure_seconds")
        return sum(sum(values(self.rows, metric, c.where)) for c in cells if c is not None for metric in spent)

    def words(self, *cells: Cell | None) -> str:
        """How well these have fitted."""
        return trained_words(self.rows, {c.arm: c.where for c in cells if c is not None})


def ticket_claims(found: Tickets) -> list[Claim]:
    """All claims, in the order of the page."""
    claims = [loss_claim(found, kept) for kept in (0.5, 0.2, 0.1)]
    claims += [init_claim(found, "cnn", "one-shot"), init_claim(found, "lenet", "iterative")]
    claims += [lenet_claim(found), rounds_claim(found, "lenet"), rounds_claim(found, "cnn"), early_stop_claim(found)]
    for network, pruning in (("cnn", "one-shot"), ("lenet", "iterative")):
        claims += [
            places_claim(found, network, pruning),
            shuffle_claim(found, network, pruning),
            rewind_claim(found, network, pruning),
        ]
    claims += [random_claim(found, network) for network in ("cnn", "lenet")]
    return [*claims, layers_claim(found), *(speed_claim(found, network) for network in ("cnn", "lenet"))]


def published(kept: float) -> float | None:
    """The paper's mean test accuracy in % at this share, None where it has none."""
    known = paper.TICKET_ACCURACY.get(round(100 * kept, 2))
    return None if known is None else statistics.mean(known)


def published_loss(kept: float) -> float:
    """Points that the paper's ticket loses against its dense network."""
    one, other = published(1.0), published(kept)
    assert one is not None and other is not None
    return one - other


def untested(claim: Claim) -> Claim:
    """A claim whose data are not the source's, or that was not run."""
    return replace(claim, verdict=Verdict.NOT_TESTABLE, survives=Survives.NOT_TESTED, control="", note="")


def judged(
    found: Tickets, claim_id: str, network: str, text: str, about: float | None, pair: tuple[Cell | None, Cell | None]
) -> Claim:
    """A gap that is predicted to be above 0: by the paper's number where there is one."""
    one, other = pair
    told = found.gap(one, other)
    measured = interval(told)
    verdict = above(measured, 0.0) if about is None else judge(measured, about, 0.0)
    note = found.note(network, test_words(told), found.words(one, other))
    shown, verdict = "not run" if about is None else about, cap(verdict, found.faithful(network))
    spent = found.seconds(one, other)
    claim = Claim(claim_id, text, shown, measured, verdict, "points", cost_seconds=spent, note=note)
    return claim if measured is not None and found.real[network] else untested(claim)


def same(
    found: Tickets, claim_id: str, network: str, text: str, pair: tuple[Cell | None, Cell | None], *,
    margin: float = MARGIN, about: float | str = "not run", two_sided: bool = True,
) -> Claim:  # fmt: skip
    """A gap that is predicted to be within a margin, by test."""
    one, other = pair
    told = found.gap(one, other)
    verdict, test = Verdict.NOT_TESTABLE, ""
    if told is not None and one is not None and other is not None:
        verdict, test = no_worse(found.rows, one.where, other.where, margin, two_sided=two_sided)
    note = found.note(network, test, found.words(one, other))
    claim = Claim(claim_id, text, about, interval(told), cap(verdict, found.faithful(network)), "points",
                  cost_seconds=found.seconds(one, other), note=note)  # fmt: skip
    return claim if told is not None and found.real[network] else untested(claim)


def percent(kept: float) -> str:
    """A share for sentences."""
    return f"{100 * kept:.3g} %"


# ------------------------------------------------------------------------------------------------ the paper's claims


def loss_claim(found: Tickets, kept: float) -> Claim:
    """As written: one cut, rewound to the initial weights."""
    margin = round(max(0.0, published_loss(kept)) + MARGIN, 2)
    text = f"CNN: cut once to {percent(kept)}, the ticket tests no worse than the dense network (margin {margin:.2f})"
    pair = found.cell("cnn", "one-shot", "ticket", kept), dense("cnn")
    about = round(-published_loss(kept), 2)
    return same(found, f"kept_{100 * kept:g}", "cnn", text, pair, margin=margin, about=about, two_sided=False)


def init_claim(found: Tickets, network: str, pruning: str) -> Claim:
    """The initial weights matter; control: the other way to prune."""
    kept = found.nearest(network, pruning, TENTH, "reinit")
    share = TENTH if kept is None else kept
    pair = (found.cell(network, pruning, "ticket", share), found.cell(network, pruning, "reinit", share))
    about = paper.TICKET_OVER_REINIT if (network, share) == ("cnn", TENTH) else None
    text = f"{NAMES[network]}, {pruning}: at {percent(share)} a ticket beats its mask with other initial weights"
    claim = judged(found, f"{network}_init", network, text, about, pair)
    if claim.verdict is Verdict.NOT_TESTABLE:
        return claim
    other = "iterative" if pruning == "one-shot" else "one-shot"
    near = found.nearest(network, other, share, "reinit")
    control = None
    if near is not None:
        one, two = (found.cell(network, other, name, near) for name in ("ticket", "reinit"))
        control = (one.where, two.where) if one is not None and two is not None else None
    controls = gap_controls(found.rows, (pair[0].where, pair[1].where), {f"{other} pruning": control})  # type: ignore[union-attr]
    survives, words = survival(claim.verdict, controls)
    return replace(claim, survives=survives, control=words)


# ------------------------------------------------------------------------------------------------ the controls


def lenet_claim(found: Tickets) -> Claim:
    """Frankle & Carbin's headline at a tenth of the weights."""
    kept = found.nearest("lenet", "iterative", TENTH) or TENTH
    text = f"LeNet-300-100, iterative: at {percent(kept)} the ticket tests no worse than dense (margin {MARGIN})"
    pair = found.cell("lenet", "iterative", "ticket", kept), dense("lenet")
    return same(found, "lenet_loss", "lenet", text, pair, about="0.3 points at 13.5 %", two_sided=False)


def rounds_claim(found: Tickets, network: str) -> Claim:
    """The audit: what the paper calls iterative is one cut."""
    kept = next(
        (k for k in sorted(found.shares(network, "one-shot")) if k in found.shares(network, "iterative")), TENTH
    )
    pair = found.cell(network, "iterative", "ticket", kept), found.cell(network, "one-shot", "ticket", kept)
    text = f"Audit, {NAMES[network]}: at {percent(kept)} one cut and rounds of 20 % test the same (within {MARGIN})"
    return same(found, f"{network}_rounds", network, text, pair)


def early_stop_claim(found: Tickets) -> Claim:
    """Least held-out loss, to the epoch."""
    kept = found.nearest("lenet", "iterative", FIFTH) or FIFTH
    ticket, other = (found.cell("lenet", "iterative", control, kept) for control in ("ticket", "reinit"))
    text = f"LeNet-300-100, iterative: at {percent(kept)} training stops earlier than dense (ratio of updates)"
    measured = ratio(found.rows, "early_stop_step", ticket.where if ticket else None, dense("lenet").where)
    verdict = cap(judge(measured, EARLY_STOP, 1.0, log_scale=True), found.full_lenet)
    against = ratio(found.rows, "early_stop_step", ticket.where if ticket else None, other.where if other else None)
    survives, control = survival(verdict, [Asked("against other initial weights", against, 1.0, "below")])
    note = found.note("lenet", "least held-out loss at an epoch's end")
    claim = Claim("early_stop", text, EARLY_STOP, measured, verdict, "×", survives, control,
                  found.seconds(ticket, dense("lenet")), note=note)  # fmt: skip
    return claim if measured is not None and found.real["lenet"] else untested(claim)


def places_claim(found: Tickets, network: str, pruning: str) -> Claim:
    """Layer ratios alone, or the places within the layers too?"""
    kept = found.nearest(network, pruning, TENTH, "shuffle") or TENTH
    pair = found.cell(network, pruning, "ticket", kept), found.cell(network, pruning, "shuffle", kept)
    text = f"Control, {NAMES[network]}, {pruning}: at {percent(kept)} a ticket beats its mask shuffled within layers"
    return judged(found, f"{network}_shuffle", network, text, None, pair)


def shuffle_claim(found: Tickets, network: str, pruning: str) -> Claim:
    """Is a shuffled mask as bad as other initial weights?"""
    kept = found.nearest(network, pruning, TENTH, "shuffle") or TENTH
    pair = found.cell(network, pruning, "shuffle", kept), found.cell(network, pruning, "reinit", kept)
    text = f"Control, {NAMES[network]}, {pruning}: at {percent(kept)} shuffled and re-initialized test the same"
    return same(found, f"{network}_shuffle_reinit", network, f"{text} (within {MARGIN})", pair)


def rewind_claim(found: Tickets, network: str, pruning: str) -> Claim:
    """Needed by deeper networks (Frankle et al. 2020), not by LeNet."""
    if not found.shares(network, pruning, "rewind"):
        pruning = "one-shot"
    kept = found.nearest(network, pruning, TENTH, "rewind") or TENTH
    pair = found.cell(network, pruning, "rewind", kept), found.cell(network, pruning, "ticket", kept)
    text = f"Control, {NAMES[network]}, {pruning}: at {percent(kept)} late rewinding"
    if network == "lenet":
        return same(found, "lenet_rewind", network, f"{text} changes nothing (within {MARGIN})", pair)
    return judged(found, "cnn_rewind", network, f"{text} tests better than the initial weights", None, pair)


def random_claim(found: Tickets, network: str) -> Claim:
    """The least that a ticket must beat."""
    kept = found.nearest(network, "one-shot", TENTH, "random") or TENTH
    pair = found.cell(network, "one-shot", "ticket", kept), found.cell(network, "one-shot", "random", kept)
    text = f"Control, {NAMES[network]}: at {percent(kept)} a ticket cut once beats a random mask of as many weights"
    return judged(found, f"{network}_random", network, text, None, pair)


def layer_shares(found: Tickets, cell: Cell) -> dict[str, dict[int, float]]:
    """Layer -> seed -> kept share."""
    shares: dict[str, dict[int, float]] = {}
    layers = dict.fromkeys(row["layer"] for row in found.rows if row["metric"] == "layer_kept" and _is_in(row, cell))
    for layer in layers:
        shares[layer] = by_seed(found.rows, "layer_kept", layer=layer, **cell.where)
    return shares


def _is_in(row: Row, cell: Cell) -> bool:
    return all(row.get(key) == value for key, value in cell.where.items())


def layers_claim(found: Tickets) -> Claim:
    """One threshold for layers of unlike scale."""
    kept = found.nearest("cnn", "one-shot", TENTH) or TENTH
    cell = found.cell("cnn", "one-shot", "ticket", kept)
    shares = {} if cell is None else layer_shares(found, cell)
    first = next(iter(shares.values()), {})
    measured = geometric_mean_interval([share / kept for share in first.values()]) if first else None
    text = f"Audit, CNN: at {percent(kept)} one global threshold keeps more of the first convolution (share / overall)"
    note = ", ".join(f"{statistics.mean(of.values()):.2g}" for of in shares.values())
    note = found.note("cnn", f"kept by layer: {note}" if note else "")
    verdict = cap(above(measured, 1.0), found.as_written)
    claim = Claim("layers", text, "not stored", measured, verdict, "×", cost_seconds=found.seconds(cell), note=note)
    return claim if measured is not None and found.real["cnn"] else untested(claim)


def step_times(found: Tickets, cell: Cell) -> dict[str, dict[int, float]]:
    """Engine -> seed -> seconds a training step."""
    engines = dict.fromkeys(
        row["engine"] for row in found.rows if row["metric"] == "step_seconds" and _is_in(row, cell)
    )
    return {engine: by_seed(found.rows, "step_seconds", engine=engine, **cell.where) for engine in engines}


def fastest(times: Mapping[str, Mapping[int, float]]) -> Mapping[int, float]:
    """Of the sparse engines: layers between fused where there are any."""
    return times.get("fused") or times.get("sparse", {})


def time_ratio(found: Tickets, cell: Cell) -> Estimate | None:
    """Seconds a step of masked dense layers over the sparse ones', seed by seed."""
    times = step_times(found, cell)
    ours, theirs = fastest(times), times.get("masked dense", {})
    seeds = sorted(set(ours) & set(theirs))
    return geometric_mean_interval([theirs[seed] / ours[seed] for seed in seeds]) if seeds else None


def speed_claim(found: Tickets, network: str) -> Claim:
    """The whole step of this study's own network on the machine that ran it."""
    pruning = "one-shot" if network == "cnn" else "iterative"
    kept = found.nearest(network, pruning, TENTH) or TENTH
    cell = found.cell(network, pruning, "ticket", kept)
    measured = None if cell is None else time_ratio(found, cell)
    text = f"{NAMES[network]}: at {percent(kept)} a training step on sparse layers is faster than on masked dense ones"
    fused = ", layers between convolutions fused" if network == "cnn" else ""
    note = found.note(network, f"masked dense time / sparse time, whole step{fused}; interval over masks")
    verdict = cap(above(measured, 1.0), found.faithful(network))
    claim = Claim(f"{network}_speed", text, "no gain (masks)", measured, verdict, "×", cost_seconds=found.seconds(cell),
                  note=note)  # fmt: skip
    return claim if measured is not None and found.real[network] else untested(claim)


# ------------------------------------------------------------------------------------------------ laws and notes


def ticket_laws(found: Tickets) -> list[Law]:
    """What no data decide."""
    counts = finals(found.rows, "kept_weights")
    totals = {(row["run"], row["seed"]): row["value"] for row in finals(found.rows, "weights")}
    off = [abs(row["value"] - math.floor(row["kept"] * totals[row["run"], row["seed"]] + 0.5 + 1e-9)) for row in counts]
    moved = [row["value"] for row in finals(found.rows, "pruned_nonzero")]
    laws = [
        Law(
            f"masks keep exactly the weights asked for: off by {max(off, default=math.nan):g}",
            bool(off) and not any(off),
        ),
        Law(f"pruned weights are zero after training: {sum(moved):g} are not", bool(moved) and not any(moved)),
    ]
    unlike, compared = 0, 0
    for cell in found.cells:
        ticket = found.cell(cell.network, cell.pruning, "ticket", cell.kept)
        if cell.control in ("reinit", "shuffle") and ticket is not None:
            own, its = layer_shares(found, cell), layer_shares(found, ticket)
            compared += len(own)
            unlike += sum(own[layer] != its.get(layer) for layer in own)
    words = f"re-initialized and shuffled masks keep every layer's count: {unlike} of {compared} layers differ"
    return [*laws, Law(words, compared > 0 and unlike == 0)]


def ticket_notes(found: Tickets) -> list[str]:
    """Rules and limits."""
    notes = [
        "Masks are on the weights of all convolutions and linear layers, first and last included, by one global "
        "threshold of |w| (the paper's way; Frankle & Carbin prune layer by layer and LeNet's last one at half the "
        "rate). Iterative pruning trains every round to the end.",
        "Test accuracies are those of the last epoch; nothing was chosen by them. LeNet's early stop is by the loss on "
        "training images that it does not train on.",
        "A re-initialized network keeps the order of the data; the paper's changes the seed as a whole.",
        "Times a step: forward, backward and update of one batch, medians of "
        "alternating calls; sparse layers against dense layers with masked gradients (channels-last) of the same mask.",
    ]
    fitted = mean(found.rows, "train_accuracy", dense("cnn").where, factor=100)
    if fitted is not None and fitted.value < 99:
        notes.append(
            f"The dense CNN ends at {fitted.value:.0f} % training accuracy here: what its tickets gain over the "
            "controls is as much how fast a mask trains as how well it generalizes once trained."
        )
    scaled = [words for network, words in found.protocol.items() if not found.faithful(network)]
    if scaled:
        notes.append(f"Scaled ({'; '.join(scaled)}): directions at best, whatever the intervals say.")
    return notes
