"""Tests that cleaning steps are read from the setting, run in order, and counted alike by any number of workers."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from clean_samples import WRITTEN, build_conversation, build_feedback, build_preference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.core.errors import InputError, find_lone_surrogate
from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.clean.cleaner import EXAMPLE_WIDTH, Cleaner, find_first_change, shorten_around
from align.data.clean.outcome import Drop, NotedRecord, Step
from align.data.clean.steps import STEPS, create_steps
from align.data.read.content import list_texts, list_turns, to_content_row

LIMITS = settings(max_examples=150, suppress_health_check=list(HealthCheck))
ALL = [
    "unicode",
    {"unicode": {"unescape": True}},
    "control",
    "empty",
    "roles",
    {"roles": {"ends": "any"}},
    {"language": {"keep": ["en", "de"]}},
    {"length": {"least": 2, "most": 40}},
    "repetition",
    "boilerplate",
    "pii",
    {"pii": {"action": "report", "regions": ["US", "DE"]}},
]


# Settings.


def test_a_list_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cleaning_of_mine.py").write_text("def shorten(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)
    setting = ["unicode", {"length": {"least": 3, "by": "tokens"}}, {"roles": None}, {"fn": "cleaning_of_mine:shorten"}]
    steps = create_steps(setting, count_tokens=len)
    assert [name for name, _ in steps] == ["unicode", "length", "roles", "fn"]
    assert pickle.loads(pickle.dumps(steps)) == steps  # steps are sent to worker processes
    sys.modules.pop("cleaning_of_mine")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("unicode", r"stage\.clean=unicode: is no list of steps"),
        (["unicod"], r"stage\.clean\[0\]=unicod: is no cleaning step\. Did you mean unicode\? The steps: unicode, "),
        (["unicode", 3], r"stage\.clean\[1\]=3: is no step\. Write its name, or"),
        ([{"pii": {}, "length": {}}], r"stage\.clean\[0\]=.*is no step"),
        ([{"length": 3}], r"stage\.clean\[0\]\.length=3: are no arguments by name\. Write .*: least, most, by\."),
        ([{"length": {"min": 3}}], r"length\.min=3: there is no such argument\. .* least, most, by\."),
        ([{"length": {"leest": 3}}], r"length\.leest=3: there is no such argument\. Did you mean least\?"),
        ([{"control": {"x": 1}}], r"control\.x=1: there is no such argument\. It has no arguments: write its name\."),
        ([{"length": {}}], r"length\.least=None: there is no limit\. Give least, most or both\."),
        (["length"], r"length\.least=None: there is no limit"),
        ([{"length": {"least": -1}}], r"length\.least=-1: is out of range\. Give a whole number of at least 0\."),
        ([{"length": {"least": True}}], r"length\.least=True: is no whole number"),
        ([{"length": {"least": 9, "most": 3}}], r"length\.least=9: is more than most \(3\)"),
        ([{"length": {"least": 9, "by": "word"}}], r"length\.by=word: is none of characters, .*Did you mean words\?"),
        ([{"length": {"least": 9, "by": "tokens"}}], r"length\.by=tokens: there is no model .* Name one with model="),
        ([{"length": {"least": 9, "count_tokens": 1}}], r"count_tokens=1: there is no such argument"),
        (["language"], r"language\.keep=\[\]: is no list of names\. Write a list, such as keep: \[en, de\]\."),
        ([{"language": {"keep": "en"}}], r"language\.keep=en: is no list of names"),
        ([{"language": {"keep": ["english"]}}], r"language\.keep=\['english'\]: has 'english', which is none of"),
        ([{"language": {"keep": ["en"], "confidence": 2}}], r"language\.confidence=2: is no share"),
        ([{"pii": {"action": "hide"}}], r"pii\.action=hide: is none of drop, mask, report"),
        ([{"pii": {"kinds": ["e-mail"]}}], r"pii\.kinds=\['e-mail'\]: .* Did you mean email\?"),
        ([{"pii": {"regions": ["USA"]}}], r"pii\.regions=\['USA'\]: has 'USA'"),
        ([{"repetition": {"grams": "a"}}], r"repetition\.grams=a: is no share"),
        ([{"repetition": {"run": 10}}], r"repetition\.run=10: is out of range\. Give a whole number of at least 64\."),
        ([{"boilerplate": {"patterns": 3}}], r"boilerplate\.patterns=3: is no file"),
        ([{"unicode": {"unescape": "yes"}}], r"unicode\.unescape=yes: is neither true nor false"),
        ([{"fn": "mine"}], r"stage\.clean\[0\]\.fn=mine: names no function\. Write \{fn: package\.module:name\}\."),
        ([{"fn": "nothing_of_that_name:f"}], r"stage\.clean\[0\]\.fn=nothing_of_that_name:f: .*cannot be imported"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_place(written: Any, said: str):
    with pytest.raises(InputError, match=said):
        create_steps(written)


# Functions of the user.


def create_user_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Step:
    (tmp_path / "step_of_mine.py").write_text(f"def change(row):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("step_of_mine", None)
    ((_, step),) = create_steps([{"fn": "step_of_mine:change"}])
    return step


@pytest.mark.parametrize(
    ("body", "record", "found"),
    [
        ("return row", build_conversation("a", "b"), "same"),
        ("return dict(row)", build_preference("a", "b", "c"), "same"),
        ("return None", build_conversation("a", "b"), Drop("fn", "step_of_mine:change")),
        ("return 'too dull'", build_conversation("a", "b"), Drop("fn: too dull", "step_of_mine:change")),
        (
            "row['messages'][1]['content'] = 'B'; return row",
            build_conversation("a", "b", id="r1"),
            build_conversation("a", "B", id="r1"),
        ),
        (
            "row['messages'] = row['messages'][:2]; return row",
            build_conversation("a", "b", "c", "d"),
            build_conversation("a", "b"),
        ),
        ("return {'text': row['text'].upper()}", "abc", "ABC"),
        (
            "row['completion'][0]['content'] = 'B'; return row",
            build_feedback("a", "b", True),
            build_feedback("a", "B", True),
        ),
    ],
)
def test_a_function_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, record: Record, found: Any):
    outcome = create_user_step(monkeypatch, tmp_path, body)(record)
    assert outcome is record if found == "same" else outcome == found


def test_a_function_that_adds_turns_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    step = create_user_step(
        monkeypatch, tmp_path, "row['messages'] += [{'role': 'user', 'content': 'mail a@b.de'}]; return row"
    )
    cleaner = Cleaner([("fn", step), *create_steps(["pii"])])
    cleaner.clean(build_conversation("a", "b"), 0)
    example = cleaner.counts[0].examples[0]
    assert [len((row or {})["messages"]) for row in (example["before"], example["after"])] == [2, 3]
    assert "a@b.de" not in repr(example)


def test_a_function_keeps_what_a_row_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    preference = create_user_step(monkeypatch, tmp_path, "row['chosen'][0]['content'] = 'Good'; return row")(
        build_preference("a", "b", "c")
    )
    assert isinstance(preference, Preference)
    assert (
        preference.chosen[0].content,
        preference.id,
        preference.group_id,
        preference.margin,
        preference.annotator,
    ) == (
        "Good",
        "p1",
        "g",
        2.0,
        "ann",
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero for chats\.jsonl:7"),
        ("raise SystemExit", "raised SystemExit"),
        ("return 3", r"returned int for chats\.jsonl:7\. Return the row, None"),
        ("return True", "returned bool"),
        ("return {'messages': []}", r"returned a row that cannot be read for chats\.jsonl:7 .*is no list of messages"),
        ("return {}", r"returned a row without messages for chats\.jsonl:7"),
        ("return {**row, 'score': 1}", r"returned a row with another score for .* Change messages alone"),
        ("row['messages'][0]['content'] = chr(0xd800); return row", ".*cannot be read.*half a character"),
        ("row['messages'][0]['role'] = 'bot'; return row", ".*is none of system, user"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, said: str
):
    with pytest.raises(InputError, match=r"stage\.clean\[0\]\.fn=step_of_mine:change: " + said):
        create_user_step(monkeypatch, tmp_path, body)(build_conversation("a", "b", id="chats.jsonl:7"))


def test_control_c_is_the_users_wish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        create_user_step(monkeypatch, tmp_path, "raise KeyboardInterrupt")("abc")


# Counting.


def test_counts_and_examples():
    cleaner = Cleaner(
        create_steps(["control", "empty", {"length": {"least": 2}}, {"pii": {"kinds": ["email"]}}]), examples=2
    )
    rows = ["fine words here", "a\x00b c", " ", "one", "mail a@b.de now", "\x01x y", "two", "three"]
    outcomes = [cleaner.clean(row, i) for i, row in enumerate(rows)]
    assert [row for row in outcomes if not isinstance(row, Drop)] == [
        "fine words here",
        "ab c",
        "mail [EMAIL] now",
        "x y",
    ]
    control, empty, length, pii = cleaner.counts
    assert [
        (counts.seen, counts.changed, counts.dropped, counts.seen - counts.dropped) for counts in cleaner.counts
    ] == [
        (8, 2, 0, 8),
        (8, 0, 1, 7),
        (7, 0, 3, 4),
        (4, 1, 0, 4),
    ]
    assert [(counts.reasons, counts.notes) for counts in (empty, length, pii)] == [
        ({"empty": 1}, {}),
        ({"too short": 3}, {}),
        ({}, {"email": 1}),
    ]
    assert [(example["at"], example["before"], example["after"]) for example in control.examples] == [
        (1, {"text": "a\x00b c"}, {"text": "ab c"}),
        (5, {"text": "\x01x y"}, {"text": "x y"}),
    ]
    assert [(example["at"], example["reason"], example["detail"], example["after"]) for example in length.examples] == [
        (3, "too short", "1 words, least: 2", None),
        (6, "too short", "1 words, least: 2", None),
    ]
    assert pii.examples[0]["before"] == pii.examples[0]["after"] == {"text": "mail [EMAIL] now"}


def test_an_example_of_a_long_record_is_cut_around_its_change():
    cleaner = Cleaner(create_steps(["control", "empty"]))
    record = build_conversation("hello " * 500, "x" * 3000 + "\x00" + "y" * 3000, "third", "")
    cleaner.clean(record, 0)
    control, empty = (counts.examples[0] for counts in cleaner.counts)
    before, after = (row["messages"] if row else [] for row in (control["before"], control["after"]))
    assert before[0]["content"] == after[0]["content"] == ("hello " * 500)[:EXAMPLE_WIDTH] + "…"
    assert "x\x00y" in before[1]["content"]
    assert "xy" in after[1]["content"]
    assert len(before[1]["content"]) == EXAMPLE_WIDTH + 2
    assert [len(empty["before"]["messages"]), len((empty["after"] or {})["messages"])] == [4, 2]
    cleaner = Cleaner(create_steps(["control"]))
    cleaner.clean(
        build_conversation(*(f"turn {i}" for i in range(30)), "a\x00b", *(f"turn {i}" for i in range(31, 60))), 0
    )
    (example,) = cleaner.counts[0].examples
    before, after = (row["messages"] if row else [] for row in (example["before"], example["after"]))
    assert [turn["content"] for turn in before[:4]] == ["turn 28", "turn 29", "a\x00b", "turn 31"]
    assert (len(before), len(after), after[2]["content"]) == (12, 12, "ab")
    assert (find_first_change("abc", "abd"), find_first_change("abc", "abc"), find_first_change("ab", "abc")) == (
        2,
        0,
        2,
    )
    assert shorten_around("abc", 1) == "abc"


# Properties that hold for any record.

PIECES = [
    "lamp",
    "the",
    "As an AI language model,",
    "bob@x.de",
    "4111111111111111",
    "8.8.8.8",
    "schÃ¶n",
    "don’t",
    "&amp;",
    "\r\n",
    "\n",
    "\x00",
    "\u200b",
    "\u200d",
    "\ufe0f",
    "\ufe01",
    "👩",
    "شب",
    "क्",
    "你好",
    "\u202e",
    "\U000e0061",
    "e\u0301",
    "  ",
    "DE89 3704 0044 0532 0130 00",
    "+1 212 664 7665",
    "`",
    "```",
    "<br>",
    "<think>",
    "</think>",
    "\x85",
    "â€",
    "\x1b[1m",
]
word = st.sampled_from(PIECES)
anything = (
    st.lists(word | st.text(max_size=6), max_size=12).map("".join).filter(lambda text: not find_lone_surrogate(text))
)
message = st.builds(
    lambda role, text, trained: Message(role, text, trained or role != "assistant"),
    st.sampled_from(["system", "user", "assistant", "assistant", "user"]),
    anything,
    st.booleans(),
)
several = st.lists(message, min_size=1, max_size=4).map(tuple)
any_record = st.one_of(
    anything,
    st.builds(Conversation, several, st.just("c:1")),
    st.tuples(several, several, several).filter(lambda t: t[1] != t[2]).map(lambda t: Preference(*t, group_id="g")),
    st.builds(Feedback, several, several, st.booleans()),
)


def unwrap_outcome(outcome: Record | Drop | NotedRecord) -> Record | Drop:
    return outcome.record if isinstance(outcome, NotedRecord) else outcome


@LIMITS
@given(any_record, st.sampled_from(range(len(ALL))))
def test_every_step_is_idempotent_and_keeps_roles_and_turns(record: Record, which: int):
    ((name, step),) = create_steps([ALL[which]])
    before = to_content_row(record)
    cleaned = unwrap_outcome(step(record))
    assert to_content_row(record) == before
    if isinstance(cleaned, Drop):
        assert cleaned.reason
        return
    assert unwrap_outcome(step(cleaned)) is cleaned
    assert cleaned is record or cleaned != record  # an unchanged record is returned itself
    if name in ("unicode", "control", "pii"):
        assert [(turn.role, turn.trained) for turn in list_turns(cleaned)] == [
            (turn.role, turn.trained) for turn in list_turns(record)
        ]
    elif name == "empty" and isinstance(record, Conversation) and isinstance(cleaned, Conversation):
        assert cleaned.messages == record.messages[: len(cleaned.messages)]
    else:
        assert cleaned is record
    assert not any(map(find_lone_surrogate, list_texts(cleaned)))


@LIMITS
@given(
    st.lists(any_record, max_size=12), st.lists(st.integers(0, 2), min_size=12, max_size=12), st.permutations(range(3))
)
def test_whoever_cleans_which_record_the_rows_counts_and_examples_are_the_same(
    rows: list[Record], owners: list[int], order: list[int]
):
    setting = ["unicode", "control", "empty", {"roles": {"ends": "any"}}, "boilerplate", "pii"]
    single_cleaner = Cleaner(create_steps(setting), examples=2)
    single_outcomes = [single_cleaner.clean(row, index) for index, row in enumerate(rows)]
    workers = [Cleaner(create_steps(setting), examples=2) for _ in range(3)]
    shared_outcomes = {
        index: workers[owners[index]].clean(row, index) for index, row in reversed(list(enumerate(rows)))
    }
    merged_cleaner = Cleaner(create_steps(setting), examples=2)
    for index in order:
        merged_cleaner.merge(json.loads(json.dumps([*map(vars, workers[index].counts)])))
    assert [shared_outcomes[index] for index in range(len(rows))] == single_outcomes
    assert merged_cleaner.counts == single_cleaner.counts


LARGE = 500_000
HOSTILE = {
    "addresses": "a@",
    "dotted": "a.",
    "host": "a@b.",
    "hyphens": "a-@a-.",
    "quotes": "o'o'",
    "digits": "1",
    "spaced digits": "1 ",
    "cards": "4111 1111 1111 1111 ",
    "almost cards": "4111-1111-1111-1112-",
    "accounts": "DE89 ",
    "accounts in a row": "de89",
    "hosts": "8.8.8.8.",
    "colons": "2001:",
    "plus": "+1 ",
    "parentheses": "(1(1",
    "social": "219-09-9998 ",
    "tags": "<div>",
    "open tags": "<",
    "ticks": "`",
    "fences": "```\n",
    "entities": "&amp;",
    "joiners": "👩\u200d",
    "selectors": "x\ufe01\u200b",
    "tag letters": "🏴\U000e0061",
    "mojibake": "Ã¶",
    "deep mojibake": "ÃƒÂ¶",
    "lines": "the same\n",
    "words": "ab ab ",
    "one character": "é",
    "blocks": "a" * 63 + "b",
    "marks": "\u0301\u0323",
    "thinking": "<think>",
    "Chinese": "你好",
    "flags": "🇳",
}


@pytest.mark.slow
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_takes_more_than_linear_time(hostile: str):
    """A linear step takes 20 times as long for half a megabyte as for 25 kilobytes, a quadratic step 400 times."""
    unit = HOSTILE[hostile]
    for setting in ALL:
        ((name, step),) = create_steps([setting])
        seconds = []
        for size in (LARGE // 20, LARGE):
            record = build_conversation("Hi", unit * (size // len(unit)))
            start = time.process_time()
            step(record)
            seconds.append(time.process_time() - start)
        assert seconds[1] < max(0.25, 60 * seconds[0]), (name, seconds)
        assert seconds[1] < 30, (name, seconds)


def test_every_step_is_tried_here_on_every_script():
    assert {name for name, _ in create_steps(ALL)} == set(STEPS)
    for text in WRITTEN.values():
        for _, step in create_steps(ALL):
            outcome = unwrap_outcome(step(build_conversation("Hi", text)))
            assert isinstance(outcome, Drop) or unwrap_outcome(step(outcome)) is outcome
