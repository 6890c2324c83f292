"""Best-of-n of a run: which answer to each prompt wins, the rows that come of it, and the figures over all prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from align.core.types import Conversation, Message, Preference, Tool
from align.ops.best_of_n import compute_kl_bound, estimate_best_of_n, list_sizes, rank_answers
from align.ops.intervals import mean_interval
from align.rollout.strip_reasoning import empty

NO_ROW = {
    "no_winner": "without an answer that ended and holds text", "all_equal": "whose answers are all equal",
    "one_score": "with no answer below the winner's score",
    "with_tools": "with tools, whose calls are no text to imitate",
}  # fmt: skip
"""Metric → what is said of the prompts that it counts, which give no pair. Those of `all_equal` and `one_score` still
give a winner."""


class Chosen(NamedTuple):
    """What one prompt gives.

    Attributes:
        winner: the number of the answer to imitate; None where there is none.
        loser: the number of the answer that it is preferred to; None where there is no pair.
        why: the key of `NO_ROW` that says why there is no pair; empty where there is one.
    """

    winner: int | None
    loser: int | None
    why: str


@dataclass
class Tally:
    """What all prompts gave, in their order.

    Attributes:
        scores, gold, tokens: of each prompt, a number for each of its N answers; `gold` is empty without a second
            reward.
        winners, pairs: what is written.
        reasons: key of `NO_ROW` → prompts.
        outranked: winners that an answer with a higher score stands beside, which was cut or is empty.
    """

    scores: list[list[float]] = field(default_factory=list)
    gold: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    winners: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[Preference] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    outranked: int = 0


def chosen(answers: Sequence[Mapping[str, Any]], tools: bool) -> Chosen:
    """The winner of a prompt and the answer that it is preferred to.

    The winner is the best answer that ended by itself and holds text: a row to imitate says nothing of an answer that
    was cut, and would teach the end of a turn in the middle of a sentence. The loser is the worst answer that holds
    another text, cut or not, where its score is lower. Of equal scores the first drawn is the better.

    Args:
        answers: in the order in which they were drawn, see `align.stages.sample`.
        tools: the prompt has some.
    """
    if tools:
        return Chosen(None, None, "with_tools")
    order = rank_answers([[each["score"] for each in answers]])[0].tolist()
    winner = next((i for i in order if answers[i]["ended"] and not empty(answers[i]["answer"])), None)
    if winner is None:
        return Chosen(None, None, "no_winner")
    texts = [each["answer"].strip() for each in answers]
    others = [i for i in order if texts[i] not in ("", texts[winner])]
    if not others:
        return Chosen(winner, None, "all_equal")
    loser = others[-1]
    apart = answers[loser]["score"] < answers[winner]["score"]
    return Chosen(winner, loser, "") if apart else Chosen(winner, None, "one_score")


def tallied(rows: Iterable[Mapping[str, Any]], run: str, scorer: str) -> Tally:
    """What the lines of a run's `samples.jsonl` give, read one at a time.

    Args:
        run: `sample:NAME`.
        scorer: what people call the reward.
    """
    found = Tally()
    for row in rows:
        answers = row["answers"]
        found.scores.append([each["score"] for each in answers])
        found.tokens.append([each["tokens"] for each in answers])
        if "gold" in answers[0]:
            found.gold.append([each["gold"] for each in answers])
        winner, loser, why = chosen(answers, uses_tools(row))
        if winner is not None:
            found.winners.append(winner_row(row, winner, run, scorer))
            found.outranked += answers[winner]["score"] < max(found.scores[-1])
        if winner is not None and loser is not None:
            found.pairs.append(pair_of(row, winner, loser, run, scorer))
        found.reasons.update([why] if why else [])
    return found


def uses_tools(row: Mapping[str, Any]) -> bool:
    tools = [Tool.from_dict(tool) for tool in row.get("tools", ())]
    return Conversation.from_messages(row["prompt"], tools=tools).uses_tools


def winner_row(row: Mapping[str, Any], winner: int, run: str, scorer: str) -> dict[str, Any]:
    """A row for stage=sft. Of the answers only the winner is trained on: those in the prompt are no sample's."""
    answers = row["answers"]
    asked = [turn | ({"train": False} if turn["role"] == "assistant" else {}) for turn in row["prompt"]]
    won = answers[winner]
    higher = sum((other["score"], -i) > (won["score"], -winner) for i, other in enumerate(answers))
    return {
        "messages": [*asked, {"role": "assistant", "content": won["answer"]}],
        "id": f"{run}/{row['number']}", "score": won["score"], "rank": higher + 1, "n": len(answers), "scorer": scorer,
    }  # fmt: skip


def pair_of(row: Mapping[str, Any], winner: int, loser: int, run: str, scorer: str) -> Preference:
    """The winner over the loser, as a preference by a scorer in place of a person."""
    won, lost = row["answers"][winner], row["answers"][loser]
    group = f"{run}/{row['number']}"
    return Preference(
        Conversation.from_messages(row["prompt"]).messages, (Message("assistant", won["answer"]),),
        (Message("assistant", lost["answer"]),), id=f"{group}:{winner}>{loser}", group_id=group,
        margin=won["score"] - lost["score"], annotator=run, source="simulated", scorer=scorer,
        chosen_ended=won["ended"], rejected_ended=lost["ended"],
    )  # fmt: skip


def curve(found: Tally) -> list[dict[str, Any]]:
    """For n = 1, 2, 4, … N: the mean reward of the best of n with its interval over prompts, that of the second reward
    where there is one, the tokens of the winner, and the bound of its KL from the policy."""
    scores = np.array(found.scores)
    measured = {"reward": scores, **({"gold": np.array(found.gold)} if found.gold else {})}
    return [
        {
            "n": n,
            **{key: mean_interval(estimate_best_of_n(scores, values, n)).as_dict() for key, values in measured.items()},
            "tokens": float(estimate_best_of_n(scores, np.array(found.tokens), n).mean()),
            "kl_bound": compute_kl_bound(n),
        }
        for n in list_sizes(scores.shape[1])
    ]  # fmt: skip


def figures(found: Tally) -> dict[str, Any]:
    """A run's headline figures: `best_of`, see `curve`; `winner_reward`, the mean of what is written to imitate, and
    `outranked`, how many winners have a better answer beside them that was cut or is empty; what is written, and what
    is not."""
    lines, winners = curve(found), found.winners
    one, best = lines[0], lines[-1]
    measured = [name for name in ("reward", "gold") if name in one]
    rewards = [row["score"] for row in winners]
    return {
        "best_of": lines,
        **{name: {"one": one[name], "best": best[name]} for name in measured},
        **({"winner_reward": sum(rewards) / len(rewards)} if rewards else {}),
        "outranked": found.outranked,
        "tokens": {"one": one["tokens"], "best": best["tokens"]},
        "winners": len(winners), "pairs": len(found.pairs), **{why: found.reasons[why] for why in NO_ROW},
    }  # fmt: skip
