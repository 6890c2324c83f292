"""Cleaning steps for characters: repair of wrongly decoded text, and removal of invisible characters."""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

from align.core.errors import require
from align.core.types import Record
from align.data.clean.outcome import Drop, join_texts, rewrite_texts

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
"""Line ends other than `\\n`."""
ALWAYS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters
    "\u00ad\u2060-\u2065\ufeff\u206a-\u206f\ufff9-\ufffc\U000e0000-\U000e001f"  # soft hyphen, zero width, BOM
    "\u202d\u202e"  # overrides of the writing direction: people see another order than a model reads (CVE-2021-42574)
    "\ufdd0-\ufdef\ufffe\uffff"
    + "".join(
        f"{chr(plane * 0x10000 + 0xFFFE)}-{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(1, 17)
    )  # noncharacters
)
"""Ranges of invisible characters that are removed wherever they stand."""
JOINED = (
    "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1900-\u1aff\u1b00-\u1c7f\ua800-\uabff\ufb50-\ufdcf\ufe70-\ufefc"
    "\U00010a00-\U00011fff\U0001e900-\U0001e95f"
)
"""Scripts that are written with zero-width joiners: Arabic and related scripts, those of India and South-East Asia,
Mongolian."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\uaa60-\uaa7f"
"""Scripts that separate words with zero-width spaces: Thai, Lao, Burmese, Khmer and related scripts."""
EMOJI = "\u00a9\u00ae\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TAGS = re.compile("(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f)|[\U000e0020-\U000e007f]+")
"""Invisible tag letters, which can spell a hidden text. The group matches their use after a black flag, as in the flag
of Scotland."""
SELECTORS = "\ufe00-\ufe0f"
MORE_SELECTORS = "\U000e0100-\U000e01ef"
HIDDEN = re.compile(
    f"[{ALWAYS}\u200b-\u200d{SELECTORS}{MORE_SELECTORS}](?:"  # one class in front makes the search fast
    f"(?<=[{ALWAYS}])"
    f"|(?<=[\u200c\u200d])(?<![{JOINED}].)(?![{JOINED}])(?:(?<![{EMOJI}].)|(?![{EMOJI}]))"  # joiners
    f"|(?<=\u200b)(?<![{UNSPACED}].)"
    f"|(?<=[{SELECTORS}{MORE_SELECTORS}])(?<=[{SELECTORS}{MORE_SELECTORS}].)"  # a row of them can encode bytes
    f"|(?<=[{MORE_SELECTORS}])(?<![{IDEOGRAPHS}].))",
    re.DOTALL,
)
"""Pattern of the invisible characters to remove, which do not affect the characters beside them."""
DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202c\u2066-\u2069]")
RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
INVISIBLE = (
    f"{ALWAYS}\u200b-\u200f\u202a-\u202e\u2066-\u2069\u061c\u115f\u1160\u180b-\u180e\u3164\uffa0\u2800"
    f"{SELECTORS}\U000e0000-\U000e0fff"
)
VISIBLE = re.compile(rf"[^\s{INVISIBLE}]")
"""A visible character."""
SELECTOR = re.compile(f"[{SELECTORS}{MORE_SELECTORS}]")
"""Pattern of variation selectors, the invisible characters that Python's `isprintable` accepts."""


@dataclass(frozen=True, slots=True)
class UnicodeRepair:
    """Cleaning step that repairs wrongly decoded text (`schÃ¶n`) and composes characters (NFC), with ftfy.

    Other normalizations of ftfy are off, since they change text that is not damaged: curly quotes, ligatures, and the
    full-width punctuation of Chinese and Japanese.

    Args:
        unescape: convert HTML entities (`&amp;`) to characters, except in lines with tags. Off by default, since an
            answer may be about them.
    """

    unescape: bool = False

    def __post_init__(self) -> None:
        is_valid = isinstance(self.unescape, bool)
        require(is_valid, "unescape", self.unescape, "is neither true nor false", "Write true or false.")

    def __call__(self, record: Record) -> Record | Drop:
        return record if self._is_plain(join_texts(record)) else rewrite_texts(record, self.repair)

    def _is_plain(self, text: str) -> bool:
        return text.isascii() and "\r" not in text and "\x1b" not in text and not (self.unescape and "&" in text)

    def repair(self, text: str) -> str:
        """Return a text after ftfy has repaired wrongly decoded characters, repeatedly until the text does not change.

        Lines are repaired one by one, and a repair may add a line end.

        In texts of SHORT or more characters, each character keeps at most 30 combining marks (UAX #15, section 13).
        Python needs quadratic time to compose them: an hour for a megabyte on one letter.
        """
        import ftfy

        previous = None
        while text != previous and not self._is_plain(text):
            previous = text
            text = LINE_BREAKS.sub("\n", text)
            if len(text) >= SHORT:
                text = compile_excess_marks().sub(r"\1", text)
            text = ftfy.fix_text(text, create_ftfy_config(self.unescape))
        return text


LINE_BREAKS = re.compile("\r\n?|[\u2028\u2029]")
"""Line ends that are replaced before the repair. U+0085 is not: it may be half of a wrongly decoded character."""
SHORT = 2_000
"""Characters below which the number of combining marks is not limited."""


@cache
def compile_excess_marks() -> re.Pattern[str]:
    """Compile a pattern that matches more than thirty combining marks in a row, with the first thirty as its group."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{30}})[{marks}]+")


@cache
def create_ftfy_config(unescape: bool) -> Any:
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
class InvisibleCharacterFilter:
    """Cleaning step that removes invisible characters.

    These are control characters, zero-width spaces, variation selectors and tags that carry a hidden text, and
    overrides of the writing direction. Line ends become `\\n`.

    Characters that affect the visible text stay: joiners inside emoji and in scripts that are written with them, and
    direction marks in texts with right-to-left letters.
    """

    def __call__(self, record: Record) -> Record | Drop:
        text = join_texts(record)
        is_printable = text.replace("\n", "").isprintable()
        has_selector = not text.isascii() and SELECTOR.search(text)
        return record if is_printable and not has_selector else rewrite_texts(record, remove_invisible)


def remove_invisible(text: str) -> str:
    """Return a text without hidden characters and with all line ends as `\\n`. The removal is repeated, since it may
    bring other hidden characters together."""
    text = LINE_ENDS.sub("\n", text)
    while True:
        visible = TAGS.sub(r"\1", HIDDEN.sub("", text))
        if not visible.isascii() and not RIGHT_TO_LEFT.search(visible):
            visible = DIRECTION.sub("", visible)
        if len(visible) == len(text):
            return visible
        text = visible
