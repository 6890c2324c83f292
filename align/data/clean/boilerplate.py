"""Phrases that no model should learn to say: refusals, talk of being a model, remains of web pages and of markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.data.clean.outcome import Drop, imitated
from align.errors import InputError, require
from align.files import read_text
from align.types import Record

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
            raise InputError(f"patterns, {path.name}, row {number}", phrase, "stands in no group",
                             "Begin a group above it: a line such as [refusal].")  # fmt: skip
        else:
            group.append(phrase)
    found = tuple(Phrases(name, tuple(phrases), place) for (name, place), phrases in names.items() if phrases)
    require(bool(found), "patterns", str(path), "has no phrases", "Write one a line, below a line such as [refusal].")
    return found
