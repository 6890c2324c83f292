"""Rewards that read the row of a prompt: functions with a second argument, and the checks of evaluation."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.config.compose import build_config, compose_tree
from align.config.scorers import build_reward_spec, parse_reward_parts
from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.evals.suite.tasks import load_task_items, parse_task
from align.reward.build import build_scorer
from align.reward.check import CheckReward
from align.reward.checkers import build_checkers, check_answers_of_turns
from align.reward.combined import score_with_diagnostics
from align.reward.function import FunctionReward, takes_rows
from align.reward.inputs import resolve_reward_inputs


def make_conversation(completion: str, id: str = "sums.jsonl:1", **columns: Any) -> Conversation:
    row = json.dumps(columns) if columns else ""
    return Conversation((Message("user", "2 + 2?"), Message("assistant", completion)), id, row=row)


# Functions.


def exact(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(c[-1]["content"] == row["answer"]) for c, row in zip(conversations, rows, strict=True)]


def lazily(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    yield from exact(conversations, rows)


class Marks:
    def __call__(self, conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return exact(conversations, rows)


def scaled(conversations: Sequence[Any], scale: float = 2.0) -> list[float]:
    return [scale for _ in conversations]


def optional(conversations: Sequence[Any], rows: Sequence[Any] = ()) -> list[float]:
    return [float(len(rows)) for _ in conversations]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (exact, True),
        (lazily, True),
        (Marks(), True),
        (optional, True),
        (functools.partial(scaled, scale=1.0), False),
        (scaled, False),
        (len, False),
        (lambda *given: [1.0], False),
        (lambda c, **more: [1.0], False),
    ],
)
def test_who_gets_the_rows(function: Callable[..., Any], rows: bool) -> None:
    """A function with one required argument gets no rows, unless its second parameter is called `rows`."""
    assert takes_rows(function) is rows


@pytest.mark.parametrize("function", [exact, lazily, Marks()])
def test_a_function_of_rows(function: Callable[..., Any]) -> None:
    conversations = [
        make_conversation("4", answer="4"),
        make_conversation("5", answer="4"),
        make_conversation("5", answer="5"),
    ]
    assert FunctionReward(function, "m:f").score(conversations).tolist() == [1, 0, 1]


def test_the_rows_of_prompts_without_any_are_empty() -> None:
    assert FunctionReward(optional, "m:f").score([make_conversation("4"), make_conversation("5")]).tolist() == [2, 2]
    assert FunctionReward(lambda c, rows: [float(r == {}) for r in rows], "m:f").score(
        [make_conversation("4")]
    ).tolist() == [1]


@pytest.mark.parametrize("function", [exact, lazily, Marks()])
def test_a_column_that_a_row_has_not_is_named(function: Callable[..., Any]) -> None:
    conversations = [make_conversation("4", answer="4"), make_conversation("4", "sums.jsonl:7", answers=["4"], level=1)]
    with pytest.raises(InputError) as error:
        FunctionReward(function, "m:f").score(conversations)
    assert str(error.value) == (
        "sums.jsonl:7, answer=(missing): m:f asks for this column. It has answers, level. Add it."
    )
    with pytest.raises(InputError, match=r"a prompt without an id, answer=.*no columns besides its prompt"):
        FunctionReward(function, "m:f").score([make_conversation("4", "")])


def test_a_function_may_do_without_a_column() -> None:
    def lenient(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        scores = []
        for row in rows:
            try:
                scores.append(float(row["answer"]))
            except KeyError:
                scores.append(row.get("level", -1.0))
        return scores

    conversations = [make_conversation("4", answer="4"), make_conversation("4", level=3), make_conversation("4")]
    assert FunctionReward(lenient, "m:f").score(conversations).tolist() == [4, 3, -1]


def brittle(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [1 / int(row["answer"]) for row in rows]


def leaves(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [1.0 if row["answer"] != "0" else sys.exit(0) for row in rows]


def together(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [1.0] if len(rows) == 1 else [rows[0]["answer"], 1 / 0]


def infinite(conversations: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float("nan") if row["answer"] == "0" else 1.0 for row in rows]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (brittle, r"raised ZeroDivisionError: .* for the answer 'second' to sums\.jsonl:2\."),
        (leaves, r"raised SystemExit: 0 for the answer 'second' to sums\.jsonl:2\."),
        (together, r"raised ZeroDivisionError: .* for 3 answers together\."),
        (infinite, r"returned nan for the answer 'second' to sums\.jsonl:2\."),
        (lambda c, rows: [1.0, 2.0], "returned 2 numbers for 3 conversations"),
        (lambda c, rows, more: [1.0], "raised TypeError"),
    ],
)
def test_a_function_that_fails_at_a_row(function: Callable[..., Any], said: str) -> None:
    conversations = [
        make_conversation(text, f"sums.jsonl:{i + 1}", answer=answer)
        for i, (text, answer) in enumerate([("first", "4"), ("second", "0"), ("third", "2")])
    ]
    with pytest.raises(InputError, match=said) as error:
        FunctionReward(function, "m:f").score(conversations)
    assert str(error.value).startswith("reward.fn=m:f")
    assert error.value.exit_status == 2


# Checks.

ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"check": {"kind": "exact", "answer": 1000, "read": "last_number"}}, "It is 1,000.", "It is 100."),
    ({"check": {"kind": "regex", "pattern": r"\d", "absent": True}}, "four", "4"),
    ({"check": {"kind": "json_schema", "schema": {"type": "object", "required": ["a"]}}}, '{"a": 1}', "{}"),
    ({"check": {"kind": "instructions", "constraints": ["no_comma", {"name": "quotation"}]}}, '"a"', '"a, b"'),
    ({"check": {"kind": "code", "tests": ["assert f(2) == 4"]}}, "def f(x): return 2 * x", "def f(x): return x"),
    ({"check": [{"kind": "exact", "answers": ["a", "b"]}]}, "b", "c"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "a b", "a, b"),
]


@pytest.mark.parametrize(("row", "right", "wrong"), ROWS)
def test_a_reward_says_what_a_task_of_an_evaluation_says(
    tmp_path: Path, row: dict[str, Any], right: str, wrong: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2?", **row}) + "\n")
    task = parse_task({"name": "t", "path": str(path)}, "eval.tasks[0]", True)
    (item,) = load_task_items(task, None, True)
    checkers = build_checkers(item.check, 1, "check", allow_code=True)
    by_task = [check_answers_of_turns(checkers, [answer]).score for answer in (right, wrong)]
    by_reward = (
        CheckReward(allow_code=True).score([make_conversation(answer, **row) for answer in (right, wrong)]).tolist()
    )
    assert by_task == by_reward == [1, 0]


def test_the_check_of_all_rows_and_the_share_of_parts() -> None:
    every = {"kind": "instructions", "constraints": ["no_comma", "quotation", {"name": "title"}, "english_lowercase"]}
    checked_conversation = make_conversation("4", check={"kind": "exact", "answer": "4"})
    conversations = [make_conversation('"hello there, my good old friend"'), checked_conversation]
    assert CheckReward(every).score(conversations).tolist() == [0, 1]
    assert CheckReward(every, score_parts=True).score(conversations).tolist() == [0.5, 1]


def test_an_answer_that_a_check_cannot_decide_about_is_counted() -> None:
    slow = {"kind": "regex", "pattern": r"(a+)+$"}
    conversations = [make_conversation("a" * 4000 + "b", check=slow), make_conversation("aa", check=slow)]
    scores, figures = score_with_diagnostics(CheckReward(), conversations)
    assert scores.tolist() == [0, 1]
    assert figures == {"check_errors": 0.5}


def test_a_row_without_a_check() -> None:
    with pytest.raises(InputError, match=r"sums\.jsonl:1, check=\(missing\): the row has no check"):
        CheckReward().score([make_conversation("4", answer="4")])


def test_the_configuration_of_checks(tmp_path: Path) -> None:
    overrides = ["stage=ppo", "reward=check", "reward.check={kind: regex, pattern: a}", "reward.score=parts"]
    config = build_config(compose_tree(overrides))
    scorer = build_scorer(build_reward_spec(config.reward), iter(()))
    assert scorer.score([make_conversation("a")]).tolist() == [1]
    assert isinstance(scorer, CheckReward)
    assert (scorer.score_parts, scorer.allow_code) == (True, False)
    sum_config = build_config(
        compose_tree(["stage=ppo", "reward=sum", "reward.parts=[{name: check, weight: 2}]"])
    ).reward
    (part,) = parse_reward_parts(sum_config)  # pyright: ignore[reportArgumentType]
    assert part[0] == 2
    checked_conversation = make_conversation("4", check={"kind": "exact", "answer": "4"})
    assert build_scorer(build_reward_spec(sum_config), iter(())).score([checked_conversation]).tolist() == [2]
    with pytest.raises(InputError, match=r"reward\.score"):
        build_config(compose_tree(["stage=ppo", "reward=check", "reward.score=most"]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "exakt", "answer": "4"}, r"reward\.check\.kind=exakt: is none of the choices"),
        ({"kind": "exact", "answer": "four", "read": "last_number"}, r"reward\.check\.answers\[0\]=four: is no number"),
        ({"kind": "code", "tests": ["assert f(2) == 4"]}, r"reward\.check\.kind=code: .*reward\.allow_code=true"),
        ("exact", r"reward\.check=exact: is no mapping"),
    ],
)
def test_a_check_that_is_wrong_is_told_before_anything_is_read(tmp_path: Path, given: Any, said: str) -> None:
    spec = {"name": "check", "check": given, "score": "all", "allow_code": False, "unsafe_code": False}
    with pytest.raises(InputError, match=said):
        resolve_reward_inputs(spec, tmp_path, None)
    spec_of_sum = {"name": "sum", "parts": [{"weight": 1.0, **spec}]}
    with pytest.raises(InputError, match=said.replace(r"reward\.check", r"reward\.parts\[0\]\.check", 1)):
        resolve_reward_inputs(spec_of_sum, tmp_path, None)
    assert resolve_reward_inputs(spec | {"check": None}, tmp_path, None) == {}
