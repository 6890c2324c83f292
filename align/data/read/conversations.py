"""Parsers of rows to imitate into documents, and of labelled answers into feedback.

The columns of a row decide its shape, see `align.data.read.shapes`:

    messages                          OpenAI, TRL: a list of {role, content}
    conversations                     ShareGPT: a list of {from, value}, or of messages
    prompt [completion|response|chosen]   texts, or lists of messages
    instruction [input] [output] [history]   Alpaca
    question [answer|response|…]      like `prompt`; `query` as well
    prompt completion label           KTO: an answer with a label; or a conversation and a label
    text                              plain text
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from align.core.errors import require
from align.core.types import Conversation, Document, Feedback, Message
from align.data.chat.reasoning import CLOSE, OPEN, measure_reasoning, strip_reasoning
from align.data.read.content import DOCUMENTS
from align.data.read.messages import (
    EMPTY_HELP,
    KEEP_ONE,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    UNSUPPORTED_COLUMNS,
    Fields,
    build_field_error,
    check_row_weight,
    check_texts_agree,
    check_tool_calls,
    check_unsupported_fields,
    parse_json_value,
    parse_message,
    parse_messages,
    parse_tools,
    with_system_column,
)
from align.data.read.shapes import (
    CONVERSATION_ANSWERS,
    CONVERSATIONS,
    HELP,
    LABEL,
    TEXT,
    Shape,
    build_unknown_shape_error,
    find_answers_beside_turns,
    parse_label,
)

PlacedMessages = list[tuple[str, Message]]
"""Messages of a row, each as (place of its text in the row, message). Errors name the place."""
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Speakers in ShareGPT and similar rows → role. Any other name is a role already."""
NO_METADATA: Fields = MappingProxyType({})
DOCUMENT_SHAPES: Mapping[str, Shape] = {shape.needs[0]: shape for shape in (*CONVERSATIONS, TEXT)}
"""Column that identifies a document's shape → the shape, by priority. The first column that is not null decides."""
KTO_HELP = (
    "Train on such rows with stage=kto. If it is no label of the answer, or labels no longer count: "
    '"data.metadata=[label]".'
)
TEXT_HELP = "Give its text, or leave the row out."
LABELLED_HELP = 'A row holds {"prompt": "…", "completion": "…", "label": true}.'
CALL_SPEAKER = "function_call"
"""Speaker of a turn whose text holds tool calls, as in LLaMA-Factory."""


def parse_document(
    row: Fields, id: str, requires_answer: bool = False, is_prompt: bool = False, kept_as_metadata: Fields = NO_METADATA
) -> Document:
    """Parse one row of any conversation format, or of plain text, into a Conversation or a text. Raises InputError if
    no format fits, or a value cannot be kept. If a row has `text` beside a conversation, the text is its rendering, and
    the conversation is used.

    Args:
        row: the row.
        id: the id of the conversation.
        requires_answer: the row must have an answer column.
        is_prompt: the row is a prompt, whose conversation keeps the other columns as JSON, for graders.
        kept_as_metadata: columns that are kept as metadata.
    """
    column = find_shape_column(row)
    if row.get(LABEL) is not None and not is_prompt:  # a prompt may have a label, which is not used
        problem = "labels the answer, but supervised training imitates every answer"
        raise build_field_error(LABEL, row[LABEL], problem, KTO_HELP)
    if column == "text":
        return parse_plain_text(row)
    placed_messages = parse_conversation(row, column, requires_answer, is_prompt=is_prompt)
    for place, message in placed_messages:
        check_not_empty(place, message)
    tools = parse_tools(row)
    check_tool_calls(placed_messages, tools)
    messages = with_system_column(tuple(message for _, message in placed_messages), row)
    return Conversation(
        messages, id, tools, encode_other_columns({**row, **kept_as_metadata}, column) if is_prompt else ""
    )


def parse_feedback(row: Fields, id: str) -> Feedback:
    """Parse one row into a labelled answer (KTO): the prompt, the answer and its boolean `label`. The row has `prompt`,
    `completion` and `label`, or a conversation of any format, whose last answer the label is about. The answer may be
    empty: models give such answers, and people reject them.

    Raises:
        InputError: there is no question, or no answer to it.
    """
    placed_messages = parse_conversation(row, find_shape_column(row))
    answer_indices = (
        i for i, (place, _) in enumerate(placed_messages) if place.partition("[")[0] in CONVERSATION_ANSWERS
    )
    start = next(answer_indices, len(placed_messages) - 1)
    prompt = tuple(message for _, message in placed_messages[:start])
    completion = tuple(message for _, message in placed_messages[start:])
    place, last = placed_messages[-1]
    if last.role != "assistant":
        problem = f"it ends with a {last.role} turn, so there is no answer that the label could apply to"
        raise build_field_error(place, last.content, problem, "End with the answer, or leave the row out.")
    prompt = with_system_column(prompt, row)
    has_question = any(message.role == "user" and message.content.strip() for message in prompt)
    require(has_question, placed_messages[0][0], "(empty)", "it holds no question to answer", "Give its text.")
    tools = parse_tools(row)
    check_tool_calls(placed_messages, tools)
    return Feedback(prompt, completion, bool(parse_label(row[LABEL])), id, tools)


def encode_other_columns(row: Fields, column: str) -> str:
    """Return all columns of a row but its prompt, system prompt and tools as JSON text, or an empty text if they are
    null. Answer columns are included: graders check answers against them.

    Args:
        row: the row.
        column: the column that identifies the row's shape.
    """
    prompt_columns = {
        column,
        *SYSTEM_COLUMNS,
        *TOOL_COLUMNS,
        *(("input", "history") if column == "instruction" else ()),
    }
    other_columns = {name: value for name, value in row.items() if name not in prompt_columns and value is not None}
    if not other_columns:
        return ""
    return json.dumps(other_columns, ensure_ascii=False, default=lambda value: None)  # bytes become null


def find_shape_column(row: Fields) -> str:
    """Return the name of the column that decides a row's format, such as `messages`, `prompt` or `text`. Raises
    InputError if none exists, or if a column cannot be kept."""
    check_unsupported_fields(row, UNSUPPORTED_COLUMNS)
    check_row_weight(row)
    present = [column for column in DOCUMENT_SHAPES if column in row]
    if not present:
        remedy = f"Give `messages`, `prompt` with `completion`, or `text`; {HELP}"
        raise build_unknown_shape_error(row, (DOCUMENTS,), remedy)
    return next((column for column in present if row[column] is not None), present[0])


def parse_conversation(
    row: Fields, column: str, requires_answer: bool = False, is_prompt: bool = False
) -> PlacedMessages:
    """Parse the messages of a conversation row, in the format that `column` decides, and pair each with its place for
    error messages.

    Args:
        row: the row.
        column: the column that identifies its shape.
        requires_answer: the row must have an answer column.
        is_prompt: the row is a prompt, so that an answer beside the conversation is not read.
    """
    answer_columns = DOCUMENT_SHAPES[column].answer_columns
    if column == "instruction":
        placed_messages = parse_alpaca(row)
    elif answer_columns:
        placed_messages = parse_question_and_answer(row, column, answer_columns)
    else:
        parse = parse_sharegpt if column == "conversations" else parse_message_list
        placed_messages = parse(row[column], column)
    if requires_answer and answer_columns and not any(name in row for name in answer_columns):
        remedy = f"Call it {' or '.join(answer_columns)}."
        raise build_field_error("columns", ", ".join(map(str, row)), "there is no answer among them", remedy)
    if not is_prompt and (columns_beside_turns := find_answers_beside_turns(row, DOCUMENT_SHAPES[column])):
        name = choose_answer_column(row, column, columns_beside_turns)
        placed_messages += parse_turns(row[name], "assistant", name)
    return placed_messages


def choose_answer_column(row: Fields, column: str, names: Sequence[str]) -> str:
    """Return the first of the answer columns `names`, or raise InputError if their values differ."""
    if len({repr(row[name]) for name in names}) > 1:
        problem = f"has several answers ({', '.join(names)})"
        raise build_field_error(column, row[column], problem, "Keep one of these columns.")
    return names[0]


def parse_plain_text(row: Fields) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise build_field_error("text", text, problem, TEXT_HELP)
    name = "system" if row.get("system") else "tools" if parse_tools(row) else ""
    if name:
        raise build_field_error(name, row.get(name), "stands beside plain text", "Give `messages`.")
    return text


def check_not_empty(place: str, message: Message) -> None:
    """Raise InputError if a user turn, or an assistant turn that is trained on, is empty or consists of reasoning
    alone. Turns with tool calls, tool results and system turns may be empty."""
    content = message.content
    if message.tool_calls or message.role == "tool":  # a tool may return nothing
        return
    if CLOSE not in content and OPEN not in content and content.strip():
        return
    answer = strip_reasoning(content) if message.role == "assistant" else content
    if answer.strip() or message.role == "system" or not message.trained:
        return
    if message.role != "assistant":
        raise build_field_error(place, content, f"the {message.role}'s turn is empty", "Leave the row out.")
    problem = "the assistant's turn is empty"
    if content.strip():
        problem = "the assistant's turn is reasoning alone"
        if not measure_reasoning(content):
            problem = f"the assistant's turn is reasoning without its end, {CLOSE}"
    raise build_field_error(place, content, problem, EMPTY_HELP)


def parse_message_list(value: Any, column: str) -> PlacedMessages:
    """Parse a column's list of messages, and pair each message with its place, such as `messages[0].content`, for error
    messages."""
    messages = parse_messages(value, column)
    return [(f"{column}[{i}].content", message) for i, message in enumerate(messages)]


def parse_sharegpt(value: Any, column: str) -> PlacedMessages:
    """Parse ShareGPT turns, `{from, value}`, or OpenAI messages, and pair each message with its place, such as
    `conversations[0].value`."""
    if not isinstance(value, list) or not any(isinstance(turn, Mapping) and "from" in turn for turn in value):
        return parse_message_list(value, column)
    placed_messages = []
    for i, turn in enumerate(value):
        place = f"{column}[{i}]"
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise build_field_error(place, turn, "is no turn", "Write a list of {from, value}.")
        message = {name: field_value for name, field_value in turn.items() if name not in ("from", "value")}
        role = SHAREGPT_ROLES.get(str(turn["from"]), turn["from"])
        check_texts_agree(turn, place)
        other_speaker = turn.get("role", role)
        if other_speaker not in (role, turn["from"]) and SHAREGPT_ROLES.get(str(other_speaker), other_speaker) != role:
            problem = f"contradicts the speaker in `from` ({turn['from']})"
            raise build_field_error(f"{place}.role", other_speaker, problem, KEEP_ONE)
        if role == CALL_SPEAKER:
            calls = parse_text_calls(turn.get("value"), f"{place}.value")
            message |= {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            message |= {"role": role, **({"content": turn["value"]} if "value" in turn else {})}
        placed_messages.append((f"{place}.value", parse_message(message, place)))
    return placed_messages


def parse_text_calls(value: Any, column: str) -> list[Any]:
    """Decode the tool calls in a turn's JSON text, an object or a list of objects, and return them as a list. Raises
    InputError for any other text."""
    calls = parse_json_value(value, column)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        raise build_field_error(column, value, "is no call of a tool", 'Write {"name": "…", "arguments": {…}}.')
    return calls


def parse_question_and_answer(row: Fields, column: str, answer_columns: tuple[str, ...]) -> PlacedMessages:
    """Return the messages of a question column and of the non-null answer column, or of the question alone if all
    answer columns are null. If the answer repeats the question, the repetition is left out."""
    present = [name for name in answer_columns if row.get(name) is not None]
    name = choose_answer_column(row, column, present) if present else answer_columns[0]
    question_turns = parse_turns(row[column], "user", column)
    reply_turns = parse_turns(row.get(name), "assistant", name)
    require(bool(question_turns), column, row[column], "asks nothing", "Give its text.")
    if [message for _, message in reply_turns[: len(question_turns)]] == [message for _, message in question_turns]:
        reply_turns = reply_turns[len(question_turns) :]  # UltraFeedback's `chosen` repeats the prompt
    return [*question_turns, *reply_turns]


def parse_turns(value: Any, role: str, column: str) -> PlacedMessages:
    """Convert a column's value to messages with their places: a text becomes one turn of `role`, a list of messages is
    parsed, null gives none. Raises InputError for anything else."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(column, Message(role, value))]
    if isinstance(value, int | float):
        raise build_field_error(column, value, "is a number, but a text is expected", f'Write "{value}".')
    return parse_message_list(value, column)


def parse_alpaca(row: Fields) -> PlacedMessages:
    """Parse an Alpaca row into the turns of `history`, a question of `instruction` and `input` on two lines, and the
    answer. `history` is a list of [question, answer]; the answer is in `output` or `response`, or missing."""
    answer_columns = [name for name in DOCUMENT_SHAPES["instruction"].answer_columns if row.get(name) is not None]
    answer_column = choose_answer_column(row, "instruction", answer_columns) if answer_columns else "output"
    for name in ("instruction", "input", answer_column):
        text = row.get(name)
        if not isinstance(text, str | None) or (name == "instruction" and text is None):
            raise build_field_error(name, text, "is no text", TEXT_HELP)
    placed_messages: PlacedMessages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise build_field_error("history", history, "is no list", "Write a list of [question, answer].")
    for i, pair in enumerate(history):
        place = f"history[{i}]"
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise build_field_error(place, pair, "is no pair of texts", "Write [question, answer].")
        placed_messages += [(place, Message("user", pair[0])), (place, Message("assistant", pair[1]))]
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    placed_messages.append(("instruction", Message("user", question)))
    if row.get(answer_column) is not None:
        placed_messages.append((answer_column, Message("assistant", row[answer_column])))
    return placed_messages
