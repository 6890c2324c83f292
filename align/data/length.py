"""Whether a text is hopelessly long, found without tokenising all of it."""

from __future__ import annotations

from typing import Any

CHARACTERS = 8
"""A token of ordinary text is shorter, so that twice the limit's worth of it settles most texts at one look."""
MARGIN = 64
"""Tokens that a cut may cost or add: they are merged or chosen anew only near it."""


def longer_than(tokenizer: Any, text: str, most: int) -> bool:
    """Whether `text` surely has more than `most` tokens. False where it may have fewer: it is short, or all of it was
    looked at.

    A tokenizer takes some 400 bytes a character for as long as it works, so that a row of eleven million took five
    gigabytes to be found too long. A beginning with enough tokens proves the same of the whole, for what stands behind
    changes none but the last. How many characters that takes depends on the tokenizer and the text (a run of blanks may
    be one token), so the beginning doubles until it does: at most twice the characters that `most` tokens have here.

    Args:
        most: tokens that a row may have.
    """
    looked = CHARACTERS * (most + MARGIN)
    while looked < len(text):
        if len(tokenizer(text[:looked], add_special_tokens=False)["input_ids"]) > most + MARGIN:
            return True
        looked *= 2
    return False
