"""The answer is one of several right ones, up to what the check ignores."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from align.core.errors import require
from align.core.spec import check_keys, get_choice, get_text, get_texts, join_quoted
from align.reward.checkers.checked import Checker, Part, part

KIND = "exact"
READS = {
    "whole": "the answer",
    "first_line": "the first line",
    "last_line": "the last line",
    "last_number": "the last number",
}
IGNORES = ("case", "punctuation", "whitespace", "number_format")
NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+−])?(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<![\w.)])\.\d++)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)
"""A number as people and programs write it: 1,000, -3.50, .5, 6.02e23. A sign behind a letter or a digit is a dash, and
a point behind a letter or a point ends a sentence."""
WITHIN = re.compile(r"(?<=\d)[.,](?=\d)|(?<![\w.)])\.(?=\d)|-(?=\d)")
"""Punctuation that is part of a number."""


def build(spec: Any, field: str) -> Checker:
    """`{kind: exact, answers: [Paris, "Paris, France"], ignore: [case], read: last_line, after: "Answer:"}`.

    Raises:
        InputError: names the key.
    """
    given = check_keys(spec, field, ("kind",), ("answer", "answers", "ignore", "read", "after"))
    require(
        ("answer" in given) != ("answers" in given), f"{field}.answers", given.get("answers", "(missing)"),
        "either `answer` or `answers` is needed", "Write answers: [first, second], each of which is right.",
    )  # fmt: skip
    answers = get_texts(given, field, "answers" if "answers" in given else "answer")
    read, after = get_choice(given, field, "read", tuple(READS), "whole"), get_text(given, field, "after")
    ignored = ignores(given, field)
    if read == "last_number":
        for i, each in enumerate(answers):
            numeric = NUMBER.fullmatch(each.strip()) is not None
            require(numeric, f"{field}.answers[{i}]", each, "is no number", "Write a number, or another `read`.")
        ignored |= {"number_format"}
    wanted = {normal(each, ignored) for each in answers}
    require(
        "" not in wanted, f"{field}.ignore", sorted(ignored), "leaves nothing of an answer: an empty one is right",
        "Ignore less.",
    )  # fmt: skip
    where = READS[read] + (f' behind the last "{after}"' if after else "")
    shown = ", ".join(name.replace("_", " ") for name in IGNORES if name in ignored)
    asks = f"{where} is {join_quoted(answers)}" + (f", whatever its {shown}" if shown else "")

    def rule(answer: str) -> list[Part]:
        found = taken(answer, read, after)
        held = found is not None and normal(found, ignored) in wanted
        missing = f'no "{after}"' if after and after not in answer else "no number"
        return [part(asks, held, missing if found is None else "" if held else found)]

    return Checker(KIND, (asks,), rule)


def ignores(spec: Mapping[str, Any], field: str) -> set[str]:
    given = get_texts(spec, field, "ignore")
    for i, each in enumerate(given):
        require(each in IGNORES, f"{field}.ignore[{i}]", each, "cannot be ignored", f"Choose of {', '.join(IGNORES)}.")
    return set(given)


def taken(answer: str, read: str, after: str) -> str | None:
    """The part of an answer that is compared; None where it is not there."""
    if after:
        _, mark, answer = answer.rpartition(after)
        if not mark:
            return None
    if read == "last_number":
        numbers = deque(NUMBER.finditer(answer), maxlen=1)
        return numbers[0][0] if numbers else None
    if read == "whole":
        return answer
    lines = answer.strip().split("\n")
    return lines[0 if read == "first_line" else -1]


def normal(found: str, ignored: set[str]) -> str:
    """A text without what is ignored. Blanks around it never count."""
    if "number_format" in ignored:
        found = NUMBER.sub(lambda number: plain(number[0]), found)
    if "case" in ignored:
        found = found.casefold()
    if "punctuation" in ignored:
        kept = {place.start() for place in WITHIN.finditer(found)}
        found = "".join(" " if i not in kept and unicodedata.category(c)[0] == "P" else c for i, c in enumerate(found))
        found = " ".join(found.split())
    if "whitespace" in ignored:
        found = "".join(found.split())
    return found.strip()


def plain(number: str) -> str:
    """One way to write a number: `1,000.0`, `+1000` and `1e3` are `1000`."""
    if number.isascii() and number.isdigit() and number[0] != "0":
        return number
    value = Decimal(number.replace(",", "").replace("−", "-"))
    if not value:
        return "0"
    written = f"{value:f}"
    return written.rstrip("0").rstrip(".") if "." in written else written
