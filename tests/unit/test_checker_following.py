"""IFEval instructions: examples by hand, all prompts compared with the published checkers, and wrong constraints."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.reward.checkers import build_checker, compute_accuracy
from align.reward.checkers.ifeval import INSTRUCTIONS, SHORT, parse_ifeval_row
from align.reward.checkers.sentences import count_sentences

DATA = Path(__file__).resolve().parents[1] / "data"
LIKE_PUBLISHED = {
    "change_case:english_capital": 0.96,
    "change_case:english_lowercase": 0.96,
    "language:response_language": 0.90,
    "length_constraints:number_sentences": 0.97,
    "change_case:capital_word_frequency": 0.99,
    "keywords:letter_frequency": 0.96,
}
"""Minimum share of equal verdicts, for instructions that differ from the published ones on purpose; 1 for others."""
ENGLISH = "The weather is fine today and we will walk along the river."
HINDI = "सभी मनुष्य जन्म से स्वतंत्र हैं और उनके अधिकार समान हैं।"

# name and arguments, an answer that follows the instruction, an answer that does not
EXAMPLES: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "existence", "keywords": ["sun", "c++"]}, "Sunday in C++", "Sunday"),
    ({"name": "frequency", "keyword": "ha", "relation": "at least", "frequency": 2}, "Haha", "Ha"),
    ({"name": "forbidden_words", "forbidden_words": ["rock"]}, "rocket", "a Rock."),
    ({"name": "letter_frequency", "letter": "#", "let_relation": "less than", "let_frequency": 2}, "a #b", "## b"),
    ({"name": "response_language", "language": "hi"}, HINDI, ENGLISH),
    ({"name": "number_sentences", "relation": "at least", "num_sentences": 2}, "Dr. Ho is in. Go!", "Dr. Ho is in."),
    ({"name": "number_words", "relation": "less than", "num_words": 3}, "two words", "three words now"),
    ({"name": "number_paragraphs", "num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    (
        {"name": "nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"},
        'An oak.\n\n"Elm," he said.',
        "An oak.\n\nAn elm.",
    ),
    ({"name": "number_placeholders", "num_placeholders": 2}, "[name], [address]", "[name] [[ ] ]"[:9]),
    ({"name": "postscript", "postscript_marker": "P.P.S"}, "Hi\np. p. s: bye", "Hi\nP.S. bye"),
    ({"name": "number_bullet_lists", "num_bullets": 2}, "* a\n  - b\n**bold**", "* a\n* b\n- c"),
    ({"name": "constrained_response"}, "Well. My answer is maybe.", "maybe."),
    ({"name": "number_highlighted_sections", "num_highlights": 2}, "*a* and **b**", "*a* and **"),
    ({"name": "multiple_sections", "section_spliter": "Day", "num_sections": 2}, "Day 1 a\nDay 2 b", "Day one\nDay 2"),
    ({"name": "json_format"}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ({"name": "title"}, "<<A poem>>\nx", "<< >>\n<a poem>"),
    ({"name": "two_responses"}, "yes\n******\nno", "yes\n******\nyes"),
    ({"name": "repeat_prompt", "prompt_to_repeat": "Say hi."}, " say hi. Hi!", "Hi! Say hi."),
    ({"name": "end_checker", "end_phrase": "Peace!"}, "So long. peace!", "Peace! So long."),
    (
        {"name": "capital_word_frequency", "capital_relation": "less than", "capital_frequency": 2},
        "BIG-EYED cat",
        "A CAT",
    ),
    ({"name": "english_capital"}, ENGLISH.upper(), ENGLISH),
    ({"name": "english_lowercase"}, ENGLISH.lower(), HINDI),
    ({"name": "no_comma"}, "a; b", "a, b"),
    ({"name": "quotation"}, ' "a b" ', '"a" b'),
]


def instructions(*constraints: Any) -> dict[str, Any]:
    return {"kind": "instructions", "constraints": list(constraints)}


def read_sample_rows(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def test_every_instruction_has_an_example_here():
    assert {SHORT[spec["name"]] for spec, _, _ in EXAMPLES} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == len(SHORT) == 25


@pytest.mark.parametrize(
    ("spec", "good", "bad"), EXAMPLES, ids=lambda value: value.get("name") if isinstance(value, dict) else ""
)
def test_an_instruction_by_hand(spec: dict[str, Any], good: str, bad: str):
    check = build_checker(instructions(spec), "check")
    assert check(good).score == 1
    assert check(bad).score == 0
    assert check(good).parts[0].asks == check.asks[0]
    assert check("").score == check(" \n").score == 0, "a blank answer follows nothing"


def test_what_is_asked_is_said_in_words():
    descriptions = {spec["name"]: build_checker(instructions(spec), "check").asks[0] for spec, _, _ in EXAMPLES}
    assert descriptions["number_sentences"] == "at least 2 sentences"
    assert descriptions["frequency"] == 'has "ha" at least 2 times'
    assert descriptions["existence"] == 'has "sun" and "c++"'
    assert descriptions["response_language"] == "is in Hindi throughout"


def test_the_published_checkers_say_the_same_of_the_prompts_of_ifeval():
    checks = {
        row["key"]: (build_checker(parse_ifeval_row(row), "row"), row["instruction_id_list"])
        for row in read_sample_rows("ifeval.jsonl.gz")
    }
    assert len(checks) == 541
    agreements = Counter[str]()
    verdicts = Counter[str]()
    verdict_counts = Counter[tuple[str, bool]]()
    for row in read_sample_rows("ifeval-verdicts.jsonl.gz"):
        check, names = checks[row["key"]]
        result = check(row["answer"])
        assert not result.error
        for name, part, strict, loose in zip(names, result.parts, row["strict"], row["loose"], strict=True):
            agreements[name] += (part.held == strict) + (part.loosely == loose)
            verdicts[name] += 2
            verdict_counts[name, strict] += 1
    assert set(verdicts) == set(INSTRUCTIONS)
    assert min(verdict_counts[name, verdict] for name in INSTRUCTIONS for verdict in (True, False)) >= 4
    shares = {name: agreements[name] / verdicts[name] for name in INSTRUCTIONS}
    assert {name: share for name, share in shares.items() if share < LIKE_PUBLISHED.get(name, 1)} == {}
    assert sum(agreements.values()) / sum(verdicts.values()) > 0.99


def test_prompt_1122_asks_for_a_sign_and_not_for_a_random_letter():
    row = next(row for row in read_sample_rows("ifeval.jsonl.gz") if row["key"] == 1122)
    check = build_checker(parse_ifeval_row(row), "row")
    assert '"#" at least 4 times' in " ".join(check.asks)
    answer = "# one\n# two\n# three\n# four " + " ".join(["word"] * 300) + "."
    held_by_description = {part.asks: part.held for part in check(answer).parts}
    assert all(check(answer) == check(answer) for _ in range(20))
    assert held_by_description['has "#" at least 4 times']


def test_the_loose_reading_forgives_a_first_line_a_last_line_and_asterisks():
    check = build_checker(instructions("quotation", "english_lowercase"), "check")
    result = check('Sure:\n"**the weather is fine today and we walk.**"\nBye')
    assert [part.held for part in result.parts] == [False, False]
    assert [part.loosely for part in result.parts] == [True, True]
    assert result.score == 0
    assert not check('"Sure"\nYES\n"Bye').parts[1].loosely


def test_accuracy_is_by_prompt_and_by_instruction():
    check = build_checker(instructions("no_comma", "title"), "check")
    accuracy = compute_accuracy([check("<<a>>"), check("<<a>> b, c"), check("a, b\n<<a>>"), check("")])
    assert accuracy[:4] == (1 / 4, 2 / 4, 4 / 8, 5 / 8)
    assert (accuracy.prompts, accuracy.instructions, accuracy.errors) == (4, 8, 0)
    with pytest.raises(ValueError, match="no answer"):
        compute_accuracy([])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two! Three? Four", 4),
        ("Mr. Smith of the U.S. Navy paid $3.50 e.g. to J. Doe.", 1),
        ('Wait... what? He said "No." Then he left.', 3),
        ("1. First thing\n2. Second thing", 3),
        ("今日は。明日は。", 2),
        ("मैं घर गया। वह आया।", 2),
        ("a\nb\nc", 1),
        ("He lives in the U.S. The end.", 2),
        ("What?! Yes.", 2),
        ("One . Two. Three", 3),
    ],
)
def test_sentences_by_hand(text: str, count: int):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("constraints", "field", "problem"),
    [
        ([], "check.constraints", "no list of constraints"),
        (["no_commas"], "check.constraints[0].name", "is no instruction"),
        ([{"name": ["no_comma"]}], "check.constraints[0].name", "is no instruction"),
        ([{"name": "number_bullet_lists", "num_bullets": float("inf")}], "check.constraints[0].num_bullets", "out of"),
        ([{"name": "number_bullet_lists", "num_bullets": float("nan")}], "check.constraints[0].num_bullets", "out of"),
        ([3], "check.constraints[0]", "neither a name nor a mapping"),
        ([{"name": "number_words", "relation": "at least"}], "check.constraints[0].num_words", "is needed"),
        ([{"name": "number_words", "relation": "over", "num_words": 3}], "check.constraints[0].relation", "none of"),
        (
            ["no_comma", {"name": "number_words", "relation": "at most", "num_words": "3"}],
            "check.constraints[1].num_words",
            "no number",
        ),
        ([{"name": "number_bullet_lists", "num_bullets": 2.5}], "check.constraints[0].num_bullets", "no whole number"),
        ([{"name": "number_bullet_lists", "num_bullets": -1}], "check.constraints[0].num_bullets", "out of bounds"),
        ([{"name": "title", "colour": "red"}], "check.constraints[0].colour", "is not a key"),
        ([{"name": "response_language", "language": "tlh"}], "check.constraints[0].language", "none of the choices"),
        (
            [{"name": "letter_frequency", "letter": "ab", "let_relation": "at least", "let_frequency": 1}],
            "check.constraints[0].letter",
            "not one character",
        ),
        ([{"name": "existence", "keywords": []}], "check.constraints[0].keywords", "is empty"),
        ([{"name": "end_checker", "end_phrase": " "}], "check.constraints[0].end_phrase", "is blank"),
        (
            [{"name": "nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}],
            "check.constraints[0].nth_paragraph",
            "is above the number of paragraphs, 2",
        ),
    ],
)
def test_a_wrong_constraint_is_named(constraints: list[Any], field: str, problem: str):
    with pytest.raises(InputError, match=problem) as caught:
        build_checker({"kind": "instructions", "constraints": constraints}, "check")
    assert caught.value.field == field


def test_a_row_of_the_hub_has_every_argument_and_none():
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None, "relation": None}]}
    assert build_checker(parse_ifeval_row(row), "row").asks == ("has no comma",)
    with pytest.raises(InputError, match="as many mappings as instructions"):
        parse_ifeval_row({**row, "kwargs": []})


TWICE = """
import socket, sys
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
from test_checker_following import EXAMPLES, build_checker, instructions, read_sample_rows
from align.reward.checkers.ifeval import parse_ifeval_row
checks = {row["key"]: build_checker(parse_ifeval_row(row), "row") for row in read_sample_rows("ifeval.jsonl.gz")}
for row in read_sample_rows("ifeval-verdicts.jsonl.gz"):
    print(checks[row["key"]](row["answer"]).parts)
"""


def test_verdicts_are_the_same_bits_twice_without_a_network():
    folder = str(Path(__file__).parent)
    outputs = [
        subprocess.run(
            [sys.executable, "-c", TWICE, folder],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"\n") == 2705
