"""The language of an answer, detected by py3langid: deterministic, and without a download."""

from __future__ import annotations

import unicodedata

from align.data.clean.language import NONE, load_identifier

LANGUAGES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "kn": "Kannada",
    "ko": "Korean",
    "ml": "Malayalam",
    "mr": "Marathi",
    "ne": "Nepali",
    "nl": "Dutch",
    "no": "Norwegian",
    "pa": "Punjabi",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
NOT_LATIN = "ar bg bn el fa gu he hi ja kn ko ml mr ne pa ru ta te th uk ur zh"
SAMPLE_LENGTH = 1000
"""Number of characters that are read at the beginning, in the middle and at the end of a longer text."""
MIN_PROBABILITY = 0.5
"""Minimum probability for which the detected language counts as certain."""


def is_in_language(text: str, code: str) -> bool:
    """Return whether a text may be in the language of a code such as `en`, as py3langid detects it.

    If the detection is not certain, a text may be in every language with its script, Latin or not. A text without a
    letter is in no language.
    """
    if len(text) > 3 * SAMPLE_LENGTH:
        middle = len(text) // 2
        text = "\n".join((text[:SAMPLE_LENGTH], text[middle : middle + SAMPLE_LENGTH], text[-SAMPLE_LENGTH:]))
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return False
    encodable = text.encode("utf-8", "ignore").decode()  # without lone surrogates
    detected, probability = load_identifier(tuple(LANGUAGES)).classify(encodable)  # ignores case
    if detected != NONE and probability >= MIN_PROBABILITY:
        return detected == code
    is_latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters) > len(letters) / 2
    return detected == code or is_latin != (code in NOT_LATIN.split())
