"""The answer has, or has not, what a regular expression describes."""

from __future__ import annotations

from typing import Any

import regex

from align.core.errors import InputError, require
from align.core.spec import check_keys, get_flag, get_text, get_texts, join_quoted
from align.reward.checkers.checked import LIMIT_S, Checker, Part, part

KIND = "regex"


def build(spec: Any, field: str) -> Checker:
    r"""`{kind: regex, pattern: "####\s*(\d+)", group: 1, equals: "42", whole: false, absent: false}`.

    Raises:
        InputError: names the key; the pattern is none, or has no such group.
    """
    given = check_keys(spec, field, ("kind", "pattern"), ("group", "equals", "whole", "absent"))
    written = get_text(given, field, "pattern")
    try:
        pattern = regex.compile(written)
    except regex.error as error:
        raise InputError(f"{field}.pattern", written, f"is no regular expression ({error})", "Correct it.") from error
    equals, whole, absent = (
        get_texts(given, field, "equals"),
        get_flag(given, field, "whole", False),
        get_flag(given, field, "absent", False),
    )
    group = given.get("group", 0)
    names = [*range(pattern.groups + 1), *pattern.groupindex]
    require(
        not isinstance(group, bool) and group in names, f"{field}.group", group, "is no group of the pattern",
        f"The groups are {', '.join(map(str, names))}; 0 is the whole match.",
    )  # fmt: skip
    require(
        "group" not in given or bool(equals), f"{field}.group", group, "`equals` is missing", "Say what it must equal."
    )
    require(not (absent and equals), f"{field}.absent", absent, "contradicts `equals`", "Leave one of them out.")
    matched = f"the {'whole answer' if whole else 'answer'} {'does not match' if absent else 'matches'} /{written}/"
    asks = matched + (f", with {join_quoted(equals)} as {f'group {group}' if group else 'the match'}" if equals else "")

    def rule(answer: str) -> list[Part]:
        find = pattern.fullmatch if whole else pattern.search
        try:
            found = find(answer, timeout=LIMIT_S)
        except TimeoutError:
            raise TimeoutError(f"the pattern took more than {LIMIT_S} s on this answer") from None
        if not equals:
            return [part(asks, (found is None) == absent, "no match" if not found else found[0] if absent else "")]
        got = found[group] if found else None
        return [part(asks, got in equals, "no match" if got is None else "" if got in equals else got)]

    return Checker(KIND, (asks,), rule)
