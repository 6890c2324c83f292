"""Rows to imitate, as documents: conversations in the field's common shapes, and plain text; and answers with a label.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from align.core.errors import require
from align.core.types import Conversation, Document, Feedback, Message
from align.data.chat.reasoning import CLOSE, OPEN, answer_alone, reasoning_length
from align.data.read.content import DOCUMENTS
from align.data.read.drops import Drop
from align.data.read.messages import (
    CALLS,
    EMPTY,
    KEEP_ONE,
    LEAVE_OUT,
    NOT_READ,
    NOT_READ_OF_ROWS,
    OFFERED,
    RESULTS,
    SYSTEM,
    Fields,
    check_calls,
    check_read,
    check_texts,
    check_weight,
    message_of,
    messages_of,
    refused,
    tools_of,
    value_of,
    with_system_column,
)
from align.data.read.rows import Row
from align.data.read.shapes import (
    ANSWERS,
    CONVERSATIONS,
    HELP,
    LABEL,
    TEXT,
    Shape,
    answers_beside,
    read_label,
    unclear,
)

Placed = list[tuple[str, Message]]
"""Messages, each with the place in its row that its text stands at, for errors to name."""
SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Who speaks in ShareGPT's rows and their kin → the role. Other names are roles."""
NOTHING_ASIDE: Fields = MappingProxyType({})
SHAPES: Mapping[str, Shape] = {shape.needs[0]: shape for shape in (*CONVERSATIONS, TEXT)}
"""Column that a document's shape is recognised by → the shape. Of several the first counts that is not null: data sets
fill the columns of other rows with null."""
LABELLED_HELP = (
    "Train on such rows with stage=kto. If it is no label of the answer, or labels no longer count: "
    '"data.metadata=[label]".'
)
GIVE_TEXT = "Give its text, or leave the row out."
CALLER = "function_call"
"""Who speaks if the text of a turn is calls, as LLaMA-Factory writes them."""


def document_of(
    row: Fields, id: str, answered: bool = False, rows: bool = False, aside: Fields = NOTHING_ASIDE
) -> Document:
    """Return one row as a document. If a row has `text` beside a conversation, that is its rendering, and the
    conversation counts.

    Args:
        answered: the row has to have a column for the answer.
        rows: the row is asked: the conversation keeps its other columns, for what checks answers.
        aside: columns that are kept as metadata.
    """
    column = shape_column(row)
    if row.get(LABEL) is not None and not rows:  # a prompt is asked whatever became of its answer
        problem = "stands beside a row to imitate, and an answer with a label is judged, not imitated"
        raise refused(LABEL, row[LABEL], problem, LABELLED_HELP)
    if column == "text":
        return plain_text(row)
    placed = placed_of(row, column, answered, asked=rows)
    for place, message in placed:
        check_says_something(place, message)
    tools = tools_of(row)
    check_calls(placed, tools)
    messages = with_system_column(tuple(message for _, message in placed), row)
    return Conversation(messages, id, tools, row_text({**row, **aside}, column) if rows else "")


def feedback_of(row: Fields, id: str) -> Feedback:
    """Return one row as an answer with a label, KTO's: `prompt`, `completion` and a `label`, or a whole conversation of
    any shape whose last answer the label is about. The answer may be empty: models give such answers, and people refuse
    them.

    Raises:
        InputError: there is no question, or no answer to it.
    """
    placed = placed_of(row, shape_column(row))
    named = (i for i, (place, _) in enumerate(placed) if place.partition("[")[0] in ANSWERS)
    start = next(named, len(placed) - 1)
    asked, answered = (tuple(message for _, message in part) for part in (placed[:start], placed[start:]))
    place, last = placed[-1]
    if last.role != "assistant":
        problem = f"it ends with a {last.role} turn, so there is no answer that the label is about"
        raise refused(place, last.content, problem, "End with the answer, or leave the row out.")
    asked = with_system_column(asked, row)
    has_question = any(message.role == "user" and message.content.strip() for message in asked)
    require(has_question, placed[0][0], "(empty)", "it holds no question to answer", "Give its text.")
    tools = tools_of(row)
    check_calls(placed, tools)
    return Feedback(asked, answered, bool(read_label(row[LABEL])), id, tools)


def row_text(row: Fields, column: str) -> str:
    """Return the columns of a row that its prompt is not made of, as JSON; an empty text if none says anything. Columns
    of answers are among them: they are what an answer to the prompt is checked by.

    Args:
        column: that the row's shape is recognised by.
    """
    asked = {column, *SYSTEM, *OFFERED, *(("input", "history") if column == "instruction" else ())}
    others = {name: value for name, value in row.items() if name not in asked and value is not None}
    return json.dumps(others, ensure_ascii=False, default=lambda value: None) if others else ""  # JSON has no bytes


def shape_column(row: Fields) -> str:
    """Return the column that a row's shape is recognised by. Raises InputError if there is none, or the row says what
    cannot be kept."""
    check_read(row, NOT_READ_OF_ROWS)
    check_weight(row)
    there = [column for column in SHAPES if column in row]
    if not there:
        remedy = f"Give `messages`, `prompt` with `completion`, or `text`; {HELP}"
        raise unclear(row, (DOCUMENTS,), remedy)
    return next((column for column in there if row[column] is not None), there[0])


def placed_of(row: Fields, column: str, answered: bool = False, asked: bool = False) -> Placed:
    """Return the messages of a row that is a conversation, recognised by this column.

    Args:
        answered: the row has to have a column for the answer.
        asked: the row is asked, so that an answer beside a conversation is not read.
    """
    answers = SHAPES[column].answers
    if column == "instruction":
        placed = alpaca(row)
    elif answers:
        placed = asked_and_answered(row, column, answers)
    else:
        read = share_gpt if column == "conversations" else listed
        placed = read(row[column], column)
    if answered and answers and not any(name in row for name in answers):
        remedy = f"Call it {' or '.join(answers)}."
        raise refused("columns", ", ".join(map(str, row)), "there is no answer among them", remedy)
    if not asked and (beside := answers_beside(row, SHAPES[column])):
        name = one_answer(row, column, beside)
        placed += turns_of(row[name], "assistant", name)
    return placed


def one_answer(row: Fields, column: str, names: Sequence[str]) -> str:
    """Return the first column of an answer. Raises InputError if the columns hold different ones."""
    if len({repr(row[name]) for name in names}) > 1:
        problem = f"has several answers ({', '.join(names)})"
        raise refused(column, row[column], problem, "Keep one of these columns.")
    return names[0]


def plain_text(row: Fields) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise refused("text", text, problem, GIVE_TEXT)
    name = "system" if row.get("system") else "tools" if tools_of(row) else ""
    if name:
        raise refused(name, row.get(name), "stands beside plain text", "Give `messages`.")
    return text


def check_says_something(place: str, message: Message) -> None:
    """Raise InputError if a turn that counts says nothing."""
    content = message.content
    if message.tool_calls or message.role == "tool":  # a tool may return nothing
        return
    if CLOSE not in content and OPEN not in content and content.strip():
        return
    answer = answer_alone(content) if message.role == "assistant" else content
    if answer.strip() or message.role == "system" or not message.trained:
        return
    if message.role != "assistant":
        raise refused(place, content, f"the {message.role}'s turn is empty", "Leave the row out.")
    problem = "the assistant's turn is empty"
    if content.strip():
        problem = "the assistant's turn is reasoning alone"
        if not reasoning_length(content):
            problem = f"the assistant's turn is reasoning without its end, {CLOSE}"
    raise refused(place, content, problem, EMPTY)


def listed(value: Any, column: str) -> Placed:
    """Return a list of messages."""
    messages = messages_of(value, column)
    return [(f"{column}[{i}].content", message) for i, message in enumerate(messages)]


def share_gpt(value: Any, column: str) -> Placed:
    """Return a list of `{from, value}`, ShareGPT's, or of messages."""
    if not isinstance(value, list) or not any(isinstance(turn, Mapping) and "from" in turn for turn in value):
        return listed(value, column)
    placed = []
    for i, turn in enumerate(value):
        at = f"{column}[{i}]"
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise refused(at, turn, "is no turn", "Write a list of {from, value}.")
        message = {name: given for name, given in turn.items() if name not in ("from", "value")}
        role = SHARE_GPT.get(str(turn["from"]), turn["from"])
        check_texts(turn, at)
        other = turn.get("role", role)
        if other not in (role, turn["from"]) and SHARE_GPT.get(str(other), other) != role:
            problem = f"is another speaker than that of `from` ({turn['from']})"
            raise refused(f"{at}.role", other, problem, KEEP_ONE)
        if role == CALLER:
            calls = calls_in(turn.get("value"), f"{at}.value")
            message |= {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            message |= {"role": role, **({"content": turn["value"]} if "value" in turn else {})}
        placed.append((f"{at}.value", message_of(message, at)))
    return placed


def calls_in(value: Any, column: str) -> list[Any]:
    """Return the calls that a text is: an object, or a list of objects."""
    calls = value_of(value, column)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        raise refused(column, value, "is no call of a tool", 'Write {"name": "…", "arguments": {…}}.')
    return calls


def asked_and_answered(row: Fields, column: str, answers: tuple[str, ...]) -> Placed:
    """Return the turns of a question and of its answer, in whichever column that stands; of the question alone if there
    is none."""
    given = [name for name in answers if row.get(name) is not None]
    name = one_answer(row, column, given) if given else answers[0]
    asked = turns_of(row[column], "user", column)
    answered = turns_of(row.get(name), "assistant", name)
    require(bool(asked), column, row[column], "asks nothing", "Give its text.")
    if [message for _, message in answered[: len(asked)]] == [message for _, message in asked]:
        answered = answered[len(asked) :]  # UltraFeedback's `chosen` repeats the prompt
    return [*asked, *answered]


def turns_of(value: Any, role: str, column: str) -> Placed:
    """Return text as one turn of `role`, a list of messages as it is, null as no turn."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(column, Message(role, value))]
    if isinstance(value, int | float):
        raise refused(column, value, "is a number, and a text is read here", f'Write "{value}".')
    return listed(value, column)


def alpaca(row: Fields) -> Placed:
    """Return an `instruction`, with its `input` on the lines below it, and the `output` or `response`; `history`, pairs
    of a question and an answer, in front."""
    answers = [name for name in SHAPES["instruction"].answers if row.get(name) is not None]
    answer = one_answer(row, "instruction", answers) if answers else "output"
    for name in ("instruction", "input", answer):
        text = row.get(name)
        if not isinstance(text, str | None) or (name == "instruction" and text is None):
            raise refused(name, text, "is no text", GIVE_TEXT)
    placed: Placed = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise refused("history", history, "is no list", "Write a list of [question, answer].")
    for i, pair in enumerate(history):
        place = f"history[{i}]"
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise refused(place, pair, "is no pair of texts", "Write [question, answer].")
        placed += [(place, Message("user", pair[0])), (place, Message("assistant", pair[1]))]
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    placed.append(("instruction", Message("user", asked)))
    if row.get(answer) is not None:
        placed.append((answer, Message("assistant", row[answer])))
    return placed


# --- Trees of messages, OASST's: every path from the root to a leaf that the assistant wrote is a conversation. A tree
# is one row, whose messages have their `replies` within them, or a row a message (`message_id`, `parent_id`, `text`,
# `role`). Rows of one tree stand together: only one tree is held in memory.

SPEAKERS = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
TOOLS = "trees with tool calls and their results are not read, and an answer without them means something else"
NOT_READ_OF_TREES = {**NOT_READ, **dict.fromkeys((*CALLS, "tool_call_id"), (TOOLS, LEAVE_OUT))}
TOGETHER = "Sort the rows so that those of one message_tree_id stand together."


class Node(NamedTuple):
    """A message of a tree.

    Attributes:
        data: its fields.
        row: that it stands in.
        place: within the row, with a dot behind it; empty if the row is the message.
        id: of the conversation that ends with it.
    """

    data: Fields
    row: Row
    place: str
    id: str


TreePath = tuple[Conversation, Fields]
"""A conversation, and the message that it ends with."""


def id_of(row: Row) -> str:
    """Return the id of a row's conversation."""
    return f"{row.file.name}:{row.place}"


def tree_of(row: Row) -> Iterator[TreePath | Drop]:
    """Yield the conversations of a row that is a whole tree."""
    inside = "" if "replies" in row.data else "prompt."

    def replies(node: Node) -> list[Node]:
        given = node.data.get("replies") or []
        place = f"{node.place}replies"
        if not isinstance(given, list) or not all(isinstance(reply, Mapping) for reply in given):
            raise refused(place, given, "is no list of messages", "Write [{role, text}, …].")
        several = len(given) > 1
        return [
            Node(reply, row, f"{place}[{i}].", f"{node.id}/{i}" if several else node.id)
            for i, reply in enumerate(given)
        ]

    yield from conversations(Node(row.data["prompt"] if inside else row.data, row, inside, id_of(row)), replies)


def flat_tree_of(rows: Sequence[Row]) -> Iterator[TreePath | Drop]:
    """Yield the conversations of rows that are the messages of one tree.

    Raises:
        InputError: a message answers none of these, or two have one id.
    """
    answers: dict[Any, list[Node]] = {}
    known = set[str]()
    for row in rows:
        name = str(row.data["message_id"])
        require(name not in known, f"{row.where}, message_id", name, "stands twice in its tree", TOGETHER)
        known.add(name)
        parent = row.data.get("parent_id")
        answers.setdefault(None if parent is None else str(parent), []).append(Node(row.data, row, "", id_of(row)))
    for row in rows:
        with row.naming_errors():
            parent = row.data.get("parent_id")
            if parent is not None and str(parent) not in known:
                problem = "no row of its tree that stands beside it has this message_id"
                raise refused("parent_id", parent, problem, TOGETHER)

    def replies(node: Node) -> list[Node]:
        return answers.get(str(node.data["message_id"]), [])

    reached = 0
    for root in answers.get(None, []):
        waiting = [root]
        while waiting:
            waiting += replies(waiting.pop())
            reached += 1
        yield from conversations(root, replies)
    problem = "messages of its tree answer each other in a circle"
    require(reached == len(rows), f"{rows[0].where}, parent_id", rows[0].data.get("parent_id"), problem, TOGETHER)


def conversations(root: Node, replies: Callable[[Node], Sequence[Node]]) -> Iterator[TreePath | Drop]:
    """Yield one conversation for each path that ends with the assistant, in the order of the replies."""
    waiting: list[tuple[tuple[Message, ...], Node]] = [((), root)]
    while waiting:
        turns, node = waiting.pop()
        if node.data.get("deleted") is True:
            yield Drop.DELETED
            continue
        with node.row.naming_errors():
            turns = (*turns, message_in(node.data, node.place))
            answers = replies(node)
        waiting += [(turns, answer) for answer in reversed(answers)]
        if not answers:
            answered = turns[-1].role == "assistant"
            yield (Conversation(turns, node.id), node.data) if answered else Drop.UNANSWERED


def message_in(data: Fields, place: str) -> Message:
    """Return the message of a node. Raises InputError if it has no text, or another role speaks."""
    check_read(data, NOT_READ_OF_TREES, place)
    role = data.get("role")
    text = data.get("text")
    if isinstance(role, str) and role in RESULTS:
        remedy = "Write the paths as conversations of `messages`, or leave such trees out."
        raise refused(f"{place}role", role, TOOLS, remedy)
    if not isinstance(role, str) or role not in SPEAKERS:
        raise refused(f"{place}role", role, f"is none of {', '.join(SPEAKERS)}", "Rename the role.")
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise refused(f"{place}text", text, problem, "Give its text, or leave the tree out.")
    return Message(SPEAKERS[role], text)
