"""Rows to imitate, as documents: conversations in the field's common shapes, and plain text.

A row is recognised by its columns:

    messages                          OpenAI's, TRL's: a list of {role, content}
    conversations                     ShareGPT's: a list of {from, value}, or of messages
    prompt [completion|response|chosen]   texts, or lists of messages
    instruction [input] [output] [history]   Alpaca's
    question [answer|response|…]      the same as a prompt; so is `query`
    message_id parent_id role text    OASST's: a message of a tree; or a tree in one row
    text                              plain text
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.data.formats.rows import Row
from align.data.reasoning import CLOSE, OPEN, answer_alone, reasoning_length
from align.data.records.bad_rows import BadRows
from align.data.records.column_rules import ColumnRules, UnreadColumns, text_sizes, unread_columns
from align.data.records.content import DOCUMENTS
from align.data.records.drops import Drop
from align.data.records.grouping import grouped_rows
from align.data.records.labels import LABEL
from align.data.records.messages import (
    EMPTY,
    SYSTEM,
    check_row,
    check_texts,
    check_weight,
    message_of,
    messages_of,
    with_system_column,
)
from align.data.records.refusals import refused
from align.data.records.shapes import (
    CONVERSATIONS,
    HELP,
    SHAPES_OF_DOCUMENTS,
    TREE,
    TREE_MESSAGE,
    Shape,
    answers_beside,
    nearest,
)
from align.data.records.tools import OFFERED, check_calls, tools_of, value_of
from align.data.records.trees import flat_tree_of, is_tree, is_tree_message, tree_of
from align.errors import InputError, require
from align.types import Conversation, Document, Message

Placed = list[tuple[str, Message]]
"""Messages, each with the place in its row that its text stands at, for errors to name."""
TEXT = "text"
SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Who speaks in ShareGPT's rows and their kin → the role. Other names are roles."""
OURS = ColumnRules()
NOTHING_ASIDE: Mapping[str, Any] = MappingProxyType({})
ANSWERS = {shape.needs[0]: shape.answers for shape in CONVERSATIONS}
BY_COLUMN = {shape.needs[0]: shape for shape in SHAPES_OF_DOCUMENTS}
LABELLED_HELP = (
    "Train on such rows with stage=kto. If it is no label of the answer, or labels no longer count: "
    '"data.metadata=[label]".'
)
CALLER = "function_call"
"""Who speaks where the text of a turn is calls, as LLaMA-Factory writes them."""


def read_documents(
    path: str | Path,
    field: str = "data.path",
    skips: bool = False,
    answered: bool = False,
    rows: bool = False,
    rules: ColumnRules = OURS,
) -> list[Document]:
    """The documents of a data set, in its order, see `align.data.formats.files.files_of`.

    Args:
        field: what the user calls the data set.
        skips: rows that are refused are left out. Without, the data set is refused.
        answered: a question has to have an answer beside it, in a column that may be null: without, a misspelt column
            would make questions of rows to train on.
        rows: conversations keep the other columns of their rows, for what checks answers.
        rules: what the user says of columns.

    Raises:
        InputError: there is no row, or rows say nothing to learn from, or what cannot be kept: names file and row.
        CorruptFile: a file was cut or is damaged.
    """
    bad_rows = BadRows(skips)
    documents = list[Document]()
    drops = Counter[Drop]()
    unread = UnreadColumns(rules)
    for group in grouped_rows(path, field, bad_rows, rules):
        if is_tree_message(group[0].data) or is_tree(group[0].data):
            with bad_rows:
                row = group[0]
                tree = list(tree_of(row, id_of(row)) if is_tree(row.data) else flat_tree_of(group, id_of))
                drops.update(one for one in tree if isinstance(one, Drop))
                documents += [one[0] for one in tree if not isinstance(one, Drop)]
                for message in group:
                    count_unread(unread, message, TREE if is_tree(row.data) else TREE_MESSAGE)
            continue
        for row in group:
            with bad_rows:
                if not rows:
                    rules.check_answer(row.data, BY_COLUMN[shape_column(row.data, row.where)], row.where)
                documents.append(document_of(row.data, row.where, id_of(row), answered, rows, row.aside))
                count_unread(unread, row, BY_COLUMN[shape_column(row.data, row.where)], rows)
    bad_rows.settle(path, len(documents))
    unread.check(field, str(path))
    require(bool(documents), field, str(path), "is empty", "Give at least one row.")
    for drop, count in drops.items():
        print(f"left out {count} path{'s' if count > 1 else ''} of {path}: {drop.value}")
    unread.tell(path)
    return documents


def count_unread(unread: UnreadColumns, row: Row, shape: Shape, asked: bool = False) -> None:
    """Count what a row has in columns that nothing reads, see `align.data.records.column_rules.text_sizes`."""
    columns = unread_columns(row, shape)
    if columns or row.aside:
        unread.add(text_sizes(row, shape, columns, asked))


def id_of(row: Row) -> str:
    """The id of a row's conversation."""
    return f"{row.file.name}:{row.place}"


def document_of(
    row: Mapping[str, Any],
    where: str,
    id: str,
    answered: bool = False,
    rows: bool = False,
    aside: Mapping[str, Any] = NOTHING_ASIDE,
) -> Document:
    """One row as a document, see `read_documents`. Where a row has `text` beside a conversation, that is its rendering,
    and the conversation counts."""
    column = shape_column(row, where)
    if row.get(LABEL) is not None and not rows:  # a prompt is asked whatever became of its answer
        problem = "stands beside a row to imitate, and an answer with a label is judged, not imitated"
        raise refused(where, LABEL, row[LABEL], problem, LABELLED_HELP)
    if column == TEXT:
        return plain_text(row, where)
    placed = placed_of(row, where, column, answered, asked=rows)
    for place, message in placed:
        check_said(place, message, where)
    tools = tools_of(row, where)
    check_calls(placed, tools, where)
    messages = with_system_column(tuple(message for _, message in placed), row, where)
    return Conversation(messages, id, tools, row_text({**row, **aside}, column) if rows else "")


def row_text(row: Mapping[str, Any], column: str) -> str:
    """The columns of a row that its prompt is not made of, as JSON; empty where none says anything. Columns of answers
    are among them: they are what an answer to the prompt is checked by.

    Args:
        column: that the row's shape is recognised by.
    """
    asked = {column, *SYSTEM, *OFFERED, *(("input", "history") if column == "instruction" else ())}
    others = {name: value for name, value in row.items() if name not in asked and value is not None}
    return json.dumps(others, ensure_ascii=False, default=lambda value: None) if others else ""  # JSON has no bytes


def shape_column(row: Mapping[str, Any], where: str) -> str:
    """The column that a row's shape is recognised by. Raises: InputError: there is none, or the row says what cannot be
    kept."""
    check_row(row, where)
    check_weight(row, where)
    there = [column for column in RECOGNISED if column in row]
    shape = next((column for column in there if row[column] is not None), there[0] if there else "")
    if not shape:
        raise InputError(
            f"{where}, columns", ", ".join(map(str, row)) or "(none)", "there is nothing to learn from among them",
            f"{nearest(row, (DOCUMENTS,))}Give `messages`, `prompt` with `completion`, or `text`; {HELP}",
        )  # fmt: skip
    return shape


def placed_of(row: Mapping[str, Any], where: str, column: str, answered: bool = False, asked: bool = False) -> Placed:
    """The messages of a row that is a conversation, recognised by this column.

    Args:
        answered: the row has to have a column for the answer.
        asked: the row is asked, so that an answer beside a conversation is not read.
    """
    read, answers = SHAPES[column]
    placed = read(row, where)
    if answered and answers and not any(name in row for name in answers):
        problem = "there is no answer among them"
        raise refused(where, "columns", ", ".join(map(str, row)), problem, f"Call it {' or '.join(answers)}.")
    if not asked and (beside := answers_beside(row, BY_COLUMN[column])):
        name = one_answer(row, where, column, beside)
        placed = [*placed, *turns_of(row[name], "assistant", where, name)]
    return placed


def one_answer(row: Mapping[str, Any], where: str, column: str, names: Sequence[str]) -> str:
    """Return the first column of an answer. Raises: InputError: the columns hold different ones."""
    if len({repr(row[name]) for name in names}) > 1:
        problem = f"has several answers ({', '.join(names)})"
        raise refused(where, column, row[column], problem, "Keep one of these columns.")
    return names[0]


def plain_text(row: Mapping[str, Any], where: str) -> str:
    """What a row of plain text says."""
    text, system = row["text"], row.get("system")
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise refused(where, "text", text, problem, "Give its text, or leave the row out.")
    require(not system, f"{where}, system", system, "stands beside plain text", "Give `messages`.")
    tools = tools_of(row, where)
    require(not tools, f"{where}, tools", row.get("tools"), "stands beside plain text", "Give `messages`.")
    return text


def check_said(place: str, message: Message, where: str) -> None:
    """Raises: InputError: a turn that counts says nothing."""
    content = message.content
    if message.tool_calls or message.role == "tool":  # a tool may return nothing
        return
    if CLOSE not in content and OPEN not in content and content.strip():
        return
    said = answer_alone(content) if message.role == "assistant" else content
    if said.strip() or message.role == "system" or not message.trained:
        return
    if message.role != "assistant":
        raise refused(where, place, content, f"the {message.role}'s turn is empty", "Leave the row out.")
    problem = "the assistant's turn is empty"
    if content.strip():
        problem = f"the assistant's turn is reasoning without its end, {CLOSE}"
        if reasoning_length(content):
            problem = "the assistant's turn is reasoning alone"
    raise refused(where, place, content, problem, EMPTY)


def listed(value: Any, where: str, column: str) -> Placed:
    """A list of messages."""
    messages = messages_of(value, where, column)
    return [(f"{column}[{i}].content", message) for i, message in enumerate(messages)]


def share_gpt(value: Any, where: str, column: str) -> Placed:
    """A list of `{from, value}`, ShareGPT's, or of messages."""
    if not isinstance(value, list) or not any(isinstance(turn, Mapping) and "from" in turn for turn in value):
        return listed(value, where, column)
    placed = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise refused(where, f"{column}[{i}]", turn, "is no turn", "Write a list of {from, value}.")
        rest = {name: given for name, given in turn.items() if name not in ("from", "value")}
        role = SHARE_GPT.get(str(turn["from"]), turn["from"])
        check_texts(turn, where, f"{column}[{i}]")
        other = turn.get("role", role)
        if other not in (role, turn["from"]) and SHARE_GPT.get(str(other), other) != role:
            problem = f"is another speaker than that of `from` ({turn['from']})"
            raise refused(where, f"{column}[{i}].role", other, problem, "Keep one of the two.")
        said = {"content": turn["value"]} if "value" in turn else {}
        if role == CALLER:
            role, said = (
                "assistant",
                {"content": None, "tool_calls": calls_in(turn.get("value"), where, f"{column}[{i}].value")},
            )
        placed.append((f"{column}[{i}].value", message_of({**rest, "role": role, **said}, where, f"{column}[{i}]")))
    return placed


def calls_in(value: Any, where: str, column: str) -> list[Any]:
    """The calls that a text is: an object, or a list of objects."""
    found = value_of(value, where, column)
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list) or not calls:
        raise refused(where, column, value, "is no call of a tool", 'Write {"name": "…", "arguments": {…}}.')
    return calls


def asked_and_answered(row: Mapping[str, Any], where: str, column: str, answers: tuple[str, ...]) -> Placed:
    """The turns of a question and of its answer, in whichever column that stands; of the question alone where there is
    none."""
    given = [name for name in answers if row.get(name) is not None]
    name = one_answer(row, where, column, given) if given else answers[0]
    asked = turns_of(row[column], "user", where, column)
    answered = turns_of(row.get(name), "assistant", where, name)
    require(bool(asked), f"{where}, {column}", row[column], "asks nothing", "Give its text.")
    if [message for _, message in answered[: len(asked)]] == [message for _, message in asked]:
        answered = answered[len(asked) :]  # UltraFeedback's `chosen` repeats the prompt
    return [*asked, *answered]


def turns_of(value: Any, role: str, where: str, column: str) -> Placed:
    """Text as one turn of `role`, a list of messages as it is, nothing as no turn."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(column, Message(role, value))]
    if isinstance(value, int | float):
        raise refused(where, column, value, "is a number, and a text is read here", f'Write "{value}".')
    return listed(value, where, column)


def alpaca(row: Mapping[str, Any], where: str) -> Placed:
    """An `instruction`, with its `input` on the lines below it, and the `output` or `response`; `history`, pairs of a
    question and an answer, in front."""
    answers = [name for name in ANSWERS["instruction"] if row.get(name) is not None]
    answer = one_answer(row, where, "instruction", answers) if answers else "output"
    texts = {name: row.get(name) for name in ("instruction", "input", answer)}
    for name, text in texts.items():
        if not isinstance(text, str | None) or (name == "instruction" and text is None):
            raise refused(where, name, text, "is no text", "Give its text, or leave the row out.")
    turns: Placed = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise refused(where, "history", history, "is no list", "Write a list of [question, answer].")
    for i, pair in enumerate(history):
        place, texts_of_it = f"history[{i}]", pair if isinstance(pair, list) else []
        if len(texts_of_it) != 2 or not all(isinstance(text, str) for text in texts_of_it):
            raise refused(where, place, pair, "is no pair of texts", "Write [question, answer].")
        turns += [(place, Message("user", texts_of_it[0])), (place, Message("assistant", texts_of_it[1]))]
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    turns.append(("instruction", Message("user", asked)))
    if (answered := texts[answer]) is not None:
        turns.append((answer, Message("assistant", answered)))
    return turns


SHAPES: Mapping[str, tuple[Callable[[Mapping[str, Any], str], Placed], tuple[str, ...]]] = {
    "messages": (lambda row, where: listed(row["messages"], where, "messages"), ()),
    "conversations": (lambda row, where: share_gpt(row["conversations"], where, "conversations"), ()),
    "prompt": (partial(asked_and_answered, column="prompt", answers=ANSWERS["prompt"]), ANSWERS["prompt"]),
    "instruction": (alpaca, ANSWERS["instruction"]),
    "question": (partial(asked_and_answered, column="question", answers=ANSWERS["question"]), ANSWERS["question"]),
    "query": (partial(asked_and_answered, column="query", answers=ANSWERS["query"]), ANSWERS["query"]),
}
"""Column that a conversation's shape is recognised by → what reads it, and the columns that its answer may stand in. Of
several the first counts that is not null: data sets fill the columns of other rows with null."""
RECOGNISED = (*SHAPES, TEXT)
