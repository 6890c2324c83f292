"""How a language model that judges is asked, and how its words are read, whatever it judges. Imports no torch.

What it judges is untrusted text: it stands between marks with a code that follows from all of it, so that no text can
hold its own code. The last line of what the model says is its choice, one of a few words in double brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import NamedTuple

from align.data.reasoning import answer_alone
from align.evals.endpoint import Endpoint, Failure, answers_from, lost
from align.rollout.kept import Answer, AnswerStore, Question
from align.types import Conversation, Message

PLACE = re.compile(r"\{([a-zA-Z_]\w*)\}")
"""A place in a template, such as `{conversation}`."""
LIKELIEST = 5
"""Tokens in place of the chosen word that the server is asked to show."""
IN_A_ROW = 8
"""Requests without an answer, one behind another and for one reason, after which a run ends."""
ROUNDED = 1e-3
"""What a logprob may be above 0 by rounding."""
LOUD = 0.5
"""The share of errors among what a judge was asked beyond which it says nothing."""


# What it is asked


class Framed(NamedTuple):
    """A conversation and answers to it, each between its marks."""

    conversation: str
    answers: Sequence[str]


def framed(prompt: Conversation, answers: Mapping[str, str]) -> Framed:
    """
    Args:
        answers: what the marks call each → its text.
    """
    said = [m.as_dict() for m in prompt.messages], prompt.tool_dicts(), *answers.values()
    code = sha256(json.dumps(said).encode()).hexdigest()[:16]
    tools = [f"<<<tools {code}>>>\n{json.dumps(prompt.tool_dicts(), ensure_ascii=False)}"] if prompt.tools else []
    turns = [f"<<<{message.role} {code}>>>\n{written(message)}" for message in prompt.messages]
    marked = [f"<<<{what} {code}>>>\n{text}\n<<<end of {what} {code}>>>" for what, text in answers.items()]
    return Framed("\n".join([*tools, *turns, f"<<<end of conversation {code}>>>"]), marked)


def written(message: Message) -> str:
    """A message's text, with the tools that it calls."""
    return "\n".join([message.content, *(f"calls {call.name}({call.arguments})" for call in message.tool_calls)])


def filled_in(template: str, places: Mapping[str, str]) -> str:
    """A template with its places filled, in one go: an answer may hold a place's name."""
    return PLACE.sub(lambda found: places[found[1]], template)


def question(endpoint: Endpoint, text: str, temperature: float, max_tokens: int) -> Question:
    """A request for reasons and a choice, with the likeliest tokens at the choice."""
    drawn = {"temperature": temperature, "max_tokens": max_tokens}
    return endpoint.question([{"role": "user", "content": text}], **drawn, logprobs=True, top_logprobs=LIKELIEST)


@dataclass
class JudgeUsage:
    """What the answers of a judge behind an endpoint took, as its server counts tokens.

    Attributes:
        asked: questions that this run asked; the others were answered in earlier runs.
        uncounted: answers of this run whose tokens the server did not count.
    """

    asked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0


COLLECTED: ContextVar[JudgeUsage | None] = ContextVar("COLLECTED", default=None)


@contextmanager
def collect_judge_usage() -> Iterator[JudgeUsage]:
    """Sum up what judges behind endpoints are asked within the block."""
    usage = JudgeUsage()
    token = COLLECTED.set(usage)
    try:
        yield usage
    finally:
        COLLECTED.reset(token)


def count_usage(answer: Answer | Failure) -> None:
    """Add an answer to the sums of the active `collect_judge_usage` block."""
    if (usage := COLLECTED.get()) is None:
        return
    usage.asked += 1
    if isinstance(answer, Answer):
        usage.prompt_tokens += answer.usage[0]
        usage.completion_tokens += answer.usage[1]
        usage.uncounted += not any(answer.usage)


def said_by(
    endpoint: Endpoint, questions: Sequence[Question], store: AnswerStore, label: str, words: Sequence[str]
) -> list[Answer | Failure]:
    """What a judge says to each question. What it chose before is not asked again; an answer without a choice is not
    kept, so that it does not come back for ever.

    Args:
        label: of the progress that is shown.
        words: that it may choose.

    Raises:
        InputError: the server gives no answers.
        CorruptFile, StorageError: the store cannot be used.
    """
    keeps = partial(chooses, words=words)
    said, _ = answers_from(endpoint, questions, store, label, patience(endpoint), keeps)
    failures = [found for found in said.values() if isinstance(found, Failure)]
    if failures and len(failures) == len(said) and failures[0].kind != "unreadable":
        raise lost(endpoint, failures[0])
    return [said[question.id] for question in questions]


def patience(endpoint: Endpoint) -> Callable[[Answer | Failure], None]:
    """What watches a judge's answers, and ends the asking after so many failures of one kind in a row."""
    row: list[str] = []

    def watch(found: Answer | Failure) -> None:
        count_usage(found)
        kind = found.kind if isinstance(found, Failure) else ""
        row[:] = [*row, kind] if kind and {*row} <= {kind} else [kind] * bool(kind)
        if isinstance(found, Failure) and kind != "unreadable" and len(row) >= IN_A_ROW:
            raise lost(endpoint, found)

    return watch


# What it says


def choice_in(said: Answer | Failure, words: Sequence[str]) -> tuple[str, float | None]:
    """The word that it chooses, and its probability of the first word beside the second.

    Args:
        words: that it may choose.

    Raises:
        ValueError: it chooses none, or gives a logprob that is none.
    """
    if isinstance(said, Failure):
        raise ValueError(f"the judge {said.said}")
    word = word_of(said, words)
    return word, first_likelier(said, word, words[0], words[1])


def chooses(said: Answer, words: Sequence[str]) -> bool:
    """Whether an answer has a choice, see `choice_in`."""
    try:
        choice_in(said, words)
    except ValueError:
        return False
    return True


def word_of(said: Answer, words: Sequence[str]) -> str:
    """The choice at the end of the last line. Raises: ValueError: there is none, or several differ."""
    choice = rf"\[\[({'|'.join(words)})\]\]"
    lines = answer_alone(said.text).strip().splitlines()
    found = {*re.findall(choice, lines[-1])} if lines else set()
    if len(found) > 1:
        raise ValueError(f"the judge gives {len(found)} verdicts")
    if not found or not re.search(rf"{choice}[\s.*_`]*$", lines[-1]):
        raise ValueError("the judge's answer was cut" if not said.ended else "the judge gives no verdict")
    return found.pop()


def first_likelier(said: Answer, word: str, one: str, other: str) -> float | None:
    """P(one) / (P(one) + P(other)) at the token in which the chosen word begins; None where the server does not show
    both or one of them. A token stands for a word that it holds, or begins.

    A word that is not shown has at most what the least likely of the shown has, and at most what they leave: it counts
    with the smaller of the two.

    Raises:
        ValueError: a logprob is no logarithm of a probability.
    """
    place = "".join(token.text for token in said.last).rfind(f"[[{word}]]") + len("[[")
    for token in said.last if place >= len("[[") else ():
        if place < len(token.text):
            break
        place -= len(token.text)
    else:
        return None
    if any(math.isnan(value) or value > ROUNDED for value in token.likely.values()):
        raise ValueError("the judge gives a logprob that is none")
    shown = {text: math.exp(min(0.0, value)) for text, value in token.likely.items()}
    least = min([*shown.values(), max(0.0, 1 - sum(shown.values()))]) if len(shown) > 1 else 1 - sum(shown.values())
    before = token.text[:place]
    a, b = ([p for text, p in shown.items() if stands_for(text, before, each)] for each in (one, other))
    if not a and not b:
        return None
    first, second = (sum(each) if each else least for each in (a, b))
    return first / (first + second) if first + second else None


def stands_for(token: str, before: str, word: str) -> bool:
    """Whether a token behind `before` begins a word that is chosen, or holds it."""
    begins = token.removeprefix(before)
    right = f"{word}]]"
    return token.startswith(before) and begins != "" and (right.startswith(begins) or begins.startswith(right))


def errors_in_words(errors: Sequence[str], asked: str, count_as: str, loudly: str) -> list[str]:
    """What is to be said of a judge's errors; nothing where there are none.

    Args:
        errors: of each thing that it was asked why there is no verdict; empty where there is one.
        asked: what it was asked for and by whom, such as `verdicts by m`.
        count_as: what an error counts as.
        loudly: what is said where errors are most of it.
    """
    found = Counter(error for error in errors if error)
    if not found:
        return []
    why, share = found.most_common(1)[0][0], found.total() / len(errors)
    loud = f"; with so many, {loudly}" if share > LOUD else ""
    return [
        f"{found.total():,} of {len(errors):,} {asked} are errors and count as {count_as} (most often: {why}){loud}"
    ]
