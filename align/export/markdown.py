"""Markdown that no name or text can break out of."""

from __future__ import annotations

from typing import Any


def table(headers: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "".join("| " + " | ".join(one_line(cell) for cell in line) + " |\n" for line in lines)


def one_line(text: Any) -> str:
    """One line that no table cell, code span or tag can be broken out of."""
    for mark, stand_in in (("|", "\\|"), ("`", "'"), ("<", "&lt;")):
        text = str(text).replace(mark, stand_in)
    return " ".join(text.split())


def code_span(text: str) -> str:
    """A text as code, in which nothing but the backtick means something."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
