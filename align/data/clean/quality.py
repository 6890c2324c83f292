"""Cleaning steps for the quality of texts: their length, repetition, and phrases that a model should not learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from align.core.errors import InputError, require
from align.core.files import read_text
from align.core.types import Document, Record
from align.data.clean.outcome import (
    Drop,
    check_choice,
    check_optional_integer,
    check_optional_share,
    list_documents,
    list_trained_texts,
)
from align.data.ngrams import iter_ngrams
from align.data.read.content import list_texts

UNITS = ("characters", "words", "turns", "tokens")
CountTokens = Callable[[Document], int]
"""A function that returns the number of tokens of a document in training."""
CHARACTER_WORDS = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Pattern of Chinese and Japanese characters, each of which counts as a word."""
RUNS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,6}")
"""Runs of up to six characters in Thai, Lao, Burmese and Khmer, which do not separate words. Each counts as a word."""
UNSPACED = re.compile(f"{CHARACTER_WORDS.pattern}|{RUNS.pattern}")


def count_words(text: str) -> int:
    """Return the number of words of a text, which is an estimate for scripts without spaces between words."""
    n_spaced = len(text.split())
    if text.isascii() or not UNSPACED.search(text):
        return n_spaced
    return max(n_spaced, len(CHARACTER_WORDS.findall(text)) + len(RUNS.findall(text)))


@dataclass(frozen=True, slots=True)
class LengthFilter:
    """Cleaning step that keeps records whose length in words, characters, turns or tokens is from `least` to `most`.

    A pair has two lengths, that of its prompt with each answer: the shorter one must reach `least`, and the longer one
    must not exceed `most`. Tool calls count with the texts of their arguments, and schemas of tools only in tokens.

    Args:
        least, most: bounds; at least one of them is required.
        by: unit of the length.
        count_tokens: counts tokens, for `by=tokens`. The stage sets it.
    """

    least: int | None = None
    most: int | None = None
    by: str = "words"
    count_tokens: CountTokens | None = None

    def __post_init__(self) -> None:
        check_optional_integer("least", self.least)
        check_optional_integer("most", self.most)
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
            "Swap the two.",
        )
        check_choice("by", self.by, UNITS)
        require(
            self.by != "tokens" or self.count_tokens is not None,
            "by",
            self.by,
            "there is no model whose tokens could be counted",
            "Name one with model=, or count by words or characters.",
        )

    def __call__(self, record: Record) -> Record | Drop:
        lengths = [*map(self._measure_length, list_documents(record))]
        if self.least is not None and min(lengths) < self.least:
            return Drop("too short", f"{min(lengths)} {self.by}, least: {self.least}")
        if self.most is not None and max(lengths) > self.most:
            return Drop("too long", f"{max(lengths)} {self.by}, most: {self.most}")
        return record

    def _measure_length(self, document: Document) -> int:
        if self.by == "turns":
            return 0 if isinstance(document, str) else sum(turn.role != "system" for turn in document.messages)
        if self.count_tokens is not None and self.by == "tokens":
            return self.count_tokens(document)
        parts = list_texts(document)
        return count_words("\n".join(parts)) if self.by == "words" else sum(map(len, parts))


N = 5
"""Number of words in an n-gram."""
RULES = "\\s\\-=_*#~.+─━═"
"""Characters of horizontal rules and tables."""
STRIDE = 16
FOUR = re.compile(rf"([^{RULES}])\1{{3}}")
"""Four equal characters in a row. If a text has a run of 4 · STRIDE equal characters, every STRIDE-th character of it
matches."""
TOKEN = re.compile(f"{CHARACTER_WORDS.pattern}|[^\\s{CHARACTER_WORDS.pattern[1:-1]}]+")


@dataclass(frozen=True, slots=True)
class RepetitionFilter:
    """Cleaning step that leaves out records whose answers repeat n-grams, lines or a character too often. A bound of
    null is not checked.

    The defaults of the two shares are those of Rae et al. 2021, arXiv 2112.11446, table A1, which bounds the characters
    in repeated 5-grams by 0.15 and those in repeated lines by 0.20, in documents of at least 50 words. Here the n-grams
    are counted instead of their characters.

    Args:
        grams: maximum share of an answer's 5-grams of words that repeat earlier ones.
        lines: maximum share of an answer's characters in lines that repeat earlier ones.
        run: number of equal characters in a row from which a record is left out. Rules and tables do not count.
        least_words: the two shares are not checked for shorter answers.
    """

    grams: float | None = 0.15
    lines: float | None = 0.20
    run: int | None = 64
    least_words: int = 50

    def __post_init__(self) -> None:
        check_optional_share("grams", self.grams)
        check_optional_share("lines", self.lines)
        check_optional_integer("run", self.run, minimum=4 * STRIDE)
        check_optional_integer("least_words", self.least_words, minimum=N)

    def __call__(self, record: Record) -> Record | Drop:
        answers = list_trained_texts(record)
        if self.run is not None and (character := find_long_run("\n".join(answers), self.run)):
            return Drop("repetition: characters", f"{character!r} {self.run} times")
        for text in answers:
            if len(text) < 2 * self.least_words:  # a word takes a character and a space
                continue
            if (
                self.lines is not None
                and (share := compute_repeated_line_share(text)) > self.lines
                and len(split_lowercase_words(text)) >= self.least_words
            ):
                return Drop("repetition: lines", f"{share:.2f} of the characters, most: {self.lines:g}")
            if (
                self.grams is not None
                and (share := compute_repeated_ngram_share(text, self.grams, self.least_words)) > self.grams
            ):
                return Drop("repetition: words", f"{share:.2f} of the {N}-grams, most: {self.grams:g}")
        return record


def find_long_run(text: str, min_length: int) -> str:
    """Return the first character that is repeated at least `min_length` times in a row, or an empty string. White space
    and characters of rules and tables do not count.

    Args:
        min_length: at least 4 · STRIDE.
    """
    if not FOUR.search(text[::STRIDE]):
        return ""
    match = re.search(rf"([^{RULES}])\1{{{min_length - 1}}}", text)
    return match[1] if match else ""


def compute_repeated_line_share(text: str) -> float:
    """Return the share of a text's characters that stand in lines equal to an earlier line, in [0, 1]. Blank lines are
    ignored."""
    if "\n" not in text:
        return 0.0
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    return 1 - sum(map(len, distinct)) / sum(map(len, lines))


def compute_repeated_ngram_share(text: str, allowed_share: float, min_words: int) -> float:
    """Return the share of a text's word n-grams that repeat an earlier n-gram, in [0, 1].

    Returns 0 for texts of fewer than `min_words` words, and if the number of distinct pairs of words proves that the
    share is at most `allowed_share`. This is faster than counting n-grams: of W words with P distinct pairs, at least
    P - (n - 2) of the W - n + 1 n-grams are distinct, since each new pair ends a new n-gram, except for the first n - 2
    pairs.
    """
    text_words = split_lowercase_words(text)
    count = len(text_words) - N + 1
    if len(text_words) < min_words:
        return 0.0
    n_distinct_pairs = len(set(pairwise(text_words)))
    if count - (n_distinct_pairs - N + 2) <= allowed_share * count:
        return 0.0
    return 1 - len(set(iter_ngrams(text_words, N))) / count


def split_lowercase_words(text: str) -> list[str]:
    """Split a text at white space into lower-case words. Each Chinese or Japanese character is a word."""
    has_character_words = not text.isascii() and CHARACTER_WORDS.search(text)
    return TOKEN.findall(text.lower()) if has_character_words else text.lower().split()


DEFAULT_PHRASES = Path(__file__).with_name("boilerplate.txt")
BEGINNING = 200
"""Number of characters at the beginning of an answer that are searched for refusals. Later, the same words are about
something else."""
HEADER = re.compile(r"\[([^\[\],]+)(?:,\s*(beginning))?\]")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
"""Code blocks and inline code, which are not searched: an answer may explain markup."""
APOSTROPHES = str.maketrans("’‘ʼ", "'''")


@dataclass(frozen=True, slots=True)
class Phrases:
    """A named group of lower-case phrases that answers are searched for.

    Attributes:
        beginning: whether only the beginning of an answer is searched for them.
    """

    name: str
    phrases: tuple[str, ...]
    beginning: bool = False

    def is_in(self, answers: Sequence[str], phrase: str) -> bool:
        """Return whether an answer contains the phrase as whole words, in its first BEGINNING characters if `beginning`
        is set."""
        return any(contains_phrase(phrase, text[:BEGINNING] if self.beginning else text) for text in answers)


@dataclass(frozen=True, slots=True)
class BoilerplateFilter:
    """Cleaning step that leaves out records with an answer that contains a listed phrase outside of code, such as a
    refusal."""

    groups: tuple[Phrases, ...]

    @classmethod
    def from_file(cls, patterns: str | None = None) -> BoilerplateFilter:
        """Create the step from a file of phrases, or from the English phrases in `boilerplate.txt` if `patterns` is
        None.

        Args:
            patterns: path of the file, whose format is explained in `boilerplate.txt`; None for the phrases in that
                file, which are English.
        """
        require(isinstance(patterns, str | None), "patterns", patterns, "is no file", "Name a file of phrases.")
        return cls(read_phrases(DEFAULT_PHRASES if patterns is None else Path(patterns)))

    def __call__(self, record: Record) -> Record | Drop:
        answers = [normalize_answer(text) for text in list_trained_texts(record)]
        joined = "\n".join(answers)  # searched first, since nearly all records have no phrase
        for group in self.groups:
            for phrase in group.phrases:
                if phrase in joined and group.is_in(answers, phrase):
                    return Drop(f"boilerplate: {group.name}", phrase)
        return record


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, with code replaced by a space and all white space as single spaces."""
    if "`" in text:
        text = CODE.sub(" ", text)
    if not text.isascii():
        text = text.translate(APOSTROPHES)
    text = text.lower()
    return " ".join(text.split()) if "\n" in text or "  " in text or "\t" in text else text


def contains_phrase(phrase: str, text: str) -> bool:
    """Return whether a text contains a phrase as whole words: `as an ai` is not in `as an aide`."""
    start = text.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        before = text[start - 1 : start] if start else ""
        after = text[end : end + 1]
        begins_inside_word = phrase[0].isalnum() and before.isalnum()
        ends_inside_word = phrase[-1].isalnum() and after.isalnum()
        if not begins_inside_word and not ends_inside_word:
            return True
        start = text.find(phrase, start + 1)
    return False


def read_phrases(path: Path) -> tuple[Phrases, ...]:
    """Read a text file of phrases, one per line below headings such as `[refusal]`, and return one Phrases per heading.

    Raises:
        InputError: the file cannot be read, has a phrase before the first group, or has no phrases.
    """
    lines = read_text(path, "patterns", "Name a text file in UTF-8.", "utf-8-sig").splitlines()
    phrases_by_group: dict[tuple[str, bool], list[str]] = {}
    group: list[str] | None = None
    for number, line in enumerate(lines, 1):
        phrase = normalize_answer(line).strip()
        if not phrase or phrase.startswith("#"):
            continue
        if header := HEADER.fullmatch(phrase):
            group = phrases_by_group.setdefault((header[1].strip(), header[2] is not None), [])
        elif group is None:
            raise InputError(
                f"patterns, {path.name}, row {number}",
                phrase,
                "is in no group",
                "Begin a group above it: a line such as [refusal].",
            )
        else:
            group.append(phrase)
    groups = tuple(
        Phrases(name, tuple(phrases), beginning) for (name, beginning), phrases in phrases_by_group.items() if phrases
    )
    require(bool(groups), "patterns", str(path), "has no phrases", "Write one a line, below a line such as [refusal].")
    return groups
