"""Where an answer that calls tools stands in what a chat template writes.

A template writes calls in a form of its own: JSON between marks, a list, an object alone. What it writes for other
arguments differs from the text in the arguments and nowhere else, so that what both end with holds the end of the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from align.types import Conversation, json_text

Span = tuple[int, int]
"""Characters [start, end)."""


def span_of_calls(
    render: Callable[..., str], conversation: Conversation, i: int, text: str, behind_answer: str,
    specials: Sequence[str],
) -> Span | None:  # fmt: skip
    """Where the assistant wrote turn `i`, its text, its calls, and the token that ends it; None where nobody can tell.

    Args:
        render: a conversation as the template writes it; with `answer_due=True`, up to the header of an answer.
        text: this conversation as the template writes it.
        behind_answer: what the template writes behind an answer without calls.
        specials: the texts of the special tokens, longest first.
    """
    mark = next(mark for n in count() if (mark := f"\ue000calls {n}\ue001") not in text)
    turn = conversation.messages[i]
    *others, last = turn.tool_calls
    turn = replace(turn, tool_calls=(*others, replace(last, arguments=json_text({mark: mark}))))
    changed = replace(conversation, messages=(*conversation.messages[:i], turn, *conversation.messages[i + 1 :]))
    rest, alone = (render(one).rpartition(mark)[2] for one in (changed, changed.turns(i + 1)))
    closing = len(common_end(text, rest))
    rest, alone = rest[len(rest) - closing :], alone[len(rest) - closing :]
    closed = end_of_calls(common_beginning(rest, alone), behind_answer, specials)
    end = len(text) - closing + closed
    before = render(conversation.turns(i), answer_due=True) if i else ""
    if i and len(before) <= end and text.startswith(before):
        return len(before), end
    written = render(conversation.turns(i + 1))
    written = written[: len(written) - len(alone) + closed]  # up to the end of the turn
    if i and written.startswith(before) and text[:end].endswith(written[len(before) :]):
        return end - (len(written) - len(before)), end  # what is before it changes with what follows, but not the turn
    return None


def end_of_calls(closing: str, behind_answer: str, specials: Sequence[str]) -> int:
    """How many characters end a turn of calls: up to the special token that ends answers; else to the first one; else
    all, without blanks.

    Args:
        closing: what the template writes behind the arguments of the last call, whether or not turns follow.
    """
    behind = behind_answer.lstrip()
    ends = [special for special in specials if behind.startswith(special) and special in closing]
    found = [(closing.find(special), special) for special in ends or specials if special in closing]
    if not found:
        return len(closing.rstrip())
    at, special = min(found, key=lambda one: (one[0], -len(one[1])))
    return at + len(special)


def common_beginning(one: str, other: str) -> str:
    """The longest text that both begin with."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differs, min(len(one), len(other)))]


def common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    return common_beginning(one[::-1], other[::-1])[::-1]
