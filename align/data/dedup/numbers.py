"""Hashes of the numbers and operators of texts, in order. Texts in which these differ are never near-duplicates.

A **number** is a run of digits of any script, also inside a word (`gpt4`). `1,234.5` and `1234.5` are one number, and
so are `3,5` and `3.5`; `1,000` is a thousand. Superscripts, subscripts and fractions are numbers of their own, so that
`5²` is not `52`. An **operator** is a mathematical symbol (`+ = < > × ÷ ≤ √`) or `^`, `&&`, `||`. Others have
other uses, and count only between operands (numbers, brackets, single letters): `- * / & | ~`, and `%` after a number.
A minus directly before a number is its sign. Bullets, quotes, rules (`-----`), hyphens and `and/or` are not
operators. Words such as `not`, `three` or `plus` are compared as words are.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, Texts, concatenate
from align.data.dedup.shingles import ODD_MULTIPLIER, hash_block_words, iter_byte_blocks, mix_bits_in_place

pc = pyarrow.compute

SYMBOLS = "".join(
    c for c in map(chr, [*range(0x80, 0x3000), *range(0xFB00, 0x10000)]) if unicodedata.category(c) == "Sm"
)
"""The mathematical symbols of Unicode's first plane. Others are letters of mathematical alphabets."""
SMALL_DIGITS = "²³¹⁰⁴-⁹₀-₉¼-¾⅐-⅞"
SMALL_NUMBER = re.compile(f"[{SMALL_DIGITS}]+")
OPERATORS = rf"%&*+\-/<=>^|~–{re.escape(SYMBOLS)}·"
RUN = re.compile(rf"[\d{SMALL_DIGITS}{OPERATORS}]+(?:[.,'’٫٬]\d+)*")
"""Pattern of numbers and operators without a gap. It begins with a set of characters, which `re` searches for fast."""
ASCII_RUN = re.compile(r"[0-9%&*+\-/<=>^|~]+(?:[.,'][0-9]+)*")
"""`RUN` for ASCII text: the search for a small set is four times as fast."""
TOKEN = re.compile(rf"\d+(?:[.,'’٫٬]\d+)*|[{SMALL_DIGITS}]+|(?<![\w.])\.\d+|[{OPERATORS}]+")
BETWEEN_LETTERS = (
    r"(?:[)\]]|(?:^|[^A-Za-z])[A-Za-z]) ?[*/%&|~-]+ ?(?:[(\[]|[A-Za-z](?:[^A-Za-z]|$))"  # between brackets too
)
MAY_HAVE_NUMBERS = rf"[0-9+<=>^]|&&|\|\||{BETWEEN_LETTERS}"
"""Pattern in RE2's syntax that every ASCII text with a number or an operator matches."""
MAY_NEED_SPELLING = (
    rf"[+<=>^]|&&|\|\||\.[0-9]|[0-9][,'][0-9]|[0-9] *%|[0-9] ?[*/&|~-]|[*/%&|~-] ?[0-9]|{BETWEEN_LETTERS}"
)
"""Pattern in RE2's syntax for ASCII texts whose numbers and operators have to be extracted one by one. If a text does
not match, its numbers are its runs of digits, and it has no operators."""
DIGITS = bytes(c if chr(c).isdigit() and c < 128 else 0 for c in range(256))
"""Translation table of bytes for texts whose numbers need no spelling: digits stay, and all other bytes become 0."""
TOKENS = bytes(0 if c == ord(" ") else c for c in range(256))
"""Translation table of bytes for spelled tokens, which are separated by blanks: blanks become 0."""
OPERATOR_SPELLINGS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "∙": "*", "⋅": "*", "÷": "/", "∕": "/", "٫": ".", "’": "'"}
)
UNAMBIGUOUS = frozenset("+=<>^" + SYMBOLS)
GROUPED_NUMBER = re.compile(
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:['٬]\d{3})+(?:[.,]\d+)?|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?"
)
OPERAND_END = re.compile(r"(?:[\d)\]]|(?<![^\W_])[^\W\d_]) ?\Z")
"""The end of an operand, directly before an operator."""
OPERAND_START = re.compile(r" ?(?:[-+−]?\.?\d|[(\[]|[^\W\d_](?![^\W_]))")
"""The beginning of an operand, directly after an operator."""


def hash_numbers(texts: Texts) -> ndarray:
    """Hash the sequence of numbers and operators in each text, uint64 (N). The hash of a text that has none is 0.

    Args:
        texts: N strings. Null counts as the empty text.
    """
    hashes = np.zeros(len(texts), np.uint64)
    is_ascii = pc.call_function("string_is_ascii", [texts]).fill_null(True).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(is_ascii)
    places = places[find_matching_texts(texts if is_ascii.all() else texts.take(pa.array(places)), MAY_HAVE_NUMBERS)]
    needs_spelling = np.zeros(len(places), bool)
    needs_spelling[find_matching_texts(texts.take(pa.array(places)), MAY_NEED_SPELLING)] = True
    hashes[places[~needs_spelling]] = hash_tokens(texts.take(pa.array(places[~needs_spelling])), DIGITS)
    places = np.concatenate([places[needs_spelling], np.flatnonzero(~is_ascii)])
    spelled_texts = [" ".join(extract_numbers_and_operators(text)) for text in texts.take(pa.array(places)).to_pylist()]
    hashes[places] = hash_tokens(pa.array(spelled_texts, pa.string()), TOKENS)
    return hashes


def find_matching_texts(texts: Texts, pattern: str) -> ndarray:
    """Return the indices of the texts that match a pattern in RE2's syntax, int64."""
    is_match = pc.call_function("match_substring_regex", [texts], pc.MatchSubstringOptions(pattern))
    return np.flatnonzero(is_match.fill_null(False).to_numpy(zero_copy_only=False))


def hash_tokens(texts: Texts, table: bytes) -> ndarray:
    """Hash the sequence of tokens in each text, uint64 (N). The hash of a text that has none is 0.

    Args:
        table: translation of each byte. Tokens are separated by 0.
    """
    hashes = list[ndarray]()
    for data, starts in iter_byte_blocks(texts, str, table):
        tokens, counts = hash_block_words(data, starts)
        ends = np.cumsum(counts)
        order = np.arange(len(tokens)) - np.repeat(ends - counts, counts)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(mix_bits_in_place(tokens ^ (order.astype(np.uint64) * ODD_MULTIPLIER)), out=sums[1:])
        sums = mix_bits_in_place(sums[ends] - sums[ends - counts])
        hashes.append(np.maximum(sums, 1) * (counts > 0))
    return concatenate(hashes, NO_HASHES)


def extract_numbers_and_operators(text: str) -> list[str]:
    """Return the numbers and operators of a text in order, each in a canonical spelling, such as `1234.5` for
    `1,234.5`."""
    tokens = list[str]()
    for run in (ASCII_RUN if text.isascii() else RUN).finditer(text):
        start = run.start()
        before = text[start - 1 : start]
        if before == ".":
            start -= 1  # of a number such as `.5`
        elif run[0].isdigit() and run[0].isascii():
            tokens.append(run[0])
            continue
        elif run[0][0] == "=" and before == "!":
            tokens.append("!")
        for match in TOKEN.finditer(text, start, run.end()):
            token = match[0]
            if token[-1].isdecimal():
                tokens += spell_number(token)
            elif SMALL_NUMBER.fullmatch(token):
                tokens.append(token)
            elif is_operator(text, match.start(), match.end()):
                tokens += token.translate(OPERATOR_SPELLINGS)
    return tokens


def spell_number(number: str) -> list[str]:
    """Return a number with ASCII digits, `.` before decimals and no separator between thousands, as a list of one text.

    A text with several separators and no groups of three digits is a version, a date or a list. Its parts are returned.
    """
    if number.isascii() and number.isdigit():
        return [number]
    if not number.isascii():
        number = number.translate(OPERATOR_SPELLINGS)
        number = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in number)
    if GROUPED_NUMBER.fullmatch(number):
        *leading_digits, last_digits = re.split(r"\D", number)
        separators = re.findall(r"\D", number)
        if len(separators) > 1 and separators[-1] != separators[0]:
            return ["".join(leading_digits) + "." + last_digits]
        return ["".join(leading_digits) + last_digits]
    parts = re.split(r"\D", number)
    return [".".join(parts)] if len(parts) == 2 else parts


def is_operator(text: str, start: int, end: int) -> bool:
    """Return whether the symbols `text[start:end]` are an operator in their context, and not a bullet, a hyphen or a
    rule."""
    run = text[start:end]
    if len(run) > 2 and len(set(run)) == 1:
        return False  # a rule between paragraphs
    if (not UNAMBIGUOUS.isdisjoint(run) and not set(run) <= {"|", "~", "−"}) or run in ("&&", "||"):
        line_before = text[text.rfind("\n", 0, start) + 1 : start]
        is_bullet = run in (">", ">>", "+") and not line_before.strip() and text[end : end + 1] == " "
        return not is_bullet
    before = text[max(start - 3, 0) : start]
    if (
        run[-1] in "-−"
        and text[end : end + 1].isdecimal()
        and not (before and (before[-1].isalnum() or before[-1] in ")]"))
    ):
        return True
    if run == "%":
        return bool(before.rstrip(" ")[-1:].isdecimal())
    return bool(OPERAND_END.search(before)) and bool(OPERAND_START.match(text, end))
