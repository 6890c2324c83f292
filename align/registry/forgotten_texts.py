"""Texts that are to be forgotten, looked for in the files of runs, and taken out of them.

A text is found whatever stands around it. A short one, such as "Yes.", says nothing of where it came from: a line goes
for it only where another of these texts stands beside it.
"""

from __future__ import annotations

import html
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.core.files import open_binary
from align.report.page import LONGEST_TEXT
from align.track import shortened

LONG, NAMES = 12, 6
"""Characters from which on a text, and a person's name, is looked for within others."""
PACKED = (".safetensors", ".gguf", ".parquet", ".bin", ".pt", ".db", ".sqlite", ".npz", ".npy", ".png", ".zip", ".gz")
"""Endings of files that hold no plain text. Any other one is opened."""
HEAD = 8192
"""Bytes at the beginning of a file, among which a zero says that it holds no plain text."""
FIGURES = (
    "metrics.jsonl",
    "steps.jsonl",
    "timing.jsonl",
    "requests.jsonl",
    "adapters.jsonl",
    "stale.json",
    "replaced.json",
    "data.json",
    "tokenizer.json",
    "vocab.json",
)
"""Files without text of rows."""
SETTINGS = ("manifest.json", "config.yaml", "metrics.json")
"""Files that say what a run is, and its figures, which the manifest repeats. They are not changed."""
MODEL = (
    "adapter_config.json", "base.json", "config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip
"""Files of a model or a tokenizer. They are not changed either: whoever loads it reads them."""
SEALED = ("receipt.json", "model.sig")
"""A folder that has one of these is an export, whose files are known by their digests to whoever has it."""
PUT = "(forgotten)"


def folded(text: str) -> str:
    """As texts are compared: single blanks, one form and one case of each letter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def forms(text: str) -> Iterator[str]:
    """A text as files hold it: as it is, and as JSON, CSV and Python write it."""
    yield text
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield text.replace('"', '""')
    yield repr(text)[1:-1]


@dataclass(frozen=True)
class Marks:
    """What tells rows of an annotation project, whatever they say.

    Attributes:
        annotator, item: whose rows go; empty for nobody's.
        votes: rows of the ledger that go.
    """

    annotator: str = ""
    item: str = ""
    votes: frozenset[int] = frozenset()

    def of(self, row: Any) -> bool:
        """Whether a row of an exported or measured file goes. A row of the ledger itself holds no words."""
        if not isinstance(row, dict) or "prev_hash" in row:
            return False
        number = str(row.get("vote", row.get("id"))).partition(":")[0]
        return (
            (bool(self.annotator) and row.get("annotator") == self.annotator)
            or (bool(self.item) and self.item in (row.get("item"), row.get("group_id"), row.get("group")))
            or (number.isdigit() and int(number) in self.votes)
        )


@dataclass(frozen=True)
class Texts:
    """Attributes:
    own: that stand in nothing which stays.
    shared: that something which stays has too.
    names: of people.
    marks: of rows that go; for the files of runs that read the project alone.
    """

    own: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    marks: Marks = Marks()

    def __bool__(self) -> bool:
        return bool(self.own or self.names or self.marks != Marks())

    def __or__(self, other: Texts) -> Texts:
        shared = self.shared | other.shared
        marks = self.marks if self.marks != Marks() else other.marks
        return Texts((self.own | other.own) - shared, shared, self.names | other.names, marks)

    @cached_property
    def strong(self) -> frozenset[str]:
        """Those that tell where a line came from: whole, and cut as logs and pages have them."""
        long = {text for text in self.own if len(folded(text)) >= LONG}
        cut = {shortened(text) for text in long} | {text[: LONGEST_TEXT - 1] for text in self.own}
        return frozenset(one for text in long | cut for form in forms(text) if len(one := folded(form)) >= LONG)

    @cached_property
    def named(self) -> re.Pattern[str] | None:
        """Finds a person's name as a word of its own; None where there is none. In a path it is somebody's folder."""
        long = sorted(name for one in self.names if len(name := folded(one)) >= NAMES)
        around = r"[\w/\\.-]"
        return re.compile(f"(?<!{around})(?:{'|'.join(map(re.escape, long))})(?!{around})") if long else None

    @cached_property
    def weak(self) -> frozenset[str]:
        return frozenset(folded(text) for text in self.own | self.names) - self.strong - {""}

    @cached_property
    def beside(self) -> frozenset[str]:
        return frozenset(folded(text) for text in self.shared) - {""}

    @cached_property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Beginning of one that tells → how long those are that begin so."""
        found: dict[str, set[int]] = {}
        for text in self.strong:
            found.setdefault(text[:LONG], set()).add(len(text))
        return {head: tuple(sorted(lengths)) for head, lengths in found.items()}

    def within(self, text: str) -> bool:
        """Whether a text holds one of them that tells."""
        text, heads, strong = folded(text), self.heads, self.strong
        if self.named is not None and self.named.search(text):
            return True
        if len(heads) <= FEW:  # to look for a beginning is faster than to look at each place
            return any(text[at : at + n] in strong for head in heads for at in places(text, head) for n in heads[head])
        return any(
            text[i : i + n] in strong for i in range(len(text) - LONG + 1) for n in heads.get(text[i : i + LONG], ())
        )

    def among(self, row: Any) -> bool:
        """Whether a row of JSON is about them."""
        if self.marks.of(row):
            return True
        found = {folded(part) for part in words_in(row)}
        weak = found & self.weak
        return any(map(self.within, found)) or (bool(weak) and len(weak) + len(found & self.beside) > 1)


FEW = 64
"""Beginnings that are looked for one by one."""


def places(text: str, head: str) -> Iterator[int]:
    """Where a text holds another."""
    at = text.find(head)
    while at >= 0:
        yield at
        at = text.find(head, at + 1)


def words_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from words_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from words_in(inner)


def without(path: Path, texts: Texts) -> tuple[bytes | None, int]:
    """What a file is without them, None of one that goes altogether, and how many of its lines are about them.

    Raises:
        OSError: it cannot be read.
    """
    with open_binary(path) as file:
        data = file.read()
    text = data.decode("utf-8", "replace")
    suffix = path.suffix.lower()
    if suffix == ".html":
        read = html.unescape(re.sub(r"<[^>]*>", " ", text))
        return None, int(texts.within(read) or texts.within(html.unescape(text)))
    if suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None, int(texts.within(text))
        cleared, count = replaced(value, texts)
        return (json.dumps(cleared, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"), count
    kept, count = list[bytes](), 0
    for line in data.splitlines(keepends=True):
        if about(line, texts, ".jsonl" in path.name.lower()):
            count += 1
        else:
            kept.append(line)
    rest = b"".join(kept)
    if ".jsonl" not in path.name.lower() and texts.within(rest.decode("utf-8", "replace")):
        return None, count + 1  # one goes over several lines
    return rest, count


def about(line: bytes, texts: Texts, rows: bool) -> bool:
    """Whether a line is about them; one of JSON that was cut off, if one of them may begin in it."""
    text = line.decode("utf-8", "replace")
    if not rows:
        return texts.within(text)
    try:
        return texts.among(json.loads(text))
    except (ValueError, RecursionError):
        shown = folded(text)
        return any(head in shown for head in texts.heads)


def replaced(value: Any, texts: Texts) -> tuple[Any, int]:
    """A JSON value without them, and how many there were."""
    if isinstance(value, str):
        return (PUT, 1) if texts.within(value) else (value, 0)
    if isinstance(value, dict):
        inner = {key: replaced(one, texts) for key, one in value.items()}
        gone = [key for key in inner if texts.within(key)]
        kept = {key: one for key, (one, _) in inner.items() if key not in gone}
        return kept, len(gone) + sum(count for _, count in inner.values())
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
        stays: it is not changed: it says what the run is, is part of a model or of an export, or is a link.
    """

    file: str
    lines: int
    stays: bool = False


def shown_in(folder: Path, texts: Texts, deep: bool = True) -> Iterator[Shown]:
    """The files of a run that show some of them. Weights, Parquet and other packed files are not looked at.

    Args:
        deep: those of the folders in it too.
    """
    if not texts:
        return
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(folders) if deep else []
        sealed = any(name in files for name in SEALED)
        for name in sorted(files):
            path = Path(top, name)
            try:
                if name in FIGURES or not is_text(path):
                    continue
                count = without(path, texts)[1]
            except OSError:
                continue  # gone meanwhile, or not for us to read: then it cannot be rewritten either
            if count:
                own = name in SETTINGS and top == str(folder)
                stays = own or sealed or name in MODEL or path.is_symlink()
                yield Shown(path.relative_to(folder).as_posix(), count, stays)


def is_text(path: Path) -> bool:
    """Whether a file holds plain text, as far as its name and its beginning tell.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix.lower() in PACKED or not path.is_file():
        return False
    with open_binary(path) as file:
        return b"\0" not in file.read(HEAD)
