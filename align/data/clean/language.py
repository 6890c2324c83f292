"""Cleaning step that keeps records of some languages, detected by py3langid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from align.core.types import Record
from align.data.clean.outcome import (
    Drop,
    NotedRecord,
    check_choice_list,
    check_optional_integer,
    check_optional_share,
    join_spoken_texts,
)
from align.data.clean.quality import count_words

COMMON = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta te "
    "th tl tr uk ur vi zh"
)
"""ISO 639 codes of the common languages, which the detection distinguishes even if they are not kept. With all
languages of py3langid, English chit-chat of five to seven words is recognised in 97.4 % instead of 99.1 %."""
RARE = (
    "af am as az ba be br bs cy dz eo eu fo fy ga gd gl grc gu ha ht hy ig is jv ka kab kk km kn ku ky la lb lg ln lo "
    "mg mk ml mn mr mt my ne nn oc om or pa pcm ps qu rw sa si sn so sq st tg tk tt ug uz vo wa xh yo yue zu"
)
"""ISO 639 codes of further languages that can be kept, and are detected only if they are kept."""
NONE = "zxx"
"""ISO 639 code for text without a language: digits, code, laughter."""
UNDECIDED = "undecided"
EXCERPT = 120
"""Number of characters that are read at the beginning, in the middle and at the end of a longer text, to save time."""


@dataclass(frozen=True, slots=True)
class LanguageFilter:
    """Cleaning step that keeps records in some languages, and records whose language is uncertain.

    The language of a record is that of all texts of people and the assistant together. Records whose language is
    uncertain are kept, and counted as undecided.

    Args:
        keep: ISO 639 codes, such as `[en, de]`.
        least_words: the language of shorter records is undecided. On chit-chat, English is recognised in 65 % of
            messages of up to four words, and in 99.9 % from eight.
        confidence: probability of another language from which a record is left out.
    """

    keep: tuple[str, ...] = ()
    least_words: int = 8
    confidence: float = 0.5

    def __post_init__(self) -> None:
        check_choice_list("keep", self.keep, f"{COMMON} {RARE}".split(), "[en, de]")
        check_optional_integer("least_words", self.least_words)
        check_optional_share("confidence", self.confidence)

    def __call__(self, record: Record) -> Drop | NotedRecord:
        text = join_spoken_texts(record)
        if (
            count_words(text[: 40 * self.least_words]) < self.least_words
        ):  # longer records have enough words, unless these are very long
            return NotedRecord(record, (UNDECIDED,))
        if len(text) > 3 * EXCERPT:
            middle = len(text) // 2
            text = "\n".join((text[:EXCERPT], text[middle : middle + EXCERPT], text[-EXCERPT:]))
        language, probability = load_identifier(self.keep).classify(text)
        if language in self.keep:
            return NotedRecord(record, (language,))
        if language == NONE or probability < self.confidence:
            return NotedRecord(record, (UNDECIDED,))
        return Drop(f"language: {language}", f"{language} ({probability:.2f}), kept: {', '.join(self.keep)}")


@lru_cache(maxsize=2)
def load_identifier(keep: tuple[str, ...]) -> Any:
    """Load a py3langid model that distinguishes the languages of `keep`, the common languages, and text without a
    language. It takes a second and 82 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages({NONE, *COMMON.split(), *keep})
    return model
