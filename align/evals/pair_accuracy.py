"""How well something that was trained on pairs orders pairs it has not seen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align.evals.stats import per_prompt
from align.ops.calibration import calibration_bins
from align.ops.intervals import proportion
from align.types import Conversation, Preference
from reward.rules import BY_NAME

RELIABILITY = "Predicted against observed, with the number of pairs; intervals are over rankings."
"""What stands under the plot of `shuffled_bins`."""


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
            gold.score([Conversation((*p.prompt, *getattr(p, side))) for p in prefs]) for side in ("chosen", "rejected")
        )
        right = better > worse  # ties never become pairs
        figures["accuracy_noiseless"] = interval(((gap > 0) == right).double().tolist())
        figures["ceiling"] = interval(right.double().tolist())
    return figures


def simulated_by(prefs: Sequence[Preference]) -> dict[str, list[str]]:
    """Which scorers stood in for people in what was learned from; empty where none did, or nobody said."""
    found = sorted({p.scorer for p in prefs if p.scorer})
    return {"simulated_by": found} if found else {}


def shuffled_bins(prefs: Sequence[Preference], gap: Tensor) -> list:
    """Calibration of P(first wins), each pair's first chosen by a hash of its id: with the chosen always first, every
    outcome would be 1."""
    predicted, outcomes = [], []
    for pref, g in zip(prefs, gap.tolist(), strict=True):
        flipped = hashlib.sha256(pref.id.encode()).digest()[0] % 2 == 1
        predicted.append(1 / (1 + math.exp(min(g if flipped else -g, 700.0))))
        outcomes.append(0.0 if flipped else 1.0)
    return calibration_bins(predicted, outcomes, [p.group_id or p.id for p in prefs])
