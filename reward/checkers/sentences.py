"""How many sentences a text has, by its punctuation: rules, no model, and time that grows by the character.

IFEval's own checkers count by Punkt (Kiss and Strunk, 2006), whose trained parameters are a download. These rules give
Punkt's count for 99 % of real answers; `docs/decisions.md` has the comparison.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = """
    a.d a.m adm al approx apt assn aug ave b.c blvd brig capt cf ch cmdr co col corp ct dec dept dist dr e.g ed
    est etc feb fig ft gen gov govt hon i.e inc jan jr lt ltd maj messrs mr mrs ms mt nov oct p.m p.s pp ph.d
    prof rev rs sec sen sep sept sgt sr st ste u.k u.n u.s u.s.a univ v viz vol vs
"""
_STARTERS = """
    a all also an and as at but by for from he her here his how however if in is it its my no not on one or our
    please she so some that the their then there these they this those to we what when where which while who why
    with yes you your
"""
ABBREVIATIONS, STARTERS = frozenset(_ABBREVIATIONS.split()), frozenset(_STARTERS.split())
"""STARTERS: words that, with a capital, begin a sentence even behind an abbreviation or an ellipsis."""
LONGEST = 24
"""Characters of a neighbouring word that are read."""
CLOSING = r"[\"'”’»)\]}*_]*+"
END = re.compile(
    rf"(?<![.?!])([.?!]++){CLOSING}(?=\s++(\S{{1,{LONGEST}}}))"  # more has to follow: the last sentence needs no end
    rf"|(?<![。！？｡।؟۔])[。！？｡।؟۔]++{CLOSING}(?=\s*+\S)"  # East Asian, Indic and Arabic text needs no space
)
OPENING = "\"'“‘([{*_"
LISTED = re.compile(r"[-+#$£€]?\d[\d.,]*")


def count_sentences(text: str) -> int:
    """Sentences of a text; a line break alone ends none. 0 for a blank text."""
    return sum(ends(text, found) for found in END.finditer(text)) + bool(text.strip())


def ends(text: str, found: re.Match[str]) -> bool:
    """Whether the marks end a sentence, by the words around them."""
    marks, following = found[1], found[2]
    if marks is None or marks.strip("."):
        return True
    before = text[max(0, found.start() - LONGEST) : found.start()]
    word = before.split()[-1].lstrip(OPENING).lower() if before[-1:].strip() else ""
    following = following.lstrip(OPENING)
    if len(marks) > 1 or word in ABBREVIATIONS:
        return following[:1].isupper() and re.split(r"\W", following, maxsplit=1)[0].lower() in STARTERS
    if len(word) == 1 and word.isalpha():  # an initial, as in J. Smith
        return word == "i"
    return not (following[:1].islower() and LISTED.fullmatch(word))
