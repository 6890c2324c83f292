"""Parsers of message trees (OASST): every path from the root to a leaf of the assistant is a conversation.

A tree is one row with nested `replies`, or one row per message (`message_id`, `parent_id`, `text`, `role`). The rows of
a tree must follow one another, as only one tree is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.core.errors import require
from align.core.types import Conversation, Message
from align.data.read.drops import Drop
from align.data.read.messages import (
    CALL_FIELDS,
    LEAVE_OUT_HELP,
    RESULT_ROLES,
    UNSUPPORTED_FIELDS,
    Fields,
    build_field_error,
    check_unsupported_fields,
)
from align.data.read.rows import Row, build_row_id

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
