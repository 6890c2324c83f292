"""The language of whole records, by py3langid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from align.core.types import Record
from align.data.clean.outcome import Drop, Noted, check_list, check_share, check_whole, spoken
from align.data.clean.quality import word_count

COMMON = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta te "
    "th tl tr uk ur vi zh"
)
"""Languages that a text is taken for, beside those that are kept. With all that py3langid knows, chit-chat of five to
seven words is recognised as English in 97.4 % instead of 99.1 %."""
RARE = (
    "af am as az ba be br bs cy dz eo eu fo fy ga gd gl grc gu ha ht hy ig is jv ka kab kk km kn ku ky la lb lg ln lo "
    "mg mk ml mn mr mt my ne nn oc om or pa pcm ps qu rw sa si sn so sq st tg tk tt ug uz vo wa xh yo yue zu"
)
"""Languages that can be kept too: ISO 639 codes, all of them."""
NONE = "zxx"
"""ISO 639's code for what is no language: digits, code, laughter."""
UNDECIDED = "undecided"
LOOKED = 120
"""Characters that are read at the beginning, in the middle and at the end of a longer text, for time grows by the
character."""


@dataclass(frozen=True, slots=True)
class Language:
    """Keeps the records of some languages, by what people and the assistant say. A record is judged as a whole. One
    that nobody can be sure of is kept, and counted as undecided.

    Args:
        keep: ISO 639 codes, such as `[en, de]`.
        least_words: of shorter records the language is not decided. On chit-chat, English is recognised in 65 % of
            messages of up to four words, and in 99.9 % from eight.
        confidence: probability from which a record is left out for its language.
    """

    keep: tuple[str, ...] = ()
    least_words: int = 8
    confidence: float = 0.5

    def __post_init__(self) -> None:
        check_list("keep", self.keep, f"{COMMON} {RARE}".split(), "[en, de]")
        check_whole("least_words", self.least_words)
        check_share("confidence", self.confidence)

    def __call__(self, record: Record) -> Drop | Noted:
        text = spoken(record)
        if word_count(text[: 40 * self.least_words]) < self.least_words:  # unless its words are very long
            return Noted(record, (UNDECIDED,))
        if len(text) > 3 * LOOKED:
            middle = len(text) // 2
            text = "\n".join((text[:LOOKED], text[middle : middle + LOOKED], text[-LOOKED:]))
        language, probability = identifier(self.keep).classify(text)
        if language in self.keep:
            return Noted(record, (language,))
        if language == NONE or probability < self.confidence:
            return Noted(record, (UNDECIDED,))
        return Drop(f"language: {language}", f"{language} ({probability:.2f}), kept: {', '.join(self.keep)}")


@lru_cache(maxsize=2)
def identifier(keep: tuple[str, ...]) -> Any:
    """Load the model that tells these languages and the common ones apart. It takes a second and 82 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    made.set_languages({NONE, *COMMON.split(), *keep})
    return made
