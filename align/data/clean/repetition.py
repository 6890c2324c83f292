"""Answers that repeat themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from align.data.clean.arguments import check_share, check_whole
from align.data.clean.length import CHARACTER_WORDS
from align.data.clean.outcome import Drop, imitated
from align.data.ngrams import ngrams
from align.types import Record

N = 5
RULES = "\\s\\-=_*#~.+─━═"
"""Characters that rules and tables are drawn with."""
STRIDE = 16
FOUR = re.compile(rf"([^{RULES}])\1{{3}}")
"""A run of 4 · STRIDE characters is four in a row among every STRIDE-th one, wherever it begins."""
TOKEN = re.compile(f"{CHARACTER_WORDS.pattern}|[^\\s{CHARACTER_WORDS.pattern[1:-1]}]+")


@dataclass(frozen=True, slots=True)
class Repetition:
    """Leaves out records whose answers repeat themselves. Each bound may be null, and is then not looked at.

    Source of the two shares: Rae et al. 2021, arXiv 2112.11446, table A1, which bounds the characters in repeated
    5-grams by 0.15 and those in repeated lines by 0.20, in documents of at least 50 words. N-grams are counted here
    instead of their characters.

    Args:
        grams: share of an answer's 5-grams of words that it had already used.
        lines: share of an answer's characters in lines that it had already used.
        run: times that one character follows itself; rules and tables are passed over.
        least_words: shorter answers are not measured by the two shares.
    """

    grams: float | None = 0.15
    lines: float | None = 0.20
    run: int | None = 64
    least_words: int = 50

    def __post_init__(self) -> None:
        check_share("grams", self.grams)
        check_share("lines", self.lines)
        check_whole("run", self.run, least=4 * STRIDE)
        check_whole("least_words", self.least_words, least=N)

    def __call__(self, record: Record) -> Record | Drop:
        answers = imitated(record)
        if self.run is not None and (found := long_run("\n".join(answers), self.run)):
            return Drop("repetition: characters", f"{found!r} {self.run} times")
        for text in answers:
            if len(text) < 2 * self.least_words:  # a word takes a character and a space
                continue
            if self.lines is not None and (share := repeated_lines(text)) > self.lines and self._is_long(text):
                return Drop("repetition: lines", f"{share:.2f} of the characters, most: {self.lines:g}")
            if self.grams is not None and (share := repeated_grams(text, self.grams, self.least_words)) > self.grams:
                return Drop("repetition: words", f"{share:.2f} of the {N}-grams, most: {self.grams:g}")
        return record

    def _is_long(self, text: str) -> bool:
        return len(words(text)) >= self.least_words


def long_run(text: str, run: int) -> str:
    """A character that follows itself at least `run` times, `run` ≥ 4 · STRIDE; empty where there is none."""
    if not FOUR.search(text[::STRIDE]):
        return ""
    found = re.search(rf"([^{RULES}])\1{{{run - 1}}}", text)
    return found[1] if found else ""


def repeated_lines(text: str) -> float:
    """Share of a text's characters in lines that it had already used, in [0, 1]; blank lines are passed over."""
    if "\n" not in text:
        return 0.0
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    once = set(lines)
    if len(once) == len(lines):
        return 0.0
    return 1 - sum(map(len, once)) / sum(map(len, lines))


def repeated_grams(text: str, bound: float, least_words: int) -> float:
    """Share of a text's n-grams of words that it had already used, in [0, 1]; 0 for texts of fewer words, and where a
    look at pairs of words shows that it is at most `bound`.

    Of W words with P different pairs, at least P - (n - 2) of the W - n + 1 n-grams are different: each pair that is
    new ends an n-gram that is new, but for those among the first n - 2 pairs.
    """
    found = words(text)
    count = len(found) - N + 1
    if len(found) < least_words:
        return 0.0
    pairs = len(set(pairwise(found)))
    if count - (pairs - N + 2) <= bound * count:
        return 0.0
    return 1 - len(set(ngrams(found, N))) / count


def words(text: str) -> list[str]:
    """Words in small letters as spaces part them; in Chinese and Japanese, characters."""
    unparted = not text.isascii() and CHARACTER_WORDS.search(text)
    return TOKEN.findall(text.lower()) if unparted else text.lower().split()
