"""Rows as records: every shape of every kind. The records of a data set, one after another, in memory that does not
grow; or all those of one kind at once; and preference files out, in TRL's conversational form.

A row is recognised by its columns, see `align.data.read.columns`. Rows to imitate:

    messages                          OpenAI's, TRL's: a list of {role, content}
    conversations                     ShareGPT's: a list of {from, value}, or of messages
    prompt [completion|response|chosen]   texts, or lists of messages
    instruction [input] [output] [history]   Alpaca's
    question [answer|response|…]      the same as a prompt; so is `query`
    message_id parent_id role text    OASST's: a message of a tree; or a tree in one row
    text                              plain text

Preference pairs:

    chosen rejected [prompt|question]                 TRL (messages or plain strings), UltraFeedback binarised, the
                                                      implicit form (whole conversations), HH transcripts, Orca pairs
    conversations chosen{} rejected{}                 LLaMA-Factory: a conversation, and two last turns
    instruction [input] chosen rejected               LLaMA-Factory
    prompt response helpfulness                       HelpSteer: neighbouring rows with one prompt are paired
    prompt response_1 response_2 preference_strength  HelpSteer2's preferences
    prompt chosen[] rejected[]                        RewardBench 2: one right answer and several wrong ones, or several
    context response1 response2 overall_preference    HelpSteer3
    prompt answers[{answer, rank}]                    K-wise rankings (Nectar), rank 1 the best
    instruction completions[{response, overall_score}]   UltraFeedback: the higher score is the better answer

Two answers and a verdict on them, as arenas, judges and annotators write them:

    prompt response_a response_b winner             also answer_, completion_, output_, conversation_; _1 _2; _0 _1
    conversation_a conversation_b winner            LMSYS's arena: whole conversations
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
from align.data.chat.reasoning import CLOSE, OPEN, answer_alone, reasoning_length
from align.data.read.columns import (
    ANSWERS,
    COLUMNS,
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
    WINNERS,
    ColumnRules,
    JudgedColumns,
    Shape,
    Sizes,
    UnreadColumns,
    answers_beside,
    is_helpsteer,
    is_tree,
    is_tree_message,
    judged_columns_of,
    label_error,
    nearest_shape,
    question_column,
    read_label,
    recognised,
    text_sizes,
    unclear,
    unread_columns,
)
from align.data.read.content import DOCUMENTS, ENDED, FEEDBACK, PARTS, PREFERENCES
from align.data.read.drops import BadRows, Drop, RefusedSource, tally
from align.data.read.messages import (
    CALLS,
    EMPTY,
    HH_TURN,
    KEEP_ONE,
    LEAVE_OUT,
    NOT_READ,
    NOT_READ_OF_ROWS,
    OFFERED,
    RESULTS,
    SYSTEM,
    Fields,
    as_turns,
    check_calls,
    check_read,
    check_texts,
    check_weight,
    displayed,
    message_of,
    messages_of,
    refused,
    tools_of,
    transcript,
    value_of,
    with_system_column,
)
from align.data.read.rows import CELLS, Row, check_values, placed_rows

Placed = list[tuple[str, Message]]
"""Messages, each with the place in its row that its text stands at, for errors to name."""
SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Who speaks in ShareGPT's rows and their kin → the role. Other names are roles."""
NOTHING_ASIDE: Fields = MappingProxyType({})
DOCUMENT_SHAPES: Mapping[str, Shape] = {shape.needs[0]: shape for shape in (*CONVERSATIONS, TEXT)}
"""Column that a document's shape is recognised by → the shape. Of several the first counts that is not null: data sets
fill the columns of other rows with null."""
KTO_HELP = (
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
        raise refused(LABEL, row[LABEL], problem, KTO_HELP)
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
    there = [column for column in DOCUMENT_SHAPES if column in row]
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
    answers = DOCUMENT_SHAPES[column].answers
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
    if not asked and (beside := answers_beside(row, DOCUMENT_SHAPES[column])):
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
    answers = [name for name in DOCUMENT_SHAPES["instruction"].answers if row.get(name) is not None]
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


Messages = tuple[Message, ...]
Parsed = tuple[Preference, Fields] | Drop
"""A pair, and what else its row says of each of its answers."""
# --- Preference pairs.

PAIR_HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."
WRITE = 'Write "{}" or "{}" for the better answer, or "tie".'
TIES = frozenset(["tie", "tied", "tie_(bothbad)", "both_bad", "bothbad", "both", "draw", "neither", "equal", "none"])
NAMED = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant)_")
"""What may stand in front of an ending in a verdict: `model_a`."""


def field_error(data: Fields, column: str, problem: str, remedy: str = PAIR_HELP) -> InputError:
    name = column.split("[")[0]
    return InputError(column, displayed(data[name]) if name in data else "(no such column)", problem, remedy)


def text_in(data: Fields, column: str) -> str:
    value = data.get(column)
    if not isinstance(value, str):
        raise field_error(data, column, "missing" if value is None else "not a text")
    return value


def figure_in(data: Fields, column: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
        raise field_error(data, column, "missing" if value is None else "not a finite number")
    return float(value)


def parse_pairs(group: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of one row, or of neighbouring HelpSteer rows."""
    for row in group:
        with row.naming_errors():
            check_read(row.data, NOT_READ_OF_ROWS)
    with group[0].naming_errors():
        yield from pair_neighbours(group) if is_helpsteer(group[0].data) else parse_row(group[0])


def parse_row(row: Row) -> Iterator[Parsed]:
    """Yield the pairs of one row."""
    data = row.data
    shape = recognised(data)
    if shape is SCORED:
        asking = question_column(data)
        yield from pair_all(entries_of(row, "completions", "response", "overall_score", 1), as_prompt(data, asking))
    elif {"chosen", "rejected"} <= data.keys() and is_texts(data["rejected"]):
        yield from pair_right_and_wrong(row)
    elif {"chosen", "rejected"} <= data.keys():
        yield parse_pair(row)
    elif shape is JUDGED:
        yield parse_judged(row)
    elif {"prompt", "answers"} <= data.keys():
        # Ranks say in what order answers are, not by how much one is better.
        yield from pair_all(entries_of(row, "answers", "answer", "rank", -1), as_prompt(data, "prompt"), margins=False)
    elif compared := next((shape for shape in (HELPSTEER2, HELPSTEER3) if data.keys() >= {*shape.needs}), None):
        yield parse_compared(row, *compared.needs)
    else:
        problem = f"missing (the row has {', '.join(sorted(data)) or 'no columns'})"
        remedy = nearest_shape(data, (PREFERENCES,)) + PAIR_HELP
        raise field_error(data, "rejected" if "chosen" in data else "chosen", problem, remedy)


def answer_turns(data: Fields, column: str, prompt: Any) -> Messages:
    """Return the turns of one side of a pair, which may have the prompt in front of the answer."""
    value = data[column]
    if not isinstance(value, str):
        return as_messages(data, column, [value] if isinstance(value, dict) else value)
    if prompt is not None:
        return as_answer(value)
    if not HH_TURN.match(value.lstrip(" ")):
        problem = f"missing, and {column} is no transcript (\\n\\nHuman: … \\n\\nAssistant: …)"
        raise field_error(data, "prompt", problem)
    return transcript(value)


def parse_pair(row: Row) -> Parsed:
    data = row.data
    asking = question_column(data) or "prompt"
    prompt = data.get(asking)
    for column in ("chosen", "rejected"):
        value = data[column]
        if not isinstance(value, str | list | dict):
            raise field_error(data, column, "missing" if value is None else "neither a text nor a list of messages")
    if type(data["chosen"]) is not type(data["rejected"]):
        raise field_error(data, "rejected", "not of the same form as chosen")
    better, worse = (answer_turns(data, column, prompt) for column in ("chosen", "rejected"))
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise field_error(data, column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge")
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise field_error(data, "prompt", "missing")
        asked = as_prompt(data, asking)
    else:
        shared = count_shared(data, better, worse)
        asked = with_system_column(better[:shared], data)
        better = better[shared:]
        worse = worse[shared:]
        # A list names its messages and must be right; a string (UltraFeedback) repeats one of them, as a caption,
        # and so do `messages` that one of the answers ends.
        named = as_messages(data, asking, prompt) if isinstance(prompt, list) and asking != "messages" else ()
        if named and asked[-len(named) :] != named:
            raise field_error(data, asking, "not what chosen and rejected share")
    margin, high, low = (data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is not None:
        margin = figure_in(data, "margin", margin)
    elif high is not None and low is not None:  # UltraFeedback's
        margin = figure_in(data, "score_chosen", high) - figure_in(data, "score_rejected", low)
    return preference_of(row, asked, better, worse, margin), {}


def parse_judged(row: Row) -> Parsed:
    """Return the pair of two answers and a verdict that names the better one."""
    data = row.data
    columns = judged_columns_of(data)
    assert columns is not None
    verdict = read_verdict(data, columns)
    name = columns.verdict[0]
    remedy = WRITE.format(*columns.endings)
    number = as_number(data[name])
    if number is not None and number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNERS:
        # A code of another kind: 0 may be the first of two answers, or a tie, and a negative number a degree.
        problem = "may be the first answer, a tie or a degree"
        raise RefusedSource(name, displayed(data[name]), problem, remedy)
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise field_error(data, name, problem, remedy)
    if verdict == 0:
        return Drop.TIE
    answers: list[Any] = [data[name] for name in columns.answers]
    pair = {name: value for name, value in data.items() if name not in columns.answers}
    lists = [parse_texts(value) for value in (data.get("prompt"), *answers)]
    if columns.verdict == WINNERS and all(lists):  # the Kaggle form of LMSYS's arena
        del pair["prompt"]
        if len({*map(len, lists)}) > 1:
            raise field_error(data, columns.answers[0], "a list of texts of another length than the prompt's")
        answers = [as_turns(zip(lists[0], texts, strict=True)) for texts in lists[1:]]
    chosen, rejected = answers if verdict < 0 else reversed(answers)
    pair |= {"chosen": chosen, "rejected": rejected}
    if columns.verdict == WINNERS:
        check_values(pair)  # texts out of JSON in a text, which was not looked into before
    return parse_pair(row._replace(data=pair))


def read_verdict(row: Fields, columns: JudgedColumns) -> int | None:
    """Return which answer is better: -1 the first, 1 the second, 0 neither; None if that cannot be read.

    A number names the column that ends with it. Answers a and b are 1 and 2; 1.5 is in the middle. A text is an ending,
    a column, a model's name, or a tie.
    """
    if columns.verdict == WINNERS:
        first, second = (read_label(row[name]) for name in WINNERS)
        tie = read_label(row.get("winner_tie", False))
        if None in (first, second, tie) or bool(first) + bool(second) + bool(tie) > 1:
            return None
        return bool(second) - bool(first)
    value = row[columns.verdict[0]]
    if isinstance(value, str):
        models = [row.get("model_a"), row.get("model_b")]
        if value in models and models[0] != models[1]:
            return -1 if value == models[0] else 1
        words = re.sub(r"[ -]", "_", value.strip().strip("[]").casefold())
        if words in TIES:
            return 0
        value = NAMED.sub("", words)
        if value in columns.endings:
            return -1 if value == columns.endings[0] else 1
    places = {0.0: -1, 1.0: 1} if columns.endings == ("0", "1") else {1.0: -1, 1.5: 0, 2.0: 1}
    number = None if isinstance(value, bool) else as_number(value)
    return None if number is None else places.get(number)


def as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parse_texts(value: Any) -> list[str]:
    """Return a list of texts, which may stand as its JSON text; an empty list for anything else. A null is an empty
    text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        return []
    return [text or "" for text in value]


def is_texts(value: Any) -> bool:
    """Return whether a column is a list of texts, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def pair_right_and_wrong(row: Row) -> Iterator[Parsed]:
    """Yield each right answer over each wrong one, as one group."""
    right = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_texts(right):
        raise field_error(row.data, "chosen", "neither a text nor a list of texts, as rejected is one")
    prompt = as_prompt(row.data, question_column(row.data) or "prompt")
    name = label_in(row.data, "id") or row.name
    if "source" not in row.data and "subset" in row.data:  # as RewardBench calls it
        row = row._replace(data={**row.data, "source": row.data["subset"]})
    for (i, better), (j, worse) in product(enumerate(right), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
        else:
            pair = preference_of(row, prompt, as_answer(better), as_answer(worse), None, f"{name}/{i}>{j}", name)
            yield pair, {}


class ScoredAnswer(NamedTuple):
    """An answer to a prompt that several answer.

    Attributes:
        row: that it stands in.
        score: how good it is: higher is better.
        about: what else is said of it.
    """

    row: Row
    turns: Messages
    score: float
    about: Fields


def entries_of(row: Row, column: str, text: str, score: str, sign: int) -> list[ScoredAnswer]:
    """Return the entries of a list of answers, each with what else it says."""
    entries = row.data[column]
    if not isinstance(entries, list) or len(entries) < 2:
        raise field_error(row.data, column, "not a list of two or more answers")
    answers = list[ScoredAnswer]()
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text), str):
            raise field_error(row.data, f"{column}[{k}].{text}", "missing or not a text")
        figure = sign * figure_in(row.data, f"{column}[{k}].{score}", entry.get(score))
        about = {name: value for name, value in entry.items() if name != text and value is not None}
        answers.append(ScoredAnswer(row, as_answer(entry[text]), figure, about))
    return answers


def pair_neighbours(rows: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of HelpSteer's rows on one prompt."""
    if len(rows) == 1:
        yield Drop.UNPAIRED
    answers = list[ScoredAnswer]()
    for row in rows:
        with row.naming_errors():
            turns = as_answer(text_in(row.data, "response"))
            score = figure_in(row.data, "helpfulness", row.data["helpfulness"])
            answers.append(ScoredAnswer(row, turns, score, unread_columns(row, HELPSTEER)))
    yield from pair_all(answers, as_prompt(rows[0].data, "prompt"))


def pair_all(answers: Sequence[ScoredAnswer], prompt: Messages, margins: bool = True) -> Iterator[Parsed]:
    """Yield every pair of answers to one prompt, as one group.

    Args:
        margins: whether differences of scores say how much better an answer is.
    """
    group = answers[0].row.name
    for pair in combinations(enumerate(answers), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.turns == worse.turns:
            yield Drop.IDENTICAL
        else:
            margin = better.score - worse.score if margins else None
            with better.row.naming_errors():
                record = preference_of(better.row, prompt, better.turns, worse.turns, margin, f"{group}/{i}>{j}", group)
            about = {"chosen": dict(better.about), "rejected": dict(worse.about)}
            yield record, {side: said for side, said in about.items() if said}


def parse_compared(row: Row, asking: str, first: str, second: str, column: str) -> Parsed:
    """Return the pair of two answers and a verdict from -3, the first is much better, to 3, the second is."""
    answers = [as_answer(text_in(row.data, name)) for name in (first, second)]
    verdict = figure_in(row.data, column, row.data[column])
    if not -3 <= verdict <= 3:
        raise field_error(row.data, column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if answers[0] == answers[1]:
        return Drop.IDENTICAL
    best, worst = answers if verdict < 0 else reversed(answers)
    return preference_of(row, as_prompt(row.data, asking), best, worst, abs(verdict)), {}


def label_in(data: Fields, column: str) -> str:
    value = data.get(column)
    return "" if value is None else str(value)


def as_answer(text: str) -> Messages:
    return (Message("assistant", text),)


def preference_of(
    row: Row,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    data = row.data
    strength = data.get("strength")
    if strength is not None and type(strength) is not int:
        raise field_error(data, "strength", "not a whole number")
    tools = tools_of(data)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        sides = (("prompt", prompt), (side, answer))
        check_calls([(f"{name}[{i}]", turn) for name, part in sides for i, turn in enumerate(part)], tools)
    texts: dict[str, Any] = {
        name: label_in(data, name) for name in ("annotator", "guideline_version", "created_at", "scorer")
    }
    return Preference(
        prompt,
        chosen,
        rejected,
        id=id or label_in(data, "id") or label_in(data, "prompt_id") or row.name,
        group_id=label_in(data, "group_id") or group,
        margin=margin,
        source=label_in(data, "source") if "source" in data else row.name.rsplit(":", 1)[0],
        strength=strength,
        **{name: data.get(name) is not False for name in ENDED},
        **texts,
        tools=tools,
    )


def as_messages(data: Fields, column: str, value: Any) -> Messages:
    """Return a list of `{role, content}`, checked."""
    if not isinstance(value, list) or not value:
        raise field_error(data, column, "neither a text nor a list of messages")
    return tuple(message for _, message in share_gpt(value, column))


def as_prompt(data: Fields, column: str) -> Messages:
    """Return a prompt from messages, a transcript or a plain question; it ends before the assistant's turn."""
    value = data.get(column)
    if column == "instruction" and isinstance(value, str):
        turns = tuple(message for place, message in alpaca(data) if place not in ("output", "response"))
    elif isinstance(value, str):
        turns = transcript(value)
    else:
        turns = as_messages(data, column, value)
    turns = with_system_column(turns, data)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise field_error(data, column, "it holds no question to answer")
    return turns


def count_shared(data: Fields, chosen: Messages, rejected: Messages) -> int:
    """Return how many turns two whole conversations share: up to the last assistant turn from which both can go on."""
    last = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while count > 0 and not chosen[count].role == rejected[count].role == "assistant":
        count -= 1
    if count == 0:
        problem = "it shares no beginning with rejected"
        raise field_error(data, "chosen", problem, "Give the prompt in a column of its own.")
    return count


def write_preferences(path: str | Path, prefs: Sequence[Preference]) -> None:
    """Write JSON Lines (packed if the name ends in `.gz`) in TRL's conversational form; the same pairs, same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(as_row(pref), ensure_ascii=False) + "\n" for pref in prefs)
    blob = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes the very escape that JSON has
    if path.suffix == ".gz":
        blob = gzip.compress(blob, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, blob)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise StorageError("path", str(path), problem, "Choose a folder with room that you can write to.") from error


def as_row(pref: Preference) -> Mapping[str, Any]:
    """Return a pair as a row. `margin` is left out if nobody gave one: TRL takes the column's presence for its use."""
    row: dict[str, Any] = {name: [turn.as_dict() for turn in getattr(pref, name)] for name in PARTS[Preference]}
    names = ("id", "group_id", "annotator", "source", "strength", "guideline_version", "created_at")
    row |= {name: getattr(pref, name) for name in names}
    row |= {name: False for name in ENDED if not getattr(pref, name)}  # True is the rule
    if pref.scorer:
        row["scorer"] = pref.scorer
    if pref.tools:
        row["tools"] = [tool.as_dict() for tool in pref.tools]
    if pref.margin is not None:
        row["margin"] = pref.margin
    return row


# --- The records of a data set, one after another.

OURS = ColumnRules()
BACK = 64
"""Rows before a place that are looked at, to know what its row goes on with; many times more if they are none."""
ONE_VALUE = {str, int, float, bool}
"""Types of values of rows that were read, as JSON, CSV and Arrow give them: none is a subclass."""
NONE: Sizes = MappingProxyType({})
Found = tuple[Record, Fields, Fields, Sizes]
"""A record, and what `Read` calls its extra, its metadata and its sizes."""
LABELLED_HELP = 'A row holds {"prompt": "…", "completion": "…", "label": true}.'


class Read(NamedTuple):
    """One record of a data set.

    Attributes:
        number: of the row that it was read from, the last one if it was read from several. Several records may have
            one number, none a lower one than those before it.
        extra: the texts, numbers and flags that the row has in other columns, such as `split` or `created_at`.
            Conversations of one tree have a `group_id`.
        metadata: all columns of the row that are no part of the record, whatever they hold. Of a pair of two rows, or
            of two entries of a list, what else each says of its answer, as `chosen` and `rejected`.
        sizes: texts in columns that nothing reads, of the first record of a row, see
            `align.data.read.columns.text_sizes`.
    """

    number: int
    record: Record
    extra: Fields
    metadata: Fields = MappingProxyType({})
    sizes: Sizes = NONE


class Outcome(NamedTuple):
    """What became of a row, or of several that are read together: a record of theirs, or why there is none, or why they
    are refused.

    Attributes:
        begin: the number of the first of these rows.
    """

    begin: int
    result: Read | Drop | InputError


def read_outcomes(
    path: str, field: str = "data.path", rules: ColumnRules = OURS, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[Outcome]:
    """Yield what becomes of the rows of a data set, whatever its formats and shapes are, see
    `align.data.read.files.files_of`.

    Args:
        field: what the user calls the data set.
        rules: what the user says of columns.
        skip: rows up to this number are not read again, nor what else belongs to the record that they end with.
        counts: see `align.data.read.rows.placed_rows`.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptFile: it was cut or is damaged. The records before that are given first.
    """
    for group in groups_of(path, field, rules, skip, counts):
        begin = group[0].number
        try:
            if group[0].error is not None:
                raise group[0].error
            records = [*records_in(group, rules)]  # all of a group, or nothing
        except InputError as error:
            yield Outcome(begin, error)
            continue
        for record in records:
            yield Outcome(begin, record if isinstance(record, Drop) else Read(group[-1].number, *record))


def records_in(group: Sequence[Row], rules: ColumnRules = OURS) -> Iterator[Found | Drop]:
    """Yield the records of rows that are read together, each with what else its row has.

    Raises:
        InputError: a row has no shape, or says what cannot be kept.
    """
    row = group[0]
    shape = recognised(row.data)
    if shape is not None and shape in (TREE, TREE_MESSAGE):
        yield from tree_records(group, shape)
        return
    if len(group) > 1 and shape is not HELPSTEER:  # messages of a tree that are pairs besides
        for row in group:
            yield from records_in([row], rules)
        return
    extra = extra_of({**row.data, **row.aside})
    if shape is not None and shape.kind == PREFERENCES:
        shared = {} if shape is HELPSTEER else unread_columns(row, shape)
        sizes = sizes_in(group, shape)
        for pair in parse_pairs(group):
            if isinstance(pair, Drop):
                yield pair
                continue
            yield pair[0], extra, {**shared, **pair[1]}, sizes
            sizes = NONE
        return
    with row.naming_errors():
        if shape is None:
            asking = [shape for shape in CONVERSATIONS if row.data.get(shape.needs[0]) is not None]
            if len(asking) > 1 and row.data.keys().isdisjoint(PAIRS.needs):
                rules.check_answer(row.data, asking[0])
            raise unclear(row.data, (DOCUMENTS, PREFERENCES, FEEDBACK))
        metadata = unread_columns(row, shape)
        if shape is LABELLED:
            extra.pop(LABEL, None)
            record: Record = feedback_of(row.data, id_of(row))
        else:
            if row.data.get(LABEL) is not None:
                raise label_error(row.data, rules.keep([LABEL]))
            rules.check_answer(row.data, shape)
            record = document_of(row.data, id_of(row))
    yield record, extra, metadata, text_sizes(row, shape, metadata)


def tree_records(group: Sequence[Row], shape: Shape) -> Iterator[Found | Drop]:
    """Yield the conversations of a tree. What else the message says that a conversation ends with is its metadata."""
    row = group[0]
    tree = row.data.get("message_tree_id") or id_of(row)
    shared = extra_of({**row.data, **row.aside}) if shape is TREE else {}
    about = unread_columns(row, TREE) if shape is TREE else {}
    sizes = sizes_in(group, shape)
    for path in paths_of(group):
        if isinstance(path, Drop):
            yield path
            continue
        conversation, last = path
        of_last = unread_columns(row._replace(data=dict(last)), TREE_MESSAGE)
        of_last = {name: value for name, value in of_last.items() if name not in ("replies", *about)}
        extra = {**shared, **extra_of(last), "group_id": str(tree)}
        yield conversation, extra, {**about, **of_last}, sizes
        sizes = NONE


def paths_of(group: Sequence[Row]) -> Iterator[Any]:
    """Yield the conversations of a tree that is one row, or several."""
    return tree_of(group[0]) if is_tree(group[0].data) else flat_tree_of(group)


def sizes_in(group: Sequence[Row], shape: Shape) -> Sizes:
    """Return the sizes of texts in columns that nothing reads, of rows of one shape that are read together."""
    unread = UnreadColumns(OURS)
    for row in group:
        unread.add_row(row, shape)
    return unread.sizes


def extra_of(data: Fields) -> dict[str, Any]:
    """Return the columns of a row that are no part of what it says, and hold one value."""
    return {name: value for name, value in data.items() if name not in COLUMNS and type(value) in ONE_VALUE}


# --- Rows as the shapes need them: with the columns' names mapped, a table's cells as values, and read together if a
# record stands in several.


def groups_of(
    path: str | Path, field: str, rules: ColumnRules | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """Yield the rows of a data set, those together that are read together: HelpSteer's neighbours on one prompt, and
    the messages of a tree; others alone, those that are none among them. What is refused within a group stands behind
    it.

    Args:
        rules: what becomes of the columns; None gives rows as they stand in the files, as evaluation sets are read.
        skip: rows up to this number were read before, and with them the whole group that the last of them is in.
        counts: see `align.data.read.rows.placed_rows`.
    """
    held = list[Row]()
    refused = list[Row]()
    neighbours = Neighbours()
    shared: Any = None
    unknown = object()
    before: Any = unknown if skip else None
    for row in ready_rows(placed_rows(path, field, skip, counts), rules):
        key = None
        if row.error is None:
            key = neighbours.key(row.data)
            if key is not None and before is unknown:
                neighbours, before = key_before(path, field, rules, skip, counts)
                key = neighbours.key(row.data)
            if key is not None and key == before:  # it goes on with a group that was read before
                continue
            before = None
        else:
            refused.append(row)
        if row.error is None and held and (key is None or key != shared):
            yield held
            held = []
        if not held:
            yield from ([other] for other in refused)
            refused = []
        if row.error is None and key is None:
            yield [row]
        elif row.error is None:
            held.append(row)
            shared = key
    if held:
        yield held
    yield from ([other] for other in refused)


def key_before(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> tuple[Neighbours, Any]:
    """Return what gives keys to the rows behind `skip`, and the key of the last row up to there that is one."""
    back = BACK
    while True:
        neighbours = Neighbours()
        key = unknown = object()
        for row in ready_rows(placed_rows(path, field, max(0, skip - back), counts), rules):
            if row.number > skip:
                break
            if row.error is None:
                key = neighbours.key(row.data)
        if key is not unknown or back >= skip:
            return neighbours, key
        back *= BACK


def ready_rows(rows: Iterator[Row], rules: ColumnRules | None) -> Iterator[Row]:
    """Yield rows with values in place of the texts of tables, and with `rules` applied to their columns. A row to which
    the rules cannot be applied has an error."""
    for row in rows:
        if row.error is None and (rules or row.texts):
            try:
                row = rules.apply(row) if rules else row._replace(data=CELLS.typed(row.data))
            except InputError as error:
                row = row._replace(error=row.located(error))
        yield row


class Neighbours:
    """What rows behind one another share if they are read together; None for a row that stands alone."""

    def __init__(self) -> None:
        self.trees = 0

    def key(self, row: Fields) -> Any:
        if is_helpsteer(row):
            return "HelpSteer", json.dumps(row["prompt"])
        if is_tree_message(row):
            self.trees += row.get("parent_id") is None
            tree = row.get("message_tree_id")
            return "tree", self.trees if tree is None else str(tree)
        return None


# --- All records of one kind.


def grouped_rows(
    path: str | Path, field: str, bad_rows: BadRows, rules: ColumnRules | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of a data set, those together that are read together. `bad_rows` gets rows that are none."""
    for group in groups_of(path, field, rules):
        if group[0].error is None:
            yield group
        else:
            bad_rows.take(group[0].error)


class Reading(NamedTuple):
    """The records of a data set that were read at once, how many rows there were, and what made no record."""

    records: list[Any]
    rows: int
    drops: Counter[Drop]


def read_all(
    path: str | Path,
    field: str,
    skips: bool,
    rules: ColumnRules,
    parse_group: Callable[[Sequence[Row], UnreadColumns], Iterator[Any]],
    together: bool = True,
    drops_count: bool = False,
) -> Reading:
    """Read all records of a data set.

    Args:
        field: what the user calls the data set.
        skips: rows that are refused are left out. Without, the data set is refused.
        rules: what the user says of columns.
        parse_group: yields the records of rows that are read together, or why they make none.
        together: False if neighbours on one prompt are read alone.
        drops_count: a data set of drops alone is no data set of refused rows.

    Raises:
        InputError: there is no such file, a row is refused, or a column holds texts that nothing reads.
        CorruptFile: a file was cut or is damaged.
    """
    bad_rows = BadRows(skips)
    unread = UnreadColumns(rules)
    reading = Reading([], 0, Counter())
    count = 0
    for group in grouped_rows(path, field, bad_rows, rules):
        count += len(group)
        alone = not together and not is_tree_message(group[0].data)
        for part in [[row] for row in group] if alone else [group]:
            with bad_rows:
                parsed = list(parse_group(part, unread))  # all of a group, or nothing
                reading.drops.update(record for record in parsed if isinstance(record, Drop))
                reading.records.extend(record for record in parsed if not isinstance(record, Drop))
    bad_rows.settle(path, len(reading.records) + (reading.drops.total() if drops_count else 0))
    unread.check(field, str(path))
    if unread.sizes:
        print(f"columns of {path} kept as metadata: {', '.join(unread.sizes)}")
    return reading._replace(rows=count)


def read_documents(
    path: str | Path,
    field: str = "data.path",
    skips: bool = False,
    answered: bool = False,
    rows: bool = False,
    rules: ColumnRules = OURS,
) -> list[Document]:
    """Return the documents of a data set, in its order, see `read_all`.

    Args:
        answered: a question has to have an answer beside it, in a column that may be null: without, a misspelt column
            would make questions of rows to train on.
        rows: conversations keep the other columns of their rows, for what checks answers.

    Raises:
        InputError: as `read_all`; or there is no row, or rows say nothing to learn from.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Document | Drop]:
        row = group[0]
        if is_tree_message(row.data) or is_tree(row.data):
            yield from (path if isinstance(path, Drop) else path[0] for path in paths_of(group))
            for message in group:
                unread.add_row(message, TREE if is_tree(row.data) else TREE_MESSAGE)
            return
        with row.naming_errors():
            shape = DOCUMENT_SHAPES[shape_column(row.data)]
            if not rows:
                rules.check_answer(row.data, shape)
            document = document_of(row.data, id_of(row), answered, rows, row.aside)
        unread.add_row(row, shape, rows)
        yield document

    reading = read_all(path, field, skips, rules, parse_group, together=False)
    require(bool(reading.records), field, str(path), "is empty", "Give at least one row.")
    for drop, count in reading.drops.items():
        print(f"left out {count} path{'s' if count > 1 else ''} of {path}: {drop.value}")
    return reading.records


def read_preferences(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> list[Preference]:
    """Return the pairs of a data set in its order, see `read_all`. Prints how many were left out because no answer of
    theirs is preferred.

    Raises:
        InputError: as `read_all`; or there is no row, or no pair.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Preference | Drop]:
        yield from (pair if isinstance(pair, Drop) else pair[0] for pair in parse_pairs(group))
        for row in group:
            unread.add_row(row, recognised(row.data) or PAIRS)

    pairs, rows, drops = read_all(path, field, skips, rules, parse_group, drops_count=True)
    require(rows > 0, field, str(path), "is empty", PAIR_HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    tally("dropped_undecided", drops.total())
    if drops:
        print(f"{drops.total()} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def answers_of_file(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> list[Feedback]:
    """Return the answers with a label of a file, see `read_all`. Raises InputError if a row is something else."""

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Feedback | Drop]:
        for found in records_in(group, rules):
            if isinstance(found, Drop):
                yield found
                continue
            record, extra, _, sizes = found
            unread.add(sizes)
            if not isinstance(record, Feedback):
                problem = "it is no answer with a label, true or false"
                raise InputError(f"{group[-1].where}, {LABEL}", extra.get(LABEL, "(none)"), problem, LABELLED_HELP)
            yield replace(record, id=str(extra["id"])) if "id" in extra else record

    answers = read_all(path, field, skips, rules, parse_group).records
    require(bool(answers), field, str(path), "holds no answer with a label", LABELLED_HELP)
    return answers
