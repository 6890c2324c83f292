"""Best-of-n: the best of each prompt's sampled answers, the training rows made from it, and figures over all
prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from align.core.types import Conversation, Message, Preference, Tool
from align.ops.best_of_n import compute_kl_bound, estimate_best_of_n, list_sizes, rank_answers
from align.ops.intervals import mean_interval
from align.rollout.strip_reasoning import is_empty_answer

NO_ROW = {
    "no_winner": "without an answer that ended and holds text",
    "low_score": "whose best complete answer scores below stage.min_score",
    "all_equal": "whose answers are all equal",
    "one_score": "with no answer below the winner's score",
    "with_tools": "with tools, whose calls are no text to imitate",
}
"""Reasons for which a prompt gives no preference pair, each with its description. Prompts with the reason `all_equal`
or `one_score` still give a winner."""


class BestOfSelection(NamedTuple):
    """Indices of the best answer to a prompt and of the answer that it is paired with.

    Attributes:
        winner: index of the answer to imitate. None if no answer qualifies.
        loser: index of the answer that the winner is preferred to. None if the prompt gives no pair.
        why: the key of `NO_ROW` for a prompt that gives no pair, else empty.
    """

    winner: int | None
    loser: int | None
    why: str


@dataclass
class BestOfResults:
    """The scores, training rows and counts of a best-of-n run over all prompts, in their order.

    Attributes:
        scores, gold, tokens: for each prompt, one number for each of its N answers. `gold` is empty without a second
            reward.
        winners, pairs: the rows to write.
        reasons: key of `NO_ROW` → number of prompts.
        outranked: number of winners whose prompt has an answer with a higher score that was cut or is empty.
    """

    scores: list[list[float]] = field(default_factory=list)
    gold: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    winners: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[Preference] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    outranked: int = 0


def select_winner_and_loser(
    answers: Sequence[Mapping[str, Any]], has_tools: bool, min_score: float = -math.inf
) -> BestOfSelection:
    """Select the best finished answer to a prompt as the winner, and the worst answer with another text as the loser of
    a pair.

    The winner is the best answer that ended by itself and holds text. A cut answer is never imitated: it would teach
    the model to end a turn in the middle of a sentence. The loser is the worst answer with another text, cut or not, if
    its score is lower. Between equal scores the answer drawn first ranks higher.

    Args:
        answers: in the order in which they were drawn, see `align.stages.sample`.
        has_tools: whether the prompt or its messages use tools.
        min_score: lowest score of a winner. If the best answer scores less, there is neither winner nor loser.
    """
    if has_tools:
        return BestOfSelection(None, None, "with_tools")
    order = rank_answers([[answer["score"] for answer in answers]])[0].tolist()
    winner = next((i for i in order if answers[i]["ended"] and not is_empty_answer(answers[i]["answer"])), None)
    if winner is None:
        return BestOfSelection(None, None, "no_winner")
    if answers[winner]["score"] < min_score:
        return BestOfSelection(None, None, "low_score")
    texts = [answer["answer"].strip() for answer in answers]
    candidates = [i for i in order if texts[i] not in ("", texts[winner])]
    if not candidates:
        return BestOfSelection(winner, None, "all_equal")
    loser = candidates[-1]
    is_lower = answers[loser]["score"] < answers[winner]["score"]
    return BestOfSelection(winner, loser, "") if is_lower else BestOfSelection(winner, None, "one_score")


def collect_best_of_results(
    rows: Iterable[Mapping[str, Any]], run: str, scorer: str, min_score: float = -math.inf
) -> BestOfResults:
    """Select winner and loser for each row of a run's `samples.jsonl`, and collect the training rows, pairs and scores.
    Reads one row at a time.

    Args:
        run: `sample:NAME`.
        scorer: the reward's name for people.
        min_score: lowest score of a winner.
    """
    results = BestOfResults()
    for row in rows:
        answers = row["answers"]
        results.scores.append([answer["score"] for answer in answers])
        results.tokens.append([answer["tokens"] for answer in answers])
        if "gold" in answers[0]:
            results.gold.append([answer["gold"] for answer in answers])
        winner, loser, why = select_winner_and_loser(answers, uses_tools(row), min_score)
        if winner is not None:
            results.winners.append(build_winner_row(row, winner, run, scorer))
            results.outranked += answers[winner]["score"] < max(results.scores[-1])
        if winner is not None and loser is not None:
            results.pairs.append(build_preference(row, winner, loser, run, scorer))
        results.reasons.update([why] if why else [])
    return results


def uses_tools(row: Mapping[str, Any]) -> bool:
    tools = [Tool.from_dict(tool) for tool in row.get("tools", ())]
    return Conversation.from_messages(row["prompt"], tools=tools).uses_tools


def build_winner_row(row: Mapping[str, Any], winner: int, run: str, scorer: str) -> dict[str, Any]:
    """Build a training row for stage=sft from a prompt and its best answer. Assistant turns of the prompt are marked as
    not trained on, since they were not sampled."""
    answers = row["answers"]
    prompt = [turn | ({"train": False} if turn["role"] == "assistant" else {}) for turn in row["prompt"]]
    best = answers[winner]
    higher = sum((answer["score"], -i) > (best["score"], -winner) for i, answer in enumerate(answers))
    return {
        "messages": [*prompt, {"role": "assistant", "content": best["answer"]}],
        "id": f"{run}/{row['number']}",
        "score": best["score"],
        "rank": higher + 1,
        "n": len(answers),
        "scorer": scorer,
    }


def build_preference(row: Mapping[str, Any], winner: int, loser: int, run: str, scorer: str) -> Preference:
    """Build a preference pair with `winner` as the chosen and `loser` as the rejected answer, and the reward recorded
    as its simulated annotator."""
    chosen_answer = row["answers"][winner]
    rejected_answer = row["answers"][loser]
    group = f"{run}/{row['number']}"
    return Preference(
        Conversation.from_messages(row["prompt"]).messages,
        (Message("assistant", chosen_answer["answer"]),),
        (Message("assistant", rejected_answer["answer"]),),
        id=f"{group}:{winner}>{loser}",
        group_id=group,
        margin=chosen_answer["score"] - rejected_answer["score"],
        annotator=run,
        source="simulated",
        scorer=scorer,
        chosen_ended=chosen_answer["ended"],
        rejected_ended=rejected_answer["ended"],
    )


def compute_best_of_curve(results: BestOfResults) -> list[dict[str, Any]]:
    """Estimate the mean reward, second reward, token count and KL bound of the best of n answers for n = 1, 2, 4, … N.

    Returns:
        for each n: the mean reward of the best of n with its interval over prompts, the same of the second reward if
        there is one, the mean tokens of the winner, and an upper bound of its KL from the policy.
    """
    scores = np.array(results.scores)
    rewards = {"reward": scores}
    if results.gold:
        rewards["gold"] = np.array(results.gold)
    return [
        {
            "n": n,
            **{key: mean_interval(estimate_best_of_n(scores, values, n)).as_dict() for key, values in rewards.items()},
            "tokens": float(estimate_best_of_n(scores, np.array(results.tokens), n).mean()),
            "kl_bound": compute_kl_bound(n),
        }
        for n in list_sizes(scores.shape[1])
    ]


def compute_best_of_figures(results: BestOfResults) -> dict[str, Any]:
    """Compute the summary figures of a best-of-n run: its curve over n, rewards and lengths at n = 1 and N, and counts.

    Returns:
        `best_of`, see `compute_best_of_curve`; `reward`, `gold` and `tokens` at n = 1 and n = N; `winner_reward`, the
        mean score of the winners; `outranked`, see `BestOfResults`; the number of `winners` and `pairs`; and how many
        prompts gave no pair, by the keys of `NO_ROW`.
    """
    lines = compute_best_of_curve(results)
    first_line = lines[0]
    last_line = lines[-1]
    rewards = [name for name in ("reward", "gold") if name in first_line]
    scores = [row["score"] for row in results.winners]
    return {
        "best_of": lines,
        **{name: {"one": first_line[name], "best": last_line[name]} for name in rewards},
        **({"winner_reward": sum(scores) / len(scores)} if scores else {}),
        "outranked": results.outranked,
        "tokens": {"one": first_line["tokens"], "best": last_line["tokens"]},
        "winners": len(results.winners),
        "pairs": len(results.pairs),
        **{why: results.reasons[why] for why in NO_ROW},
    }
