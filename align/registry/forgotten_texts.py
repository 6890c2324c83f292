"""Search for the texts of deleted data in the files of runs, and removal of these texts.

A text is found within any other text. A short text, such as "Yes.", does not identify its source: a line is removed for
it only if another of these texts is in the same line.
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
from typing import Any, NamedTuple

from align.core.files import open_binary
from align.report.page import LONGEST_TEXT
from align.track import truncate_text

LONG = 12
"""Smallest number of characters of a deleted text that is searched for inside other texts."""
NAMES = 6
"""Smallest number of characters of a person's name that is searched for inside other texts."""
PACKED = (".safetensors", ".gguf", ".parquet", ".bin", ".pt", ".db", ".sqlite", ".npz", ".npy", ".png", ".zip", ".gz")
"""Suffixes of binary files, which are not searched. Any other file is opened."""
HEAD = 8192
"""Number of bytes at the beginning of a file in which a zero byte marks it as binary."""
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
"""Names of files that hold no texts of data rows, and are not searched."""
SETTINGS = ("manifest.json", "config.yaml", "metrics.json")
"""Names of files with a run's settings and metrics, which are searched but never changed."""
MODEL = (
    "adapter_config.json",
    "base.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
"""Names of model and tokenizer files, which are searched but never changed, because loading the model needs them."""
SEALED = ("receipt.json", "model.sig")
"""Names of files that mark a folder as an export, whose files are searched but never changed.

Other people know these files by their digests.
"""
PUT = "(forgotten)"
"""Text that replaces a deleted text in a JSON file."""


def fold_text(text: str) -> str:
    """Normalize a text for comparison: Unicode NFC, case-folded, and single spaces between words."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def iter_escaped_forms(text: str) -> Iterator[str]:
    """Yield a text as files may hold it: unchanged, and escaped as in JSON, CSV and Python."""
    yield text
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield text.replace('"', '""')
    yield repr(text)[1:-1]


@dataclass(frozen=True)
class RowMarks:
    """The annotator, item and vote ids of annotation rows that have to be removed, regardless of their texts.

    Attributes:
        annotator, item: remove the rows of this annotator or item; empty for none.
        votes: rows of the ledger to remove.
    """

    annotator: str = ""
    item: str = ""
    votes: frozenset[int] = frozenset()

    def matches(self, row: Any) -> bool:
        """Return whether a JSON row belongs to the annotator, the item or one of the votes to remove.

        Rows of the ledger, which hold no text, never match.
        """
        if not isinstance(row, dict) or "prev_hash" in row:
            return False
        number = str(row.get("vote", row.get("id"))).partition(":")[0]
        return (
            (bool(self.annotator) and row.get("annotator") == self.annotator)
            or (bool(self.item) and self.item in (row.get("item"), row.get("group_id"), row.get("group")))
            or (number.isdigit() and int(number) in self.votes)
        )


@dataclass(frozen=True)
class ForgottenTexts:
    """The texts of deleted data and the names of people that are searched for in the files of runs.

    Attributes:
        own: texts that occur in nothing that stays.
        shared: texts that also occur in something that stays.
        names: names of people.
        marks: ids of rows to remove, for files of runs that read the annotation project.
    """

    own: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    marks: RowMarks = RowMarks()

    def __bool__(self) -> bool:
        return bool(self.own or self.names or self.marks != RowMarks())

    def __or__(self, other: ForgottenTexts) -> ForgottenTexts:
        shared = self.shared | other.shared
        marks = self.marks if self.marks != RowMarks() else other.marks
        return ForgottenTexts((self.own | other.own) - shared, shared, self.names | other.names, marks)

    @cached_property
    def strong(self) -> frozenset[str]:
        """Deleted texts, case-folded, that are long enough to identify a copied line by themselves.

        They are in the set in full, in their escaped forms, and shortened as in logs and pages.
        """
        long = {text for text in self.own if len(fold_text(text)) >= LONG}
        cut = {truncate_text(text) for text in long} | {text[: LONGEST_TEXT - 1] for text in self.own}
        return frozenset(
            key for text in long | cut for form in iter_escaped_forms(text) if len(key := fold_text(form)) >= LONG
        )

    @cached_property
    def name_pattern(self) -> re.Pattern[str] | None:
        """A pattern that finds the people's names as separate words outside of paths, or None if there are no names."""
        names = sorted(folded_name for name in self.names if len(folded_name := fold_text(name)) >= NAMES)
        if not names:
            return None
        neighbour = r"[\w/\\.-]"
        return re.compile(f"(?<!{neighbour})(?:{'|'.join(map(re.escape, names))})(?!{neighbour})")

    @cached_property
    def weak(self) -> frozenset[str]:
        """Deleted texts and people's names, case-folded, that are too short to identify a copied line by themselves."""
        return frozenset(fold_text(text) for text in self.own | self.names) - self.strong - {""}

    @cached_property
    def folded_shared(self) -> frozenset[str]:
        """Deleted texts, case-folded, that also occur in data that are not deleted."""
        return frozenset(fold_text(text) for text in self.shared) - {""}

    @cached_property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """First 12 characters of a long deleted text → lengths of all long deleted texts that begin with them."""
        all_lengths: dict[str, set[int]] = {}
        for text in self.strong:
            all_lengths.setdefault(text[:LONG], set()).add(len(text))
        return {head: tuple(sorted(lengths)) for head, lengths in all_lengths.items()}

    def occur_in(self, text: str) -> bool:
        """Return whether a text contains one of the long deleted texts, which identify a copied line, or a person's
        name."""
        text = fold_text(text)
        if self.name_pattern is not None and self.name_pattern.search(text):
            return True
        heads = self.heads
        strong = self.strong
        if len(heads) <= FEW:  # a search for each beginning is faster than a look at each position
            return any(
                text[start : start + n] in strong
                for head in heads
                for start in iter_positions(text, head)
                for n in heads[head]
            )
        return any(
            text[i : i + n] in strong for i in range(len(text) - LONG + 1) for n in heads.get(text[i : i + LONG], ())
        )

    def occur_in_row(self, row: Any) -> bool:
        """Return whether a JSON row has to be removed, because of its ids or because it contains deleted texts.

        One long text or one name is enough. A short one counts only beside another short text, or a
        text that also occurs in data that stay.
        """
        if self.marks.matches(row):
            return True
        parts = {fold_text(part) for part in iter_json_texts(row)}
        weak = parts & self.weak
        return any(map(self.occur_in, parts)) or (bool(weak) and len(weak) + len(parts & self.folded_shared) > 1)


FEW = 64
"""Largest number of different beginnings of deleted texts that are searched for one by one; more are looked up by
position."""


def iter_positions(text: str, head: str) -> Iterator[int]:
    """Yield each index at which `text` contains `head`, including overlapping ones."""
    position = text.find(head)
    while position >= 0:
        yield position
        position = text.find(head, position + 1)


def iter_json_texts(value: Any) -> Iterator[str]:
    """Yield every string in a nested JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from iter_json_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iter_json_texts(inner)


class CleanedContent(NamedTuple):
    """The content of a file after removing deleted texts, and the number of removals.

    Attributes:
        content: the content; None if lines cannot be removed from it. The file then has to be deleted if
            `match_count` is above 0.
        match_count: number of lines or values that contained the texts.
    """

    content: bytes | None
    match_count: int


def read_without_texts(path: Path, texts: ForgottenTexts) -> CleanedContent:
    """Return a file's content without the lines or JSON strings that contain deleted texts. The file is not changed.

    The content is `None` for an HTML page, for invalid JSON, and for a text that spans several lines: if such a file
    contains deleted texts, it has to be deleted.

    Raises:
        OSError: The file cannot be read.
    """
    with open_binary(path) as file:
        data = file.read()
    text = data.decode("utf-8", "replace")
    suffix = path.suffix.lower()
    if suffix == ".html":
        visible_text = html.unescape(re.sub(r"<[^>]*>", " ", text))
        return CleanedContent(None, int(texts.occur_in(visible_text) or texts.occur_in(html.unescape(text))))
    if suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return CleanedContent(None, int(texts.occur_in(text)))
        cleaned, count = replace_texts_in_json(value, texts)
        clean_json = json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
        return CleanedContent(clean_json.encode("utf-8", "backslashreplace"), count)
    is_jsonl = ".jsonl" in path.name.lower()
    lines = data.splitlines(keepends=True)
    clean_lines = [line for line in lines if not contains_texts(line, texts, is_jsonl)]
    count = len(lines) - len(clean_lines)
    content = b"".join(clean_lines)
    if not is_jsonl and texts.occur_in(content.decode("utf-8", "replace")):
        return CleanedContent(None, count + 1)  # a text spans several lines
    return CleanedContent(content, count)


def contains_texts(line: bytes, texts: ForgottenTexts, is_json: bool) -> bool:
    """Return whether a line of a file contains deleted texts. A JSON line is parsed and checked value by value.

    A JSON line that was cut off counts if a deleted text may begin in it.
    """
    text = line.decode("utf-8", "replace")
    if not is_json:
        return texts.occur_in(text)
    try:
        return texts.occur_in_row(json.loads(text))
    except (ValueError, RecursionError):
        folded_line = fold_text(text)
        return any(head in folded_line for head in texts.heads)


def replace_texts_in_json(value: Any, texts: ForgottenTexts) -> tuple[Any, int]:
    """Return a copy of a JSON value with `(forgotten)` for each string that contains deleted texts, and their number.

    Keys that contain them are left out.
    """
    if isinstance(value, str):
        return (PUT, 1) if texts.occur_in(value) else (value, 0)
    if isinstance(value, dict):
        items = {key: replace_texts_in_json(inner, texts) for key, inner in value.items()}
        removed_keys = {key for key in items if texts.occur_in(key)}
        clean_items = {key: inner for key, (inner, _) in items.items() if key not in removed_keys}
        return clean_items, len(removed_keys) + sum(count for _, count in items.values())
    if isinstance(value, list):
        elements = [replace_texts_in_json(element, texts) for element in value]
        return [element for element, _ in elements], sum(count for _, count in elements)
    return value, 0


@dataclass(frozen=True, slots=True)
class FileMatch:
    """A file of a run that contains deleted texts, and the number of places.

    Attributes:
        file: path relative to the run's folder.
        lines: number of lines, or of places in a page or in JSON.
        stays: True if the file is not changed: it holds the run's settings, is part of a model or an export, or is a
            link.
    """

    file: str
    lines: int
    stays: bool = False


def iter_matches(folder: Path, texts: ForgottenTexts, search_subfolders: bool = True) -> Iterator[FileMatch]:
    """Search the files in a run's folder for deleted texts, and yield a FileMatch for each file that contains some.

    Weights, Parquet and other packed files are not searched.

    Args:
        search_subfolders: search the folders inside it as well.
    """
    if not texts:
        return
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(folders) if search_subfolders else []
        is_export = any(name in files for name in SEALED)
        for name in sorted(files):
            path = Path(parent, name)
            try:
                if name in FIGURES or not is_text_file(path):
                    continue
                count = read_without_texts(path, texts).match_count
            except OSError:
                continue  # removed since, or not readable, so that it could not be rewritten either
            if count:
                is_settings = name in SETTINGS and parent == str(folder)
                stays = is_settings or is_export or name in MODEL or path.is_symlink()
                yield FileMatch(path.relative_to(folder).as_posix(), count, stays)


def is_text_file(path: Path) -> bool:
    """Return whether a file holds plain text, judged by its suffix and a zero byte in its first 8 KB.

    Raises:
        OSError: The file cannot be read.
    """
    if path.suffix.lower() in PACKED or not path.is_file():
        return False
    with open_binary(path) as file:
        return b"\0" not in file.read(HEAD)
