"""Names of people, in the form in which they are compared."""

from __future__ import annotations

import unicodedata


def normalise_name(name: str) -> str:
    """Return an account's name in the form in which names are compared: NFKC, case-folded, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
