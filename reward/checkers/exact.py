"""The check `exact`: the answer, or a part of it, equals one of the right answers."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from align.core.errors import require
from align.core.spec import get_choice, get_text, get_texts, join_quoted, require_keys
from align.reward.checkers.checked import Checker, Part, make_part

KIND = "exact"
READS = {
    "whole": "the answer",
    "first_line": "the first line",
    "last_line": "the last line",
    "last_number": "the last number",
    "answer_tag": "the text in the last <answer>…</answer>",
}
TAG_START, TAG_END = "<answer>", "</answer>"
IGNORES = ("case", "punctuation", "whitespace", "number_format")
NUMBER = re.compile(
    r"((?:(?<![\w.)])[-+−])?(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<![\w.)])\.\d++)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?)"
)
"""A number as people and programs write it: 1,000, -3.50, .5, 6.02e23. A sign after a letter or a digit is a dash, and
a point after a letter or a point ends a sentence."""
NUMBER_PUNCTUATION = re.compile(r"((?<=\d)[.,](?=\d)|(?<![\w.)])\.(?=\d)|-(?=\d))")
"""Punctuation that is part of a number. This and `NUMBER` are groups, so that `split` keeps what they match."""


def build(spec: Any, field: str) -> Checker:
    """Build the checker that tests whether an answer, or a part such as its last line, equals a right answer.

    The check is `{kind: exact, answers: [Paris, "Paris, France"], ignore: [case], read: last_line, after: "Answer:"}`.

    Raises:
        InputError: a key is wrong.
    """
    settings = require_keys(spec, field, ("kind",), ("answer", "answers", "ignore", "read", "after"))
    require(
        ("answer" in settings) != ("answers" in settings),
        f"{field}.answers",
        settings.get("answers", "(missing)"),
        "either `answer` or `answers` is needed",
        "Write answers: [first, second], each of which is right.",
    )
    answers = get_texts(settings, field, "answers" if "answers" in settings else "answer")
    selection = get_choice(settings, field, "read", tuple(READS), "whole")
    after = get_text(settings, field, "after")
    ignored = parse_ignored(settings, field)
    if selection == "last_number":
        for i, answer in enumerate(answers):
            is_number = NUMBER.fullmatch(answer.strip()) is not None
            require(is_number, f"{field}.answers[{i}]", answer, "is no number", "Write a number, or another `read`.")
        ignored |= {"number_format"}
    right_answers = {normalize_text(answer, ignored) for answer in answers}
    problem = "removes everything from a right answer, so an empty answer would pass"
    require("" not in right_answers, f"{field}.ignore", sorted(ignored), problem, "Ignore less.")
    where = READS[selection] + (f' behind the last "{after}"' if after else "")
    ignored_names = ", ".join(name.replace("_", " ") for name in IGNORES if name in ignored)
    asks = f"{where} is {join_quoted(answers)}" + (f", whatever its {ignored_names}" if ignored_names else "")

    def check_answer(answer: str) -> list[Part]:
        compared = select_compared_text(answer, selection, after)
        if compared is None:
            return [make_part(asks, False, f'no "{after}"' if after and after not in answer else "no number")]
        normalised = normalize_text(compared, ignored)
        is_right = normalised in right_answers
        return [make_part(asks, is_right, "" if is_right else compared, compared=normalised)]

    return Checker(KIND, (asks,), check_answer)


def parse_ignored(spec: Mapping[str, Any], field: str) -> set[str]:
    names = get_texts(spec, field, "ignore")
    for i, name in enumerate(names):
        require(name in IGNORES, f"{field}.ignore[{i}]", name, "cannot be ignored", f"Choose of {', '.join(IGNORES)}.")
    return set(names)


def select_compared_text(answer: str, selection: str, after: str) -> str | None:
    """Return the part of an answer that is compared with the expected texts, or None if it has no such part.

    Args:
        selection: of `READS`. Without a pair of tags, `answer_tag` selects the whole answer.
        after: a text after whose last occurrence the part begins; may be empty.
    """
    if after:
        _, mark, answer = answer.rpartition(after)
        if not mark:
            return None
    if selection == "last_number":
        numbers = deque(NUMBER.finditer(answer), maxlen=1)
        return numbers[0][0] if numbers else None
    if selection == "answer_tag":
        end = answer.rfind(TAG_END)
        start = answer.rfind(TAG_START, 0, max(end, 0))
        return answer if start < 0 else answer[start + len(TAG_START) : end]
    if selection == "whole":
        return answer
    lines = answer.strip().split("\n")
    return lines[0 if selection == "first_line" else -1]


def normalize_text(text: str, ignored: set[str]) -> str:
    """Return a text without the differences that a comparison ignores, such as case or punctuation, and stripped.

    Args:
        ignored: of `IGNORES`.
    """
    if "number_format" in ignored:
        parts = NUMBER.split(text)
        parts[1::2] = [normalize_number(number) for number in parts[1::2]]
        text = "".join(parts)
    if "case" in ignored:
        text = text.casefold()
    if "punctuation" in ignored:
        space_of = {ord(character): " " for character in set(text) if unicodedata.category(character)[0] == "P"}
        parts = NUMBER_PUNCTUATION.split(text)
        parts[::2] = [part.translate(space_of) for part in parts[::2]]
        text = " ".join("".join(parts).split())
    if "whitespace" in ignored:
        text = "".join(text.split())
    return text.strip()


def normalize_number(number: str) -> str:
    """Return the canonical form of a number: `1,000.0`, `+1000` and `1e3` become `1000`."""
    if number.isascii() and number.isdigit() and number[0] != "0":
        return number
    value = Decimal(number.replace(",", "").replace("−", "-"))
    if not value:
        return "0"
    digits = f"{value:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
