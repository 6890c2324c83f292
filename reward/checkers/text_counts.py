"""What IFEval's instructions count in a text that is not blank. Every function takes time that grows by the character,
so that an answer of a million brackets is counted as fast as one of letters."""

from __future__ import annotations

import json
import operator
import re

COMPARED = {
    "less than": operator.lt, "at least": operator.ge,
    "at most": operator.le, "more than": operator.gt, "exactly": operator.eq,
}  # fmt: skip
"""IFEval has the first two."""
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
CAPITAL = re.compile(r"[^\W_]+(?:[-./][^\W_]+)*")
HIGHLIGHT, STRONG = re.compile(r"\*[^\n*]*\*"), re.compile(r"\*\*[^\n*]*\*\*")
BULLET = re.compile(r"^[^\S\n]*(?:\*[^*]|-).*$", re.MULTILINE)


def compare(count: int, relation: str, bound: int) -> bool:
    return COMPARED[relation](count, bound)


def occurrences(text: str, keyword: str) -> int:
    """Occurrences of a keyword, inside other words too, in any case."""
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word by itself, in any case."""
    return re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) is not None


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def starred_paragraphs(text: str) -> int:
    """Paragraphs that `***` divides; -1 where one between two others is blank."""
    pieces = re.split(r"\s?\*\*\*\s?", text)
    if any(not piece.strip() for piece in pieces[1:-1]):
        return -1
    return sum(bool(piece.strip()) for piece in pieces)


def paragraph_begins(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether there are so many paragraphs, divided by empty lines, and one of them begins with a word. A blank
    paragraph has a place but is not counted."""
    paragraphs = text.split("\n\n")
    if sum(bool(each.strip()) for each in paragraphs) != num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    if not words:
        return False
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"').lower(), maxsplit=1)[0]
    return first == first_word.lower()


def placeholders(text: str) -> int:
    """`[…]` on one line: a piece that a closing bracket ends, with an opening one in it."""
    return sum("[" in piece for line in text.split("\n") for piece in line.split("]")[:-1])


def has_postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), text.lower()) is not None


def bullets(text: str) -> int:
    """Lines that begin with a dash, or with one asterisk."""
    return len(BULLET.findall(text))


def highlights(text: str) -> int:
    """`*…*` and `**…**` on one line with something between. What stands in double asterisks counts once, for `**`
    alone is an empty highlight."""
    single = sum(bool(found.strip("*").strip()) for found in HIGHLIGHT.findall(text))
    return single + sum(bool(found[2:-2].strip()) for found in STRONG.findall(text))


def sections(text: str, marker: str) -> int:
    """Occurrences of a marker with a number, such as `Section 1`."""
    return len(re.findall(rf"{re.escape(marker.strip())}\s?\d+", text))


def is_json(text: str) -> bool:
    """Whether a text is JSON; fences around it, with or without `json`, do not count."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """Whether a line has `<<…>>` with something between."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text: str) -> bool:
    """Whether `******` divides a text into two that differ. It may also stand at the beginning and the end."""
    pieces = [piece.strip() for piece in text.split("******")]
    if not all(pieces[1:-1]):
        return False
    given = [piece for piece in pieces if piece]
    return len(given) == 2 and given[0] != given[1]


def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def capital_words(text: str) -> int:
    """Words whose letters are all capitals. What a hyphen, a point or a slash joins is one word;
    CAN'T is two, as for the Treebank's tokenizer."""
    return sum(word.isupper() for word in CAPITAL.findall(text))
