# SPDX-License-Identifier: Apache-2.0
"""One rule for all studies: does a claim survive the control that its source did not run?

*Not tested*: the claim itself is neither *Reproduced* nor *Direction only* (there is nothing to survive), or a control
has no interval. *Yes*: every control's interval lies wholly on the claim's side. *No*: one lies wholly on the failing
side. *Undecided*: an interval holds the bound; more seeds could turn it either way.

An effect that is there as written and again under the control (a gap between two arms, a slope) is asked two things:
that it is still there, and that at least half of it is, which is what *Reproduced* asks of a published effect. With d_i
the effect of seed i as written and c_i under the control, the second is the interaction (difference of differences)

    I = mean_i (c_i − d_i / 2),

seed by seed, because both arms start from the seed's own weights. Comparing c with half of the mean of d instead would
take d for known, and comparing the two intervals would count the seeds' common part twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from curvlab.runs.stats import Estimate, Survives, Verdict, mean_interval

SHARE = 0.5  # of the effect as written, that a control must keep


@dataclass(frozen=True)
class Control:
    """One number that a claim must hold under.

    Attributes:
        name: what was measured, for the page.
        found: the number; None where it was not measured.
        bound: what the interval must not hold: 0 for differences, 1 for ratios.
        side: where the claim lies.
    """

    name: str
    found: Estimate | None
    bound: float = 0.0
    side: Literal["above", "below"] = "above"

    @property
    def is_known(self) -> bool:
        """Whether there is an interval to decide by."""
        return self.found is not None and self.found.has_interval

    @property
    def holds(self) -> bool:
        """Whether the interval lies wholly on the claim's side."""
        return self._beyond(self.side)

    @property
    def fails(self) -> bool:
        """Whether the interval lies wholly on the other side."""
        return self._beyond("below" if self.side == "above" else "above")

    def _beyond(self, side: str) -> bool:
        if self.found is None or not self.found.has_interval:
            return False
        return self.found.low > self.bound if side == "above" else self.found.high < self.bound

    def __str__(self) -> str:
        bound = f"{self.bound:.4g}".replace("-", "−")
        return f"{self.name} ({'not measured' if self.found is None else self.found}; asked: {self.side} {bound})"


def survival(verdict: Verdict, controls: Sequence[Control]) -> tuple[Survives, str]:
    """The answer and the words below it; see the module's text."""
    known = [control for control in controls if control.is_known]
    if verdict not in (Verdict.REPRODUCED, Verdict.DIRECTION_ONLY) or not known:
        return Survives.NOT_TESTED, "; ".join(str(control) for control in controls if control.found is not None)
    told = "; ".join(map(str, controls))
    if any(control.fails for control in known):
        return Survives.NO, told
    if len(known) < len(controls):
        return Survives.NOT_TESTED, told
    return (Survives.YES if all(control.holds for control in known) else Survives.UNDECIDED), told


def interaction(control: Mapping[int, float], written: Mapping[int, float], *, share: float = SHARE) -> Estimate | None:
    """I of the module's text over the seeds that both have, with its t interval; None where they share none.

    Args:
        control: seed -> effect under the control.
        written: seed -> effect as written.
        share: of the effect as written; 1 gives the plain interaction.
    """
    seeds = sorted(set(control) & set(written))
    if not seeds:
        return None
    found = mean_interval([control[seed] - share * written[seed] for seed in seeds])
    return replace(found, method=f"difference of differences by seed: {found.method}")


def effect_controls(
    written: Mapping[int, float], controls: Mapping[str, Mapping[int, float]], side: Literal["above", "below"] = "above"
) -> list[Control]:
    """The two questions to every control arm, from one effect a seed (0: none); an empty arm was not measured."""
    found = []
    for name, effect in controls.items():
        mean = mean_interval([effect[seed] for seed in sorted(effect)]) if effect else None
        found.append(Control(name, mean, side=side))
        found.append(Control(kept_words(name), interaction(effect, written), side=side))
    return found


def kept_words(name: str) -> str:
    """How the second question reads."""
    return f"{name}, minus {SHARE:g} × as written, seed by seed"
