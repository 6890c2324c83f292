"""Fenced blocks of Markdown in an answer."""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """What stands between two fences.

    Attributes:
        language: the first word behind the opening fence, in lower case; may be empty.
        text: the lines between. Of a block that nobody closed, all that follow.
    """

    language: str
    text: str


def blocks(answer: str) -> list[Block]:
    """The fenced blocks of an answer, in order. A fence is a line that begins with three backticks or tildes; one that
    is indented counts too, for models write blocks into lists."""
    found, inside, language, mark = list[Block](), None, "", ""
    for line in answer.split("\n"):
        bare = line.strip()
        if inside is None and bare.startswith(("```", "~~~")):
            mark = bare[:3]
            label = bare.lstrip(mark[0]).split(maxsplit=1)
            inside, language = list[str](), label[0].lower() if label else ""
        elif inside is not None and bare.startswith(mark) and not bare.strip(mark[0]):
            found.append(Block(language, "\n".join(inside)))
            inside = None
        elif inside is not None:
            inside.append(line)
    return found if inside is None else [*found, Block(language, "\n".join(inside))]
