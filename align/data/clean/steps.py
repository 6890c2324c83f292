"""The list of cleaning steps of a data set, as the setting names them; and the steps that look at turns: those that say
nothing, their order, and a function of the user's.

[unicode, control, {language: {keep: [en, de]}}, {length: {least: 3, by: words}}, {fn: package.module:fn}]
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.core.errors import InputError, find_lone_surrogate, require
from align.core.functions import explain_user_errors, load_function
from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.chat.reasoning import OPEN, answer_alone
from align.data.clean.characters import SEEN, Control, Unicode
from align.data.clean.language import Language
from align.data.clean.outcome import Drop, Step, check_choice, said, sequences, suggest
from align.data.clean.pii import Pii
from align.data.clean.quality import Boilerplate, CountTokens, Length, Repetition
from align.data.read.content import MESSAGE_ATTRIBUTES, to_content_row
from align.data.read.messages import check_calls, format_value, parse_messages

BEHIND: Mapping[str, tuple[str, ...]] = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role → the roles that it may follow; the empty name is the beginning."""
SHAPE = "Return the row, None to leave it out, or a text that says why it is left out."
REASON = 60
"""Characters of a function's reason that are counted by."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Leaves out records with turns that say nothing. If these are the last, they are cut off, with the question that
    they leave unanswered, and the rest is kept.

    Answers that are not trained on may say nothing, as may a system turn, and the answers of pairs and of feedback:
    models give such answers, and people judge them.
    """

    def __call__(self, record: Record) -> Record | Drop:
        if isinstance(record, str):
            return record if SEEN.search(record) else Drop("empty", "the text says nothing")
        turns = record.prompt if isinstance(record, Preference | Feedback) else record.messages
        silent = next((i for i, turn in enumerate(turns) if not speaks(turn)), None)
        if silent is None:
            return record
        kept = without_silent_end(turns)
        if not isinstance(record, Conversation) or len(kept) > silent:
            return Drop("empty turn", f"the {turns[silent].role}'s turn {silent} says nothing")
        if all(turn.role == "system" for turn in kept):
            return Drop("empty", "no question is answered")
        return replace(record, messages=kept)


def without_silent_end(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns up to the last that speaks; if an answer is cut off, up to the answer before it."""
    kept = turns
    while kept and not speaks(kept[-1]):
        kept = kept[:-1]
    if any(turn.role == "assistant" for turn in turns[len(kept) :]):
        while kept and kept[-1].role != "assistant":
            kept = kept[:-1]
    return kept


def speaks(turn: Message) -> bool:
    """Return whether a turn says something, or need not: a tool may return nothing, and a call says what to do."""
    if turn.role in ("system", "tool") or turn.tool_calls or not turn.trained:
        return True
    text = turn.content
    if text[:1].isascii() and text[:1].isalnum():  # nearly all of them
        return True
    if turn.role == "assistant" and OPEN in text:
        text = answer_alone(text)
    return SEEN.search(text) is not None


@dataclass(frozen=True, slots=True)
class Roles:
    """Leaves out conversations whose turns come in another order than chat templates know: a system turn first or
    nowhere, then the user and the assistant in turn, with results of tools behind what the assistant calls.

    Args:
        ends: `assistant` if the last turn has to be an answer, `any` if questions without an answer are wanted too.
    """

    ends: str = "assistant"

    def __post_init__(self) -> None:
        check_choice("ends", self.ends, ("assistant", "any"))

    def __call__(self, record: Record) -> Record | Drop:
        for document in sequences(record):
            if isinstance(document, str):
                return record
            before = ""
            for i, turn in enumerate(document.messages):
                if before not in BEHIND[turn.role]:
                    behind = f"follows the {before}'s" if before else "is the first"
                    return Drop("role order", f"turn {i}, the {turn.role}'s, {behind}")
                before = turn.role
            if before != "assistant" and self.ends == "assistant":
                return Drop("no answer", f"the last turn is the {before}'s; {{roles: {{ends: any}}}} keeps such")
        return record


@dataclass(frozen=True, slots=True)
class Function:
    """Calls a function with a row: `{"messages": [{"role": …, "content": …}, …]}`, `{"text": …}`, or a pair's `prompt`,
    `chosen` and `rejected`. It returns the row, changed or as it is; None to leave the row out; or a text, which leaves
    it out and is the reason that is counted.

    Args:
        function: importable by its name, so that workers in other processes find it.
        name: `package.module:name`.
        field: where the user named it.
    """

    function: Callable[[dict[str, Any]], Any]
    name: str
    field: str = "fn"

    def __call__(self, record: Record) -> Record | Drop:
        """Raises:
        InputError: the function raises, or returns something else; names the row.
        """
        row = to_content_row(record)
        id = "" if isinstance(record, str) else record.id
        where = id or format_value(record if isinstance(record, str) else str(row))
        with explain_user_errors(self.field, self.name, f"raised {{error}} for {where}", "Correct the function."):
            given = self.function(to_content_row(record))
        if given is None:
            return Drop("fn", self.name)
        if isinstance(given, str):
            return Drop(f"fn: {given.strip()[:REASON] or self.name}", self.name)
        parts = ("text",) if isinstance(record, str) else MESSAGE_ATTRIBUTES[type(record)]
        if not isinstance(given, Mapping):
            raise self._returned(f"{type(given).__name__} for {where}")
        if missing := [part for part in parts if part not in given]:
            raise self._returned(f"a row without {missing[0]} for {where}")
        changed = {name for name in given.keys() | row.keys() if given.get(name) != row.get(name)}
        if other := sorted(changed - {*parts}):
            raise self._returned(f"a row with another {other[0]} for {where}", f"Change {' or '.join(parts)} alone.")
        try:
            if isinstance(record, str):
                made = given["text"]
            else:
                made = replace(
                    record, **{part: parse_messages(given[part], f"{self.field}, {part}") for part in sorted(changed)}
                )
                for document in sequences(made):
                    turns = enumerate(document.messages) if isinstance(document, Conversation) else ()
                    check_calls([(f"{self.field}, turn {i}", turn) for i, turn in turns], made.tools)
            if not isinstance(made, Record) or find_lone_surrogate(said(made)):
                raise ValueError("what is no text, or half a character")
        except ValueError as error:
            raise self._returned(f"a row that cannot be read for {where} ({error})") from error
        return record if made == record else made

    def _returned(self, what: str, remedy: str = SHAPE) -> InputError:
        return InputError(self.field, self.name, f"returned {what}", remedy)


STEPS: Mapping[str, Callable[..., Step]] = {
    "unicode": Unicode,
    "control": Control,
    "empty": Empty,
    "roles": Roles,
    "language": Language,
    "length": Length,
    "repetition": Repetition,
    "boilerplate": Boilerplate.of,
    "pii": Pii,
}
"""Name → what makes the step of its arguments. `fn` beside them is a function of the user's."""
FN = "fn"
COUNT_TOKENS = "count_tokens"
"""What a step is handed by the stage, and no user writes."""


def steps_of(
    given: Sequence[Any], field: str = "stage.clean", count_tokens: CountTokens | None = None
) -> list[tuple[str, Step]]:
    """Return the steps that a setting names, in its order, each with its name.

    Args:
        given: names, and mappings of one name to its arguments.
        field: where the user wrote them, for errors.
        count_tokens: what `length` by tokens counts with; None if there is no model.

    Raises:
        InputError: a step or an argument that there is not, or a value that cannot be.
    """
    require(isinstance(given, list | tuple), field, given, "is no list of steps", "Write [unicode, control].")
    return [step_of(entry, f"{field}[{i}]", count_tokens) for i, entry in enumerate(given)]


def step_of(given: Any, field: str, count_tokens: CountTokens | None) -> tuple[str, Step]:
    """Return one of the steps of a setting, see `steps_of`."""
    entry = given if isinstance(given, Mapping) else {given: {}} if isinstance(given, str) else {}
    remedy = "Write its name, or its name and its arguments: {length: {least: 3, by: words}}."
    require(len(entry) == 1, field, given, "is no step", remedy)
    ((name, arguments),) = entry.items()
    if name == FN:
        field = f"{field}.{FN}"
        is_name = isinstance(arguments, str) and re.fullmatch("[^:]+:[^:]+", arguments)
        require(bool(is_name), field, arguments, "names no function", "Write {fn: package.module:name}.")
        return FN, Function(load_function(str(arguments), field), str(arguments), field)
    problem = "is no step of a list: rows are scored when all sources are cleaned"
    require(name != "score", field, name, problem, "Write stage.score.by=loss or stage.score.by=reward.")
    known = [*STEPS, FN]
    remedy = f"{suggest(name, known)} The steps: {', '.join(known)}."
    require(name in STEPS, field, name, "is no cleaning step", remedy)
    return name, make_step(STEPS[name], {} if arguments is None else arguments, f"{field}.{name}", count_tokens)


def make_step(maker: Callable[..., Step], arguments: Any, field: str, count_tokens: CountTokens | None) -> Step:
    """Return a step with its arguments, whose errors name the place of the step."""
    known = list(inspect.signature(maker).parameters)
    passed = {COUNT_TOKENS: count_tokens} if COUNT_TOKENS in known else {}
    names = [name for name in known if name not in passed]
    example = f"Write its arguments by name: {', '.join(names)}." if names else "It has no arguments: write its name."
    require(isinstance(arguments, Mapping), field, arguments, "are no arguments by name", example)
    for name, value in arguments.items():
        remedy = f"{suggest(name, names)} {example}" if names else example
        require(name in names, f"{field}.{name}", value, "there is no such argument", remedy)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return maker(**values, **passed)
    except InputError as error:
        value = list(error.value) if isinstance(error.value, tuple) else error.value
        raise InputError(f"{field}.{error.field}", value, error.problem, error.remedy) from error
