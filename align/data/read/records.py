"""Parsers of rows into documents, preference pairs and feedback, for every supported shape.

`iter_outcomes` streams the records of a data set in bounded memory. `read_documents`, `read_preferences` and
`read_feedback` return all records of one kind. `write_preferences` writes pairs in TRL's conversational form.

The columns of a row decide its shape, see `align.data.read.columns`. Rows to imitate:

    messages                          OpenAI, TRL: a list of {role, content}
    conversations                     ShareGPT: a list of {from, value}, or of messages
    prompt [completion|response|chosen]   texts, or lists of messages
    instruction [input] [output] [history]   Alpaca
    question [answer|response|…]      like `prompt`; `query` as well
    message_id parent_id role text    OASST: a message of a tree; or a tree in one row
    text                              plain text

Preference pairs:

    chosen rejected [prompt|question]                 TRL (messages or plain strings), UltraFeedback binarised, the
                                                      implicit form (whole conversations), HH transcripts, Orca pairs
    conversations chosen{} rejected{}                 LLaMA-Factory: a conversation, and two last turns
    instruction [input] chosen rejected               LLaMA-Factory
    prompt response helpfulness                       HelpSteer: neighbouring rows with one prompt are paired
    prompt response_1 response_2 preference_strength  HelpSteer2 preferences
    prompt chosen[] rejected[]                        RewardBench 2: one right answer and several wrong ones, or several
    context response1 response2 overall_preference    HelpSteer3
    prompt answers[{answer, rank}]                    K-wise rankings (Nectar), rank 1 the best
    instruction completions[{response, overall_score}]   UltraFeedback: the higher score is the better answer

Two answers and a verdict on them, from arenas, judges or annotators:

    prompt response_a response_b winner             also answer_, completion_, output_, conversation_; _1 _2; _0 _1
    conversation_a conversation_b winner            LMSYS arena: whole conversations
    prompt response_a response_b winner_model_a winner_model_b winner_tie    its Kaggle form: lists of texts
    prompt response_0 response_1 better_response_id     PKU-SafeRLHF
    instruction output_1 output_2 preference            AlpacaFarm
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from align.core.errors import InputError, StorageError, require
from align.core.outputs import replace_file
from align.core.types import Conversation, Document, Feedback, Message, Preference, Record
from align.data.chat.reasoning import CLOSE, OPEN, measure_reasoning, strip_reasoning
from align.data.read.columns import (
    CONTENT_COLUMNS,
    CONVERSATION_ANSWERS,
    CONVERSATIONS,
    HELP,
    HELPSTEER,
    HELPSTEER2,
    HELPSTEER3,
    JUDGED,
    LABEL,
    LABELLED,
    PAIRS,
    SCORED,
    TEXT,
    TREE,
    TREE_MESSAGE,
    WINNER_COLUMNS,
    ColumnRules,
    JudgedColumns,
    Shape,
    TextSizes,
    UnreadColumns,
    build_label_error,
    build_unknown_shape_error,
    describe_nearest_shape,
    find_answers_beside_turns,
    find_judged_columns_of_row,
    find_question_column,
    find_shape,
    find_unread_columns,
    is_helpsteer,
    is_tree,
    is_tree_message,
    measure_unread_texts,
    parse_label,
)
from align.data.read.content import DOCUMENTS, ENDED_FLAGS, FEEDBACK, MESSAGE_ATTRIBUTES, PREFERENCES
from align.data.read.drops import BadRows, DoubtfulSourceError, Drop, count_dropped
from align.data.read.messages import (
    CALL_FIELDS,
    EMPTY_HELP,
    HH_TURN,
    KEEP_ONE,
    LEAVE_OUT_HELP,
    RESULT_ROLES,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    UNSUPPORTED_COLUMNS,
    UNSUPPORTED_FIELDS,
    Fields,
    build_field_error,
    check_row_weight,
    check_texts_agree,
    check_tool_calls,
    check_unsupported_fields,
    format_value,
    pairs_to_turns,
    parse_json_value,
    parse_message,
    parse_messages,
    parse_tools,
    parse_transcript,
    with_system_column,
)
from align.data.read.rows import CELL_TYPES, Row, check_json_values, iter_rows

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


# --- Message trees (OASST): every path from the root to a leaf of the assistant is a conversation. A tree is one row
# with nested `replies`, or one row per message (`message_id`, `parent_id`, `text`, `role`). The rows of a tree must
# follow one another, as only one tree is held in memory.

TREE_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
TREE_TOOLS_PROBLEM = (
    "trees with tool calls are not supported, and leaving the calls out would change the answers' meaning"
)
UNSUPPORTED_TREE_FIELDS = {
    **UNSUPPORTED_FIELDS,
    **dict.fromkeys((*CALL_FIELDS, "tool_call_id"), (TREE_TOOLS_PROBLEM, LEAVE_OUT_HELP)),
}
SORT_HELP = "Sort the rows so that those of one message_tree_id stand together."


class TreeNode(NamedTuple):
    """A message of a conversation tree, with the row that holds it and its place in that row.

    Attributes:
        data: its fields.
        row: the row that holds it.
        place: its path within the row, with a trailing dot. Empty if the row is the message.
        id: id of the conversation that ends with it.
    """

    data: Fields
    row: Row
    place: str
    id: str


TreePath = tuple[Conversation, Fields]
"""A path of a conversation tree, as (conversation, fields of its last message)."""


def build_row_id(row: Row) -> str:
    """Return the id of the conversation in a row, `FILE:NUMBER`, from the file's name and the row's number in it."""
    return f"{row.file.name}:{row.place}"


def parse_tree_row(row: Row) -> Iterator[TreePath | Drop]:
    """Yield a conversation for each path of a message tree stored in one row, or a Drop, the reason, for a path without
    an answer."""
    prefix = "" if "replies" in row.data else "prompt."

    def list_replies(node: TreeNode) -> list[TreeNode]:
        children = node.data.get("replies") or []
        place = f"{node.place}replies"
        if not isinstance(children, list) or not all(isinstance(reply, Mapping) for reply in children):
            raise build_field_error(place, children, "is no list of messages", "Write [{role, text}, …].")
        has_siblings = len(children) > 1
        return [
            TreeNode(reply, row, f"{place}[{i}].", f"{node.id}/{i}" if has_siblings else node.id)
            for i, reply in enumerate(children)
        ]

    yield from iter_tree_paths(
        TreeNode(row.data["prompt"] if prefix else row.data, row, prefix, build_row_id(row)), list_replies
    )


def parse_tree_messages(rows: Sequence[Row]) -> Iterator[TreePath | Drop]:
    """Yield a conversation for each path of a message tree stored as one row per message, or a Drop, the reason, for a
    path without an answer.

    Raises:
        InputError: the parent of a message is missing, two messages have one id, or messages answer each other in a
            circle.
    """
    children: dict[Any, list[TreeNode]] = {}
    message_ids = set[str]()
    for row in rows:
        name = str(row.data["message_id"])
        require(name not in message_ids, f"{row.where}, message_id", name, "stands twice in its tree", SORT_HELP)
        message_ids.add(name)
        parent = row.data.get("parent_id")
        children.setdefault(None if parent is None else str(parent), []).append(
            TreeNode(row.data, row, "", build_row_id(row))
        )
    for row in rows:
        with row.naming_errors():
            parent = row.data.get("parent_id")
            if parent is not None and str(parent) not in message_ids:
                problem = "is the message_id of no neighbouring row of its tree"
                raise build_field_error("parent_id", parent, problem, SORT_HELP)

    def list_replies(node: TreeNode) -> list[TreeNode]:
        return children.get(str(node.data["message_id"]), [])

    reached_count = 0
    for root in children.get(None, []):
        pending = [root]
        while pending:
            pending += list_replies(pending.pop())
            reached_count += 1
        yield from iter_tree_paths(root, list_replies)
    problem = "messages of its tree answer each other in a circle"
    require(
        reached_count == len(rows), f"{rows[0].where}, parent_id", rows[0].data.get("parent_id"), problem, SORT_HELP
    )


def iter_tree_paths(
    root: TreeNode, list_replies: Callable[[TreeNode], Sequence[TreeNode]]
) -> Iterator[TreePath | Drop]:
    """Yield a conversation for each path of a message tree from its root to a leaf, or a Drop, the reason, for a path
    without an answer. Paths come depth first, in the order of the replies. A deleted message ends its path with a
    Drop."""
    pending: list[tuple[tuple[Message, ...], TreeNode]] = [((), root)]
    while pending:
        turns, node = pending.pop()
        if node.data.get("deleted") is True:
            yield Drop.DELETED
            continue
        with node.row.naming_errors():
            turns = (*turns, parse_tree_message(node.data, node.place))
            children = list_replies(node)
        pending += [(turns, child) for child in reversed(children)]
        if not children:
            is_answered = turns[-1].role == "assistant"
            yield (Conversation(turns, node.id), node.data) if is_answered else Drop.UNANSWERED


def parse_tree_message(data: Fields, place: str) -> Message:
    """Convert the `role` and `text` of a message in a conversation tree to a Message. Raises InputError if it has no
    text, or an unknown role."""
    check_unsupported_fields(data, UNSUPPORTED_TREE_FIELDS, place)
    role = data.get("role")
    text = data.get("text")
    if isinstance(role, str) and role in RESULT_ROLES:
        remedy = "Write the paths as conversations of `messages`, or leave such trees out."
        raise build_field_error(f"{place}role", role, TREE_TOOLS_PROBLEM, remedy)
    if not isinstance(role, str) or role not in TREE_ROLES:
        raise build_field_error(f"{place}role", role, f"is none of {', '.join(TREE_ROLES)}", "Rename the role.")
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise build_field_error(f"{place}text", text, problem, "Give its text, or leave the tree out.")
    return Message(TREE_ROLES[role], text)


# --- Preference pairs.

Messages = tuple[Message, ...]
ParsedPair = tuple[Preference, Fields] | Drop
"""A preference pair with its answers' metadata under `chosen` and `rejected`, or the reason why there is no pair."""

PAIR_HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."
VERDICT_HELP = 'Write "{}" or "{}" for the better answer, or "tie".'
TIES = frozenset(["tie", "tied", "tie_(bothbad)", "both_bad", "bothbad", "both", "draw", "neither", "equal", "none"])
VERDICT_PREFIX = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant)_")
"""Prefix of an ending in a verdict, as in `model_a`."""


def build_pair_error(data: Fields, column: str, problem: str, remedy: str = PAIR_HELP) -> InputError:
    """Return an InputError about a column of a preference pair, which shows the column's value."""
    name = column.split("[")[0]
    return InputError(column, format_value(data[name]) if name in data else "(no such column)", problem, remedy)


def require_text(data: Fields, column: str) -> str:
    """Return the text in a row's column, or raise InputError if the column holds no text."""
    value = data.get(column)
    if not isinstance(value, str):
        raise build_pair_error(data, column, "missing" if value is None else "not a text")
    return value


def require_number(data: Fields, column: str, value: Any) -> float:
    """Return `value` as a float, or raise InputError about `column` if it is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
        raise build_pair_error(data, column, "missing" if value is None else "not a finite number")
    return float(value)


def parse_pairs(group: Sequence[Row]) -> Iterator[ParsedPair]:
    """Yield each preference pair of a row, or of HelpSteer rows with one prompt, and a Drop, the reason, for each that
    is left out."""
    for row in group:
        with row.naming_errors():
            check_unsupported_fields(row.data, UNSUPPORTED_COLUMNS)
    with group[0].naming_errors():
        yield from pair_helpsteer_rows(group) if is_helpsteer(group[0].data) else parse_row_pairs(group[0])


def parse_row_pairs(row: Row) -> Iterator[ParsedPair]:
    """Yield each preference pair of a row in any pair format except HelpSteer, and a Drop, the reason, for each that is
    left out. Raises InputError if the row has no such format."""
    data = row.data
    shape = find_shape(data)
    if shape is SCORED:
        question_name = find_question_column(data)
        answers = parse_scored_answers(row, "completions", "response", "overall_score", 1)
        yield from pair_all(answers, parse_prompt(data, question_name))
    elif {"chosen", "rejected"} <= data.keys() and is_text_list(data["rejected"]):
        yield from pair_right_with_wrong_answers(row)
    elif {"chosen", "rejected"} <= data.keys():
        yield parse_pair(row)
    elif shape is JUDGED:
        yield parse_judged_pair(row)
    elif {"prompt", "answers"} <= data.keys():
        # Ranks give the order of answers, not a margin between them.
        answers = parse_scored_answers(row, "answers", "answer", "rank", -1)
        yield from pair_all(answers, parse_prompt(data, "prompt"), has_margins=False)
    elif compared_shape := next((shape for shape in (HELPSTEER2, HELPSTEER3) if data.keys() >= {*shape.needs}), None):
        yield parse_compared_pair(row, *compared_shape.needs)
    else:
        problem = f"missing (the row has {', '.join(sorted(data)) or 'no columns'})"
        remedy = describe_nearest_shape(data, (PREFERENCES,)) + PAIR_HELP
        raise build_pair_error(data, "rejected" if "chosen" in data else "chosen", problem, remedy)


def parse_pair_answer(data: Fields, column: str, prompt: Any) -> Messages:
    """Parse the answer in a pair's column `chosen` or `rejected` into messages. If `prompt` is `None`, they begin with
    the prompt."""
    value = data[column]
    if not isinstance(value, str):
        return parse_pair_messages(data, column, [value] if isinstance(value, dict) else value)
    if prompt is not None:
        return to_answer(value)
    if not HH_TURN.match(value.lstrip(" ")):
        problem = f"missing, and {column} is not a transcript (\\n\\nHuman: … \\n\\nAssistant: …)"
        raise build_pair_error(data, "prompt", problem)
    return parse_transcript(value)


def parse_pair(row: Row) -> ParsedPair:
    """Parse a row with `chosen` and `rejected`, two answers to a prompt or two whole conversations with a common
    beginning, into a preference pair. Returns `Drop.IDENTICAL` if they are equal."""
    data = row.data
    question_name = find_question_column(data) or "prompt"
    prompt = data.get(question_name)
    for column in ("chosen", "rejected"):
        value = data[column]
        if not isinstance(value, str | list | dict):
            raise build_pair_error(
                data, column, "missing" if value is None else "neither a text nor a list of messages"
            )
    if type(data["chosen"]) is not type(data["rejected"]):
        raise build_pair_error(data, "rejected", "not of the same form as chosen")
    better, worse = (parse_pair_answer(data, column, prompt) for column in ("chosen", "rejected"))
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise build_pair_error(
                data, column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge"
            )
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise build_pair_error(data, "prompt", "missing")
        prompt_turns = parse_prompt(data, question_name)
    else:
        shared_count = count_shared_turns(data, better, worse)
        prompt_turns = with_system_column(better[:shared_count], data)
        better = better[shared_count:]
        worse = worse[shared_count:]
        # A list of messages must equal the last shared turns. A string is a caption that repeats one of them
        # (UltraFeedback), and `messages` may be a whole conversation that ends with one of the answers.
        if isinstance(prompt, list) and question_name != "messages":
            named_prompt = parse_pair_messages(data, question_name, prompt)
            if prompt_turns[-len(named_prompt) :] != named_prompt:
                raise build_pair_error(data, question_name, "not the common beginning of chosen and rejected")
    margin, chosen_score, rejected_score = (data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is not None:
        margin = require_number(data, "margin", margin)
    elif chosen_score is not None and rejected_score is not None:  # UltraFeedback
        margin = require_number(data, "score_chosen", chosen_score) - require_number(
            data, "score_rejected", rejected_score
        )
    return build_preference(row, prompt_turns, better, worse, margin), {}


def parse_judged_pair(row: Row) -> ParsedPair:
    """Parse a row of two answers and a verdict, such as `winner: a`, into a preference pair. Returns a Drop for a tie
    or equal answers."""
    data = row.data
    columns = find_judged_columns_of_row(data)
    assert columns is not None
    verdict = parse_verdict(data, columns)
    name = columns.verdict[0]
    remedy = VERDICT_HELP.format(*columns.endings)
    number = convert_to_float(data[name])
    if number is not None and number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNER_COLUMNS:
        # An ambiguous code: 0 may be the first answer or a tie, and a negative number may be a degree.
        problem = "is ambiguous: it may mean the first answer, a tie or a degree"
        raise DoubtfulSourceError(name, format_value(data[name]), problem, remedy)
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise build_pair_error(data, name, problem, remedy)
    if verdict == 0:
        return Drop.TIE
    answers: list[Any] = [data[name] for name in columns.answers]
    pair = {name: value for name, value in data.items() if name not in columns.answers}
    text_lists = [parse_text_list(value) for value in (data.get("prompt"), *answers)]
    if columns.verdict == WINNER_COLUMNS and all(text_lists):  # the Kaggle form of LMSYS's arena
        del pair["prompt"]
        if len({*map(len, text_lists)}) > 1:
            raise build_pair_error(data, columns.answers[0], "a list of texts of another length than the prompt's")
        answers = [pairs_to_turns(zip(text_lists[0], texts, strict=True)) for texts in text_lists[1:]]
    better_answer, worse_answer = answers if verdict < 0 else reversed(answers)
    pair |= {"chosen": better_answer, "rejected": worse_answer}
    if columns.verdict == WINNER_COLUMNS:
        check_json_values(pair)  # texts decoded from JSON text have not been checked yet
    return parse_pair(row._replace(data=pair))


def parse_verdict(row: Fields, columns: JudgedColumns) -> int | None:
    """Return the answer that a row's verdict prefers: -1 for the first, 1 for the second, 0 for neither. Returns None
    if the verdict cannot be parsed.

    A number names the column that ends with it. Answers a and b have the numbers 1 and 2; 1.5 is a tie. A text is an
    ending, a column, a model's name, or a tie.
    """
    if columns.verdict == WINNER_COLUMNS:
        first, second = (parse_label(row[name]) for name in WINNER_COLUMNS)
        tie = parse_label(row.get("winner_tie", False))
        if None in (first, second, tie) or bool(first) + bool(second) + bool(tie) > 1:
            return None
        return bool(second) - bool(first)
    value = row[columns.verdict[0]]
    if isinstance(value, str):
        models = [row.get("model_a"), row.get("model_b")]
        if value in models and models[0] != models[1]:
            return -1 if value == models[0] else 1
        normalised = re.sub(r"[ -]", "_", value.strip().strip("[]").casefold())
        if normalised in TIES:
            return 0
        value = VERDICT_PREFIX.sub("", normalised)
        if value in columns.endings:
            return -1 if value == columns.endings[0] else 1
    places = {0.0: -1, 1.0: 1} if columns.endings == ("0", "1") else {1.0: -1, 1.5: 0, 2.0: 1}
    number = None if isinstance(value, bool) else convert_to_float(value)
    return None if number is None else places.get(number)


def convert_to_float(value: Any) -> float | None:
    """Convert a number or its text to a float, or return None for any other value."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parse_text_list(value: Any) -> list[str]:
    """Return a list of texts, given as a list or as its JSON text, with null entries as empty texts. Returns an empty
    list for anything else."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        return []
    return [text or "" for text in value]


def is_text_list(value: Any) -> bool:
    """Return whether a value is a non-empty list of texts, and not of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def pair_right_with_wrong_answers(row: Row) -> Iterator[ParsedPair]:
    """Yield a preference pair for every combination of a right answer in `chosen` and a wrong answer in `rejected`. All
    have the row's group name. Equal answers yield `Drop.IDENTICAL`."""
    right_answers = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_text_list(right_answers):
        raise build_pair_error(row.data, "chosen", "neither a text nor a list of texts, as rejected is one")
    prompt = parse_prompt(row.data, find_question_column(row.data) or "prompt")
    name = get_text(row.data, "id") or row.name
    if "source" not in row.data and "subset" in row.data:  # RewardBench's name
        row = row._replace(data={**row.data, "source": row.data["subset"]})
    for (i, better), (j, worse) in product(enumerate(right_answers), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
        else:
            pair = build_preference(row, prompt, to_answer(better), to_answer(worse), None, f"{name}/{i}>{j}", name)
            yield pair, {}


class ScoredAnswer(NamedTuple):
    """One of several answers to a prompt, with its score and its other fields.

    Attributes:
        row: the row that holds it.
        turns: the answer.
        score: higher is better.
        other_fields: other fields of the answer.
    """

    row: Row
    turns: Messages
    score: float
    other_fields: Fields


def parse_scored_answers(
    row: Row, column: str, text_field: str, score_field: str, score_sign: int
) -> list[ScoredAnswer]:
    """Parse a column that lists answers with their scores or ranks, as in UltraFeedback or Nectar, into ScoredAnswers.
    Raises InputError if there are fewer than two, or one lacks its text or number.

    Args:
        row: the row.
        column: the column.
        text_field: the entry's field with the answer.
        score_field: the entry's field with the score.
        score_sign: 1 if a higher score is better, -1 if a lower one is.
    """
    entries = row.data[column]
    if not isinstance(entries, list) or len(entries) < 2:
        raise build_pair_error(row.data, column, "not a list of two or more answers")
    answers = list[ScoredAnswer]()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
            raise build_pair_error(row.data, f"{column}[{i}].{text_field}", "missing or not a text")
        number = score_sign * require_number(row.data, f"{column}[{i}].{score_field}", entry.get(score_field))
        about = {name: value for name, value in entry.items() if name != text_field and value is not None}
        answers.append(ScoredAnswer(row, to_answer(entry[text_field]), number, about))
    return answers


def pair_helpsteer_rows(rows: Sequence[Row]) -> Iterator[ParsedPair]:
    """Yield a preference pair for every two HelpSteer rows of one prompt, the more helpful answer preferred. A single
    row, a tie and equal answers yield a Drop."""
    if len(rows) == 1:
        yield Drop.UNPAIRED
    answers = list[ScoredAnswer]()
    for row in rows:
        with row.naming_errors():
            turns = to_answer(require_text(row.data, "response"))
            score = require_number(row.data, "helpfulness", row.data["helpfulness"])
            answers.append(ScoredAnswer(row, turns, score, find_unread_columns(row, HELPSTEER)))
    yield from pair_all(answers, parse_prompt(rows[0].data, "prompt"))


def pair_all(answers: Sequence[ScoredAnswer], prompt: Messages, has_margins: bool = True) -> Iterator[ParsedPair]:
    """Yield a preference pair for every two answers to one prompt, the higher score preferred, all in one group. A tie
    and equal answers yield a Drop.

    Args:
        answers: two or more answers.
        prompt: the prompt.
        has_margins: differences of scores are margins.
    """
    group = answers[0].row.name
    for pair in combinations(enumerate(answers), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.turns == worse.turns:
            yield Drop.IDENTICAL
        else:
            margin = better.score - worse.score if has_margins else None
            with better.row.naming_errors():
                record = build_preference(
                    better.row, prompt, better.turns, worse.turns, margin, f"{group}/{i}>{j}", group
                )
            about = {"chosen": dict(better.other_fields), "rejected": dict(worse.other_fields)}
            yield record, {side: fields for side, fields in about.items() if fields}


def parse_compared_pair(
    row: Row, question_name: str, first_column: str, second_column: str, verdict_column: str
) -> ParsedPair:
    """Parse a row of two answers and a verdict from -3 (the first is much better) to 3 (the second is much better) into
    a preference pair. Its margin is the absolute verdict. Returns a Drop for a tie or equal answers.

    Args:
        row: the row.
        question_name: the question column.
        first_column, second_column: the answer columns.
        verdict_column: the verdict column.
    """
    answers = [to_answer(require_text(row.data, name)) for name in (first_column, second_column)]
    verdict = require_number(row.data, verdict_column, row.data[verdict_column])
    if not -3 <= verdict <= 3:
        raise build_pair_error(row.data, verdict_column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if answers[0] == answers[1]:
        return Drop.IDENTICAL
    better, worse = answers if verdict < 0 else reversed(answers)
    return build_preference(row, parse_prompt(row.data, question_name), better, worse, abs(verdict)), {}


def get_text(data: Fields, column: str) -> str:
    """Return the value of a row's column as text, or an empty text if it is null or missing."""
    value = data.get(column)
    return "" if value is None else str(value)


def to_answer(text: str) -> Messages:
    """Return a text as a tuple of one assistant message."""
    return (Message("assistant", text),)


def build_preference(
    row: Row,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    """Build a Preference from its prompt and answers, with attributes such as `annotator` from the row's other columns.

    Args:
        row: the row.
        prompt, chosen, rejected: the turns.
        margin: how much better the chosen answer is, if known.
        id: empty to use the row's `id` or `prompt_id`, else its place.
        group: the group unless the row has a `group_id`.

    Raises:
        InputError: `strength` is not an integer, or tools and calls do not match.
    """
    data = row.data
    strength = data.get("strength")
    if strength is not None and type(strength) is not int:
        raise build_pair_error(data, "strength", "not a whole number")
    tools = parse_tools(data)
    for answer_name, answer in (("chosen", chosen), ("rejected", rejected)):
        parts = (("prompt", prompt), (answer_name, answer))
        check_tool_calls([(f"{name}[{i}]", turn) for name, part in parts for i, turn in enumerate(part)], tools)
    texts: dict[str, Any] = {
        name: get_text(data, name) for name in ("annotator", "guideline_version", "created_at", "scorer")
    }
    return Preference(
        prompt,
        chosen,
        rejected,
        id=id or get_text(data, "id") or get_text(data, "prompt_id") or row.name,
        group_id=get_text(data, "group_id") or group,
        margin=margin,
        source=get_text(data, "source") if "source" in data else row.name.rsplit(":", 1)[0],
        strength=strength,
        **{name: data.get(name) is not False for name in ENDED_FLAGS},
        **texts,
        tools=tools,
    )


def parse_pair_messages(data: Fields, column: str, value: Any) -> Messages:
    """Parse a column's list of `{role, content}` or ShareGPT's `{from, value}` into messages. Raises InputError for
    anything else."""
    if not isinstance(value, list) or not value:
        raise build_pair_error(data, column, "neither a text nor a list of messages")
    return tuple(message for _, message in parse_sharegpt(value, column))


def parse_prompt(data: Fields, column: str) -> Messages:
    """Parse a pair's prompt from a column that holds messages, a transcript or a plain question. The row's system
    prompt comes first. Raises InputError if the prompt is empty or ends with an answer."""
    value = data.get(column)
    if column == "instruction" and isinstance(value, str):
        turns = tuple(message for place, message in parse_alpaca(data) if place not in ("output", "response"))
    elif isinstance(value, str):
        turns = parse_transcript(value)
    else:
        turns = parse_pair_messages(data, column, value)
    turns = with_system_column(turns, data)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise build_pair_error(data, column, "it holds no question to answer")
    return turns


def count_shared_turns(data: Fields, chosen: Messages, rejected: Messages) -> int:
    """Return the number of leading turns that two conversations share before the two answers that differ. Raises
    InputError if they share none."""
    limit = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while count > 0 and not chosen[count].role == rejected[count].role == "assistant":
        count -= 1
    if count == 0:
        problem = "it has no common beginning with rejected"
        raise build_pair_error(data, "chosen", problem, "Give the prompt in a column of its own.")
    return count


def write_preferences(path: str | Path, prefs: Sequence[Preference]) -> None:
    """Write preference pairs to a JSON Lines file in TRL's conversational form, compressed if its name ends in `.gz`.
    Creates the folder. The same pairs give the same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(to_trl_row(pref), ensure_ascii=False) + "\n" for pref in prefs)
    blob = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
    if path.suffix == ".gz":
        blob = gzip.compress(blob, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, blob)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise StorageError("path", str(path), problem, "Choose a folder with room that you can write to.") from error


def to_trl_row(pref: Preference) -> Mapping[str, Any]:
    """Return a preference pair as a row in TRL's conversational form. A pair without margin has no column `margin`, as
    TRL uses margins if the column exists."""
    row: dict[str, Any] = {
        name: [turn.as_dict() for turn in getattr(pref, name)] for name in MESSAGE_ATTRIBUTES[Preference]
    }
    names = ("id", "group_id", "annotator", "source", "strength", "guideline_version", "created_at")
    row |= {name: getattr(pref, name) for name in names}
    row |= {name: False for name in ENDED_FLAGS if not getattr(pref, name)}  # the default is True
    if pref.scorer:
        row["scorer"] = pref.scorer
    if pref.tools:
        row["tools"] = [tool.as_dict() for tool in pref.tools]
    if pref.margin is not None:
        row["margin"] = pref.margin
    return row


# --- Streams of records.

DEFAULT_RULES = ColumnRules()
LOOKBACK_ROWS = 64
"""Rows read before the resume point to find its group. Multiplied by 64 until a valid row or the first row is read."""
SCALAR_TYPES = {str, int, float, bool}
"""Types of scalars in rows. Readers of JSON, CSV and Arrow return no subclasses of them."""
NO_SIZES: TextSizes = MappingProxyType({})
RecordFields = tuple[Record, Fields, Fields, TextSizes]
"""A parsed record as (record, extra, metadata, sizes), see `ParsedRecord`."""
LABELLED_HELP = 'A row holds {"prompt": "…", "completion": "…", "label": true}.'


class ParsedRecord(NamedTuple):
    """A record of a data set, with its row's number, other columns and metadata.

    Attributes:
        number: number of its row, or of the last row of its group. Several records may share a number; numbers never
            decrease.
        record: the record.
        extra: texts, numbers and booleans in other columns of the row, such as `split` or `created_at`. Conversations
            of one tree have a `group_id`.
        metadata: all columns of the row that are not part of the record. A pair of two rows or list entries has their
            other fields under `chosen` and `rejected`.
        sizes: sizes of texts in unread columns, see `align.data.read.columns.measure_unread_texts`. Only the
            first record of a row has them.
    """

    number: int
    record: Record
    extra: Fields
    metadata: Fields = MappingProxyType({})
    sizes: TextSizes = NO_SIZES


class RowOutcome(NamedTuple):
    """One result of parsing a row or a group of rows: a record, the reason why none exists, or the error that refuses
    the group.

    Attributes:
        first_row_number: number of the first row of the group.
        result: the record, drop or error.
    """

    first_row_number: int
    result: ParsedRecord | Drop | InputError


def iter_outcomes(
    path: str, field: str = "data.path", rules: ColumnRules = DEFAULT_RULES, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[RowOutcome]:
    """Parse the rows of a data set in any format, and yield each record, each Drop (the reason why there is no record)
    and each row's error.

    Args:
        path: the data set, see `align.data.read.files.list_data_files`.
        field: the setting that names it, for errors.
        rules: the user's settings for columns.
        skip: rows up to this number are skipped, with the rest of the group that this row belongs to.
        counts: see `align.data.read.rows.iter_rows`.

    Raises:
        InputError: a file does not exist or cannot be read.
        CorruptFile: a file is cut or damaged. The records before that are yielded first.
    """
    for group in iter_groups(path, field, rules, skip, counts):
        begin = group[0].number
        try:
            if group[0].error is not None:
                raise group[0].error
            records = [*parse_records(group, rules)]  # an error refuses the whole group
        except InputError as error:
            yield RowOutcome(begin, error)
            continue
        for record in records:
            yield RowOutcome(begin, record if isinstance(record, Drop) else ParsedRecord(group[-1].number, *record))


def parse_records(group: Sequence[Row], rules: ColumnRules = DEFAULT_RULES) -> Iterator[RecordFields | Drop]:
    """Yield the records of a group of rows, each with its row's other columns, metadata and text sizes, or a Drop, the
    reason why none exists.

    Raises:
        InputError: a row has no shape, or a value that cannot be kept.
    """
    row = group[0]
    shape = find_shape(row.data)
    if shape is not None and shape in (TREE, TREE_MESSAGE):
        yield from parse_tree_records(group, shape)
        return
    if len(group) > 1 and shape is not HELPSTEER:  # tree messages that also have the columns of pairs
        for row in group:
            yield from parse_records([row], rules)
        return
    extra = collect_scalar_columns({**row.data, **row.kept_as_metadata})
    if shape is not None and shape.kind == PREFERENCES:
        shared = {} if shape is HELPSTEER else find_unread_columns(row, shape)
        sizes = measure_group_texts(group, shape)
        for pair in parse_pairs(group):
            if isinstance(pair, Drop):
                yield pair
                continue
            yield pair[0], extra, {**shared, **pair[1]}, sizes
            sizes = NO_SIZES
        return
    with row.naming_errors():
        if shape is None:
            candidates = [shape for shape in CONVERSATIONS if row.data.get(shape.needs[0]) is not None]
            if len(candidates) > 1 and row.data.keys().isdisjoint(PAIRS.needs):
                rules.check_answer(row.data, candidates[0])
            raise build_unknown_shape_error(row.data, (DOCUMENTS, PREFERENCES, FEEDBACK))
        metadata = find_unread_columns(row, shape)
        if shape is LABELLED:
            extra.pop(LABEL, None)
            record: Record = parse_feedback(row.data, build_row_id(row))
        else:
            if row.data.get(LABEL) is not None:
                raise build_label_error(row.data, rules.suggest_metadata([LABEL]))
            rules.check_answer(row.data, shape)
            record = parse_document(row.data, build_row_id(row))
    yield record, extra, metadata, measure_unread_texts(row, shape, metadata)


def parse_tree_records(group: Sequence[Row], shape: Shape) -> Iterator[RecordFields | Drop]:
    """Yield each conversation of a message tree with its other columns, metadata and text sizes, or a Drop, the reason,
    for a path without an answer. The other fields of its last message are metadata."""
    row = group[0]
    tree = row.data.get("message_tree_id") or build_row_id(row)
    shared = collect_scalar_columns({**row.data, **row.kept_as_metadata}) if shape is TREE else {}
    tree_metadata = find_unread_columns(row, TREE) if shape is TREE else {}
    sizes = measure_group_texts(group, shape)
    for path in parse_tree(group):
        if isinstance(path, Drop):
            yield path
            continue
        conversation, last = path
        last_metadata = find_unread_columns(row._replace(data=dict(last)), TREE_MESSAGE)
        last_metadata = {
            name: value for name, value in last_metadata.items() if name not in ("replies", *tree_metadata)
        }
        extra = {**shared, **collect_scalar_columns(last), "group_id": str(tree)}
        yield conversation, extra, {**tree_metadata, **last_metadata}, sizes
        sizes = NO_SIZES


def parse_tree(group: Sequence[Row]) -> Iterator[Any]:
    """Yield a conversation for each path of a message tree, or a Drop, the reason, for a path without an answer. The
    tree is stored in one row or as one row per message."""
    return parse_tree_row(group[0]) if is_tree(group[0].data) else parse_tree_messages(group)


def measure_group_texts(group: Sequence[Row], shape: Shape) -> TextSizes:
    """Return the number and total characters of the texts in each unread column, summed over a group of rows of one
    format."""
    unread = UnreadColumns(DEFAULT_RULES)
    for row in group:
        unread.add_row(row, shape)
    return unread.sizes


def collect_scalar_columns(data: Fields) -> dict[str, Any]:
    """Return the columns of a row that hold a text, number or boolean and are no part of its content."""
    return {name: value for name, value in data.items() if name not in CONTENT_COLUMNS and type(value) in SCALAR_TYPES}


# --- Groups of rows: with columns renamed, cells of tables converted, and rows that form records together collected.


def iter_groups(
    path: str | Path, field: str, rules: ColumnRules | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """Yield the rows of a data set in groups that are parsed together: HelpSteer rows of one prompt, messages of one
    tree, or a single row. A row with an error is a group of its own. Rows with errors within a group follow it.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        rules: the user's settings for columns. If None, rows are left as they are in the files, as for evaluation sets.
        skip: rows up to this number are skipped, with the rest of the group that this row belongs to.
        counts: see `align.data.read.rows.iter_rows`.
    """
    group = list[Row]()
    bad_rows = list[Row]()
    group_keys = GroupKeys()
    group_key: Any = None
    not_looked_up = object()
    previous_key: Any = not_looked_up if skip else None
    for row in apply_rules(iter_rows(path, field, skip, counts), rules):
        key = None
        if row.error is None:
            key = group_keys.compute_key(row.data)
            if key is not None and previous_key is not_looked_up:
                group_keys, previous_key = find_previous_key(path, field, rules, skip, counts)
                key = group_keys.compute_key(row.data)
            if key is not None and key == previous_key:  # it continues a group that was read before
                continue
            previous_key = None
        else:
            bad_rows.append(row)
        if row.error is None and group and (key is None or key != group_key):
            yield group
            group = []
        if not group:
            yield from ([bad_row] for bad_row in bad_rows)
            bad_rows = []
        if row.error is None and key is None:
            yield [row]
        elif row.error is None:
            group.append(row)
            group_key = key
    if group:
        yield group
    yield from ([bad_row] for bad_row in bad_rows)


def find_previous_key(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> tuple[GroupKeys, Any]:
    """Read the rows before a resume point, and return the group key of the last valid row up to `skip`. Also returns
    the GroupKeys to use for the rows after it."""
    lookback = LOOKBACK_ROWS
    while True:
        group_keys = GroupKeys()
        key = not_found = object()
        for row in apply_rules(iter_rows(path, field, max(0, skip - lookback), counts), rules):
            if row.number > skip:
                break
            if row.error is None:
                key = group_keys.compute_key(row.data)
        if key is not not_found or lookback >= skip:
            return group_keys, key
        lookback *= LOOKBACK_ROWS


def apply_rules(rows: Iterator[Row], rules: ColumnRules | None) -> Iterator[Row]:
    """Yield each row with the user's column rules applied, or only with text cells of tables converted if `rules` is
    None. A row to which the rules cannot be applied gets an error."""
    for row in rows:
        if row.error is None and (rules or row.texts):
            try:
                row = rules.apply(row) if rules else row._replace(data=CELL_TYPES.convert_row(row.data))
            except InputError as error:
                row = row._replace(error=row.add_location(error))
        yield row


class GroupKeys:
    """The keys that consecutive rows of one group share, computed row by row. Messages without a tree id belong to the
    tree of the last root.

    Attributes:
        trees: number of roots counted.
    """

    def __init__(self) -> None:
        self.trees = 0

    def compute_key(self, row: Fields) -> Any:
        """Return the key that a row shares with its group: the prompt (HelpSteer) or the tree (OASST). Returns None for
        a row that is a group of its own."""
        if is_helpsteer(row):
            return "HelpSteer", json.dumps(row["prompt"])
        if is_tree_message(row):
            self.trees += row.get("parent_id") is None
            tree = row.get("message_tree_id")
            return "tree", self.trees if tree is None else str(tree)
        return None


# --- Lists of all records of one kind.


def iter_valid_groups(
    path: str | Path, field: str, bad_rows: BadRows, rules: ColumnRules | None = None
) -> Iterator[list[Row]]:
    """Yield the groups of a data set's rows that are parsed together, and add the errors of unreadable rows to
    `bad_rows`."""
    for group in iter_groups(path, field, rules):
        if group[0].error is None:
            yield group
        else:
            bad_rows.add(group[0].error)


class ReadResult(NamedTuple):
    """The records of a data set, the number of its rows, and how often each Drop occurred."""

    records: list[Any]
    rows: int
    drops: Counter[Drop]


def read_all_records(
    path: str | Path,
    field: str,
    skip_bad_rows: bool,
    rules: ColumnRules,
    parse_group: Callable[[Sequence[Row], UnreadColumns], Iterator[Any]],
    keep_groups: bool = True,
    count_drops: bool = False,
) -> ReadResult:
    """Parse all rows of a data set with `parse_group`, and return the records in a list, with the number of rows and
    drops. Prints the columns that are kept as metadata.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        skip_bad_rows: leave refused rows out. If False, the data set is refused.
        rules: the user's settings for columns.
        parse_group: yields the records and drops of a group of rows.
        keep_groups: False parses rows one by one, except messages of a tree.
        count_drops: refused rows may be skipped even if the other rows only give drops.

    Raises:
        InputError: a file does not exist, a row is refused, or an unread column holds long texts.
        CorruptFile: a file is cut or damaged.
    """
    bad_rows = BadRows(skip_bad_rows)
    unread = UnreadColumns(rules)
    reading = ReadResult([], 0, Counter())
    row_count = 0
    for group in iter_valid_groups(path, field, bad_rows, rules):
        row_count += len(group)
        is_separate = not keep_groups and not is_tree_message(group[0].data)
        for part in [[row] for row in group] if is_separate else [group]:
            with bad_rows:
                parsed = list(parse_group(part, unread))  # an error refuses the whole group
                reading.drops.update(record for record in parsed if isinstance(record, Drop))
                reading.records.extend(record for record in parsed if not isinstance(record, Drop))
    bad_rows.report_refused_rows(path, len(reading.records) + (reading.drops.total() if count_drops else 0))
    unread.check(field, str(path))
    if unread.sizes:
        print(f"columns of {path} kept as metadata: {', '.join(unread.sizes)}")
    return reading._replace(rows=row_count)


def read_documents(
    path: str | Path,
    field: str = "data.path",
    skip_bad_rows: bool = False,
    requires_answer: bool = False,
    are_prompts: bool = False,
    rules: ColumnRules = DEFAULT_RULES,
) -> list[Document]:
    """Read the conversations and plain texts of a data set into a list, in the order of its rows, see
    `read_all_records`.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        skip_bad_rows: leave refused rows out.
        requires_answer: a question must have an answer column, which may be null. Otherwise a misspelt column would
            turn rows to train on into questions.
        are_prompts: conversations keep the other columns of their rows, for graders.
        rules: the user's settings for columns.

    Raises:
        InputError: as in `read_all_records`; or there is no row, or no row makes a document.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Document | Drop]:
        row = group[0]
        if is_tree_message(row.data) or is_tree(row.data):
            yield from (path if isinstance(path, Drop) else path[0] for path in parse_tree(group))
            for message in group:
                unread.add_row(message, TREE if is_tree(row.data) else TREE_MESSAGE)
            return
        with row.naming_errors():
            shape = DOCUMENT_SHAPES[find_shape_column(row.data)]
            if not are_prompts:
                rules.check_answer(row.data, shape)
            document = parse_document(row.data, build_row_id(row), requires_answer, are_prompts, row.kept_as_metadata)
        unread.add_row(row, shape, are_prompts)
        yield document

    reading = read_all_records(path, field, skip_bad_rows, rules, parse_group, keep_groups=False)
    require(bool(reading.records), field, str(path), "is empty", "Give at least one row.")
    for drop, count in reading.drops.items():
        print(f"left out {count} path{'s' if count > 1 else ''} of {path}: {drop.value}")
    return reading.records


def read_preferences(
    path: str | Path, field: str = "data.path", skip_bad_rows: bool = False, rules: ColumnRules = DEFAULT_RULES
) -> list[Preference]:
    """Read the preference pairs of a data set into a list, in the order of its rows, see `read_all_records`. Prints how
    many were dropped because neither answer is preferred.

    Raises:
        InputError: as in `read_all_records`; or there is no row, or no pair.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Preference | Drop]:
        yield from (pair if isinstance(pair, Drop) else pair[0] for pair in parse_pairs(group))
        for row in group:
            unread.add_row(row, find_shape(row.data) or PAIRS)

    pairs, rows, drops = read_all_records(path, field, skip_bad_rows, rules, parse_group, count_drops=True)
    require(rows > 0, field, str(path), "is empty", PAIR_HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    count_dropped("dropped_undecided", drops.total())
    if drops:
        print(f"{drops.total()} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def read_feedback(
    path: str | Path, field: str = "data.path", skip_bad_rows: bool = False, rules: ColumnRules = DEFAULT_RULES
) -> list[Feedback]:
    """Read the labelled answers (KTO) of a data set into a list, in the order of its rows, see `read_all_records`.
    Raises InputError if a row is something else."""

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Feedback | Drop]:
        for item in parse_records(group, rules):
            if isinstance(item, Drop):
                yield item
                continue
            record, extra, _, sizes = item
            unread.add(sizes)
            if not isinstance(record, Feedback):
                problem = "it is no answer with a label, true or false"
                raise InputError(f"{group[-1].where}, {LABEL}", extra.get(LABEL, "(none)"), problem, LABELLED_HELP)
            yield replace(record, id=str(extra["id"])) if "id" in extra else record

    answers = read_all_records(path, field, skip_bad_rows, rules, parse_group).records
    require(bool(answers), field, str(path), "holds no answer with a label", LABELLED_HELP)
    return answers
