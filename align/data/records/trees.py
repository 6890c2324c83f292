"""Trees of messages, OASST's: every path from the root to a leaf that the assistant wrote is a conversation.

A tree is one row, whose messages have their `replies` within them, or a row a message (`message_id`, `parent_id`,
`text`, `role`). Rows of one tree stand together: only one tree is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.data.formats.rows import Row
from align.data.records.drops import Drop
from align.data.records.messages import NOT_READ, check_read
from align.data.records.refusals import refused
from align.data.records.tools import CALLS, RESULTS
from align.errors import require
from align.types import Conversation, Message

SPEAKERS = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
TOOLS = "trees with tool calls and their results are not read, and an answer without them means something else"
NOT_READ_OF_TREES = {**NOT_READ, **dict.fromkeys((*CALLS, "tool_call_id"), TOOLS)}
TOGETHER = "Sort the rows so that those of one message_tree_id stand together."


class Node(NamedTuple):
    """A message of a tree.

    Attributes:
        data: its fields.
        where: file and row that it stands in.
        place: within the row, with a dot behind it; empty where the row is the message.
        id: of the conversation that ends with it.
    """

    data: Mapping[str, Any]
    where: str
    place: str
    id: str


Found = tuple[Conversation, Mapping[str, Any]]
"""A conversation, and the message that it ends with."""


def is_tree(row: Mapping[str, Any]) -> bool:
    """Whether a row is a whole tree."""
    root = row if "replies" in row else row.get("prompt")
    return isinstance(root, dict) and {"replies", "role", "text"} <= root.keys()


def is_tree_message(row: Mapping[str, Any]) -> bool:
    """Return whether a row is one message of a tree, as OASST's flat files have them."""
    named = "message_id" in row and ("parent_id" in row or "message_tree_id" in row)
    return named and "role" in row and "text" in row


def tree_of(row: Row, id: str) -> Iterator[Found | Drop]:
    """The conversations of a row that is a whole tree."""
    inside = "" if "replies" in row.data else "prompt."
    root = Node(row.data["prompt"] if inside else row.data, row.where, inside, id)

    def replies(node: Node) -> list[Node]:
        given = node.data.get("replies") or []
        if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
            raise refused(
                node.where, f"{node.place}replies", given, "is no list of messages", "Write [{role, text}, …]."
            )
        return [
            Node(one, node.where, f"{node.place}replies[{i}].", f"{node.id}/{i}" if len(given) > 1 else node.id)
            for i, one in enumerate(given)
        ]

    yield from conversations(root, replies)


def flat_tree_of(rows: Sequence[Row], id_of: Callable[[Row], str]) -> Iterator[Found | Drop]:
    """The conversations of rows that are the messages of one tree.

    Raises:
        InputError: a message answers none of these, or two have one id.
    """
    nodes = [Node(row.data, row.where, "", id_of(row)) for row in rows]
    answers: dict[Any, list[Node]] = {}
    known: dict[str, Node] = {}
    for node in nodes:
        name = str(node.data["message_id"])
        require(name not in known, f"{node.where}, message_id", name, "stands twice in its tree", TOGETHER)
        known[name] = node
        answers.setdefault(parent(node), []).append(node)
    for node in nodes:
        if parent(node) is not None and parent(node) not in known:
            problem = "no row of its tree that stands beside it has this message_id"
            raise refused(node.where, "parent_id", node.data["parent_id"], problem, TOGETHER)
    reached = 0
    for root in answers.get(None, []):
        reached += sum(1 for _ in below(root, answers))
        yield from conversations(root, lambda node: answers.get(str(node.data["message_id"]), []))
    problem = "messages of its tree answer each other in a circle"
    require(reached == len(nodes), f"{nodes[0].where}, parent_id", nodes[0].data.get("parent_id"), problem, TOGETHER)


def parent(node: Node) -> str | None:
    given = node.data.get("parent_id")
    return None if given is None else str(given)


def below(root: Node, answers: Mapping[Any, list[Node]]) -> Iterator[Node]:
    """A message and all that answers it."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        waiting += answers.get(str(node.data["message_id"]), [])
        yield node


def conversations(root: Node, replies: Callable[[Node], Sequence[Node]]) -> Iterator[Found | Drop]:
    """One conversation for each path that ends with the assistant, in the order of the replies."""
    waiting: list[tuple[tuple[Message, ...], Node]] = [((), root)]
    while waiting:
        said, node = waiting.pop()
        if node.data.get("deleted") is True:
            yield Drop.DELETED
            continue
        said = (*said, message(node))
        answers = replies(node)
        waiting += [(said, answer) for answer in reversed(answers)]
        if not answers:
            answered = said[-1].role == "assistant"
            yield (Conversation(said, node.id), node.data) if answered else Drop.UNANSWERED


def message(node: Node) -> Message:
    """Raises: InputError: it has no text, or somebody else says it."""
    check_read(node.data, NOT_READ_OF_TREES, node.where, node.place)
    role, text = node.data.get("role"), node.data.get("text")
    if isinstance(role, str) and role in RESULTS:
        remedy = "Write the paths as conversations of `messages`, or leave such trees out."
        raise refused(node.where, f"{node.place}role", role, TOOLS, remedy)
    if not isinstance(role, str) or role not in SPEAKERS:
        raise refused(node.where, f"{node.place}role", role, f"is none of {', '.join(SPEAKERS)}", "Rename the role.")
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise refused(node.where, f"{node.place}text", text, problem, "Give its text, or leave the tree out.")
    return Message(SPEAKERS[role], text)
