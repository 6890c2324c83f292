"""Sampled prompts that are added to the annotation store, and those that are withheld."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.annotate.store import Candidate, Store
from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import Prompt
from align.rollout.strip_reasoning import warn_about_empty_answers
from align.stages.sample import add_items, describe_withheld, require_added_items

THOUGHT = "<think>\nHm.\n</think>\n\n"


def config(reasoning: str = "keep") -> Any:
    rollout = SimpleNamespace(reasoning=reasoning)
    return SimpleNamespace(stage=SimpleNamespace(candidates=2), project="p", rollout=rollout)


def add_candidates(
    folder: Path, pairs: list[tuple[str, str]], reasoning: str = "keep"
) -> tuple[dict[str, int], list[Any]]:
    """Add a prompt for each pair of answers. Returns the counts of withheld prompts, and the store's items."""
    turns = Message("user", "a?"), Message("assistant", f"{THOUGHT}A."), Message("user", "b?")
    prompts = [Prompt(Conversation(turns, str(i)), [1]) for i in range(len(pairs))]
    answers = [Candidate(text, "d" * 64) for pair in pairs for text in pair]
    with Store.open(f"sqlite:///{folder / 'annotations.db'}") as store:
        kept_back = add_items(store, config(reasoning), "run/", 64, prompts, answers)
        return kept_back, list(store.items("p"))


def test_nobody_is_asked_to_compare_what_is_the_same(tmp_path: Path):
    pairs = [("Yes.", "No."), ("", " \n"), ("Yes.", "Yes. "), ("", "No.")]
    kept_back, items = add_candidates(tmp_path, pairs)
    assert kept_back == {"all_empty": 1, "all_equal": 1, "with_tools": 0}
    assert [[c.text for c in item.candidates] for item in items] == [["Yes.", "No."], ["", "No."]]
    assert describe_withheld(kept_back) == [
        "not handed out to annotators: 1 prompt whose answers are all empty, 1 prompt whose answers are all equal"
    ]
    assert describe_withheld({"all_empty": 0, "all_equal": 0, "with_tools": 0}) == []


@pytest.mark.parametrize(("reasoning", "shown"), [("keep", f"{THOUGHT}A."), ("hide", "A.")])
def test_who_compares_answers_alone_reads_no_earlier_reasoning(tmp_path: Path, reasoning: str, shown: str):
    _, (item,) = add_candidates(tmp_path, [("Yes.", "No.")], reasoning)
    assert [m.content for m in item.prompt.messages] == ["a?", shown, "b?"]


@pytest.mark.parametrize(
    ("reasoning", "back", "field"),
    [
        ("hide", {"all_empty": 5, "all_equal": 0}, "rollout.reasoning=hide"),
        ("keep", {"all_empty": 5, "all_equal": 0}, "init=sft:a"),
        ("hide", {"all_empty": 3, "all_equal": 2}, "init=sft:a"),
        ("hide", {"all_empty": 3, "all_equal": 1}, ""),
    ],
)
def test_a_run_that_hands_out_nothing_says_so(reasoning: str, back: dict[str, int], field: str):
    inputs = {"init": SimpleNamespace(ref="sft:a")}
    run: Any = SimpleNamespace(folder=Path("runs/sample/x"), inputs=inputs, known_metrics={"prompts": 5})
    if not field:
        require_added_items(run, config(reasoning), [back])
        return
    with pytest.raises(InputError, match=rf"^{field}: .*runs/sample/x/samples\.jsonl"):
        require_added_items(run, config(reasoning), [back])


def test_empty_answers_are_said():
    assert warn_about_empty_answers(0.0, hides_reasoning=True) == []
    assert warn_about_empty_answers(0.5, hides_reasoning=True) == [
        "50% of the answers are empty: their reasoning was not closed, or no text follows it"
    ]
    assert warn_about_empty_answers(1 / 800, hides_reasoning=False, whose="start's ") == [
        "0.125% of the start's answers are empty: they hold no text"
    ]
