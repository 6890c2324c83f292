"""Fenced blocks of Markdown in an answer."""

from __future__ import annotations

from typing import NamedTuple


class FencedBlock(NamedTuple):
    """A fenced block of Markdown: its label and its text.

    Attributes:
        language: the first word after the opening fence, in lower case; may be empty.
        text: the lines of the block. A block without a closing fence goes on to the end of the answer.
    """

    language: str
    text: str


def find_fenced_blocks(answer: str) -> list[FencedBlock]:
    """Return the fenced Markdown blocks of an answer, in order, with their languages and texts.

    A fence is a line that begins with three backticks or tildes. It may be indented, because models write blocks into
    lists.
    """
    fenced: list[FencedBlock] = []
    lines: list[str] | None = None
    language = ""
    mark = ""
    for line in answer.split("\n"):
        bare = line.strip()
        if lines is None:
            if bare.startswith(("```", "~~~")):
                mark = bare[:3]
                label = bare.lstrip(mark[0]).split(maxsplit=1)
                language = label[0].lower() if label else ""
                lines = []
        elif bare.startswith(mark) and not bare.strip(mark[0]):
            fenced.append(FencedBlock(language, "\n".join(lines)))
            lines = None
        else:
            lines.append(line)
    if lines is not None:
        fenced.append(FencedBlock(language, "\n".join(lines)))
    return fenced
