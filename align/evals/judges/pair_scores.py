"""Verdicts on pairs of answers from reward scores: the answer with the higher score is the better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core.errors import InputError
from align.core.types import Rollout
from align.evals.held_out import write_held_out_pairs
from align.evals.judges.examples import PairExample
from align.evals.judges.opinions import JudgeOpinions
from align.evals.stats.verdicts import compute_wins
from align.models.finite_checks import build_divergence_error
from align.report.figure_text import pluralize
from align.reward.build import build_scorer, load_reward_model
from align.reward.combined import standardise_members
from align.run import Artifact

BATCH = 32
"""Number of conversations in a forward pass of a reward model."""


def score_pairs(
    reward: Mapping[str, Any],
    models: Sequence[Artifact],
    pairs: Sequence[PairExample],
    data: str,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[PairExample], JudgeOpinions]:
    """Score both answers of each pair by a reward, and return the pairs that fit the reward models' contexts with the
    verdicts on them. The learned members of a combined reward are standardised on the second answers.

    Args:
        reward: see `align.config.scorers.build_reward_spec`.
        models: its reward models.
        data: the name of the pairs, for errors.

    Raises:
        InputError: no pair fits, or a score is not finite.
    """
    loaded = [load_reward_model(model, device, dtype, BATCH) for model in models]
    fitting = [pair for pair in pairs if all(model.fits(side) for model in loaded for side in pair.conversations)]
    if not fitting:
        problem = f"are {pluralize(len(pairs), 'pair')}, each longer than a reward model's context"
        raise InputError("data", data, problem, "Give shorter pairs, or name another judge.")
    sides = [[pair.conversations[side] for pair in fitting] for side in (0, 1)]
    end_flags = [build_rollout_with_end_flags(pair.ended[side] for pair in fitting) for side in (0, 1)]
    scorer = standardise_members(build_scorer(reward, iter(loaded)), sides[1], end_flags[1])
    first_N, second_N = (scorer.score(side, ended).double() for side, ended in zip(sides, end_flags, strict=True))
    if not (first_N.isfinite() & second_N.isfinite()).all():
        raise build_divergence_error("the score of an answer is not finite", None, str(dtype).removeprefix("torch."))
    first = first_N.tolist()
    second = second_N.tolist()
    # Only a reward model's scores are in units of log-odds (Bradley-Terry).
    is_learned = reward["name"] == "learned"
    log_odds = (first_N - second_N).tolist() if is_learned else [None] * len(fitting)
    scores = [*zip(first, second, strict=True)]
    return fitting, JudgeOpinions(compute_wins(first, second).tolist(), None, log_odds, [""] * len(fitting), scores)


def build_rollout_with_end_flags(end_flags: Iterable[bool]) -> Rollout:
    """Return a rollout with dummy tokens and the given end-of-text flags, for rewards that read only these flags."""
    ended_B = torch.tensor([*end_flags], dtype=torch.bool, device="cpu")
    tokens = torch.zeros(len(ended_B), 2, dtype=torch.int64, device="cpu")
    return Rollout(tokens, tokens == 0, 1, ended_B)


def write_scored_pairs(path: Path, pairs: Sequence[PairExample], opinions: JudgeOpinions) -> None:
    """Write the untied pairs with their scores to a file in the format of `stage=reward`'s held-out pairs. The report
    page lists the pairs with the largest margins from it. Writes nothing if all pairs are tied or the judge gives no
    scores."""
    rows = [i for i, pair in enumerate(pairs) if not pair.is_tied]
    if opinions.scores is None or not rows:
        return
    scores_M2 = torch.tensor(
        [opinions.scores[i] if pairs[i].verdict == 1 else opinions.scores[i][::-1] for i in rows],
        dtype=torch.float64,
        device="cpu",
    )
    margins_M: Tensor = scores_M2[:, 0] - scores_M2[:, 1]
    has_odds = opinions.log_odds[0] is not None
    write_held_out_pairs(
        path, [pairs[i].to_preference() for i in rows], margins_M, scores_M2, 1.0 if has_odds else None
    )
