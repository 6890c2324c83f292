"""Signs that a policy optimises the reward model's mistakes, each with a threshold.

Gao et al., "Scaling laws for reward model overoptimization" (2022): beyond some distance from the reference the learned
reward goes on rising while the true one falls. None of these signs is proof; several updates in a row deserve a look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Wire(NamedTuple):
    """One sign: the figure it reads, whether it is too high or too low that is suspicious, and what it says then."""

    figure: str
    too_high: bool
    meaning: str


WIRES = {
    "length_correlation": Wire("score_length_correlation", True, "the score follows the length of the answer"),
    "disagreement": Wire("disagreement", True, "the members of the ensemble contradict each other"),
    "kl": Wire("kl", True, "the policy has gone further from the reference than its budget"),
    "entropy": Wire("entropy", False, "the policy says nearly the same whatever is drawn"),
    "repetition": Wire("repetition", True, "answers repeat themselves"),
    "collapse": Wire("collapse", True, "greedy answers to held-out prompts are nearly alike"),
}
AT_ONCE = ("collapse",)
"""Wires that trip without patience: their figures are not measured at every update."""


def crossed(figures: Mapping[str, float], limits: Mapping[str, float | None]) -> dict[str, str]:
    """Which wires this update crosses, each with what to tell of it.

    Args:
        figures: of one update.
        limits: by the name of the wire; None where it is not stretched.
    """
    messages = {}
    for name, limit in limits.items():
        wire = WIRES[name]
        if limit is None or wire.figure not in figures:
            continue
        found = figures[wire.figure]
        if found > limit if wire.too_high else found < limit:
            side = "above" if wire.too_high else "below"
            messages[name] = f"{name} {found:.3g} is {side} {limit:g}: {wire.meaning}"
    return messages


def tripped_in(rows: Sequence[Mapping[str, float]], limits: Mapping[str, float | None], patience: int) -> list[str]:
    """Every wire that was crossed for `patience` updates in a row somewhere in these figures, one row an update."""
    strikes: dict[str, int] = {}
    found: set[str] = set()
    for row in rows:
        strikes = strikes_after(strikes, crossed(row, limits))
        found |= {name for name, count in strikes.items() if count >= strikes_needed(name, patience)}
    return sorted(found)


def strikes_needed(name: str, patience: int) -> int:
    """Return how many updates in a row must cross a wire before it trips."""
    return 1 if name in AT_ONCE else patience


def strikes_after(strikes: Mapping[str, int], crossed_now: Mapping[str, str]) -> dict[str, int]:
    """How many updates in a row each wire has been crossed."""
    return {name: strikes.get(name, 0) + 1 for name in crossed_now}
