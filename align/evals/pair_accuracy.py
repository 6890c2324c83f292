"""How well something that was trained on pairs orders pairs it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from align.core.types import Conversation, Message, Preference
from align.evals.stats import per_prompt
from align.ops.intervals import proportion
from align.reward.rules import BY_NAME
from align.run import write_text
from align.track import line_of, turn_text

SIDES = ("chosen", "rejected")


def held_out_figures(prefs: Sequence[Preference], gap: Tensor) -> dict[str, dict[str, Any]]:
    """Accuracy on the labels with its interval over prompts; where one scorer is known to have made them all, with
    noise, also against its noiseless order, and the ceiling that the noise leaves: how often the labels agree with it.
    """
    groups = [p.group_id or p.id for p in prefs]

    def interval(values: list[float]) -> dict[str, Any]:
        return proportion(per_prompt(groups, values)).as_dict()

    figures = {"accuracy": interval((gap > 0).double().tolist())}
    scorers = {p.scorer for p in prefs}
    if len(scorers) == 1 and scorers <= BY_NAME.keys():
        gold = BY_NAME[scorers.pop()]()
        better, worse = (
            gold.score([Conversation((*p.prompt, *getattr(p, side)), tools=p.tools) for p in prefs])
            for side in ("chosen", "rejected")
        )
        right = better > worse  # ties never become pairs
        figures["accuracy_noiseless"] = interval(((gap > 0) == right).double().tolist())
        figures["ceiling"] = interval(right.double().tolist())
    return figures


def simulated_by(prefs: Sequence[Preference]) -> dict[str, list[str]]:
    """Which scorers stood in for people in what was learned from; empty where none did, or nobody said."""
    found = sorted({p.scorer for p in prefs if p.scorer})
    return {"simulated_by": found} if found else {}


def write_held_out(
    path: Path, prefs: Sequence[Preference], margins_M: Tensor, scores_M2: Tensor | None = None,
    log_odds: float | None = 1.0,
) -> None:  # fmt: skip
    """`held_out.jsonl`: every held-out pair with what the model thinks of it, one JSON object a line.

    Args:
        margins_M: by how much the model puts the chosen answer of each pair above the other.
        scores_M2: of the chosen and the other one, where each has a score of its own.
        log_odds: nats of log odds that the chosen one wins in a unit of the margin; None where it says nothing of odds.
    """
    scores = scores_M2.tolist() if scores_M2 is not None else [()] * len(prefs)
    rows = [
        {
            "id": pref.id, "group": pref.group_id or pref.id, "margin": margin,
            "prompt": [message.as_dict() for message in pref.prompt],
            **{side: pref_text(getattr(pref, side)) for side in SIDES},
            **{f"score_{side}": score for side, score in zip(SIDES, pair, strict=False)},
            **({} if log_odds is None else {"log_odds": log_odds * margin}),
        }
        for pref, margin, pair in zip(prefs, margins_M.tolist(), scores, strict=True)
    ]  # fmt: skip
    write_text(path, "".join(map(line_of, rows)))


def pref_text(turns: Sequence[Message]) -> str:
    return "\n".join(turn_text(message.as_dict()) for message in turns)
