"""Exact answers up to differences that a check ignores, and regular expressions with a limit of time."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from align.core.errors import InputError
from align.reward.checkers import CheckResult, build_checker
from align.reward.checkers.exact import normalize_number


def check_exact(text: str, /, **spec: Any) -> CheckResult:
    return build_checker({"kind": "exact", **spec}, "check")(text)


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        ({"answer": "Paris"}, [" Paris\n"], ["paris", "Paris.", "in Paris", ""]),
        ({"answers": ["Paris", "Lutetia"]}, ["Paris", "Lutetia"], ["Rome"]),
        ({"answer": "Straße", "ignore": "case"}, ["STRASSE", "straße"], ["Strasse 1"]),
        ({"answer": "well known", "ignore": ["punctuation"]}, ["well-known!", "“well known”"], ["wellknown"]),
        ({"answer": "3.5", "ignore": ["punctuation"]}, ["(3.5)."], ["35", "3 5"]),
        ({"answer": "a b", "ignore": ["whitespace"]}, ["a\n b", "ab"], ["a, b"]),
        ({"answer": 1000, "ignore": ["number_format"]}, ["1,000", "1000.00", "+1e3"], ["1,0000", "100", "1000 kg"]),
        ({"answer": "a\nb", "read": "whole"}, ["a\nb"], ["a b"]),
        ({"answer": "yes", "read": "first_line"}, ["\nyes\nfor a reason"], ["well\nyes"]),
        ({"answer": "yes", "read": "last_line"}, ["a reason\nyes\n"], ["yes\nwell"]),
        (
            {"answer": "1000", "read": "last_number"},
            ["5 or 1,000", "$1,000.0.", "so 10 - 9000, or 1e3"],
            ["1000 or 5", "-1000", "none", "x1000y2"],
        ),
        ({"answer": "-3", "read": "last_number"}, ["it is -3", "−3.0", "x=-3"], ["5-3", "3"]),
        ({"answer": "5", "read": "last_number"}, ["so...5", "item a).5", "x.5"], [".5", "it is .5", "$.5", "-.5"]),
        ({"answer": 0.5, "read": "last_number"}, [".5", "(.50)", "+.5"], ["-.5", "so...5"]),
        ({"answer": "5", "ignore": ["punctuation"]}, ["...5", "5."], [".5", "-5"]),
        ({"answer": "4", "after": "####"}, ["#### 5 no, #### 4"], ["4", "#### 4 apples"]),
        ({"answer": "4", "after": "####", "read": "last_number"}, ["#### 4 apples"], ["4 #### none"]),
    ],
)
def test_right_and_wrong_answers(spec: dict[str, Any], right: list[str], wrong: list[str]):
    assert [answer for answer in right if check_exact(answer, **spec).score != 1] == []
    assert [answer for answer in wrong if check_exact(answer, **spec).score != 0] == []


def test_numbers_have_one_form():
    numbers = ["007", "-0", "1e-3", "0.10", "12,345,678.90", "999999999999999999999999999999.5"]
    assert [normalize_number(number) for number in numbers] == [
        "7",
        "0",
        "0.001",
        "0.1",
        "12345678.9",
        "999999999999999999999999999999.5",
    ]


def test_what_was_found_is_shown():
    assert check_exact("it is 7", answer="8", read="last_number").parts[0].found == "7"
    assert check_exact("nothing", answer="8", read="last_number").parts[0].found == "no number"
    assert check_exact("x", answer="8", after="A:").parts[0].found == 'no "A:"'
    shown_text = check_exact("\ud800" * 1000, answer="8").parts[0].found
    assert len(shown_text) <= 201
    shown_text.encode()
    asks = build_checker(
        {"kind": "exact", "answers": ["a", "b"], "ignore": ["case"], "read": "last_line"}, "check"
    ).asks
    assert asks == ('the last line is "a" or "b", whatever its case',)


@pytest.mark.parametrize(
    ("spec", "field", "problem"),
    [
        ({}, "check.answers", "either"),
        ({"answer": "a", "answers": ["a"]}, "check.answers", "either"),
        ({"answers": []}, "check.answers", "is empty"),
        ({"answer": True}, "check.answer[0]", "true or false"),
        ({"answer": None}, "check.answer[0]", "no text"),
        ({"answer": "a\udfff"}, "check.answer[0]", "half a character"),
        ({"answer": "a", "ignore": ["accents"]}, "check.ignore[0]", "cannot be ignored"),
        ({"answer": "a", "read": "middle"}, "check.read", "none of the choices"),
        ({"answer": "four", "read": "last_number"}, "check.answers[0]", "is no number"),
        ({"answer": "a", "strip": True}, "check.strip", "is not a key"),
        ({"answer": math.nan}, "check.answer[0]", "is no number"),
        ({"answers": ["a", "…"], "ignore": ["punctuation"]}, "check.ignore", "an empty answer would pass"),
    ],
)
def test_a_wrong_check_is_named(spec: dict[str, Any], field: str, problem: str):
    with pytest.raises(InputError, match=problem) as caught:
        check_exact("", **spec)
    assert caught.value.field == field


def check_pattern(answer: str, pattern: str, **spec: Any) -> CheckResult:
    return build_checker({"kind": "regex", "pattern": pattern, **spec}, "check")(answer)


def test_patterns():
    assert check_pattern("it is 42.", r"\d+").score == 1
    assert check_pattern("it is 42.", r"\d+", whole=True).score == 0
    assert check_pattern("it is 42.", r"\d+", absent=True).score == 0
    assert check_pattern("it is", r"\d+", absent=True).score == 1
    assert check_pattern("#### 42", r"####\s*(?P<n>\d+)", group="n", equals=["41", 42]).score == 1
    assert check_pattern("#### 43", r"####\s*(\d+)", group=1, equals="42").parts[0].found == "43"
    assert check_pattern("none", r"####\s*(\d+)", group=1, equals="42").parts[0].found == "no match"
    assert check_pattern("b", r"(a)?b", group=1, equals="a").score == 0
    asks = build_checker({"kind": "regex", "pattern": "a(b)", "group": 1, "equals": "b"}, "check").asks
    assert asks == ('the answer matches /a(b)/, with "b" as group 1',)


@pytest.mark.parametrize(
    ("spec", "field", "problem"),
    [
        ({"pattern": "("}, "check.pattern", "no regular expression"),
        ({"pattern": "a", "group": 1, "equals": "a"}, "check.group", "no group of the pattern"),
        ({"pattern": "(a)", "group": 1}, "check.group", "`equals` is missing"),
        ({"pattern": "a", "absent": True, "equals": "a"}, "check.absent", "contradicts"),
        ({"pattern": "a", "whole": 1}, "check.whole", "neither true nor false"),
        ({}, "check.pattern", "is needed"),
    ],
)
def test_a_wrong_pattern_is_named(spec: dict[str, Any], field: str, problem: str):
    with pytest.raises(InputError, match=problem) as caught:
        build_checker({"kind": "regex", **spec}, "check")
    assert caught.value.field == field


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*?,){25}P", r"^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_runaway_pattern_is_an_outcome(pattern: str):
    start = time.process_time()
    result = check_pattern("a" * 5000 + "," * 400 + "!", pattern)
    assert time.process_time() - start < 1
    assert result.score == 0
    assert "took more than 0.25 s" in result.error or not result.parts[0].held
    assert "TimeoutError" in check_pattern("a" * 5000 + "!", r"(a|aa)+$").error


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 1),
        ("<answer>7</answer>", 1),
        ("I add.\n<answer> 7 </answer> Done.", 1),
        ("<answer>8</answer><answer>7</answer>", 1),
        ("<answer>7</answer><answer>8</answer>", 0),
        ("<answer>7", 0),
        ("<answer>7</answer><answer>8", 1),
        ("<answer>8</answer><answer>7", 0),
        ("7</answer>", 0),
        ("<answer>7 or 8</answer>", 0),
        ("<answer></answer>7", 0),
    ],
)
def test_the_last_answer_tag_is_read(answer: str, score: int) -> None:
    assert check_exact(answer, answer="7", read="answer_tag").score == score
