"""Steps that look at how good a text is: its length, whether it repeats itself, and phrases that no model should learn
to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from align.core.errors import InputError, require
from align.core.files import read_text
from align.core.types import Document, Record
from align.data.clean.outcome import Drop, check_choice, check_share, check_whole, imitated, sequences
from align.data.ngrams import iter_ngrams
from align.data.read.content import list_texts

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
        require(
            self.least is not None or self.most is not None,
            "least",
            None,
            "there is no limit",
            "Give least, most or both.",
        )
        require(
            self.least is None or self.most is None or self.least <= self.most,
            "least",
            self.least,
            f"is more than most ({self.most}), and nothing is kept",
            "Exchange the two.",
        )
        check_choice("by", self.by, BY)
        require(
            self.by != "tokens" or self.count_tokens is not None,
            "by",
            self.by,
            "there is no model whose tokens could be counted",
            "Name one with model=, or count by words or characters.",
        )

    def __call__(self, record: Record) -> Record | Drop:
        lengths = [*map(self._measured, sequences(record))]
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
        found = list_texts(one)
        return word_count("\n".join(found)) if self.by == "words" else sum(map(len, found))


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
            if (
                self.lines is not None
                and (share := repeated_lines(text)) > self.lines
                and len(words(text)) >= self.least_words
            ):
                return Drop("repetition: lines", f"{share:.2f} of the characters, most: {self.lines:g}")
            if self.grams is not None and (share := repeated_grams(text, self.grams, self.least_words)) > self.grams:
                return Drop("repetition: words", f"{share:.2f} of the {N}-grams, most: {self.grams:g}")
        return record


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
    return 1 - len(set(iter_ngrams(found, N))) / count


def words(text: str) -> list[str]:
    """Words in small letters as spaces part them; in Chinese and Japanese, characters."""
    unparted = not text.isascii() and CHARACTER_WORDS.search(text)
    return TOKEN.findall(text.lower()) if unparted else text.lower().split()


OURS = Path(__file__).with_name("boilerplate.txt")
BEGINNING = 200
"""Characters of an answer that a refusal begins in. Further on, the same words are about something else."""
HEADER = re.compile(r"\[([^\[\],]+)(?:,\s*(beginning))?\]")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
"""What is shown and not said: an answer may explain markup."""
APOSTROPHES = str.maketrans("’‘ʼ", "'''")


@dataclass(frozen=True, slots=True)
class Phrases:
    """Phrases that are counted by one name, in small letters.

    Attributes:
        beginning: they are looked for at the beginning of an answer alone.
    """

    name: str
    phrases: tuple[str, ...]
    beginning: bool = False

    def said_in(self, answers: Sequence[str], phrase: str) -> bool:
        """Whether an answer says the phrase where this group is looked for."""
        return any(stands_alone(phrase, text[:BEGINNING] if self.beginning else text) for text in answers)


@dataclass(frozen=True, slots=True)
class Boilerplate:
    """Leaves out records with an answer that says one of these phrases, outside of code.

    Args:
        groups: what is looked for.
    """

    groups: tuple[Phrases, ...]

    @classmethod
    def of(cls, patterns: str | None = None) -> Boilerplate:
        """Args:
        patterns: a file of phrases in place of ours, which are English; see `boilerplate.txt` for the format.
        """
        require(isinstance(patterns, str | None), "patterns", patterns, "is no file", "Name a file of phrases.")
        return cls(read_phrases(OURS if patterns is None else Path(patterns)))

    def __call__(self, record: Record) -> Record | Drop:
        answers = [plainly(text) for text in imitated(record)]
        together = "\n".join(answers)  # one look a phrase: nearly all records have none
        for group in self.groups:
            for phrase in group.phrases:
                if phrase in together and group.said_in(answers, phrase):
                    return Drop(f"boilerplate: {group.name}", phrase)
        return record


def plainly(text: str) -> str:
    """What an answer says in small letters, its code left out, its spaces and ends of lines single spaces."""
    if "`" in text:
        text = CODE.sub(" ", text)
    if not text.isascii():
        text = text.translate(APOSTROPHES)
    text = text.lower()
    return " ".join(text.split()) if "\n" in text or "  " in text or "\t" in text else text


def stands_alone(phrase: str, text: str) -> bool:
    """Whether a phrase is in a text as whole words: `as an ai` is not in `as an aide`."""
    at = text.find(phrase)
    while at >= 0:
        before, behind = text[at - 1 : at] if at else "", text[at + len(phrase) : at + len(phrase) + 1]
        joined_before = phrase[0].isalnum() and before.isalnum()
        if not joined_before and not (phrase[-1].isalnum() and behind.isalnum()):
            return True
        at = text.find(phrase, at + 1)
    return False


def read_phrases(path: Path) -> tuple[Phrases, ...]:
    """The groups of a file.

    Raises:
        InputError: it cannot be read, a phrase stands before the first group, or there is no phrase.
    """
    lines = read_text(path, "patterns", "Name a text file in UTF-8.", "utf-8-sig").splitlines()
    names: dict[tuple[str, bool], list[str]] = {}
    group: list[str] | None = None
    for number, line in enumerate(lines, 1):
        phrase = plainly(line).strip()
        if not phrase or phrase.startswith("#"):
            continue
        if header := HEADER.fullmatch(phrase):
            group = names.setdefault((header[1].strip(), header[2] is not None), [])
        elif group is None:
            raise InputError(
                f"patterns, {path.name}, row {number}",
                phrase,
                "stands in no group",
                "Begin a group above it: a line such as [refusal].",
            )
        else:
            group.append(phrase)
    found = tuple(Phrases(name, tuple(phrases), place) for (name, place), phrases in names.items() if phrases)
    require(bool(found), "patterns", str(path), "has no phrases", "Write one a line, below a line such as [refusal].")
    return found
