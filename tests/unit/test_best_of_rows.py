"""Selection of a prompt's best and worst answer, and the rows that are written of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.core.errors import InputError
from align.core.types import Conversation, Rollout
from align.data.read.conversations import parse_document
from align.evals.best_of import (
    BestOfSelection,
    collect_best_of_results,
    compute_best_of_figures,
    select_winner_and_loser,
)
from align.rollout.strip_reasoning import JudgedAnswers
from align.stages.sample import describe_best, score_answers

ASKED = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A."}, {"role": "user", "content": "b?"}]


def build_answers(*triples: tuple[str, float, bool]) -> list[dict[str, Any]]:
    return [
        {"answer": text, "score": score, "ended": is_ended, "tokens": len(text) + is_ended}
        for text, score, is_ended in triples
    ]


def build_candidates_row(*triples: tuple[str, float, bool], number: int = 0, **columns: Any) -> dict[str, Any]:
    return {"step": 4, "number": number, "prompt": ASKED, "answers": build_answers(*triples), **columns}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("x", 1, True), ("y", 3, True), ("z", 2, True)], BestOfSelection(1, 0, "")),
        (
            [("x", 3, True), ("y", 3, True), ("z", 1, True), ("w", 1, True)],
            BestOfSelection(0, 3, ""),
        ),  # ties: the first drawn
        ([("x", 9, False), ("y", 3, True), ("z", 5, True)], BestOfSelection(2, 1, "")),  # cut: no winner
        ([("x", 9, True), ("y", -3, False), ("z", 5, True)], BestOfSelection(0, 1, "")),  # cut: a loser all the same
        ([(" ", 9, True), ("y", 3, True), ("", -5, True), ("z", 1, True)], BestOfSelection(1, 3, "")),  # empty: neither
        ([("x", 9, False), ("", 3, True)], BestOfSelection(None, None, "no_winner")),
        ([("x", 1, True), (" x\n", 1, True), ("", 0, True)], BestOfSelection(0, None, "all_equal")),
        ([("x", 1, True), ("y", 1, True)], BestOfSelection(0, None, "one_score")),
        ([("x", 1, True), ("y", 5, False)], BestOfSelection(0, None, "one_score")),  # nothing below the winner
        (
            [("x", 2, True), ("x", 1, True), ("y", 1.5, True)],
            BestOfSelection(0, 2, ""),
        ),  # an answer does not lose to its own text
    ],
)
def test_who_wins_and_who_loses(given: list[tuple[str, float, bool]], expected: BestOfSelection) -> None:
    assert select_winner_and_loser(build_answers(*given), has_tools=False) == expected
    assert select_winner_and_loser(build_answers(*given), has_tools=True) == BestOfSelection(None, None, "with_tools")


def test_winners_have_the_minimum_score() -> None:
    answers = build_answers(("x", 9, False), ("y", 3, True), ("z", 1, True))
    assert select_winner_and_loser(answers, has_tools=False, min_score=3) == BestOfSelection(1, 2, "")
    assert select_winner_and_loser(answers, has_tools=False, min_score=3.5) == BestOfSelection(None, None, "low_score")


def test_only_the_winner_is_trained_on() -> None:
    results = collect_best_of_results(
        [build_candidates_row(("x", 1, True), ("y", 3, False), ("z", 2, True))], "sample:r", "vader"
    )
    (winner,) = results.winners
    assert {key: winner[key] for key in ("id", "score", "rank", "n", "scorer")} == {
        "id": "sample:r/0",
        "score": 2,
        "rank": 2,
        "n": 3,
        "scorer": "vader",
    }
    document = parse_document(winner, "i", requires_answer=True)
    assert isinstance(document, Conversation)
    assert [(m.content, m.trained) for m in document.messages if m.role == "assistant"] == [("A.", False), ("z", True)]


def test_a_pair_says_who_made_it_and_which_side_was_cut() -> None:
    results = collect_best_of_results(
        [build_candidates_row(("x", 1.5, False), ("z", 2, True), number=7)], "sample:r", "vader"
    )
    (pair,) = results.pairs
    assert [turn.content for turn in pair.prompt] == ["a?", "A.", "b?"]
    assert (pair.chosen[0].content, pair.rejected[0].content, pair.margin) == ("z", "x", 0.5)
    assert (pair.id, pair.group_id, pair.annotator) == ("sample:r/7:1>0", "sample:r/7", "sample:r")
    assert (pair.source, pair.scorer) == ("simulated", "vader")
    assert (pair.chosen_ended, pair.rejected_ended) == (True, False)


def test_every_prompt_is_counted_once() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    rows = [
        build_candidates_row(("x", 1, True), ("y", 2, True), number=0),
        build_candidates_row(("x", 1, True), ("x", 1, True), number=1),
        build_candidates_row(("x", 1, True), ("y", 1, True), number=2),
        build_candidates_row(("x", 1, False), ("", 9, True), number=3),
        build_candidates_row(("x", 1, True), ("y", 2, True), number=4, tools=[tool]),
    ]
    figures = compute_best_of_figures(collect_best_of_results(rows, "sample:r", "vader"))
    assert (figures["winners"], figures["pairs"]) == (3, 1)
    assert {
        reason: figures[reason] for reason in ("no_winner", "all_equal", "one_score", "with_tools")
    } == dict.fromkeys(("no_winner", "all_equal", "one_score", "with_tools"), 1)
    assert [line["n"] for line in figures["best_of"]] == [1, 2]
    # The reward ranks all answers, whether they can be imitated or not.
    assert figures["reward"]["one"]["value"] == pytest.approx((1.5 + 1 + 1 + 5 + 1.5) / 5)
    assert figures["reward"]["best"]["value"] == pytest.approx((2 + 1 + 1 + 9 + 2) / 5)
    assert (figures["winner_reward"], figures["outranked"]) == (pytest.approx((2 + 1 + 1) / 3), 0)
    assert figures["tokens"] == {"one": pytest.approx((2 * 4 + 1) / 5), "best": pytest.approx((2 * 4 + 1) / 5)}


def test_winners_that_a_cut_answer_outranks_are_counted() -> None:
    """Winners may be worse than the mean of all answers, which the figures of all answers do not show."""
    rows = [
        build_candidates_row(("x", 1, True), ("y", 9, False)),
        build_candidates_row(("x", 3, True), ("y", 2, True), number=1),
    ]
    figures = compute_best_of_figures(collect_best_of_results(rows, "sample:r", "vader"))
    assert (figures["winner_reward"], figures["outranked"]) == (2.0, 1)
    tied_figures = compute_best_of_figures(
        collect_best_of_results([build_candidates_row(("x", 1, False), ("y", 1, True))], "sample:r", "vader")
    )
    assert tied_figures["outranked"] == 0, "one that was drawn before with the same score is no better"
    assert figures["reward"]["one"]["value"] == pytest.approx(3.75)
    assert describe_best(figures)[0] == (
        "the winners' mean reward is 2; for 1 of them, a better-scored answer was cut or is empty"
    )


def test_gold_is_that_of_the_answer_that_the_reward_ranks_first() -> None:
    scored_answers = build_answers(("x", 1, True), ("y", 2, True), ("z", 0, True))
    gold_answers = [answer | {"gold": value} for answer, value in zip(scored_answers, (5.0, -1.0, 8.0), strict=True)]
    figures = compute_best_of_figures(
        collect_best_of_results([{"number": 0, "prompt": ASKED, "answers": gold_answers}] * 2, "sample:r", "vader")
    )
    assert [line["gold"]["value"] for line in figures["best_of"]] == pytest.approx([4.0, (5 - 1 - 1) / 3, -1.0])
    assert figures["gold"]["best"]["value"] == -1.0


@pytest.mark.parametrize(("name", "field"), [("score", "reward"), ("gold", "stage.gold")])
def test_a_score_that_is_no_number_ends_the_run(name: str, field: str) -> None:
    class Broken:
        name = "broken"

        def score(self, conversations: Any, rollout: Any = None) -> torch.Tensor:
            return torch.tensor([0.0, float("nan")], device="cpu")

    tokens = torch.ones((2, 3), dtype=torch.long, device="cpu")
    rollout = Rollout(tokens, tokens.bool(), 1, torch.ones(2, dtype=torch.bool, device="cpu"))
    with pytest.raises(InputError, match=rf"^{field}=broken: gives 1 of 2 answers a score that is nan"):
        score_answers(Broken(), name, JudgedAnswers([Conversation.from_messages(ASKED)] * 2, rollout, [None, None]))
