"""Which language a whole answer is in, by py3langid: the same verdict each time, and no download."""

from __future__ import annotations

import unicodedata

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
NOT_LATIN = "ar bg bn el fa gu he hi ja kn ko ml mr ne pa ru ta te th uk ur zh"
LOOKED = 1000
"""Characters that are read at the beginning, in the middle and at the end of a longer text."""
SURE = 0.5
"""Probability from which a text is taken for another language."""


def in_language(text: str, code: str) -> bool:
    """Whether nothing speaks against a language. A short text that may be in several is in each of them that is written
    with its letters, Latin ones or not. A text without a letter is in none."""
    if len(text) > 3 * LOOKED:
        middle = len(text) // 2
        text = "\n".join((text[:LOOKED], text[middle : middle + LOOKED], text[-LOOKED:]))
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return False
    whole = text.encode("utf-8", "ignore").decode()  # lone surrogates cannot be encoded
    found, probability = identifier(tuple(LANGUAGES)).classify(whole)  # in any case
    if found != NONE and probability >= SURE:
        return found == code
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters) > len(letters) / 2
    return found == code or latin != (code in NOT_LATIN.split())
