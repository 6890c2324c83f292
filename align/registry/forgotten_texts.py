"""Texts that are to be forgotten, looked for in the files of runs, and taken out of them.

A text is found whatever stands around it. A short one, such as "Yes.", says nothing of where it came from: a line goes
for it only where another of these texts stands beside it.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.data.records.content import strings
from align.report.page import LONGEST_TEXT
from align.track import shortened

LONG, NAMES = 12, 6
"""Characters from which on a text, and a person's name, is looked for within others."""
FEW = 64
"""Texts that are looked for one by one."""
SCANNED = (".jsonl", ".json", ".html", ".txt", ".log", ".md", ".csv", ".yaml")
FIGURES = (
    "metrics.jsonl",
    "timing.jsonl",
    "requests.jsonl",
    "stale.json",
    "replaced.json",
    "data.json",
    "tokenizer.json",
)
"""Files without text of rows."""
SETTINGS = ("manifest.json", "config.yaml")
"""Files that say what a run is. They are not changed."""
PUT = "(forgotten)"


def on_one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Texts:
    """Attributes:
    own: that stand in nothing which stays.
    shared: that something which stays has too.
    names: of people.
    """

    own: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.own or self.names)

    def __or__(self, other: Texts) -> Texts:
        shared = self.shared | other.shared
        return Texts((self.own | other.own) - shared, shared, self.names | other.names)

    @cached_property
    def strong(self) -> tuple[str, ...]:
        """Those that tell where a line came from, with single blanks: whole, and cut as logs and pages have them."""
        long = {joined for text in self.own if len(joined := on_one_line(text)) >= LONG}
        cut = {shortened(text) for text in long} | {on_one_line(text[: LONGEST_TEXT - 1]) for text in self.own}
        names = {joined for name in self.names if len(joined := on_one_line(name)) >= NAMES}
        return tuple(sorted(long | names | {text for text in cut if len(text) >= LONG}))

    @cached_property
    def weak(self) -> frozenset[str]:
        return frozenset(on_one_line(text) for text in self.own | self.names) - {*self.strong, ""}

    @cached_property
    def beside(self) -> frozenset[str]:
        return frozenset(on_one_line(text) for text in self.shared) - {""}

    @cached_property
    def heads(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for text in self.strong:
            found.setdefault(text[:NAMES], []).append(text)
        return found

    def within(self, text: str) -> bool:
        """Whether a text holds one of them that tells."""
        text = on_one_line(text)
        if len(self.strong) <= FEW:
            return any(one in text for one in self.strong)
        return any(
            text.startswith(one, i)
            for i in range(len(text) - NAMES + 1)
            for one in self.heads.get(text[i : i + NAMES], ())
        )

    def among(self, parts: Iterable[str]) -> bool:
        """Whether the texts of one line are about them."""
        found = {on_one_line(part) for part in parts}
        weak = found & self.weak
        return any(map(self.within, found)) or (bool(weak) and len(weak) + len(found & self.beside) > 1)


def without(path: Path, texts: Texts) -> tuple[bytes | None, int]:
    """What a file is without them, None of one that goes altogether, and how many of its lines are about them.

    Raises:
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    if path.suffix == ".html":
        return None, int(texts.within(html.unescape(text)))
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None, int(texts.within(text))
        cleared, count = replaced(value, texts)
        return (json.dumps(cleared, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"), count
    kept, count = list[bytes](), 0
    for line in data.splitlines(keepends=True):
        if about(line, texts, path.suffix == ".jsonl"):
            count += 1
        else:
            kept.append(line)
    return b"".join(kept), count


def about(line: bytes, texts: Texts, rows: bool) -> bool:
    """Whether a line is about them; one of JSON that was cut off, if one of them may begin in it."""
    text = line.decode("utf-8", "replace")
    if not rows:
        return texts.within(text)
    try:
        return texts.among(strings(json.loads(text)))
    except (ValueError, RecursionError):
        return any(one[:LONG] in on_one_line(text) for one in texts.strong)


def replaced(value: Any, texts: Texts) -> tuple[Any, int]:
    """A JSON value without them, and how many there were."""
    if isinstance(value, str):
        return (PUT, 1) if texts.within(value) else (value, 0)
    if isinstance(value, dict):
        inner = {key: replaced(one, texts) for key, one in value.items()}
        return {key: one for key, (one, _) in inner.items()}, sum(count for _, count in inner.values())
    if isinstance(value, list):
        listed = [replaced(one, texts) for one in value]
        return [one for one, _ in listed], sum(count for _, count in listed)
    return value, 0


@dataclass(frozen=True, slots=True)
class Shown:
    """A file of a run that shows some of them.

    Attributes:
        file: relative to the run's folder.
        lines: how many; of a page or of JSON, how many places.
        settings: it says what the run is, and stays as it is.
    """

    file: str
    lines: int
    settings: bool = False


def shown_in(folder: Path, texts: Texts) -> Iterator[Shown]:
    """The files of a run that show some of them. Weights, Parquet and other packed files are not looked at; links are
    not followed."""
    if not texts:
        return
    for top, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(top, name)
            if path.suffix not in SCANNED or name in FIGURES or path.is_symlink():
                continue
            try:
                count = without(path, texts)[1]
            except OSError:
                continue  # gone meanwhile, or not for us to read: then it cannot be rewritten either
            if count:
                yield Shown(path.relative_to(folder).as_posix(), count, name in SETTINGS and top == str(folder))
