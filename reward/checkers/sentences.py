"""Counting sentences by punctuation, with rules and in linear time.

IFEval's own checkers count by Punkt (Kiss and Strunk, 2006), whose trained parameters are a download. These rules give
Punkt's count for 99 % of real answers; `docs/decisions.md` has the comparison.
"""

from __future__ import annotations

import re

LISTED_ABBREVIATIONS = """
    a.d a.m adm al approx apt assn aug ave b.c blvd brig capt cf ch cmdr co col corp ct dec dept dist dr e.g ed
    est etc feb fig ft gen gov govt hon i.e inc jan jr lt ltd maj messrs mr mrs ms mt nov oct p.m p.s pp ph.d
    prof rev rs sec sen sep sept sgt sr st ste u.k u.n u.s u.s.a univ v viz vol vs
"""
LISTED_STARTERS = """
    a all also an and as at but by for from he her here his how however if in is it its my no not on one or our
    please she so some that the their then there these they this those to we what when where which while who why
    with yes you your
"""
ABBREVIATIONS = frozenset(LISTED_ABBREVIATIONS.split())
STARTERS = frozenset(LISTED_STARTERS.split())
"""Words that, with a capital, begin a sentence even after an abbreviation or an ellipsis."""
LONGEST = 24
"""Maximum number of characters of a neighbouring word."""
CLOSING = r"[\"'”’»)\]}*_]*+"
END = re.compile(
    rf"(?<![.?!])([.?!]++){CLOSING}(?=\s++(\S{{1,{LONGEST}}}))"  # more has to follow: the last sentence needs no end
    rf"|(?<![。！？｡।؟۔])[。！？｡।؟۔]++{CLOSING}(?=\s*+\S)"  # East Asian, Indic and Arabic text needs no space
)
OPENING = "\"'“‘([{*_"
LISTED = re.compile(r"[-+#$£€]?\d[\d.,]*")


def count_sentences(text: str) -> int:
    """Count the sentences of a text. A line break alone ends no sentence, and a blank text has none."""
    return sum(ends_sentence(text, match) for match in END.finditer(text)) + bool(text.strip())


def ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Return whether the punctuation that `match` found in a text ends a sentence, judged by the words around it."""
    marks, following = match.groups()
    if marks is None or marks.strip("."):
        return True
    start = match.start()
    word = ""
    if text[start - 1 : start].strip():
        word = text[max(0, start - LONGEST) : start].split()[-1].lstrip(OPENING).lower()
    if len(marks) == 1 and word not in ABBREVIATIONS:
        if not word:
            return True
        if len(word) == 1 and word.isalpha():  # an initial, as in J. Smith
            return word == "i"
        return not (following.lstrip(OPENING)[:1].islower() and LISTED.fullmatch(word))
    following = following.lstrip(OPENING)
    return following[:1].isupper() and re.split(r"\W", following, maxsplit=1)[0].lower() in STARTERS
