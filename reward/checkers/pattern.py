"""The check `regex`: the answer matches, or does not match, a regular expression."""

from __future__ import annotations

from typing import Any

import regex

from align.core.errors import InputError, require
from align.core.spec import get_flag, get_text, get_texts, join_quoted, require_keys
from align.reward.checkers.checked import LIMIT_S, Checker, Part, make_part

KIND = "regex"


def build(spec: Any, field: str) -> Checker:
    r"""Build the checker that tests whether an answer matches a regular expression, or with `absent` does not.

    The check is `{kind: regex, pattern: "####\s*(\d+)", group: 1, equals: "42", whole: false, absent: false}`.

    Raises:
        InputError: a key is wrong, the pattern is invalid, or it has no such group.
    """
    settings = require_keys(spec, field, ("kind", "pattern"), ("group", "equals", "whole", "absent"))
    expression = get_text(settings, field, "pattern")
    try:
        pattern = regex.compile(expression)
    except regex.error as error:
        raise InputError(
            f"{field}.pattern", expression, f"is no regular expression ({error})", "Correct it."
        ) from error
    equals = get_texts(settings, field, "equals")
    must_match_whole = get_flag(settings, field, "whole", False)
    absent = get_flag(settings, field, "absent", False)
    group = settings.get("group", 0)
    names = [*range(pattern.groups + 1), *pattern.groupindex]
    is_group = not isinstance(group, bool) and group in names
    remedy = f"The groups are {', '.join(map(str, names))}; 0 is the whole match."
    require(is_group, f"{field}.group", group, "is no group of the pattern", remedy)
    is_compared = "group" not in settings or bool(equals)
    require(is_compared, f"{field}.group", group, "`equals` is missing", "Write the texts that it must equal.")
    require(not (absent and equals), f"{field}.absent", absent, "contradicts `equals`", "Leave one of them out.")
    scope = "whole answer" if must_match_whole else "answer"
    matched = f"the {scope} {'does not match' if absent else 'matches'} /{expression}/"
    asks = matched + (f", with {join_quoted(equals)} as {f'group {group}' if group else 'the match'}" if equals else "")

    def check_answer(answer: str) -> list[Part]:
        find = pattern.fullmatch if must_match_whole else pattern.search
        try:
            match = find(answer, timeout=LIMIT_S)
        except TimeoutError:
            raise TimeoutError(f"the pattern took more than {LIMIT_S} s on this answer") from None
        if not equals:
            if match is None:
                return [make_part(asks, absent, "no match")]
            return [make_part(asks, not absent, match[0] if absent else "")]
        captured = match[group] if match else None
        if captured is None:
            return [make_part(asks, False, "no match")]
        is_equal = captured in equals
        return [make_part(asks, is_equal, "" if is_equal else captured)]

    return Checker(KIND, (asks,), check_answer)
