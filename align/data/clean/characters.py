"""Characters: text that was decoded wrongly, and characters that nobody sees."""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

from align.core.errors import require
from align.core.types import Record
from align.data.clean.outcome import Drop, rewritten, said

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
"""Ends of lines that are not the one that models are taught."""
ALWAYS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters
    "\u00ad\u2060-\u2065\ufeff\u206a-\u206f\ufff9-\ufffc\U000e0000-\U000e001f"  # soft hyphen, zero width, BOM
    "\u202d\u202e"  # overrides: a reader sees another order than a model reads (CVE-2021-42574)
    "\ufdd0-\ufdef\ufffe\uffff"
    + "".join(
        f"{chr(plane * 0x10000 + 0xFFFE)}-{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(1, 17)
    )  # no characters
)
"""What stands in no text on purpose."""
JOINED = (
    "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1900-\u1aff\u1b00-\u1c7f\ua800-\uabff\ufb50-\ufdcf\ufe70-\ufefc"
    "\U00010a00-\U00011fff\U0001e900-\U0001e95f"
)
"""Scripts that write with joiners: Arabic and its kin, those of India, of South-East Asia, Mongolian."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\uaa60-\uaa7f"
"""Scripts that part words with a space of no width: Thai, Lao, Burmese, Khmer and their kin."""
EMOJI = "\u00a9\u00ae\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TAGS = re.compile("(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f)|[\U000e0020-\U000e007f]+")
"""Letters without a look, which spell a hidden text, but behind a black flag, which a few of them make Scotland's."""
SELECTORS, MORE_SELECTORS = "\ufe00-\ufe0f", "\U000e0100-\U000e01ef"
HIDDEN = re.compile(
    f"[{ALWAYS}\u200b-\u200d{SELECTORS}{MORE_SELECTORS}](?:"  # one class in front: what a search is fast by
    f"(?<=[{ALWAYS}])"
    f"|(?<=[\u200c\u200d])(?<![{JOINED}].)(?![{JOINED}])(?:(?<![{EMOJI}].)|(?![{EMOJI}]))"  # joiners
    f"|(?<=\u200b)(?<![{UNSPACED}].)"
    f"|(?<=[{SELECTORS}{MORE_SELECTORS}])(?<=[{SELECTORS}{MORE_SELECTORS}].)"  # in a row they carry bytes
    f"|(?<=[{MORE_SELECTORS}])(?<![{IDEOGRAPHS}].))",
    re.DOTALL,
)
"""Characters without any look of their own, where they do not shape what stands beside them."""
DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202c\u2066-\u2069]")
RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
INVISIBLE = (
    f"{ALWAYS}\u200b-\u200f\u202a-\u202e\u2066-\u2069\u061c\u115f\u1160\u180b-\u180e\u3164\uffa0\u2800"
    f"{SELECTORS}\U000e0000-\U000e0fff"
)
SEEN = re.compile(rf"[^\s{INVISIBLE}]")
"""A character that somebody sees."""
CHOSEN = re.compile(f"[{SELECTORS}{MORE_SELECTORS}]")
"""Of what nobody sees, that which Python takes for printable."""


@dataclass(frozen=True, slots=True)
class Unicode:
    """Repairs text that was decoded wrongly (`schÃ¶n`), and composes characters (NFC), by ftfy.

    What ftfy also offers and what is no damage is left alone: curly quotes, ligatures that someone chose, and the wide
    punctuation of Chinese and Japanese.

    Args:
        unescape: entities of HTML (`&amp;`) become characters, but in lines that have tags. They may be what an answer
            is about.
    """

    unescape: bool = False

    def __post_init__(self) -> None:
        known = isinstance(self.unescape, bool)
        require(known, "unescape", self.unescape, "is neither true nor false", "Write true or false.")

    def __call__(self, record: Record) -> Record | Drop:
        return record if self._is_plain(said(record)) else rewritten(record, self.repaired)

    def _is_plain(self, text: str) -> bool:
        return text.isascii() and "\r" not in text and "\x1b" not in text and not (self.unescape and "&" in text)

    def repaired(self, text: str) -> str:
        """Return a text that is repaired until nothing changes: a repair may end a line, and lines are repaired one by
        one.

        Of longer texts, no character keeps more than 30 marks (UAX #15, section 13): Python needs an hour to compose a
        megabyte of them on one letter, for its time grows by the square."""
        import ftfy

        before = None
        while text != before and not self._is_plain(text):
            before = text
            text = LINE_BREAKS.sub("\n", text)
            text = text if len(text) < SHORT else crowd().sub(r"\1", text)
            text = ftfy.fix_text(text, configuration(self.unescape))
        return text


LINE_BREAKS = re.compile("\r\n?|[\u2028\u2029]")
"""Before the repair; U+0085 may be half of a character that was decoded wrongly."""
SHORT = 2_000


@cache
def crowd() -> re.Pattern[str]:
    """Thirty marks, and more behind them."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{30}})[{marks}]+")


@cache
def configuration(unescape: bool) -> Any:
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html="auto" if unescape else False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_surrogates=False,
        remove_control_chars=False,
        max_decode_length=100_000,
        explain=False,
    )


@dataclass(frozen=True, slots=True)
class Control:
    """Removes characters that nobody sees: control characters, spaces of no width, selectors and tags that carry a
    hidden text, and overrides of the direction of writing. Ends of lines become `\\n`.

    What shapes a text stays: joiners inside emoji and in the scripts that write with them, and marks of direction in
    texts that have letters from right to left.
    """

    def __call__(self, record: Record) -> Record | Drop:
        text = said(record)
        printable = text.replace("\n", "").isprintable()
        return record if printable and (text.isascii() or not CHOSEN.search(text)) else rewritten(record, seen)


def seen(text: str) -> str:
    """The text without what nobody sees, see `Control`."""
    text = LINE_ENDS.sub("\n", text)
    while True:  # what was parted by a hidden character stands side by side without it
        kept = TAGS.sub(r"\1", HIDDEN.sub("", text))
        if not kept.isascii() and not RIGHT_TO_LEFT.search(kept):
            kept = DIRECTION.sub("", kept)
        if len(kept) == len(text):
            return kept
        text = kept
