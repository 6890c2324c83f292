"""Which language a whole answer is in, by py3langid: the same verdict each time, and no download."""

from __future__ import annotations

from align.data.clean.language import NONE, identifier

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati",
    "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "kn": "Kannada", "ko": "Korean", "ml": "Malayalam", "mr": "Marathi", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
LOOKED = 1000
"""Characters that are read at the beginning, in the middle and at the end of a longer text."""
SURE = 0.5
"""Probability from which a text is taken for another language."""


def in_language(text: str, code: str) -> bool:
    """Whether nothing speaks against a language: a short text that may be in several is in each of them. A text without
    a letter is in none."""
    if len(text) > 3 * LOOKED:
        middle = len(text) // 2
        text = "\n".join((text[:LOOKED], text[middle : middle + LOOKED], text[-LOOKED:]))
    if not any(map(str.isalpha, text)):
        return False
    read = text.lower().encode("utf-8", "ignore").decode()  # the identifier saw few texts in capitals
    found, probability = identifier(tuple(LANGUAGES)).classify(read)
    return found in (code, NONE) or probability < SURE
