"""Construction of the cleaning steps that `stage.clean` lists; and steps for empty turns, the order of roles, and
functions of the user.

Example of the setting:

[unicode, control, {language: {keep: [en, de]}}, {length: {least: 3, by: words}}, {fn: package.module:fn}]
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.core.errors import InputError, find_lone_surrogate, require
from align.core.functions import convert_user_errors, load_function
from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.chat.reasoning import OPEN, strip_reasoning
from align.data.clean.characters import VISIBLE, InvisibleCharacterFilter, UnicodeRepair
from align.data.clean.language import LanguageFilter
from align.data.clean.outcome import Drop, Step, check_choice, join_texts, list_documents, suggest_choice
from align.data.clean.pii import PersonalDataFilter
from align.data.clean.quality import BoilerplateFilter, CountTokens, LengthFilter, RepetitionFilter
from align.data.read.content import MESSAGE_ATTRIBUTES, to_content_row
from align.data.read.messages import check_tool_calls, format_value, parse_messages

PREVIOUS_ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role of a turn → roles that the turn before it may have. The empty name is the beginning."""
RETURN_REMEDY = "Return the row, None to leave it out, or a text that says why it is left out."
MAX_REASON = 60
"""Maximum characters of a reason returned by a function of the user, by which dropped records are counted."""


@dataclass(frozen=True, slots=True)
class EmptyTurnFilter:
    """Cleaning step that leaves out records with an empty turn, and cuts off empty turns at the end.

    Empty turns at the end are removed instead, with the question that they leave unanswered, and the rest is kept.

    System turns may be empty, and so may answers that are not trained on, and the answers of pairs and of feedback:
    models give empty answers, and people judge them.
    """

    def __call__(self, record: Record) -> Record | Drop:
        if isinstance(record, str):
            return record if VISIBLE.search(record) else Drop("empty", "the text says nothing")
        turns = record.prompt if isinstance(record, Preference | Feedback) else record.messages
        first_empty = next((i for i, turn in enumerate(turns) if is_empty(turn)), None)
        if first_empty is None:
            return record
        remaining = remove_empty_last_turns(turns)
        if not isinstance(record, Conversation) or len(remaining) > first_empty:
            return Drop("empty turn", f"the {turns[first_empty].role}'s turn {first_empty} says nothing")
        if all(turn.role == "system" for turn in remaining):
            return Drop("empty", "no question is answered")
        return replace(record, messages=remaining)


def remove_empty_last_turns(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns without the empty ones at the end. If an answer is among them, the turns after the answer before
    it are removed too."""
    remaining = turns
    while remaining and is_empty(remaining[-1]):
        remaining = remaining[:-1]
    if any(turn.role == "assistant" for turn in turns[len(remaining) :]):
        while remaining and remaining[-1].role != "assistant":
            remaining = remaining[:-1]
    return remaining


def is_empty(turn: Message) -> bool:
    """Return whether a turn has no visible text outside of reasoning although it needs some. System turns, tool
    results, turns with calls and turns that are not trained on need no text."""
    if turn.role in ("system", "tool") or turn.tool_calls or not turn.trained:
        return False
    text = turn.content
    if text[:1].isascii() and text[:1].isalnum():  # nearly all turns
        return False
    if turn.role == "assistant" and OPEN in text:
        text = strip_reasoning(text)
    return VISIBLE.search(text) is None


@dataclass(frozen=True, slots=True)
class RoleOrderFilter:
    """Cleaning step that leaves out conversations whose roles are not in the order that chat templates expect.

    That is an optional system turn, then user and assistant turns alternately, with results of tools after the calls of
    the assistant.

    Args:
        ends: `assistant` if the last turn must be an answer, `any` to keep questions without an answer too.
    """

    ends: str = "assistant"

    def __post_init__(self) -> None:
        check_choice("ends", self.ends, ("assistant", "any"))

    def __call__(self, record: Record) -> Record | Drop:
        for document in list_documents(record):
            if isinstance(document, str):
                return record
            previous = ""
            for i, turn in enumerate(document.messages):
                if previous not in PREVIOUS_ROLES[turn.role]:
                    position = f"follows the {previous}'s" if previous else "is the first"
                    return Drop("role order", f"turn {i}, the {turn.role}'s, {position}")
                previous = turn.role
            if previous != "assistant" and self.ends == "assistant":
                return Drop("no answer", f"the last turn is the {previous}'s; {{roles: {{ends: any}}}} keeps such")
        return record


@dataclass(frozen=True, slots=True)
class UserFunction:
    """Cleaning step that calls a function of the user with each row.

    A row is `{"messages": [{"role": …, "content": …}, …]}`, `{"text": …}`, or a pair's `prompt`, `chosen` and
    `rejected`. The function returns the row, changed or unchanged; None to leave it out; or a text, to leave it out for
    that reason.

    Args:
        function: importable by its name, so that workers in other processes can import it.
        name: `package.module:name`.
        field: the setting that names it, for errors.
    """

    function: Callable[[dict[str, Any]], Any]
    name: str
    field: str = "fn"

    def __call__(self, record: Record) -> Record | Drop:
        """Call the user's function with a record's row, and return the changed record, or a Drop if it returns None or
        a reason.

        Raises:
            InputError: the function raises an exception or returns something else. The error names the row.
        """
        row = to_content_row(record)
        record_id = "" if isinstance(record, str) else record.id
        label = record_id or format_value(record if isinstance(record, str) else str(row))
        with convert_user_errors(self.field, self.name, f"raised {{error}} for {label}", "Correct the function."):
            returned = self.function(to_content_row(record))
        if returned is None:
            return Drop("fn", self.name)
        if isinstance(returned, str):
            return Drop(f"fn: {returned.strip()[:MAX_REASON] or self.name}", self.name)
        parts = ("text",) if isinstance(record, str) else MESSAGE_ATTRIBUTES[type(record)]
        if not isinstance(returned, Mapping):
            raise self._build_error(f"{type(returned).__name__} for {label}")
        if missing := [part for part in parts if part not in returned]:
            raise self._build_error(f"a row without {missing[0]} for {label}")
        changed = {name for name in returned.keys() | row.keys() if returned.get(name) != row.get(name)}
        if forbidden := sorted(changed - {*parts}):
            raise self._build_error(
                f"a row with another {forbidden[0]} for {label}", f"Change {' or '.join(parts)} alone."
            )
        try:
            if isinstance(record, str):
                new_record = returned["text"]
            else:
                messages = {part: parse_messages(returned[part], f"{self.field}, {part}") for part in sorted(changed)}
                new_record = replace(record, **messages)
                for document in list_documents(new_record):
                    turns = enumerate(document.messages) if isinstance(document, Conversation) else ()
                    check_tool_calls([(f"{self.field}, turn {i}", turn) for i, turn in turns], new_record.tools)
            if not isinstance(new_record, Record) or find_lone_surrogate(join_texts(new_record)):
                raise ValueError("a value that is no text, or holds half a character")
        except ValueError as error:
            raise self._build_error(f"a row that cannot be read for {label} ({error})") from error
        return record if new_record == record else new_record

    def _build_error(self, description: str, remedy: str = RETURN_REMEDY) -> InputError:
        return InputError(self.field, self.name, f"returned {description}", remedy)


STEPS: Mapping[str, Callable[..., Step]] = {
    "unicode": UnicodeRepair,
    "control": InvisibleCharacterFilter,
    "empty": EmptyTurnFilter,
    "roles": RoleOrderFilter,
    "language": LanguageFilter,
    "length": LengthFilter,
    "repetition": RepetitionFilter,
    "boilerplate": BoilerplateFilter.from_file,
    "pii": PersonalDataFilter,
}
"""Name of a cleaning step → class or function that creates the step from its arguments. The name `fn` for
`UserFunction` is not in it."""
FN = "fn"
COUNT_TOKENS = "count_tokens"
"""Name of the argument that the stage passes to a step itself, and users cannot set."""


def create_steps(
    entries: Sequence[Any], field: str = "stage.clean", count_tokens: CountTokens | None = None
) -> list[tuple[str, Step]]:
    """Create the cleaning steps that a setting lists, and return them as pairs of name and step in the setting's order.

    Args:
        entries: names of steps, and mappings of one name to its arguments.
        field: the setting, for errors.
        count_tokens: counts tokens for `length`; None if there is no model.

    Raises:
        InputError: a step or an argument is unknown, or a value is invalid.
    """
    require(isinstance(entries, list | tuple), field, entries, "is no list of steps", "Write [unicode, control].")
    return [create_step(entry, f"{field}[{i}]", count_tokens) for i, entry in enumerate(entries)]


def create_step(entry: Any, field: str, count_tokens: CountTokens | None) -> tuple[str, Step]:
    """Create the cleaning step of one entry in the setting, and return its name and the step. See `create_steps`."""
    named_arguments: Mapping[Any, Any] = {}
    if isinstance(entry, Mapping):
        named_arguments = entry
    elif isinstance(entry, str):
        named_arguments = {entry: {}}
    remedy = "Write its name, or its name and its arguments: {length: {least: 3, by: words}}."
    require(len(named_arguments) == 1, field, entry, "is no step", remedy)
    ((name, arguments),) = named_arguments.items()
    if name == FN:
        field = f"{field}.{FN}"
        is_name = isinstance(arguments, str) and re.fullmatch("[^:]+:[^:]+", arguments)
        require(bool(is_name), field, arguments, "names no function", "Write {fn: package.module:name}.")
        return FN, UserFunction(load_function(str(arguments), field), str(arguments), field)
    problem = "is no step of a list: rows are scored when all sources are cleaned"
    require(name != "score", field, name, problem, "Write stage.score.by=loss or stage.score.by=reward.")
    names = [*STEPS, FN]
    remedy = f"{suggest_choice(name, names)} The steps: {', '.join(names)}."
    require(name in STEPS, field, name, "is no cleaning step", remedy)
    return name, call_step_factory(STEPS[name], {} if arguments is None else arguments, f"{field}.{name}", count_tokens)


def call_step_factory(
    factory: Callable[..., Step], arguments: Any, field: str, count_tokens: CountTokens | None
) -> Step:
    """Create a cleaning step by calling its class or function with the user's arguments, or raise InputError if one is
    wrong. The error names the position of the step in the setting."""
    parameters = list(inspect.signature(factory).parameters)
    stage_arguments = {COUNT_TOKENS: count_tokens} if COUNT_TOKENS in parameters else {}
    names = [name for name in parameters if name not in stage_arguments]
    example = f"Write its arguments by name: {', '.join(names)}." if names else "It has no arguments: write its name."
    require(isinstance(arguments, Mapping), field, arguments, "are no arguments by name", example)
    for name, value in arguments.items():
        remedy = f"{suggest_choice(name, names)} {example}" if names else example
        require(name in names, f"{field}.{name}", value, "there is no such argument", remedy)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return factory(**values, **stage_arguments)
    except InputError as error:
        value = list(error.value) if isinstance(error.value, tuple) else error.value
        raise InputError(f"{field}.{error.field}", value, error.problem, error.remedy) from error
