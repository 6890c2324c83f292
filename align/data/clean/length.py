"""Length, in whatever it is counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from align.data.clean.arguments import check_choice, check_whole
from align.data.clean.outcome import Drop, sequences
from align.data.read.content import texts
from align.errors import require
from align.types import Document, Record

BY = ("characters", "words", "turns", "tokens")
CountTokens = Callable[[Document], int]
"""Tokens of a conversation, or of plain text, as a model reads it."""
CHARACTER_WORDS = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Chinese and Japanese, where a character is counted as a word."""
RUNS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,6}")
"""Thai, Lao, Burmese and Khmer, where words are not parted: about six characters are counted as a word."""
UNPARTED = re.compile(f"{CHARACTER_WORDS.pattern}|{RUNS.pattern}")


def word_count(text: str) -> int:
    """Words of a text; of scripts that do not part them, about as many."""
    parted = len(text.split())
    if text.isascii() or not UNPARTED.search(text):
        return parted
    return max(parted, len(CHARACTER_WORDS.findall(text)) + len(RUNS.findall(text)))


@dataclass(frozen=True, slots=True)
class Length:
    """Keeps records from `least` to `most` long, both included. A pair is as long as its prompt with either answer: the
    shorter is measured by `least`, the longer by `most`. Calls of tools count by the texts of their arguments, and
    schemas of tools by tokens alone.

    Args:
        least, most: at least one of them.
        by: what is counted.
        count_tokens: for `tokens`; the stage hands it in.
    """

    least: int | None = None
    most: int | None = None
    by: str = "words"
    count_tokens: CountTokens | None = None

    def __post_init__(self) -> None:
        check_whole("least", self.least)
        check_whole("most", self.most)
        require(self.least is not None or self.most is not None, "least", None, "there is no limit",
                "Give least, most or both.")  # fmt: skip
        require(self.least is None or self.most is None or self.least <= self.most, "least", self.least,
                f"is more than most ({self.most}), and nothing is kept", "Exchange the two.")  # fmt: skip
        check_choice("by", self.by, BY)
        require(self.by != "tokens" or self.count_tokens is not None, "by", self.by,
                "there is no model whose tokens could be counted",
                "Name one with model=, or count by words or characters.")  # fmt: skip

    def __call__(self, record: Record) -> Record | Drop:
        lengths = [self._measured(one) for one in (sequences(record) if not isinstance(record, str) else [record])]
        if self.least is not None and min(lengths) < self.least:
            return Drop("too short", f"{min(lengths)} {self.by}, least: {self.least}")
        if self.most is not None and max(lengths) > self.most:
            return Drop("too long", f"{max(lengths)} {self.by}, most: {self.most}")
        return record

    def _measured(self, one: Document) -> int:
        if self.by == "turns":
            return 0 if isinstance(one, str) else sum(turn.role != "system" for turn in one.messages)
        if self.count_tokens is not None and self.by == "tokens":
            return self.count_tokens(one)
        found = texts(one)
        return word_count("\n".join(found)) if self.by == "words" else sum(map(len, found))
